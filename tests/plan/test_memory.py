"""Results in the memory of others: which take what is dead, and what must be declined."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

import iocompiler as ioc
from iocompiler.codegen.module import emit_module
from iocompiler.compilation import Compilation
from iocompiler.plan.contents import made
from iocompiler.plan.data import AtenStep, KernelStep, Plan, Ref, Step, TensorSpec, ViewStep
from iocompiler.plan.donated import donated
from iocompiler.plan.memory import Uses, rooms, shared_memory
from iocompiler.plan.peak import held_bytes, kept, storage_bytes
from iocompiler.plan.place import Place
from iocompiler.runtime.load import load_text
from iocompiler.runtime.reference import run_plan
from iocompiler.tile.index import Affine, Axis, Size, product
from iocompiler.tile.program import Buffer, Builder
from tests.accuracy import relative_error
from tests.compiling import compiled
from tests.runtime.plans import SCHEDULE, interpreter, scaled


def spec(*shape: Size, dtype: torch.dtype = torch.float32, device: str = "cpu") -> TensorSpec:
    stride = tuple(product(shape[dim + 1 :]) for dim in range(len(shape)))
    return TensorSpec(shape, stride, dtype, device)


SQUARE, LONG, FEW, HALF = spec(8, 8), spec(64), spec(4, 8), spec(8, 8, dtype=torch.float16)
LARGE = spec(64, 64)


def call(
    name: str, *read: str, of: TensorSpec = SQUARE, target: str = "aten.sin.default"
) -> AtenStep:
    return AtenStep(target, tuple(map(Ref, read)), (), ((name, of),), False)


def mm(name: str, *read: str, of: TensorSpec = SQUARE) -> AtenStep:
    """A product, whose operands and result calls see as tensors."""
    return call(name, *read, *read[: 2 - len(read)], of=of, target="aten.mm.default")


def kernel(reads: str, **outputs: TensorSpec) -> KernelStep:
    """Each result the sum of what is read, element by element."""
    builder, x, names = Builder(), Affine.of("x"), reads.split()
    elements = next(iter(outputs.values())).reach
    loads = [builder.load(name, x, torch.float32) for name in names]
    total = functools.reduce(lambda a, b: builder.map("add", a, b), loads)
    for name in outputs:
        builder.store(name, x, total)
    buffers = [Buffer(name, torch.float32, "in", elements) for name in names]
    buffers += [Buffer(name, of.dtype, "out", of.reach) for name, of in outputs.items()]
    program = builder.program((Axis("x", elements),), (), tuple(buffers))
    made_here = tuple(outputs.items())
    return KernelStep("sum", program, SCHEDULE, (*names, *outputs), made_here)


def placed(*steps: Step, outputs: str = "z", given: str = "primals", hints: int = 8) -> Plan:
    """The plan of one input, which is the caller's while it runs: ``primals``."""
    inputs = tuple((name, SQUARE) for name in given.split())
    plan = Plan(inputs, steps, tuple(map(Ref, outputs.split())), "cpu")
    return shared_memory(plan, {"s": hints})


def taken(*steps: Step, **keywords: Any) -> dict[str, str]:
    """Who takes the memory of whom."""
    return {name: place.root for name, place in placed(*steps, **keywords).placed}


FIRST = (mm("a", "primals"), mm("b", "a"))
"""``a`` is dead behind them."""


def test_a_product_takes_what_is_dead() -> None:
    assert taken(*FIRST, mm("c", "b"), mm("z", "c")) == {"c": "a", "z": "b"}
    assert taken(*FIRST, mm("z", "b")) == {"z": "a"}


def test_kernels_take_memory_of_any_shape_and_dtype_with_as_many_bytes() -> None:
    for of in (LONG, spec(128, dtype=torch.float16)):
        assert taken(*FIRST, kernel("b", c=of), kernel("c", z=LONG)) == {"c": "a", "z": "b"}
    wide = spec(8, 16, dtype=torch.float16)
    assert taken(*FIRST, mm("c", "b", of=wide), mm("z", "c")) == {"z": "b"}


def test_what_looks_alike_is_preferred_else_what_died_last() -> None:
    other = spec(4, 16)
    steps = (mm("a", "primals"), mm("b", "primals", of=other), mm("c", "a"), mm("d", "b", "c"))
    assert taken(*steps, mm("z", "d"))["z"] == "c"
    assert taken(*steps, mm("z", "d", of=other))["z"] == "b"
    assert taken(*steps, mm("z", "d", of=LONG))["z"] == "c"


