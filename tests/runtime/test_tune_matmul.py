"""Products and the kernels behind them by the clock: the faster way is kept, measured once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule

from iocompiler import engines, scheduling
from iocompiler.cost_model.device import DEVICES, Device
from iocompiler.cost_model.matmul_tiles import candidates
from iocompiler.errors import BadPlanFile
from iocompiler.options import Options
from iocompiler.patience import Patience
from iocompiler.plan.apart import apart, together
from iocompiler.plan.data import AtenStep, KernelStep, MatmulStep, Plan
from iocompiler.plan.fold import folded
from iocompiler.plan.priced import priced
from iocompiler.plan.product import MatmulTile
from iocompiler.plan.sites import sites
from iocompiler.runtime import module as module_file
from iocompiler.runtime.cache import default_cache
from iocompiler.runtime.compile import Job
from iocompiler.runtime.launch import Image
from iocompiler.runtime.load import prepare
from iocompiler.runtime.measure import DoesNotFit
from iocompiler.runtime.measure_region import GpuRegionBench
from iocompiler.runtime.plan_file import PlanFile
from iocompiler.runtime.reference import run_plan
from iocompiler.runtime.tune_matmul import Built, Folding, _Subject, tune_matmuls
from tests.codegen.matmuls import SMALL, plan_on_fakes
from tests.plan.graphs import Planned

H200 = DEVICES["h200"]
UNPRICED = dataclasses.replace(H200, matmul_template=None)
SHAPES = ((8192, 512), (2048, 512), (2048,), (2048, 512))


def block(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
    return x + F.gelu(F.linear(x, w, b)) @ v


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_on_fakes(block, *SHAPES, dtype=torch.bfloat16)


class FakeBench:
    """Times by the tile of a plan, None for one that has none; counts what it is asked for."""

    def __init__(self, seconds: Callable[[MatmulTile | None], float | None]):
        self.seconds = seconds
        self.loaded: list[Plan] = []
        self.timed = 0
        self.broken: set[MatmulTile] = set()

    def load(self, plans: Sequence[Plan]) -> list[Built | None]:
        self.loaded += plans
        return [None if _tile(plan) in self.broken else _Loaded(_tile(plan)) for plan in plans]

    def time(
        self, plan: Plan, built: Sequence[Built], sizes: Mapping[str, int]
    ) -> list[float | None]:
        self.timed += 1
        kinds = [type(step) for step in plan.steps]
        assert kinds in ([AtenStep, KernelStep], [AtenStep] * 3)
        return [self.seconds(run.tile) for run in built]  # type: ignore[attr-defined]


@dataclasses.dataclass
class _Loaded:
    tile: MatmulTile | None

    def __call__(self, args: list[Any]) -> list[Any]:
        raise NotImplementedError


def _tile(plan: Plan) -> MatmulTile | None:
    return next((s.tile for s in plan.steps if isinstance(s, MatmulStep)), None)


def tuned(
    plan: Plan, bench: FakeBench, row: Device = H200, **more: Any
) -> tuple[Plan, tuple[Folding, ...]]:
    return tune_matmuls(plan, row, {}, bench, default_cache(), **more)


def steps(plan: Plan) -> list[MatmulStep]:
    return [step for step in plan.steps if isinstance(step, MatmulStep)]


def test_the_fastest_tile_is_kept(plan: Plan) -> None:
    ways = [candidates(*site.key, H200) for site in sites(plan)]
    bench = FakeBench(lambda tile: 9.0 if tile is None else 1.0 + (tile != last()))
    last = lambda: ways[bench.timed - 1][-1]
    after, records = tuned(plan, bench)
    assert [step.tile for step in steps(after)] == [way[-1] for way in ways]
    assert [record.gain for record in records] == [9.0, 9.0]
    assert [record.model for record in records] == [way[0] for way in ways]
    assert len(bench.loaded) == sum(1 + len(way) for way in ways)


def layers(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return F.linear(x, q), F.linear(x, k), F.linear(x, v)


def test_products_with_no_kernel_behind_them_are_measured_too() -> None:
    plan = plan_on_fakes(layers, (512, 1024), *[(1024, 1024)] * 3, dtype=torch.bfloat16)
    after, (record,) = tuned(plan, FakeBench(lambda tile: 2.0 if tile is None else 1.0))
    (step,) = steps(after)
    assert step.tile == record.chosen == record.model
    assert len(step.parts) == 3
    after, _ = tuned(plan, FakeBench(lambda tile: 1.0 if tile is None else 2.0), machine="b")
    reasons = {step.reason for step in after.steps if isinstance(step, AtenStep)}
    assert reasons == {"contraction: cuBLAS; library 1000000.0 us, in one 2000000.0 us: measured"}


def test_what_the_model_expects_to_be_much_slower_is_not_worth_the_clock() -> None:
    """Few launches are all that can be saved."""
    plan = plan_on_fakes(layers, (16384, 256), *[(1024, 256)] * 3, dtype=torch.bfloat16)
    (each,) = priced(plan, H200, {})
    assert each.folded_s is not None
    assert each.folded_s > 1.15 * each.library_s
    after, records = tuned(plan, FakeBench(lambda tile: 2.0 if tile is None else 1.0))
    assert (steps(after), records) == ([], ())


def test_what_is_not_faster_stays_as_it_is(plan: Plan) -> None:
    after, records = tuned(plan, FakeBench(lambda tile: 1.0 if tile is None else 0.99), machine="a")
    assert after.steps == plan.steps
    assert [record.chosen for record in records] == [None, None]
    measured = [edge for edge in after.unfused if "library and kernel 1000000.0 us" in edge.reason]
    assert len(measured) == 2
    assert [record.gain for record in records] == [1.0, 1.0]


def test_one_site_may_be_folded_and_another_not(plan: Plan) -> None:
    first, _ = sites(plan)
    bench = FakeBench(lambda tile: 1.0 if tile is None else 2.0 if bench.timed == 2 else 0.5)
    after, records = tuned(plan, bench, machine="b")
    assert [record.chosen is None for record in records] == [False, True]
    assert [step.product for step in steps(after)] == [first.step.product]


def test_the_second_time_nothing_is_measured(plan: Plan) -> None:
    once = tuned(plan, FakeBench(lambda tile: 2.0 if tile is None else 1.0), machine="c")
    again = FakeBench(lambda tile: 1.0)
    assert tuned(plan, again, machine="c") == once
    assert not again.loaded
    assert not again.timed


def test_what_fails_is_passed_over(plan: Plan) -> None:
    class Full(FakeBench):
        def time(self, plan: Plan, built: Any, sizes: Any) -> list[float | None]:
            raise DoesNotFit("1 byte")

    assert tuned(plan, Full(lambda tile: 1.0), UNPRICED, machine="d") == (plan, ())
    after, records = tuned(plan, Full(lambda tile: 1.0), machine="d")
    assert [step.tile for step in steps(after)] == [each.tile for each in priced(plan, H200, {})]
    assert not records
    unlaunched = FakeBench(lambda tile: 1.0 if tile is None else None)
    after, records = tuned(plan, unlaunched, machine="e")
    assert after.steps == plan.steps
    assert any("in one fails" in edge.reason for edge in after.unfused)
    assert all(set(record.seconds) == {None} for record in records)
    broken = FakeBench(lambda tile: 2.0 if tile is None else 1.0)
    broken.broken = {candidates(*site.key, H200)[0] for site in sites(plan)}
    after, _ = tuned(plan, broken, machine="f")
    assert not broken.broken & {step.tile for step in steps(after)}
    assert len(steps(after)) == 2
    broken.broken = {tile for site in sites(plan) for tile in candidates(*site.key, H200)}
    assert tuned(plan, broken, machine="h") == (plan, ())


def test_small_products_are_not_measured() -> None:
    small = plan_on_fakes(block, (64, 32), (48, 32), (48,), (48, 32), dtype=torch.bfloat16)
    bench = FakeBench(lambda tile: 1.0)
    assert sites(small)
    assert tuned(small, bench) == (small, ())
    assert not bench.loaded


def test_time_is_bounded(plan: Plan) -> None:
    now = iter(range(0, 10000, 100))
    bench = FakeBench(lambda tile: 2.0 if tile is None else 1.0)
    after, records = tuned(plan, bench, UNPRICED, machine="g", clock=lambda: float(next(now)))
    assert not records or len(bench.loaded) < sum(
        1 + len(candidates(*site.key, H200)) for site in sites(plan)
    )
    assert len(steps(after)) == len(records)
    now = iter(range(0, 10000, 100))
    after, records = tuned(plan, bench, machine="g2", clock=lambda: float(next(now)))
    assert len(records) < len(steps(after)) == 2, "what the clock did not reach is priced"


def gated(x: Tensor, w: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return F.silu(x @ w.t()) * (x @ v) + s


@pytest.mark.parametrize("f", [block, gated])
def test_both_ways_compute_the_same(f: Callable[..., Tensor]) -> None:
    given = [torch.randn(shape) for shape in ((20, 12), (12, 12), (12,), (12, 12))]
    if f is gated:
        given = [given[0], given[1], given[3], torch.randn(20, 12)]
    planned = Planned()
    planned(f)(*given)
    (plan,) = planned.plans
    for site in sites(plan):
        one, other = apart(plan, site), together(plan, site, SMALL)
        assert (one.inputs, one.outputs) == (other.inputs, other.outputs)
        assert len(other.steps) == 1
        args = [torch.randn(spec.shape).as_strided(spec.shape, spec.stride)  # type: ignore[union-attr,arg-type]
                if spec.stride[-1] == 1 else torch.randn(spec.shape[::-1]).t()  # type: ignore[union-attr]
                for _, spec in one.inputs]  # fmt: skip
        torch.testing.assert_close(run_plan(other, args), run_plan(one, args))


def test_equal_sites_are_equal_regions() -> None:
    def twice(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
        return block(block(x, w, b, v), w, b, v)

    plan = plan_on_fakes(twice, *SHAPES, dtype=torch.bfloat16)
    found = sites(plan)
    assert [apart(plan, site) for site in found[:2]] == [apart(plan, site) for site in found[2:]]


def looked_up(x: Tensor, w: Tensor, ids: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    return torch.tanh(x @ w.t() + table[ids]) * scale


@pytest.mark.parametrize("dynamic", [False, True])
def test_arguments_are_as_the_region_wants_them(
    dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the GPU's bench makes up, tried on the CPU: layouts, sizes, indices that stay inside."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (1 << 28, 1 << 30))
    bench = object.__new__(GpuRegionBench)
    bench.index, bench.device, bench._l2_bytes = 0, torch.device("cpu"), 1 << 16
    planned = Planned()
    ids, table = torch.tensor([3, 1, 2, 0, 3, 2, 1]), torch.randn(4, 12)
    given = (torch.randn(7, 5), torch.randn(12, 5), ids, table, torch.tensor(2.0))
    planned(looked_up, dynamic=dynamic)(*given)
    (plan,) = planned.plans
    (site,) = sites(plan)
    subject = _Subject.of(plan, site, {})
    sizes = dict.fromkeys(subject.sizes, 9) if dynamic else {}
    sets = bench._argument_sets(subject.region, sizes)
    assert len(sets) > 1
    for args in sets:
        results = run_plan(subject.with_tile(SMALL), list(args))
        torch.testing.assert_close(results, run_plan(subject.region, list(args)))
        assert all(torch.isfinite(result).all() for result in results)
    (picked,) = (x for x in sets[0] if isinstance(x, Tensor) and x.dtype == torch.int64)
    assert picked.max() > 1, "rows of the whole table are read"


def test_what_is_measured_is_compiled_as_the_module_compiles_it(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the winner would be compiled a second time when the plan is loaded."""
    asked: list[dict[str, Job]] = []

    def keep(jobs: dict[str, Job], cache: Any) -> dict[str, Image]:
        asked.append(dict(jobs))
        return dict.fromkeys(jobs, Image(b"", {}))

    monkeypatch.setattr(module_file, "compiled_images", keep)
    found = sites(plan)
    tile = candidates(*found[0].key, H200)[0]
    prepare(together(plan, found[0], tile), H200)
    prepare(folded(plan, {found[0].key: tile}), H200)
    assert set(asked[0]) < set(asked[1])


