"""Kernels that begin with a sum and do more, in plans and programs written by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from iocompiler.plan.data import AtenStep, KernelStep, Plan, Ref, Step, TensorSpec
from iocompiler.plan.first_sum import first_sum
from iocompiler.tile.index import Affine, Axis
from iocompiler.tile.program import Buffer, Builder, TileProgram
from tests.plan.adding import BF16, with_residuals
from tests.runtime.plans import kernel, on_a_gpu, plan, spec


def sum_and_double(turned: tuple[str, ...] = (), height: int = 8) -> TileProgram:
    """h = a + b; out = h + h, of 8 x 8, by rows; those that are ``turned``, by columns."""
    b, rows, columns = Builder(), Affine.of("x0"), Affine.of("x1")

    def lies(name: str) -> Affine:
        return rows + columns * 8 if name in turned else rows * 8 + columns

    first, second = (b.cast(b.load(n, lies(n), BF16), torch.float32) for n in ("in0", "in1"))
    total = b.cast(b.map("add", first, second), BF16)
    b.store("out0", lies("out0"), total)
    wide = b.cast(total, torch.float32)
    b.store("out1", lies("out1"), b.cast(b.map("add", wide, wide), BF16))
    names = [("in0", "in"), ("in1", "in"), ("out0", "out"), ("out1", "out")]
    given = tuple(Buffer(name, BF16, role, 64) for name, role in names)  # type: ignore[arg-type]
    return b.program((Axis("x0", height), Axis("x1", 8)), (), given)


SQUARE = spec(8, 8, dtype=BF16)


def chain(*between: Step, behind: tuple[Step, ...] = ()) -> Plan:
    """y = x @ w; ``between``; h, z = kernel(y, r); ``behind``."""
    mm = AtenStep("aten.mm.default", (Ref("x"), Ref("w")), (), (("y", SQUARE),), False)
    step = kernel("add", sum_and_double(), ("y", "r", "h", "z"), SQUARE)
    step = replace(step, outputs=(("h", SQUARE), ("z", SQUARE)))
    inputs: dict[str, TensorSpec | None] = dict.fromkeys(("x", "w", "r"), SQUARE)
    return on_a_gpu(plan(inputs, [mm, *between, step, *behind], (Ref("h"), Ref("z"))))


def test_the_plan() -> None:
    after = with_residuals(chain())
    call, step = after.steps
    assert isinstance(call, AtenStep)
    assert isinstance(step, KernelStep)
    assert call.target == "aten.addmm.default"
    assert call.args == (Ref("r"), Ref("x"), Ref("w"))
    assert call.outputs == (("h", on_a_gpu_spec()),)
    assert step.args == ("h", "z")
    assert [name for name, _ in step.outputs] == ["z"]
    assert str(step.program).splitlines()[2:] == [
        "  %0: bfloat16 = load in0[x0*8 + x1]",
        "  %1: float32 = cast(%0)",
        "  %2: float32 = add(%1, %1)",
        "  %3: bfloat16 = cast(%2)",
        "  store out1[x0*8 + x1] = %3",
    ]


def on_a_gpu_spec() -> TensorSpec:
    (call,) = (step for step in chain().steps if isinstance(step, AtenStep))
    found = call.outputs[0][1]
    assert found is not None
    return found


def copied(into: str) -> AtenStep:
    return AtenStep("aten.copy_.default", (Ref(into), Ref("w")), (), ((None, None),), False)


def sorted_of(name: str) -> AtenStep:
    return AtenStep("aten.sin.default", (Ref(name),), (), ((f"sin_{name}", SQUARE),), False)


@pytest.mark.parametrize(("between", "taken"), [
    ((), True),
    ((sorted_of("x"),), True),
    ((copied("r"),), False),  # what is added is overwritten before
    ((copied("y"),), False),  # the product is
    ((sorted_of("y"),), False),  # the product is read by another
])  # fmt: skip
def test_what_stands_between(between: tuple[Step, ...], taken: bool) -> None:
    before = chain(*between)
    assert (with_residuals(before) != before) == taken


@pytest.mark.parametrize(("behind", "taken"), [
    ((copied("r"),), True),
    ((sorted_of("h"),), True),
    ((sorted_of("y"),), False),
])  # fmt: skip
def test_what_stands_behind(behind: tuple[Step, ...], taken: bool) -> None:
    before = chain(behind=behind)
    assert (with_residuals(before) != before) == taken


def test_what_is_added_is_made_behind_the_product() -> None:
    sin = AtenStep("aten.sin.default", (Ref("r"),), (), (("s", SQUARE),), False)
    before = chain(sin)
    step = before.steps[-1]
    assert isinstance(step, KernelStep)
    late = replace(before, steps=(*before.steps[:-1], replace(step, args=("y", "s", "h", "z"))))
    assert with_residuals(late) == late
    mm, sin_step, last = late.steps
    early = replace(late, steps=(sin_step, mm, last))
    assert with_residuals(early) != early


def test_the_product_is_two_of_the_arguments() -> None:
    """What is left would read the other one."""
    before = chain()
    mm, step = before.steps
    assert isinstance(step, KernelStep)
    program, b = step.program, Builder()
    for op in program.ops[:-1]:
        b.add(op)
    more = b.load("in2", Affine.of("x0") * 8 + Affine.of("x1"), BF16)
    b.store("out1", Affine.of("x0") * 8 + Affine.of("x1"), more)
    buffers = (*program.buffers[:2], Buffer("in2", BF16, "in", 64), *program.buffers[2:])
    both = b.program(program.parallel, (), buffers)
    for name, taken in (("y", False), ("r", True)):
        other = replace(step, program=both, args=("y", "x", name, "h", "z"))
        found = replace(before, steps=(mm, other))
        assert (with_residuals(found) != found) == taken


def test_two_kernels_that_read_the_product() -> None:
    before = chain()
    step = before.steps[-1]
    assert isinstance(step, KernelStep)
    other = replace(step, args=("y", "r", "h2", "z2"),
                    outputs=tuple((f"{name}2", of) for name, of in step.outputs))  # fmt: skip
    twice = replace(before, steps=(*before.steps, other))
    assert with_residuals(twice) == twice


def test_a_kernel_of_fewer_rows() -> None:
    before = chain()
    step = before.steps[-1]
    assert isinstance(step, KernelStep)
    fewer = replace(step, program=sum_and_double(height=4))
    part = replace(before, steps=(*before.steps[:-1], fewer))
    assert with_residuals(part) == part


def test_the_product_is_read_at_other_places_too() -> None:
    b, program = Builder(), sum_and_double()
    for op in program.ops[:-1]:
        b.add(op)
    first_row = b.load("in0", Affine.of("x1"), BF16)
    b.store("out1", Affine.of("x0") * 8 + Affine.of("x1"), first_row)
    again = b.program(program.parallel, (), program.buffers)
    assert sum(op.buffer == "in0" for op in again.ops) == 2
    assert first_sum(again, "in0", 8) is None


@pytest.mark.parametrize(("turned", "taken"), [
    ((), True),
    (("in0",), False),
    (("in1",), False),
    (("out0",), False),
    (("in0", "in1"), False),
    (("in0", "in1", "out0"), True),  # all of the sum, each where the others are
    (("out1",), True),
])  # fmt: skip
def test_orders(turned: tuple[str, ...], taken: bool) -> None:
    assert (first_sum(sum_and_double(turned), "in0", 8) is not None) == taken


def test_masked_reads_and_stores_are_no_sum() -> None:
    program = sum_and_double()
    for kind in ("load", "store"):
        at = next(n for n, op in enumerate(program.ops) if op.kind == kind)
        b = Builder()
        condition = b.map("lt", b.iota(Affine.of("x0")), b.const(3, torch.int64), dtype=torch.bool)
        first = tuple(b.ops)
        moved_ops = [shifted(op, len(first)) for op in program.ops]
        moved_ops[at] = replace(moved_ops[at], inputs=(*moved_ops[at].inputs, condition))
        masked = replace(program, ops=(*first, *moved_ops))
        assert first_sum(masked, "in0", 8) is None
        unmasked = replace(program, ops=(*first, *(shifted(op, len(first)) for op in program.ops)))
        assert first_sum(unmasked, "in0", 8) is not None


def shifted(op: Any, by: int) -> Any:
    return replace(op, inputs=tuple(value + by for value in op.inputs))


@pytest.mark.parametrize("how", ["atomic_add", "partial"])
def test_a_sum_that_is_added_to_memory_is_not_its_place(how: str) -> None:
    program = sum_and_double()
    at = next(n for n, op in enumerate(program.ops) if op.kind == "store")
    ops = list(program.ops)
    ops[at] = replace(ops[at], fn=how)
    assert first_sum(replace(program, ops=tuple(ops)), "in0", 8) is None