def test_each_takes_from_who_had_it_last() -> None:
    steps = [kernel(before, **{after: LONG}) for before, after in ("ab", "bc", "cd", "dz")]
    assert taken(kernel("primals", a=LONG), *steps) == {"c": "a", "d": "b", "z": "c"}


def viewed(name: str, of: str) -> ViewStep:
    return ViewStep(name, of, LONG)


PADDED = TensorSpec((8, 4), (16, 1), torch.float32, "cpu")


@pytest.mark.parametrize(("steps", "outputs"), [
    ([mm("a", "primals"), mm("z", "a")], "z"),  # read by the step itself
    ([*FIRST, mm("z", "b", "a")], "z"),  # read again
    ([mm("b", "primals"), mm("z", "b")], "z primals"),  # an input
    ([*FIRST, mm("z", "b")], "z a"),
    ([mm("a", "primals"), viewed("v", "a"), mm("b", "a"), mm("z", "b")], "z v"),
    ([mm("a", "primals"), viewed("v", "a"), mm("b", "a"), mm("z", "b", "v")], "z"),
    ([mm("a", "primals", of=FEW), mm("b", "a"), mm("z", "b")], "z"),
    ([mm("a", "primals", of=HALF), mm("b", "a"), mm("z", "b")], "z"),
    ([*FIRST, mm("z", "b", of=spec(9, 8))], "z"),
    ([mm("a", "primals"), call("b", "a", target="aten.view.default"), mm("c", "primals"),
      mm("z", "c", "b")], "z"),
    ([mm("a", "primals"), call("b", "a", target="mine.keep.default"), mm("z", "b")], "z"),
    ([mm("a", "primals"), call("b", "a", target="_c10d_functional.all_reduce.default"),
      mm("z", "b")], "z"),
    ([call("a", "primals"), mm("b", "a"), mm("z", "b")], "z"),  # not allocated by the module
    ([mm("a", "primals", of=spec(8, 8, device="cuda:1")), mm("b", "a"), mm("z", "b")], "z"),
    ([mm("a", "primals", of=PADDED), mm("b", "a", of=FEW), mm("z", "b", of=PADDED)], "z"),
])  # fmt: skip
def test_declined(steps: list[Step], outputs: str) -> None:
    assert taken(*steps, outputs=outputs) == {}


def test_what_is_written_over_an_input_is_neither_taken_nor_takes() -> None:
    over = replace(kernel("b", c=SQUARE), over=(("c", "primals"),))
    steps = (*FIRST, over, mm("d", "c"), kernel("d", e=LONG), mm("z", "e"))
    assert taken(*steps) == {"d": "b", "e": "a", "z": "d"}


def test_a_number_is_a_tensor_to_the_host() -> None:
    """Its one element is read there, so it is seen in its shape."""
    one = spec(1)
    program = scaled(1)
    factor = KernelStep("scaled", program, SCHEDULE, ("b", "c", "z"), (("z", one),))
    steps = (kernel("primals", a=one), kernel("a", b=one), kernel("b", c=spec()), factor)
    assert "c" in Uses(placed(*steps)).seen
    assert "reinterpret(a, (), (), 0)" in emit_module(placed(*steps), "graph")


def test_sizes_that_are_not_known() -> None:
    s = sympy.Symbol("s", integer=True, positive=True)
    steps = (mm("a", "primals", of=spec(s, 8)), mm("b", "a"), kernel("b", c=spec(8 * s)))
    assert taken(*steps, mm("z", "c", "b")) == {"c": "a"}
    assert taken(mm("a", "primals", of=spec(s, s)), *steps[1:], mm("z", "c", "b")) == {}


def test_nothing_is_held_where_most_is_in_use() -> None:
    peak = (mm("l", "b", of=LARGE), mm("s", "l", of=FEW), mm("z", "b", "s"))
    assert taken(*FIRST, *peak) == {}
    less = (mm("l", "b", of=spec(16, 8)), mm("s", "l", of=FEW), mm("z", "b", "s"))
    more = (mm("m", "z", of=LARGE), mm("y", "m", of=FEW))
    assert taken(*FIRST, *less, outputs="z") == {}
    assert taken(*FIRST, *less, *more, outputs="y") == {"z": "a"}