def test_what_kernels_are_called_does_not_matter(plan: Plan) -> None:
    renamed = dataclasses.replace(
        plan,
        steps=tuple(
            dataclasses.replace(s, name=f"another_{s.name}") if isinstance(s, KernelStep) else s
            for s in plan.steps
        ),
    )
    keys = [
        [_Subject.of(p, site, {}).cache_key(H200, "") for site in sites(p)] for p in (plan, renamed)
    ]
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == 2


# --- the plan file


def test_a_plan_file_has_the_tiles(plan: Plan, tmp_path: Path) -> None:
    first, second = sites(plan)
    chosen = folded(plan, {second.key: SMALL})
    file = PlanFile(tmp_path / "plan.json")
    file.add(chosen, plan, "forward", "h200")
    assert file.replayed(plan, "forward", "h200") == chosen
    (entry,) = json.loads(file.path.read_text())["graphs"].values()
    assert list(entry["matmuls"]) == [second.name]
    assert len(entry["kernels"]) == 2
    assert first.name not in entry["matmuls"]


def test_without_one_the_file_is_as_it_was(plan: Plan, tmp_path: Path) -> None:
    file = PlanFile(tmp_path / "plan.json")
    file.add(plan, plan, "forward", "h200")
    assert "matmuls" not in file.path.read_text()
    assert file.replayed(plan, "forward", "h200") == plan


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"m": 48}, "power of two"),
        ({"k": 8}, "less than 16"),
        ({"n": "64"}, "not a number"),
        ({"parts": 8}, "parts"),
        ({"lanes": 4}, "has the fields"),
        (None, "no products to fold"),
    ],
)
def test_a_tile_that_is_none(plan: Plan, tmp_path: Path, change: Any, reason: str) -> None:
    file = PlanFile(tmp_path / "plan.json")
    file.add(folded(plan, {sites(plan)[0].key: SMALL}), plan, "forward", "h200")
    text = json.loads(file.path.read_text())
    (entry,) = text["graphs"].values()
    if change is None:
        entry["matmuls"]["another"] = entry["matmuls"].pop(sites(plan)[0].name)
    else:
        entry["matmuls"][sites(plan)[0].name].update(change)
    file.path.write_text(json.dumps(text))
    with pytest.raises(BadPlanFile, match=reason):
        file.replayed(plan, "forward", "h200")


