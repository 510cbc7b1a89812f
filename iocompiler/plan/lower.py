"""Lowering: a set of FX nodes to one tile program.

Values are pulled from the outputs: to store node O at an index, compute its operands at the indices
O reads them, down to loads. Views only change the index. What is computed is right by construction
for any index; a set of nodes that has no common iteration space fails (`Unsupported`, with the
reason), it never goes wrong.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from iocompiler.plan.lowering import Lowering, Unsupported
from iocompiler.plan.overwriting import stored_into, writes_in_part
from iocompiler.plan.rules import rule_of
from iocompiler.plan.rules.placing import place_written
from iocompiler.plan.sizes import equal, normal, size_of
from iocompiler.plan.space import output_index, root_space, settled
from iocompiler.plan.views import Index, NotAffine, SplitAxis
from iocompiler.tile import coarse
from iocompiler.tile.index import Affine, Axis, Size
from iocompiler.tile.program import Buffer, TileProgram, loads_first


@dataclass(frozen=True)
class Lowered:
    """A finished kernel body: the program, and the FX node behind each of its buffers.

    ``elements``: where the program is that of a kernel which reads other single elements, those it
    reads (buffer, element), and this kernel's own in their places.
    """

    program: TileProgram
    nodes: tuple[Node, ...]
    elements: Mapping[tuple[str, int], int] = field(default_factory=dict)

    def own(self) -> TileProgram:
        """The program with the elements of this kernel."""
        if all(old == new for (_, old), new in self.elements.items()):
            return self.program
        ops = []
        for op in self.program.ops:
            if op.index is not None and not op.index.terms and isinstance(op.index.const, int):
                element = self.elements.get((op.buffer, op.index.const), op.index.const)
                op = replace(op, index=Affine.constant(element))
            ops.append(op)
        return replace(self.program, ops=tuple(ops))


def lower(
    home: frozenset[Node],
    virtual: Container[Node],
    outputs: tuple[Node, ...],
    order: Mapping[Node, int],
) -> Lowered:
    """Lower ``home`` nodes to a kernel that stores ``outputs``.

    ``virtual`` nodes are recomputed where they are read. ``order`` is the graph's order of nodes:
    it makes the result a function of structure alone, so that equal layers give equal programs.
    Raises `Unsupported` with the reason.
    """
    space, seeds = root_space(home, outputs, order)
    for _ in range(16):
        try:
            first = Lowering(space, home, virtual, rule_of, outputs, seeds)
            places = settled(first, outputs)
            fresh = Lowering(space, home, virtual, rule_of, outputs, seeds, first.carried)
            return _lower_in(fresh, outputs, places)
        except SplitAxis as wish:
            space, rename = space.split(wish.axis, wish.inner)
            seeds = {n: tuple(i.substitute(rename) for i in index) for n, index in seeds.items()}
        except NotAffine as error:
            raise Unsupported(f"no affine index: {error}") from error
        except RecursionError:
            raise Unsupported("too many operators one behind another") from None
    raise Unsupported("the axes would have to be split too often")


def _lower_in(
    lowering: Lowering, outputs: tuple[Node, ...], places: Mapping[Node, Index]
) -> Lowered:
    stored: dict[Node, Affine] = {}
    for output in outputs:
        target = stored_into(output)
        index, value = output_index(lowering, output, places.get(output))
        if target in stored:
            raise Unsupported(target, " is written twice in one kernel")
        tensor, mask = target.meta["val"], None
        if writes_in_part(output):
            index, mask = place_written(lowering, output, index)
        address = Affine()
        for position, stride in zip(index, tensor.stride(), strict=True):
            address = address + position * size_of(stride)
        value = lowering.convert(value, tensor.dtype)
        lowering.builder.store(lowering.buffer_name(target), address, value, mask)
        stored[target] = address
    _check_mutation(lowering, outputs, stored)
    return _finish(lowering, outputs)


def _check_mutation(
    lowering: Lowering, outputs: tuple[Node, ...], stored: Mapping[Node, Affine]
) -> None:
    """A kernel may read an argument it overwrites only where it writes, and before; one of which it
    overwrites a part not at all.
    """
    for output in outputs:
        target = stored_into(output)
        if target is output:
            continue
        if writes_in_part(output):
            name = lowering.names[target]
            if any(op.kind == "load" and op.buffer == name for op in lowering.builder.ops):
                raise Unsupported(target, " is overwritten in part and read")
            continue
        if lowering.space.reduced and not _once_a_row(lowering, stored[target]):
            raise Unsupported(
                target, " is overwritten in place and the kernel makes several passes"
            )
        name = lowering.names[target]
        if any(
            op.kind == "load" and op.buffer == name and op.index != stored[target]
            for op in lowering.builder.ops
        ):
            raise Unsupported(target, " is overwritten in place and read at other elements")


def _once_a_row(lowering: Lowering, address: Affine) -> bool:
    """Whether an address is that of one row, whose program alone reads and writes it, once each."""
    rows = {a.name for a in lowering.space.part(reduced=False) if not equal(a.size, 1)}
    loads = [op for op in lowering.builder.ops if op.kind == "load" and op.index == address]
    reduced = {a.name for a in lowering.space.part(reduced=True)}
    masked_along = any(lowering.varies(i) & reduced for op in loads for i in op.inputs)
    down = any(op.kind == "reduce" and op.over == "parallel" for op in lowering.builder.ops)
    return set(address.names) == rows and not masked_along and not down


def _finish(lowering: Lowering, outputs: tuple[Node, ...]) -> Lowered:
    loaded = {op.buffer for op in lowering.builder.ops if op.kind == "load"}
    written = {op.buffer for op in lowering.builder.ops if op.kind == "store"}
    buffers = []
    for node, name in lowering.names.items():
        tensor = node.meta["val"]
        role: Any = "in" if name not in written else "inout" if name in loaded else "out"
        if (
            role == "in"
            and tensor.device.type == "cpu"
            and tensor.dim() == 0
            and _on_accelerator(outputs)
        ):
            role = "scalar"
        buffers.append(Buffer(name, tensor.dtype, role, _extent(tensor)))
    program = lowering.builder.program(
        lowering.space.part(reduced=False), lowering.space.part(reduced=True), tuple(buffers)
    )
    program = loads_first(coarse.settled(program))
    return _canonical(program, {name: node for node, name in lowering.names.items()})


def _on_accelerator(outputs: tuple[Node, ...]) -> bool:
    return any(o.meta["val"].device.type != "cpu" for o in outputs)


def _extent(tensor: torch.Tensor) -> Size:
    extent: Size = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        extent = extent + (size_of(size) - 1) * size_of(stride)
    if any(equal(size_of(s), 0) for s in tensor.shape):
        return 0
    return normal(extent)


def _canonical(program: TileProgram, nodes: Mapping[str, Node]) -> Lowered:
    """Rename axes and buffers by position, so that equal kernels are equal values."""
    axes = {a.name: f"x{i}" for i, a in enumerate(program.parallel)}
    axes |= {a.name: f"r{i}" for i, a in enumerate(program.reduced)}
    counts = {"in": 0, "out": 0, "inout": 0, "scalar": 0}
    names: dict[str, str] = {}
    for buffer in sorted(program.buffers, key=lambda b: (b.role in ("out",), b.role == "inout")):
        names[buffer.name] = f"{buffer.role}{counts[buffer.role]}"
        counts[buffer.role] += 1
    rename = {old: Affine.of(new) for old, new in axes.items()}
    ops = tuple(
        replace(
            op,
            buffer=names.get(op.buffer, ""),
            index=None if op.index is None else op.index.substitute(rename),
        )
        for op in program.ops
    )
    ordered = sorted(program.buffers, key=lambda b: (b.role == "out", b.role == "inout"))
    renamed = TileProgram(
        tuple(Axis(axes[a.name], a.size) for a in program.parallel),
        tuple(Axis(axes[a.name], a.size) for a in program.reduced),
        tuple(replace(b, name=names[b.name]) for b in ordered),
        ops,
    )
    return Lowered(renamed, tuple(nodes[b.name] for b in ordered))
