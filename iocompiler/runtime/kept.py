"""Outputs of CUDA graphs that the caller keeps for longer than a step.

They lie in the graphs' pool, and the next step writes there again. Before it begins, what of them
is still alive is moved to memory of its own: outputs themselves, and gradients that autograd left
in the ``.grad`` of parameters, so that gradients accumulate over steps. Small outputs, losses among
them, and those that are little beside what their graph moves have memory of their own from the
start: what the caller makes of them (``loss.detach()``, ``logits[:, -1]``) keeps its value too. A
view of a larger one is not followed: one the caller made, or one returned beside it while gradients
are recorded, which AOTAutograd makes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, UntypedStorage

_Refs = list["ReferenceType[Tensor]"]
SMALL = 1 << 16
"""Bytes of an output's memory up to which a copy is one short launch."""


class Kept:
    """What the graphs of one device have handed out since the step began."""

    def __init__(self) -> None:
        self._outputs: _Refs = []
        self._parameters: dict[int, ReferenceType[Tensor]] = {}
        self._gradients: set[int] = set()

    def hand_out(self, outputs: Sequence[Any], count: int, little: int = 0) -> list[Any]:
        """``outputs``, the first ``count`` of them as tensors that only the caller holds.

        Replays return the same tensors again: what the caller keeps must be another, on the same
        storage, or on a copy.

        Args:
            little: bytes of memory that it is little to copy, `SMALL` at least.
        """
        most, copies = max(little, SMALL), dict[int, UntypedStorage]()
        handed = [
            self._handed(x, most, copies) if type(x) is Tensor else x for x in outputs[:count]
        ]
        return [*handed, *outputs[count:]]

    def _handed(self, output: Tensor, most: int, copies: dict[int, UntypedStorage]) -> Tensor:
        """Args: copies: those of this call, by the place of what they are copies of."""
        storage = output.untyped_storage()
        if storage.nbytes() <= most:
            return _lying(output, _copied(storage, copies))
        found = _lying(output, storage)
        self._outputs.append(ref(found))
        return found

    def watch(self, parameters: Iterable[Any]) -> None:
        """Gradients may be left in the ``.grad`` of these."""
        for each in parameters:
            if isinstance(each, Tensor) and each.requires_grad and each.is_leaf:
                self._parameters[id(each)] = ref(each)

    def gradients(self, outputs: Iterable[Any]) -> None:
        """What a backward made."""
        self._gradients.update(out.data_ptr() for out in outputs if isinstance(out, Tensor))

    def move(self) -> None:
        """The step is over: what is still held gets memory of its own."""
        held = [tensor for each in self._outputs if (tensor := each()) is not None]
        self._outputs.clear()
        if self._gradients:
            held += self._held_gradients()
            self._gradients.clear()
        moved: dict[int, UntypedStorage] = {}
        for tensor in held:
            own = _copied(tensor.untyped_storage(), moved)
            with torch.inference_mode(tensor.is_inference()):
                tensor.data = _lying(tensor, own)

    def _held_gradients(self) -> list[Tensor]:
        found = []
        for key, each in list(self._parameters.items()):
            parameter = each()
            if parameter is None:
                del self._parameters[key]
            elif parameter.grad is not None and parameter.grad.data_ptr() in self._gradients:
                found.append(parameter.grad)
        return found


_kept: dict[int, Kept] = {}


def on_device(index: int) -> Kept:
    """What the graphs of this device, which share a pool, have handed out."""
    return _kept.setdefault(index, Kept())


def _copied(storage: UntypedStorage, copies: dict[int, UntypedStorage]) -> UntypedStorage:
    """A copy, the same for all tensors that lie there."""
    place = storage.data_ptr()
    if place not in copies:
        copies[place] = storage.clone()  # type: ignore[no-untyped-call]
    return copies[place]


def _lying(tensor: Tensor, storage: UntypedStorage) -> Tensor:
    """What ``tensor`` is, on its storage or one like that; autograd does not take it for a view."""
    with torch.no_grad():
        return tensor.new_empty(0).set_(
            storage, tensor.storage_offset(), tensor.shape, tensor.stride()
        )