def test_by_price_only_on_a_device_that_was_measured(plan: Plan) -> None:
    empty = GraphModule({}, Graph())
    assert scheduling.by_price(plan, empty, Options(device="a100")) is plan


def test_by_price_on_a_device_that_was_measured(plan: Plan) -> None:
    after, measured = scheduling.tuned(
        plan, GraphModule({}, Graph()), Options(device="h200"), Patience()
    )
    assert len(steps(after)) == 2
    assert not measured


def test_schedules_first_then_products(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk of max-autotune, with benches that need no GPU."""
    released: list[str] = []

    class Schedules:
        def __init__(self, device: torch.device) -> None:
            assert device.type == "cuda"

        def compile(self, wanted: Sequence[Any]) -> list[Image | None]:
            return [Image(b"", {"spills": 0}) for _ in wanted]

        def time(self, subject: Any, built: Sequence[Any]) -> list[float | None]:
            return [1.0 / (1 + place) for place in range(len(built))]

        def release(self) -> None:
            released.append("schedules")

    class Regions(FakeBench):
        def __init__(self, device: torch.device) -> None:
            super().__init__(lambda tile: 2.0 if tile is None else 1.0)

        def release(self) -> None:
            released.append("regions")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
    monkeypatch.setattr("iocompiler.runtime.measure.GpuBench", Schedules)
    monkeypatch.setattr("iocompiler.runtime.measure_region.GpuRegionBench", Regions)
    monkeypatch.setattr(engines, "device_row", lambda gm, options: H200)
    on_gpu = dataclasses.replace(plan, device="cuda:0")
    options = Options(mode="max-autotune")
    spent = Patience(spent=1e6)
    nothing = scheduling.tuned(on_gpu, GraphModule({}, Graph()), options, spent)
    assert not nothing[1], "a compilation that has measured for long may not"
    patience = Patience()
    assert nothing[0] == scheduling.by_price(on_gpu, GraphModule({}, Graph()), options)
    released.clear()
    patience.started -= 100.0
    after, measured = scheduling.tuned(on_gpu, GraphModule({}, Graph()), options, patience)
    assert patience.spent > 0
    assert released == ["schedules", "regions"]
    assert len(steps(after)) == 2
    kinds = [type(record).__name__ for record in measured]
    assert kinds == ["Tuned", "Tuned", "Folding", "Folding"]


# --- the real thing


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import iocompiler as ioc

    given = [
        torch.randn(*shape, device="cuda").mul(0.1).bfloat16().requires_grad_() for shape in SHAPES
    ]
    expected = torch.autograd.grad(block(*given).float().square().sum(), given)
    monkeypatch.setattr("iocompiler.patience.LEAST_S", 60.0)  # other tests have the cores
    records: list[Any] = []

    def forbidden(*_: Any) -> None:
        raise AssertionError("measured a second time")

    for _ in range(2):
        torch._dynamo.reset()
        options: dict[str, Any] = {"mode": "max-autotune", "strict": True, "cache": False}
        run = torch.compile(block, backend=ioc.Compiler(on_compiled=records.append, **options))
        result = run(*given)
        torch.testing.assert_close(result, block(*given), rtol=2e-2, atol=2e-2)
        found = torch.autograd.grad(result.float().square().sum(), given)
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() <= 2e-2 * other.norm()
        monkeypatch.setattr(GpuRegionBench, "time", forbidden)
    measured = [t for r in records for ts in r.tuned.values() for t in ts if isinstance(t, Folding)]
    assert measured
    for each in measured:
        assert len(each.seconds) > 1
        assert 1e-6 < min(each.seconds.values()) < 1e-2
        assert each.gain >= 1.0
