"""Which of the copies a program asks for are left in its plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

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
    times: Counter[tuple[str, str]] = Counter()
    moved: Counter[tuple[str, str]] = Counter()
    for copy in asked:
        times[copy.operator, copy.where] += 1
        moved[copy.operator, copy.where] += copy.bytes
    left, bytes_left = Counter[str](), Counter[str]()
    for plan, hints in plans:
        for line, size in _kept(plan, hints):
            left[line] += 1
            bytes_left[line] += size
    rows = []
    for (operator, line), count in times.items():
        kept = min(count, left[line])
        size = bytes_left[line] * kept // max(left[line], 1)
        rows.append(Copied(operator, line, count, moved[operator, line], kept, size))
        left[line] -= kept
        bytes_left[line] -= size
    rows += [
        Copied(NOT_ASKED, line, 0, 0, count, bytes_left[line])
        for line, count in left.items()
        if count
    ]
    return tuple(sorted(rows, key=lambda row: -max(row.bytes, row.bytes_kept)))


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
