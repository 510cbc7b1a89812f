"""A reduction in parts: what each part has to compute, and how results that go on beside another
(`tile/online.py`) are put together.

With m, q, r the mean of a part of n elements, the squares and the sum of its deviations, and d = m
less the mean of all, Chan, Golub and LeVeque (1983) have

    sum(x - mean) = sum(r + n d)        sum((x - mean)^2) = sum(q + d (n d + 2 r))

whatever m and the mean were rounded to.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from iocompiler.tile.index import Size
from iocompiler.tile.online import Online, means
from iocompiler.tile.program import Builder, TileProgram


def after_reductions(program: TileProgram) -> list[bool]:
    """For each operation, whether it is a reduction or waits for one."""
    found: list[bool] = []
    for op in program.ops:
        found.append(op.kind == "reduce" or any(found[r] for r in op.reads))
    return found


def between(program: TileProgram, beside: Mapping[int, Online]) -> set[int]:
    """Places of what a part computes besides its reductions and means: all that these read, and
    the stores along the reduced axes that wait for none of them.
    """
    settled = set(means(beside).values())
    reduced = {a.name for a in program.reduced}
    waits = after_reductions(program)
    wanted = {
        i
        for i, op in enumerate(program.ops)
        if op.kind == "store" and not waits[i] and program.varies[i] & reduced
    }
    queue = [*wanted, *(i for i, op in enumerate(program.ops) if op.kind == "reduce")]
    while queue:
        for read in program.ops[queue.pop()].reads:
            if read not in wanted and read not in settled and program.ops[read].kind != "reduce":
                wanted.add(read)
                queue.append(read)
    return wanted


def together(
    build: Builder,
    position: int,
    beside: Mapping[int, Online],
    parts: Mapping[int, int],
    whole: Mapping[int, int],
    each: Size,
) -> int:
    """What is summed over the parts for the reduction at ``position``.

    Args:
        parts: each reduction's results of the parts; a mean's in place of the sum behind it.
        whole: what is known of all parts together, by its place in the program.
        each: elements of a part.
    """
    its = beside[position]
    away = build.map("sub", parts[its.beside], whole[its.against])
    if its.kind == "powers":
        return _brought_below(build, parts[position], parts[its.beside], away)
    shift = build.map("mul", away, build.const(each, torch.float32))
    if its.kind == "rests":
        return build.map("add", parts[position], shift)
    for other, rest in beside.items():
        if (rest.kind, rest.beside) == ("rests", its.beside):
            twice = build.map("add", parts[other], parts[other])
            shift = build.map("add", shift, twice)
    return build.map("add", parts[position], build.map("mul", away, shift))


def _brought_below(build: Builder, powers: int, top: int, away: int) -> int:
    """powers exp(away), 0 for a part that has nothing above -inf."""
    lowest = build.const(float("-inf"), torch.float32)
    empty = build.map("eq", top, lowest, dtype=torch.bool)
    brought = build.map("mul", powers, build.map("exp", away))
    nothing = build.const(0.0, torch.float32)
    return build.map("where", empty, nothing, brought, dtype=torch.float32)
