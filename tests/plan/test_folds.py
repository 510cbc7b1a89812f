"""Second halves of reductions in one launch: which may wait for each other, and for how long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.cost_model.device import DEVICES
from iocompiler.plan import folds as plan_folds
from iocompiler.plan.batch import batch
from iocompiler.plan.contents import made
from iocompiler.plan.data import (
    AtenStep,
    BatchStep,
    KernelStep,
    Plan,
    Ref,
    Schedule,
    Step,
    TensorSpec,
    ViewStep,
)
from iocompiler.plan.peak import kept, scheduled_peak
from iocompiler.runtime.reference import run_plan
from iocompiler.tile.program import TileProgram
from tests.accuracy import compare_with_eager
from tests.plan.graphs import Planned
from tests.tile.test_flat import column_sums

H200 = DEVICES["h200"]
PARTS = 4


def spec(program: TileProgram, buffer: int) -> TensorSpec:
    b = program.buffers[buffer]
    assert isinstance(b.elements, int)
    return TensorSpec((b.elements,), (1,), b.dtype, "cpu")


def fold(*sources: str, size: int = 6, shares: bool = False) -> KernelStep:
    """Results named "d" and their source, of as many rows of partial results."""
    program = column_sums((size,), PARTS, results=len(sources), shares=shares)
    results = [f"d{name}" for name in sources] + ["twice"] * shares
    specs = [spec(program, len(sources) + n) for n in range(len(results))]
    outputs = tuple(zip(results, specs, strict=True))
    return KernelStep("fold", program, Schedule("looped", 8, 1, 4), (*sources, *results), outputs)


def read(name: str) -> AtenStep:
    out = TensorSpec((6,), (1,), torch.bfloat16, "cpu")
    return AtenStep("aten.neg.default", (Ref(name),), (), ((f"minus_{name}", out),), False)


def planned(*steps: Step) -> list[Step]:
    return batch(list(steps), H200, {})


def batches(steps: list[Step]) -> list[BatchStep]:
    return [step for step in steps if isinstance(step, BatchStep)]


def plan_of(steps: list[Step], inputs: dict[str, int]) -> Plan:
    given = {n: TensorSpec((size,), (1,), torch.float32, "cpu") for n, size in inputs.items()}
    outputs = tuple(Ref(name) for step in steps for name in made(step) if "d" in name)
    return Plan(tuple(given.items()), tuple(steps), outputs, "cpu")


def assert_same(before: list[Step], after: list[Step], inputs: dict[str, int]) -> None:
    given = [torch.randn(size) for size in inputs.values()]
    results = []
    for steps in (before, after):
        plan = plan_of(steps, inputs)
        names = [output.name for output in plan.outputs]
        results.append(dict(zip(names, run_plan(plan, list(given)), strict=True)))
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=0)


def test_folds_of_several_sizes_and_results_are_one_launch() -> None:
    steps: list[Step] = [fold("a", "b"), read("da"), fold("c"), fold("e", size=5)]
    steps.pop(1)
    after = planned(*steps)
    (step,) = after
    assert isinstance(step, BatchStep)
    assert [args for args, _ in step.members] == [
        ("a", "da"),
        ("b", "db"),
        ("c", "dc"),
        ("e", "de"),
    ]
    assert list(step.extents()) == [{"n": 6, "p": 4}] * 3 + [{"n": 5, "p": 4}]
    assert dict(step.outputs).keys() == {"da", "db", "dc", "de"}
    assert_same(steps, after, {"a": 24, "b": 24, "c": 24, "e": 20})


@pytest.mark.parametrize("view", [False, True])
def test_a_result_that_is_read_is_there_before(view: bool) -> None:
    steps: list[Step] = [fold("a"), read("da"), fold("b"), fold("c"), fold("e")]
    if view:
        out = TensorSpec((3,), (2,), torch.bfloat16, "cpu")
        steps[1:2] = [ViewStep("v", "da", out), replace(read("v"), outputs=(("y", out),))]
    after = planned(*steps)
    assert after[: len(steps) - 3] == steps[: len(steps) - 3]
    assert [len(step.members) for step in batches(after)] == [3]
    assert_same(steps, after, dict.fromkeys("abce", 24))


def test_what_is_read_alone_does_not_keep_the_others_apart() -> None:
    """The one in the middle is launched where it was, the others together at the end."""
    steps: list[Step] = [fold("a"), fold("b"), read("db"), fold("c")]
    after = planned(*steps)
    assert after[:2] == steps[1:3]
    (step,) = batches(after)
    assert [args[0] for args, _ in step.members] == ["a", "c"]


def test_partial_rows_that_are_overwritten_are_folded_before() -> None:
    overwrite = AtenStep("aten.copy_.default", (Ref("a"), Ref("b")), (), ((None, None),), False)
    steps: list[Step] = [fold("a"), overwrite, fold("c")]
    assert planned(*steps) == steps


def test_no_more_than_the_bound_waits() -> None:
    one = 6 * PARTS * 4
    steps: list[Step] = [*(fold(name) for name in "abcefg"), fold("h", size=60)]
    after = batch(steps, H200, {}, 2 * one + 1)
    assert [[args[0] for args, _ in step.members] for step in batches(after)] == [
        ["a", "b"],
        ["c", "e"],
        ["f", "g"],
    ]
    assert isinstance(after[-1], KernelStep)  # alone more than may wait


def test_two_kinds_of_folds_wait_for_half_each() -> None:
    def largest(name: str) -> KernelStep:
        step = fold(name)
        ops = tuple(replace(o, fn="max") if o.kind == "reduce" else o for o in step.program.ops)
        return replace(step, program=replace(step.program, ops=ops))

    steps = [kind(name) for kind, name in zip([fold, largest] * 4, "abcefghi", strict=True)]
    one = 6 * PARTS * 4
    after = batch(list[Step](steps), H200, {}, 4 * one)
    assert [len(step.members) for step in batches(after)] == [2] * 4


def test_results_of_another_kind_stay_behind() -> None:
    """A step with two kinds of results gives one away where that saves a launch."""
    mixed = fold("b", "x")
    inputs = {"a": 24, "b": 24, "c": 24, "x": 24}
    ops = list(mixed.program.ops)
    last = max(i for i, op in enumerate(ops) if op.kind == "reduce")
    ops[last] = replace(ops[last], fn="max")
    mixed = replace(mixed, program=replace(mixed.program, ops=tuple(ops)))
    assert len(planned(fold("a"), mixed)) == 2  # nothing to save
    steps: list[Step] = [fold("a"), mixed, fold("c")]
    after = planned(*steps)
    (step,) = batches(after)
    assert [args[0] for args, _ in step.members] == ["a", "b", "c"]
    (rest,) = (step for step in after if isinstance(step, KernelStep))
    assert rest.args == ("x", "dx")
    assert dict(rest.outputs).keys() == {"dx"}
    assert_same(steps, after, inputs)


def test_results_of_one_reduction_go_together() -> None:
    steps: list[Step] = [fold("a", shares=True), fold("b")]
    assert planned(*steps) == steps


class Blocks(nn.Module):
    """Norms and biases of two widths."""

    def __init__(self, width: int = 24, depth: int = 3) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, width + 7) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(width + 7, width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for up, down, norm in zip(self.up, self.down, self.norms, strict=True):
            x = x + down(F.gelu(up(norm(x))))
        return x


def folding(step: Step) -> bool:
    return isinstance(step, (KernelStep, BatchStep)) and "_fold" in step.name


def test_the_bound_is_a_part_of_what_a_graph_is_handed() -> None:
    large = TensorSpec((1 << 20, 640), (640, 1), torch.bfloat16, "cpu")
    small = TensorSpec((1 << 10, 640), (640, 1), torch.bfloat16, "cpu")
    assert plan_folds.most_held([("a", large), ("s0", None)], {}) == 1 << 25
    assert plan_folds.most_held([("a", small), ("b", small)], {}) == 2 * 640 * 2048 // 32


@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.bfloat16, False), (torch.float32, True)])
def test_gradients(dtype: torch.dtype, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_folds, "SHARE", 1)  # a model as small as this has little room
    records: list[Compilation] = []

    def compiled(module: nn.Module) -> Callable[..., Tensor]:
        backend = Compiler(engine="reference", strict=True, on_compiled=records.append)
        return torch.compile(module, backend=backend, dynamic=dynamic)

    given = {"x": torch.randn(300, 24, requires_grad=True)}
    for each in compare_with_eager(Blocks, given, compiled, dtype=dtype, device="cpu", train=True):
        assert each.ok, each
    (step,) = (s for s in records[0].plans["backward"].steps if folding(s))
    assert isinstance(step, BatchStep)
    assert len(step.members) == 3 * (2 + 1)  # a norm's weight and bias, the bias before it


def test_what_waits_adds_no_more_than_the_bound_to_the_peak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def peak(bound: int) -> tuple[int, int]:
        monkeypatch.setattr(plan_folds, "MOST_HELD", bound)
        monkeypatch.setattr(plan_folds, "SHARE", 1)
        planned = Planned()
        module = Blocks(depth=5)
        planned(module)(torch.randn(300, 24)).sum().backward()
        handed_over = kept(*planned.graphs)
        folds = [step for step in planned.plans[1].steps if folding(step)]
        return scheduled_peak(*planned.plans, handed_over, {}), len(folds)

    apart, many = peak(0)
    bound = 75_000  # of two blocks
    together, few = peak(bound)
    assert (many, few) == (4, 3)
    assert together <= apart + bound
