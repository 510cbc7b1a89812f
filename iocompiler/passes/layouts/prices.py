"""What orders of storage cost, in whole picoseconds at the rate of the device's memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from iocompiler.cost_model.device import Device
from iocompiler.graph.copies import elements
from iocompiler.graph.storage_order import is_both

_SECOND = 10**12
# A kernel that reads one order and writes the other moves no more bytes, and a tile of it goes
# through registers sideways: of the time of a copy, so much that one order throughout is preferred.
_MIXED = 0.1


@dataclass(frozen=True)
class Prices:
    """Prices for one device; symbols of sizes count as their hints."""

    device: Device

    def copied(self, tensor: Tensor) -> int:
        """Read in one order, written in the other, by a kernel of its own."""
        return self.moved(2 * bytes_of(tensor), launches=1)

    def written(self, tensor: Tensor) -> int:
        """Written once more, by the kernel that makes it."""
        return self.moved(bytes_of(tensor))

    def mixed(self, tensor: Tensor) -> int:
        """Read or written by a kernel whose other tensors lie in the other order."""
        return self.moved(_MIXED * 2 * bytes_of(tensor))

    def moved(self, size: float, launches: int = 0) -> int:
        """Bytes, and launches of ours; of a library's launches nothing is known."""
        if not size:
            return 0
        seconds = size / self.device.memory_rate + launches * self.device.launch_s
        return round(seconds * _SECOND)


def bytes_of(tensor: Tensor) -> int:
    """Bytes that lie elsewhere in the other order."""
    return 0 if is_both(tensor) else elements(tensor) * tensor.element_size()