def test_inputs_that_die_may_make_what_comes_later_the_smaller_peak() -> None:
    less = (mm("l", "b", of=spec(16, 8)), mm("s", "l", of=FEW), mm("z", "b", "s"))
    more = (mm("m", "z", of=LARGE), mm("y", "m", of=FEW))
    assert "z" not in taken(*FIRST, *less, *more, outputs="y", given="primals saved")


# --- partial sums

SUMS = spec(100)


def test_what_dies_together_is_one_allocation() -> None:
    plan = placed(kernel("primals", p=SUMS, q=SUMS, r=SUMS), kernel("p q r", z=SUMS))
    assert plan.placed == (("q", Place("p", 128)), ("r", Place("p", 256)))
    assert rooms(plan.steps, dict(plan.placed)) == {"p": 356}


@pytest.mark.parametrize(("steps", "outputs"), [
    ([kernel("p", y=SUMS), kernel("q", z=SUMS)], "y z"),  # die one after the other
    ([kernel("p q", z=SUMS)], "z q"),
    ([mm("z", "p", "q")], "z"),  # seen as tensors
    ([viewed("v", "q"), mm("z", "p", "v")], "z"),
])  # fmt: skip
def test_kept_apart(steps: list[Step], outputs: str) -> None:
    plan = placed(kernel("primals", p=SUMS, q=SUMS), *steps, outputs=outputs)
    assert not any(place.offset for _, place in plan.placed)


def test_of_another_dtype() -> None:
    other = spec(100, dtype=torch.float16)
    assert placed(kernel("primals", p=SUMS, q=other), kernel("p q", z=SUMS)).placed == ()


def test_symbolic_offsets_are_aligned() -> None:
    s = sympy.Symbol("s", integer=True, positive=True)
    four, three = (
        placed(kernel("primals", p=spec(n * s), q=SUMS), kernel("p q", z=SUMS)) for n in (4, 3)
    )
    assert four.placed == (("q", Place("p", 4 * s)),)
    assert three.placed == ()


def test_partial_sums_take_those_that_are_folded() -> None:
    steps = (kernel("primals", p=SUMS, q=SUMS), kernel("p q", y=SUMS),
             kernel("primals", r=SUMS, t=SUMS), kernel("r t", z=SUMS))  # fmt: skip
    assert dict(placed(*steps, outputs="y z").placed) == {
        "q": Place("p", 128), "r": Place("p"), "t": Place("r", 128),
    }  # fmt: skip


def test_text_and_reference_agree_on_what_is_where() -> None:
    sums = (kernel("primals", p=LONG, q=LONG), kernel("p q", c=LONG))
    steps = (*sums, *FIRST, kernel("b", d=LONG), mm("e", "b"), kernel("c d", f=SQUARE))
    plan = placed(*steps, mm("z", "f", "e"))
    assert dict(plan.placed) == {
        "q": Place("p", 64), "d": Place("a"), "f": Place("b"), "z": Place("d"),
    }  # fmt: skip
    text = emit_module(plan, "graph")
    for line in ("p = empty((128,), (1,), torch.float32)", "d = a", "f = b", "out=d)"):
        assert line in text
    assert "p.data_ptr() + 256" in text
    x = torch.rand(8, 8)
    run = load_text(text, "graph", "cpu", interpreter(plan))
    b = x @ x @ (x @ x)
    for (found,) in (run_plan(plan, [x]), run([x.clone()])):
        torch.testing.assert_close(found, (2 * x + b) @ (b @ b))


def turned(name: str, of: str) -> ViewStep:
    return ViewStep(name, of, TensorSpec((8, 8), (1, 8), torch.float32, "cpu"))


@pytest.mark.parametrize(("outputs", "count"), [("z", 1), ("z v", 2)])
def test_memory_passed_on_is_shown_by_the_same_tensor(outputs: str, count: int) -> None:
    """What the caller gets is nobody else's."""
    last = () if outputs == "z" else (mm("w", "c"), turned("v", "w"))
    steps = (mm("a", "primals"), turned("t", "a"), mm("b", "t"), mm("c", "b"), turned("u", "c"))
    plan = placed(*steps, mm("z", "u", "b"), *last, outputs=outputs)
    assert dict(plan.placed)["c"] == Place("a")
    text = emit_module(plan, "graph")
    assert text.count(" reinterpret(") == count
    assert "    u = t\n" in text
    x = torch.rand(8, 8)
    run = load_text(text, "graph", "cpu", interpreter(plan))
    assert all(map(torch.equal, run([x.clone()]), run_plan(replace(plan, placed=()), [x])))


