"""Tuning: the fastest legal schedule is kept, measured once; plans compute what they did."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule

from iocompiler import scheduling
from iocompiler.codegen.module import emit_module
from iocompiler.cost_model.candidates import candidates
from iocompiler.cost_model.device import DEVICES
from iocompiler.options import Options
from iocompiler.patience import Patience
from iocompiler.plan.data import BatchStep, KernelStep, Plan, Ref, Schedule
from iocompiler.runtime import module as module_file
from iocompiler.runtime.cache import default_cache
from iocompiler.runtime.compile import Job
from iocompiler.runtime.launch import Image
from iocompiler.runtime.measure import DoesNotFit, GpuBench
from iocompiler.runtime.module import Module
from iocompiler.runtime.reference import run_plan
from iocompiler.runtime.stimulus import index_limits, tensor_for
from iocompiler.runtime.subject import Subject
from iocompiler.runtime.tune import Tuned, tune
from iocompiler.tile.flat import LENGTH
from iocompiler.tile.index import Affine, Axis
from iocompiler.tile.program import Buffer, Builder, TileProgram
from tests.plan.graphs import Planned
from tests.runtime.plans import S0, UNMEASURED, binary, kernel, plan, spec

H200 = DEVICES["h200"]
LARGE = 1 << 24


class FakeBench:
    """Times by a function of the schedule; counts what it is asked for."""

    def __init__(self, seconds: Callable[[Schedule], float | None], clock: Clock | None = None):
        self.seconds = seconds
        self.compiled: list[tuple[str, Schedule]] = []
        self.timed: list[str] = []
        self.broken: set[Schedule] = set()
        self.spilling: set[Schedule] = set()
        self.clock = clock

    def compile(self, wanted: Sequence[tuple[Subject, Schedule]]) -> list[Image | None]:
        self.compiled += [(subject.name, schedule) for subject, schedule in wanted]
        if self.clock is not None:
            self.clock.now += len(wanted)
        return [None if s in self.broken else self.image(s) for _, s in wanted]

    def image(self, schedule: Schedule) -> Image:
        return Image(b"", {"spills": 8 if schedule in self.spilling else 0})

    def time(self, subject: Subject, built: Sequence[tuple[Schedule, Image]]) -> list[float | None]:
        self.timed.append(subject.name)
        return [self.seconds(schedule) for schedule, _ in built]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def by_rank(order: Sequence[Schedule]) -> Callable[[Schedule], float]:
    """The later in ``order``, the faster."""
    return lambda schedule: 1.0 / (1 + order.index(schedule))


def large(fn: str = "add", size: Any = LARGE) -> Plan:
    """One kernel of some tens of microseconds, with the schedule the model chooses."""
    program = binary(fn, size)
    step = kernel(fn, program, ("x", "x", "a"), spec(size), "model.py:1")
    step = dataclasses.replace(step, schedule=candidates(program, H200)[0])
    return plan({"x": spec(size)}, [step], (Ref("a"),))


def options(graph: Plan) -> list[Schedule]:
    (step,) = (s for s in graph.steps if isinstance(s, KernelStep))
    return candidates(step.program, H200, {"s0": LARGE})


def tuned(graph: Plan, bench: FakeBench, **more: Any) -> tuple[Plan, tuple[Tuned, ...]]:
    return tune(graph, H200, {"s0": LARGE}, bench, default_cache(), **more)


def schedule_of(graph: Plan, place: int = 0) -> Schedule:
    step = graph.steps[place]
    assert isinstance(step, (KernelStep, BatchStep))
    return step.schedule


def test_the_fastest_is_kept() -> None:
    found = options(large())
    after, (record,) = tuned(large(), FakeBench(by_rank(found)))
    assert schedule_of(after) == found[-1] != found[0]
    assert (record.kernel, record.chosen, record.model) == ("add", found[-1], found[0])
    assert record.gain == pytest.approx(len(found))
    assert set(record.seconds) == set(found)


def test_a_tie_goes_to_the_model() -> None:
    found = options(large())
    after, (record,) = tuned(large(), FakeBench(lambda s: 1.0 if s == found[0] else 0.985))
    assert schedule_of(after) == found[0]
    assert record.gain == 1.0
    assert after == large()


def test_the_second_time_nothing_is_measured() -> None:
    found = options(large())
    first = tuned(large(), FakeBench(by_rank(found)))
    again = FakeBench(by_rank(found[::-1]))
    assert tuned(large(), again) == first
    assert not again.compiled
    assert not again.timed


def test_another_gpu_is_measured_anew() -> None:
    found = options(large())
    tuned(large(), FakeBench(by_rank(found)), machine="one")
    other = FakeBench(by_rank(found))
    tuned(large(), other, machine="two")
    assert other.timed == ["add"]


def test_without_a_cache_it_works() -> None:
    found = options(large())
    after, _ = tune(large(), H200, {}, FakeBench(by_rank(found)), None)
    assert schedule_of(after) == found[-1]


def test_what_fails_to_compile_spills_or_cannot_be_launched_is_skipped() -> None:
    found = options(large())
    bench = FakeBench(lambda s: None if s == found[-3] else by_rank(found)(s))
    bench.broken, bench.spilling = {found[-1]}, {found[-2]}
    after, (record,) = tuned(large(), bench)
    assert schedule_of(after) == found[-4]
    assert not {found[-1], found[-2], found[-3]} & set(record.seconds)


def test_a_choice_that_spills_still_competes() -> None:
    found = options(large())
    bench = FakeBench(lambda s: 1.0 if s == found[0] else 2.0)
    bench.spilling = {found[0]}
    assert schedule_of(tuned(large(), bench)[0]) == found[0]


def test_arguments_that_do_not_fit_leave_the_choice() -> None:
    class Full(FakeBench):
        def time(self, subject: Subject, built: Any) -> list[float | None]:
            raise DoesNotFit("1 byte")

    assert tuned(large(), Full(lambda s: 1.0)) == (large(), ())


def test_short_kernels_are_not_measured() -> None:
    bench = FakeBench(lambda s: 1.0)
    assert tuned(large(size=1024), bench) == (large(size=1024), ())
    assert not bench.compiled


def test_equal_kernels_are_measured_once() -> None:
    (step,) = large().steps
    assert isinstance(step, KernelStep)
    second = dataclasses.replace(step, args=("a", "a", "b"), outputs=(("b", spec(LARGE)),))
    graph = dataclasses.replace(large(), steps=(step, second), outputs=(Ref("b"),))
    found = options(large())
    bench = FakeBench(by_rank(found))
    after, records = tuned(graph, bench)
    assert bench.timed == ["add"]
    assert len(records) == 1
    assert schedule_of(after, 0) == schedule_of(after, 1) == found[-1]


def test_time_is_bounded_by_what_the_choices_took() -> None:
    (step,) = large().steps
    assert isinstance(step, KernelStep)
    fns = ("add", "sub", "mul", "div", "minimum", "maximum") * 4
    steps = []
    for number, fn in enumerate(fns):  # sizes differ, so all 24 are distinct
        program = binary(fn, LARGE + 256 * number)
        name = f"k{number}"
        args = ("x", "x", f"v{number}")
        made = kernel(name, program, args, spec(LARGE + 256 * number))
        steps.append(dataclasses.replace(made, schedule=candidates(program, H200)[0]))
    graph = plan({"x": spec(LARGE + 10_000)}, list(steps), (Ref("v0"),))
    clock = Clock()
    bench = FakeBench(lambda s: 1.0, clock)
    tuned(graph, bench, clock=clock)
    assert bench.compiled[: len(fns)] == [
        (s.name, s.schedule) for s in sorted(steps, key=lambda s: -s.program.buffers[0].elements)
    ]
    assert len(fns) < len(bench.compiled) <= 3 * len(fns)


def test_sizes_are_taken_from_the_hints() -> None:
    graph = large(size=8 * S0)
    found = candidates(graph.steps[0].program, H200, {"s0": LARGE}, first=schedule_of(graph))
    after, (record,) = tuned(graph, FakeBench(by_rank(found)))
    assert schedule_of(after) == record.chosen
    assert tune(graph, H200, {"s0": 8}, FakeBench(lambda s: 1.0), None)[1] == ()


def test_the_number_of_programs_with_partial_rows_stays() -> None:
    planned = Planned()
    x, w = torch.randn(5, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    planned(lambda x, w: torch.nn.functional.rms_norm(x, (64,), w))(x, w).sum().backward()
    steps = [s for s in planned.kernels if s.schedule.kind == "rows"]
    assert [s.schedule.programs for s in steps] == [5]
    found = candidates(steps[0].program, H200, {}, first=steps[0].schedule)
    assert len(found) > 1
    assert {s.programs for s in found} == {5}


def norm_and_softmax(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.softmax(torch.nn.functional.layer_norm(x, x.shape[-1:], w), 0)


def test_the_plan_computes_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iocompiler.runtime.tune.SHORTEST_S", 0.0)
    planned = Planned()
    x = torch.randn(33, 96, requires_grad=True)
    w = torch.randn(96, requires_grad=True)
    planned(norm_and_softmax)(x, w).sum().backward()  # type: ignore[no-untyped-call]
    changed = 0
    for graph in planned.plans:
        after, records = tuned(graph, FakeBench(lambda s: 1.0 / (s.x_block + 32 * s.num_warps)))
        changed += sum(record.chosen != record.model for record in records)
        given = [torch.randn(s.shape).as_strided(s.shape, s.stride) for _, s in graph.inputs]
        before = run_plan(graph, [t.clone() for t in given])
        torch.testing.assert_close(run_plan(after, given), before, equal_nan=True)
        assert "@triton.jit" in emit_module(after, "tuned")
    assert changed


BATCHED = (LARGE, LARGE // 2)


def batched() -> Plan:
    """Two additions in one launch."""
    base, sizes = binary("add", LENGTH), BATCHED
    members = tuple(((f"x{n}", f"x{n}", f"a{n}"), n) for n in sizes)
    outputs = tuple((f"a{n}", spec(n)) for n in sizes)
    step = BatchStep("adds", base, batch_options()[0], members, outputs)
    inputs: dict[str, Any] = {f"x{n}": spec(n) for n in sizes}
    return plan(inputs, [step], tuple(Ref(f"a{n}") for n in sizes))


def batch_options() -> list[Schedule]:
    return candidates(binary("add", LENGTH), H200, {"n": sum(BATCHED)})


def test_a_batch_is_measured() -> None:
    chosen = batch_options()
    after, (record,) = tuned(batched(), FakeBench(by_rank(chosen)))
    assert record.kernel == "adds"
    assert schedule_of(after) == chosen[-1]
    assert f"programs={chosen[-1].programs}" in emit_module(after, "tuned")


TUNED: list[tuple[Callable[[], Plan], Callable[[], list[Schedule]], Callable[[Schedule], bool]]] = [
    (large, lambda: options(large()), lambda s: s != options(large())[0]),
    (batched, batch_options, lambda s: s.programs > 0),
    (batched, batch_options, lambda s: s.registers > 0),
]


@pytest.mark.parametrize(
    ("make", "all_options", "fast"), TUNED, ids=["kernel", "a walk", "a bound of registers"]
)
def test_a_tuned_kernel_is_compiled_as_the_module_compiles_it(
    make: Callable[[], Plan],
    all_options: Callable[[], list[Schedule]],
    fast: Callable[[Schedule], bool],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
) -> None:
    """Else the winner would be compiled a second time when the plan is loaded."""
    subjects: list[Subject] = []

    class Keeping(FakeBench):
        def compile(self, wanted: Any) -> list[Image | None]:
            subjects.extend(subject for subject, _ in wanted)
            return super().compile(wanted)

    after, (record,) = tuned(make(), Keeping(lambda s: 1.0 if fast(s) else 2.0))
    assert fast(record.chosen)
    asked: dict[str, Job] = {}

    def keep(jobs: dict[str, Job], cache: Any) -> dict[str, Image]:
        asked.update(jobs)
        return dict.fromkeys(jobs, Image(b"", {}))

    monkeypatch.setattr(module_file, "compiled_images", keep)
    path = tmp_path / "tuned.py"
    path.write_text(emit_module(after, "tuned"))
    module = Module(str(path), "cpu")
    module.execute()
    module.compile(90)
    assert subjects[0].job(record.chosen, 90) in asked.values()


@pytest.mark.parametrize("options", UNMEASURED)
def test_only_what_runs_on_a_gpu_is_measured(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    graph = dataclasses.replace(large(), device="cuda:0")
    assert scheduling.tuned(graph, GraphModule({}, Graph()), options, Patience()) == (graph, ())


# --- arguments


def picking(rows: int = 10, width: int = 4, shift: str = "") -> TileProgram:
    """``out[x, y] = table[ids[x], y]``; ``shift`` maps the ids first."""
    build, x, y = Builder(), Affine.of("x"), Affine.of("y")
    picked = build.load("ids", x, torch.int64)
    if shift:
        picked = build.map(shift, picked, picked)
    at = Affine.of(f"%{picked}") * width + y
    build.store("out", x * width + y, build.load("table", at, torch.float32))
    buffers = (
        Buffer("ids", torch.int64, "in", 7),
        Buffer("table", torch.float32, "in", rows * width),
        Buffer("out", torch.float32, "out", 7 * width),
    )
    return build.program((Axis("x", 7), Axis("y", width)), (), buffers)


def test_indices_stay_in_bounds() -> None:
    assert index_limits(picking(), {}) == {"ids": 9}
    ids = tensor_for(picking().buffers[0], 1000, 9, torch.device("cpu"), 0)
    assert (ids.min(), ids.max(), ids.dtype) == (0, 9, torch.int64)


def test_computed_indices_are_not_made_up() -> None:
    bench = FakeBench(lambda s: 1.0)
    program = picking(1 << 20, 64, "mul")
    step = dataclasses.replace(
        kernel("pick", program, ("i", "t", "o"), spec(7, 64)), schedule=Schedule("pointwise")
    )
    graph = plan({"i": spec(7, dtype=torch.int64), "t": spec(1 << 20, 64)}, [step], (Ref("o"),))
    assert tuned(graph, bench) == (graph, ())
    assert not bench.compiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.bool])
def test_outputs_are_poisoned(dtype: torch.dtype) -> None:
    out = tensor_for(Buffer("o", dtype, "out", 5), 5, None, torch.device("cpu"), 0)
    assert (out.dtype, out.shape) == (dtype, (5,))
    assert out.isnan().all() if dtype.is_floating_point else (out != 0).all()


# --- the real thing


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import iocompiler as ioc

    monkeypatch.setattr("iocompiler.patience.LEAST_S", 60.0)  # other tests have the cores
    records: list[Any] = []

    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], w).softmax(-1)

    given = [
        torch.randn(*shape, device="cuda", requires_grad=True) for shape in ((8192, 2048), (2048,))
    ]
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    expected = torch.autograd.grad(f(*given).square().sum(), given)

    def forbidden(*_: Any) -> None:
        raise AssertionError("measured a second time")

    for _ in range(2):
        torch._dynamo.reset()
        backend = ioc.Compiler(on_compiled=records.append, mode="max-autotune", strict=True)
        result = torch.compile(f, backend=backend)(*given)
        torch.testing.assert_close(result, f(*given))
        found = torch.autograd.grad(result.square().sum(), given)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        monkeypatch.setattr(GpuBench, "time", forbidden)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    measured = [t for r in records for ts in r.tuned.values() for t in ts]
    assert measured
    for one in measured:
        assert len(one.seconds) > 1
        assert 1e-6 < min(one.seconds.values()) < 1e-2
        assert one.gain >= 1.0
