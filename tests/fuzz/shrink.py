"""A failing program made smaller while it still fails in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.fuzz.program import Given, Program, Step, alive, in_place


def shrink(program: Program, fails: Callable[[Program], bool], tries: int = 200) -> Program:
    """The smallest program found in ``tries`` trials that ``fails`` still says is wrong."""
    left = tries
    smaller = True
    while smaller and left > 0:
        smaller = False
        for candidate in _candidates(program):
            left -= 1
            if left <= 0:
                break
            if fails(candidate):
                program, smaller = candidate, True
                break
    return program


def _candidates(program: Program) -> Iterator[Program]:
    """Simpler programs, the boldest first."""
    for name in program.outputs:
        if len(program.outputs) > 1:
            yield replace(program, outputs=(name,)).pruned()
    for position in range(len(program.steps)):
        earlier = program.steps[position].name
        if program.outputs != (earlier,):
            yield replace(program, outputs=(earlier,)).pruned()
    if program.dynamic:
        yield replace(program, dynamic=False)
    if program.train:
        yield _inference(program)
    for position in reversed(range(len(program.steps))):
        yield from _without(program, position)
    for position in range(len(program.given)):
        yield from _simpler(program, position)


def _inference(program: Program) -> Program:
    given = tuple((name, replace(one, grad=False)) for name, one in program.given)
    return replace(program, given=given, train=False)


def _without(program: Program, position: int) -> Iterator[Program]:
    """One step gone, its readers reading one of its operands instead."""
    gone = program.steps[position]
    rest = program.steps[:position] + program.steps[position + 1 :]
    for operand in dict.fromkeys(gone.reads):
        steps = tuple(_renamed(step, gone.name, operand) for step in rest)
        outputs = tuple(operand if name == gone.name else name for name in program.outputs)
        smaller = replace(program, steps=steps, outputs=tuple(dict.fromkeys(outputs))).pruned()
        if alive(smaller.outputs, smaller) == smaller.outputs:
            yield smaller
        if in_place(gone):
            break


def _renamed(step: Step, old: str, new: str) -> Step:
    return replace(step, reads=tuple(new if name == old else name for name in step.reads))


def _simpler(program: Program, position: int) -> Iterator[Program]:
    """One input with a plain layout, another dtype, smaller sizes."""
    name, given = program.given[position]

    def having(one: Given) -> Program:
        pairs = (*program.given[:position], (name, one), *program.given[position + 1 :])
        return replace(program, given=pairs)

    if given.layout != "contiguous":
        yield having(replace(given, layout="contiguous"))
    if given.grad:
        yield having(replace(given, grad=False))
    if given.dtype in ("bfloat16", "float16", "float64"):
        yield having(replace(given, dtype="float32"))
    for size in sorted(set(given.shape)):
        for smaller in (2, 3):
            if size > smaller:
                yield _resized(program, size, smaller)
    for dim in range(len(given.shape)):
        yield having(replace(given, shape=given.shape[:dim] + given.shape[dim + 1 :]))
        if given.shape[dim] > 1:
            yield having(replace(given, shape=(*given.shape[:dim], 1, *given.shape[dim + 1 :])))


def _resized(program: Program, old: int, new: int) -> Program:
    given = tuple(
        (name, replace(one, shape=tuple(new if s == old else s for s in one.shape)))
        for name, one in program.given
    )
    return replace(program, given=given)