@pytest.mark.parametrize("seed", range(40))
def test_random_plans_give_what_they_gave(seed: int) -> None:
    """With everything in memory of its own; in the reference, and as text."""
    rng = random.Random(seed)
    steps, values, of = [], ["primals"], (SQUARE, LONG, spec(4, 16))
    for number in range(24):
        read = rng.choices(values[-6:], k=rng.choice((1, 2, 3)))
        names = [f"v{number}_{at}" for at in range(rng.choice((1, 1, 2, 3)))]
        if rng.random() < 0.4:
            operands = [f"{name}_{number}" for name in (read * 2)[:2]]
            pairs = zip(operands, (read * 2)[:2], strict=True)
            views = [ViewStep(view, name, SQUARE) for view, name in pairs]
            steps += [*{view.name: view for view in views}.values(), mm(names[0], *operands)]
            names = names[:1]
        else:
            once = " ".join(dict.fromkeys(read))
            steps.append(kernel(once, **{name: rng.choice(of) for name in names}))
        values += names
    outputs = " ".join(rng.sample(values[1:], 2))
    plan = placed(*steps, outputs=outputs)
    alone = replace(plan, placed=())
    assert plan.placed
    x = torch.rand(8, 8) / 4  # products of it keep their size
    expected = run_plan(alone, [x])
    run = load_text(emit_module(plan, "graph"), "graph", "cpu", interpreter(plan))
    for found in (run_plan(plan, [x]), run([x.clone()])):
        assert all(map(torch.equal, found, expected))


def test_the_reference_poisons_what_is_taken() -> None:
    """A plan that takes what is read again is wrong, and seen to be."""
    steps = (*FIRST, kernel("b", c=SQUARE), mm("z", "c", "a"))
    plan = Plan((("primals", SQUARE),), steps, (Ref("z"),), "cpu")
    x = torch.rand(8, 8)
    right = run_plan(plan, [x])[0]
    wrong = run_plan(replace(plan, placed=(("c", Place("a")),)), [x])[0]
    assert not torch.allclose(right, wrong)


# --- whole programs


def trained(f: Callable[..., Any], *inputs: Tensor, **options: Any) -> Compilation:
    torch._dynamo.reset()
    run, records = compiled(f, ioc.DEFAULT, engine="reference", cache=False, **options)
    run(*inputs).sum().backward()
    (record,) = records
    return record


def layers(x: Tensor, w: Tensor, g: Tensor, b: Tensor) -> Tensor:
    for _ in range(4):
        x = x + F.gelu(F.layer_norm(x, (32,), g, b) @ w)
    return x


def test_a_training_step_is_right_and_no_peak_is_higher() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(24, 32), torch.randn(32, 32) / 6, torch.randn(32), torch.randn(32)]
    inputs = [x.requires_grad_() for x in inputs]
    record = trained(layers, *inputs)
    found = [x.grad for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    layers(*exact).sum().backward()
    for ours, theirs in zip(found, exact, strict=True):
        assert ours is not None
        assert theirs.grad is not None
        assert relative_error(ours, theirs.grad) < 1e-5
    backward = record.plans["backward"]
    assert len(backward.placed) >= 8
    handed_over = kept(*(record.flat[name] for name in ("forward", "backward")))
    mine = donated(record.plans["forward"], handed_over)
    given = {name: storage_bytes(s, {}) for name, s in backward.inputs if s and name in mine}
    assert given
    assert max(_held(backward, given)) == max(held_bytes(backward, given, {}))


def _held(plan: Plan, given: dict[str, int]) -> list[int]:
    """Bytes in use at each step where what is placed shares one storage to its last use."""
    joined = []
    for step in plan.steps:
        here = dict(plan.placed)
        for name, each in made(step).items():
            if name in here and here[name].offset == 0:
                joined.append(ViewStep(name, here[name].root, each))
        if isinstance(step, KernelStep):
            kept = [(n, s) for n, s in step.outputs if n not in here or here[n].offset != 0]
            joined.append(replace(step, outputs=tuple(kept)))
        elif isinstance(step, AtenStep) and set(made(step)) & set(here):
            joined.append(replace(step, args=(*step.args, Ref(*made(step))), outputs=()))
        else:
            joined.append(step)
    return held_bytes(replace(plan, steps=tuple(joined)), given, {})
