"""The reference interpreter: a tile program on the CPU in torch, every point of it at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from iocompiler.tile.index import Affine, Size
from iocompiler.tile.ops import MAPS, REDUCES, SCANS
from iocompiler.tile.philox import uniform
from iocompiler.tile.program import Constant, Op, TileProgram

if TYPE_CHECKING:
    from iocompiler.plan.data import Schedule


def run(
    program: TileProgram,
    buffers: Mapping[str, torch.Tensor],
    sizes: Mapping[str, int],
    schedule: Schedule | None = None,
) -> None:
    """Compute the program: its "out" and "inout" buffers are written.

    Args:
        buffers: a flat CPU tensor for every buffer; one element for role "scalar".
        sizes: the value of every size symbol.
        schedule: gives the number of programs where there are partial stores.
    """
    _Run(program, buffers, sizes, schedule.programs if schedule is not None else 1).run()


class _Run:
    def __init__(
        self,
        program: TileProgram,
        buffers: Mapping[str, torch.Tensor],
        sizes: Mapping[str, int],
        programs: int,
    ):
        self.program, self.buffers, self.sizes, self.programs = program, buffers, sizes, programs
        self.extents = [self.size(a.size) for a in program.axes]
        self.rank = len(self.extents)
        self.first_reduced = len(program.parallel)
        self.positions = {
            axis.name: torch.arange(extent).reshape(
                [-1 if d == dim else 1 for d in range(self.rank)]
            )
            for dim, (axis, extent) in enumerate(zip(program.axes, self.extents, strict=True))
        }
        self.values: list[torch.Tensor] = []

    def run(self) -> None:
        for op in self.program.ops:
            inputs = [self.values[i] for i in op.inputs]
            self.values.append(getattr(self, f"_{op.kind}")(op, inputs))

    def size(self, size: Size) -> int:
        if isinstance(size, int):
            return size
        return int(size.subs({s: self.sizes[s.name] for s in size.free_symbols}))

    def constant(self, value: Constant) -> float:
        return value if isinstance(value, float) else self.size(value)

    def at(self, index: Affine | None) -> torch.Tensor:
        """The index's value at every point, broadcastable over the space."""
        assert index is not None
        total = torch.full([1] * self.rank, self.size(index.const), dtype=torch.int64)
        for name, coefficient in index.terms:
            term = self.values[int(name[1:])] if name.startswith("%") else self.positions[name]
            total = total + term * self.size(coefficient)
        return total

    def dims(self, over: str) -> list[int]:
        """The dimensions of the space a reduction folds."""
        reduced = over == "reduced"
        return [d for d in range(self.rank) if (d >= self.first_reduced) == reduced]

    def spread(self, value: torch.Tensor, dims: list[int]) -> torch.Tensor:
        shape = [self.extents[d] if d in dims else s for d, s in enumerate(value.shape)]
        return value.expand(shape)

    # --- one method a kind of operation

    def _load(self, op: Op, inputs: list[torch.Tensor]) -> torch.Tensor:
        buffer = self.buffers[op.buffer].reshape(-1)
        if self.program.buffer(op.buffer).role == "scalar":
            return buffer.to(op.dtype).reshape([1] * self.rank)
        address = self.at(op.index)
        if inputs:
            address, mask = _broadcast(address, inputs[0])
            other = torch.tensor(self.constant(op.value), dtype=op.dtype)
            self._check(op, address[mask], buffer)
            if not buffer.numel():
                return other.expand(address.shape)
            return torch.where(mask, buffer[torch.where(mask, address, 0)], other)
        self._check(op, address, buffer)
        return buffer.take(address)  # indexed by a 0-dim place it would be a view, not a value

    def _store(self, op: Op, inputs: list[torch.Tensor]) -> torch.Tensor:
        buffer = self.buffers[op.buffer]
        address, value = _broadcast(self.at(op.index), inputs[0].to(op.dtype))
        if len(inputs) > 1:
            keep = inputs[1].expand(address.shape)
            address, value = address[keep], value[keep]
        address, value = address.reshape(-1), value.reshape(-1)
        self._check(op, address, buffer)
        if op.fn == "partial":
            self._partial(op, buffer)
        if op.fn == "atomic_add":
            buffer.index_add_(0, address, value)
        else:
            buffer[address] = value
        return inputs[0]

    def _check(self, op: Op, address: torch.Tensor, buffer: torch.Tensor) -> None:
        # torch counts negative places from the end; a kernel reads what lies before the buffer
        if address.numel() and not (
            int(address.min()) >= 0 and int(address.max()) < buffer.numel()
        ):
            reach = f"{int(address.min())} to {int(address.max())}"
            raise IndexError(
                f"{op.kind} of {op.buffer}[{op.index}]: {reach} of {buffer.numel()} elements"
            )

    def _partial(self, op: Op, buffer: torch.Tensor) -> None:
        """The whole result goes to the first program's row; the others hold neutral elements."""
        row = REDUCES[self.program.ops[op.inputs[0]].fn]
        buffer.fill_(row.neutral(buffer.dtype))

    def _const(self, op: Op, inputs: list[torch.Tensor]) -> torch.Tensor:
        return torch.full([1] * self.rank, self.constant(op.value), dtype=op.dtype)

    def _iota(self, op: Op, inputs: list[torch.Tensor]) -> torch.Tensor:
        return self.at(op.index)

    def _map(self, op: Op, inputs: list[torch.Tensor]) -> torch.Tensor:
        if op.fn in ("int_trunc_div", "int_trunc_mod"):
            # a lane nobody selects may divide by zero: undefined on the GPU, an exception in torch
            inputs = [inputs[0], torch.where(inputs[1] == 0, 1, inputs[1])]
        return MAPS[op.fn].reference(*inputs).to(op.dtype)

    def _cast(self, op: Op, inputs: list[torch.Tensor]) -> torch.Tensor:
        return inputs[0].to(op.dtype)

    def _reduce(self, op: Op, inputs: list[torch.Tensor]) -> torch.Tensor:
        dims = self.dims(op.over)
        value = self.spread(inputs[0], dims)
        if op.fn in ("argmax", "argmin"):
            return self._position(op, value, dims)
        row = REDUCES[op.fn]
        if not dims:
            return value.to(op.dtype)
        if any(self.extents[d] == 0 for d in dims):
            shape = [1 if d in dims else s for d, s in enumerate(value.shape)]
            return torch.full(shape, row.neutral(op.dtype), dtype=op.dtype)
        if op.fn in ("prod", "any"):
            for dim in dims:
                value = row.reference(value, dim, keepdim=True)
            return value.to(op.dtype)
        if op.fn == "sum":
            return value.sum(dims, keepdim=True, dtype=op.dtype)
        return row.reference(value, dims, keepdim=True).to(op.dtype)

    def _position(self, op: Op, value: torch.Tensor, dims: list[int]) -> torch.Tensor:
        kept = [1 if d in dims else s for d, s in enumerate(value.shape)]
        others = [d for d in range(self.rank) if d not in dims]
        rows = value.permute(others + dims).reshape([value.shape[d] for d in others] + [-1])
        return REDUCES[op.fn].reference(rows, -1).reshape(kept)

    def _scan(self, op: Op, inputs: list[torch.Tensor]) -> torch.Tensor:
        value = self.spread(inputs[0], [self.first_reduced])
        return SCANS[op.fn].reference(value, self.first_reduced).to(op.dtype)

    def _rand(self, op: Op, inputs: list[torch.Tensor]) -> torch.Tensor:
        return uniform(inputs[0], self.at(op.index))


def _broadcast(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
    return a.expand(shape), b.expand(shape)
