"""The modeled time of one generated kernel: what the planner compares."""

from __future__ import annotations

from collections.abc import Mapping

from iocompiler.cost_model.device import Device
from iocompiler.tile.index import Size
from iocompiler.tile.program import TileProgram
from iocompiler.tile.traffic import traffic

# A special function unit result costs about this many additions.
_TRANSCENDENTAL_FLOPS = 8


def kernel_seconds(program: TileProgram, device: Device, hints: Mapping[str, int]) -> float:
    """Roofline time: the longer of moving its bytes and doing its arithmetic, after one launch."""
    moved = traffic(program)
    read, written = _at(moved.read_bytes, hints), _at(moved.written_bytes, hints)
    work = _at(moved.flops, hints) + _TRANSCENDENTAL_FLOPS * _at(moved.transcendentals, hints)
    return device.launch_s + max(
        (read + written) / device.hbm_bytes_per_s, work / device.vector_flops
    )


def _at(size: Size, hints: Mapping[str, int]) -> float:
    if isinstance(size, (int, float)):
        return float(size)
    return float(size.subs({s: hints.get(s.name, 1024) for s in size.free_symbols}))
