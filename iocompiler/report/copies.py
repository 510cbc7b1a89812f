"""Which of the copies a program asks for are left in its plans."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from iocompiler.cost_model.cost import value_of
from iocompiler.graph.copies import Copy
from iocompiler.plan.contents import all_steps
from iocompiler.plan.data import AtenStep, KernelStep, Plan
from iocompiler.report.ledger import Copied
from iocompiler.tile.program import TileProgram
from iocompiler.tile.traffic import traffic

_CALLS = frozenset({"aten.clone.default", "aten.contiguous.default", "aten.repeat.default"})
NOT_ASKED = "(not asked for)"
"""In place of the operator, for a copy that a reader or the caller needs."""


def copied(
    asked: Iterable[Copy], plans: Iterable[tuple[Plan, Mapping[str, int]]]
) -> tuple[Copied, ...]:
    """One row an operator and a line, most bytes first.

    Args:
        asked: the copies of the program as it was written.
        plans: all of its plans, each with the values of its sizes.
    """
    sizes: dict[tuple[str, str], list[int]] = defaultdict(list)
    for copy in asked:
        sizes[copy.operator, copy.where].append(copy.bytes)
    left: dict[str, list[int]] = defaultdict(list)
    for plan, hints in plans:
        for line, size in _kept(plan, hints):
            left[line].append(size)
    kept = _matched(sizes, left)
    rows = [
        Copied(operator, line, len(each), sum(each), len(made), sum(made))
        for ((operator, line), each), made in zip(sizes.items(), kept, strict=True)
    ]
    rows += [
        Copied(NOT_ASKED, line, 0, 0, len(each), sum(each)) for line, each in left.items() if each
    ]
    return tuple(sorted(rows, key=lambda row: -max(row.bytes, row.bytes_kept)))


def _matched(
    sizes: Mapping[tuple[str, str], Sequence[int]], left: Mapping[str, list[int]]
) -> list[list[int]]:
    """For each row of ``sizes``, the bytes of those of ``left`` that are its own, which are taken
    from there: those of its line and its sizes, then others of its line.
    """
    kept: list[list[int]] = []
    for (_, line), each in sizes.items():
        kept.append([size for size in each if _taken(left[line], size)])
    for made, ((_, line), each) in zip(kept, sizes.items(), strict=True):
        while left[line] and len(made) < len(each):
            made.append(left[line].pop())
    return kept


def _taken(left: list[int], size: int) -> bool:
    if size not in left:
        return False
    left.remove(size)
    return True


def _kept(plan: Plan, hints: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """The line and the bytes of each step that only copies."""
    for step in all_steps(plan):
        if isinstance(step, KernelStep) and _only_copies(step.program):
            size = round(value_of(traffic(step.program).bytes, hints))
            yield step.where[0] if step.where else "", size
        elif isinstance(step, AtenStep) and step.target in _CALLS:
            yield step.where, _bytes(step, hints)


def _only_copies(program: TileProgram) -> bool:
    """One load at places known beforehand, one store of what was loaded; short floats are widened
    between them, and are themselves again.
    """
    kinds = [op.kind for op in program.ops]
    if kinds != ["load", *["cast"] * (len(kinds) - 2), "store"]:
        return False
    load, *casts, store = program.ops
    dtype = program.buffer(load.buffer).dtype
    same = dtype == program.buffer(store.buffer).dtype
    same = same and all(torch.promote_types(op.dtype, dtype) == op.dtype for op in casts)
    return same and not load.reads and program.buffer(store.buffer).role == "out"


def _bytes(step: AtenStep, hints: Mapping[str, int]) -> int:
    spec = step.outputs[0][1]
    if spec is None:
        return 0
    size = spec.dtype.itemsize
    for extent in spec.shape:
        size = size * extent
    return 2 * round(value_of(size, hints))
