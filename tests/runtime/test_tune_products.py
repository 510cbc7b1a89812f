"""The library's algorithms for products by the clock: the fastest is kept, measured once, written
down, and used for the product it was measured for.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from iocompiler import engines
from iocompiler.backend import Compiler
from iocompiler.codegen.module import emit_module
from iocompiler.compilation import Compilation
from iocompiler.cost_model.device import DEVICES
from iocompiler.errors import BadPlanFile
from iocompiler.ops import linear_cross_entropy, sum_of_products
from iocompiler.ops.multiply import multiply, noted, using
from iocompiler.options import Options
from iocompiler.plan.addressed import addressed
from iocompiler.plan.data import AtenStep, Plan, Ref, Step
from iocompiler.plan.library_product import Algorithm, Problem
from iocompiler.report.build import Part, build_report
from iocompiler.runtime import products
from iocompiler.runtime.ahead import multiplied
from iocompiler.runtime.algorithm_rows import algorithm_rows, algorithms_of
from iocompiler.runtime.cache import default_cache
from iocompiler.runtime.load import load_text
from iocompiler.runtime.measure import DoesNotFit
from iocompiler.runtime.plan_file import PlanFile
from iocompiler.runtime.tune_products import Selection, problems_of, title, tune_products
from iocompiler.runtime.values import in_numbers
from tests.accuracy import assert_near_exact
from tests.runtime.plans import S0, interpreter, on_a_gpu, plan, spec
from tests.runtime.test_plan_file import compiled

H100 = DEVICES["h100"]
BF16 = torch.bfloat16


def algorithm(number: int) -> Algorithm:
    return Algorithm(66, number, 1, 0, 0, 0, 36, 0, 2)


FIRST, SECOND, THIRD = map(algorithm, range(3))


class FakeBench:
    """Proposes the same algorithms for all; times by a function of these; counts what is asked."""

    version = 130000

    def __init__(
        self,
        seconds: Mapping[Algorithm, float | None],
        proposed: Sequence[Algorithm] = (FIRST, SECOND, THIRD),
    ):
        self.seconds, self.algorithms = seconds, proposed
        self.timed: list[Problem] = []

    def proposed(self, problem: Problem) -> Sequence[Algorithm]:
        return self.algorithms

    def time(self, problem: Problem, algorithms: Sequence[Algorithm]) -> list[float | None]:
        assert list(algorithms) == list(self.algorithms)
        self.timed.append(problem)
        return [self.seconds.get(each, 9.0) for each in algorithms]


def half(*shape: Any) -> Any:
    return spec(*shape, dtype=BF16)


def mm(out: str, a: str, b: str, of: Any, bias: str = "") -> AtenStep:
    args = tuple(map(Ref, (bias, a, b) if bias else (a, b)))
    target = "aten.addmm.default" if bias else "aten.mm.default"
    return AtenStep(target, args, (), ((out, of),), False, out)


def chain(rows: Any = 4096, layers: int = 3) -> Plan:
    """Equal layers, as a GPU has them."""
    of = half(rows, 1024)
    steps: list[Step] = [mm(f"y{i + 1}", f"y{i}", "w", of) for i in range(layers)]
    graph = plan({"y0": of, "w": half(1024, 1024)}, steps, (Ref(f"y{layers}"),))
    return addressed(on_a_gpu(graph))


def tuned(
    graph: Plan, bench: FakeBench, hints: Mapping[str, int] | None = None, **more: Any
) -> tuple[Plan, tuple[Selection, ...]]:
    return tune_products(graph, H100, hints or {}, bench, default_cache(), **more)


def faster(which: Algorithm = THIRD) -> FakeBench:
    return FakeBench({which: 1.0})


LAYER = Problem(1, 4096, 1024, 1024, BF16, (0, 1024, 1), (0, 1024, 1), (0, 1024, 1))


def test_the_fastest_is_kept_and_equal_products_are_measured_once() -> None:
    bench = faster()
    after, (record,) = tuned(chain(), bench)
    assert bench.timed == [LAYER]
    assert after.algorithms == ((LAYER, THIRD),)
    assert after.steps == chain().steps
    assert (record.chosen, record.model, record.gain) == (THIRD, FIRST, 9.0)
    assert record.kernel == "4096 x 1024 x 1024 bfloat16 nn"
    assert set(record.seconds) == {FIRST, SECOND, THIRD}


@pytest.mark.parametrize("seconds", [{FIRST: 1.0}, {FIRST: 1.0, THIRD: 0.996}])
def test_a_tie_goes_to_the_library(seconds: dict[Algorithm, float | None]) -> None:
    after, (record,) = tuned(chain(), FakeBench(seconds))
    assert after == chain()
    assert (record.chosen, record.gain) == (FIRST, 1.0)


def test_the_second_time_nothing_is_measured() -> None:
    first, again = tuned(chain(), faster()), faster(SECOND)
    assert tuned(chain(layers=2), again)[1] == first[1]
    assert not again.timed


def test_another_gpu_and_another_library_are_measured_anew() -> None:
    tuned(chain(), faster(), machine="one")
    other = faster(SECOND)
    assert tuned(chain(), other, machine="two")[0].algorithms == ((LAYER, SECOND),)
    newer = faster(SECOND)
    newer.version = 130100
    tuned(chain(), newer, machine="one")
    assert len(other.timed) == len(newer.timed) == 1


def test_what_is_refused_is_not_kept() -> None:
    bench = FakeBench({THIRD: None, SECOND: 1.0})
    after, (record,) = tuned(chain(), bench)
    assert after.algorithms == ((LAYER, SECOND),)
    assert set(record.seconds) == {FIRST, SECOND}
    assert tuned(chain(), FakeBench({FIRST: None}), machine="b") == (chain(), ())


def test_where_there_is_nothing_to_choose_from_nothing_is_measured() -> None:
    for proposed in ((), (FIRST,)):
        bench = FakeBench({}, proposed)
        assert tuned(chain(), bench) == (chain(), ())
        assert not bench.timed


def test_operands_that_do_not_fit_leave_the_library_s_choice() -> None:
    class Full(FakeBench):
        def time(self, problem: Problem, algorithms: Any) -> list[float | None]:
            raise DoesNotFit("1 byte")

    assert tuned(chain(), Full({})) == (chain(), ())


def test_short_products_and_those_that_are_not_asked_for_are_not_measured() -> None:
    bench = faster()
    odd = replace(LAYER, a=(0, 2048, 2))
    biased = replace(LAYER, added=(0, 0, 1), dtype=torch.float32)
    assert tuned(chain(16), bench, inside=[odd, biased])[1] == ()
    assert not bench.timed


def test_what_takes_most_time_comes_first_and_time_is_bounded() -> None:
    deep = replace(LAYER, k=4096, a=(0, 4096, 1))
    short = replace(LAYER, m=2048)
    bench, now = faster(), iter([0.0, 1.0, 2.0, 3.5])
    _, found = tuned(chain(layers=8), bench, inside=[short, deep], clock=lambda: next(now))
    assert bench.timed == [LAYER, deep]
    assert len(found) == 2
    again, now = faster(), iter([0.0, 5.0])
    _, found = tuned(chain(layers=8), again, inside=[short, deep], clock=lambda: next(now))
    assert not again.timed
    assert len(found) == 2, "what the cache has takes no time"


def test_without_a_cache_it_works() -> None:
    after, _ = tune_products(chain(), H100, {}, faster(), None)
    assert after.algorithms == ((LAYER, THIRD),)


# --- sizes that are not known


def test_measured_is_the_product_of_the_hints() -> None:
    bench = faster()
    after, _ = tuned(chain(S0), bench, {"s0": 4096})
    assert bench.timed == [LAYER]
    assert after.algorithms == ((LAYER, THIRD),)
    assert tuned(chain(S0), bench, {}, machine="b") == (chain(S0), ())


@pytest.mark.parametrize("rows", [8, 5])
def test_only_the_product_that_was_measured_is_made_by_its_algorithm(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = half(S0, 8)
    steps: list[Step] = [mm("y", "x", "w", of, bias="c"), mm("z", "y", "w", of)]
    graph = plan({"x": of, "w": half(8, 8), "c": half(8)}, steps, (Ref("z"),))
    graph = addressed(on_a_gpu(graph))
    biased, _ = problems_of(graph, {"s0": 8})
    text = emit_module(replace(graph, algorithms=((biased, SECOND),)), "graph")
    asked = asked_of(monkeypatch)
    x, w, c = (torch.randn(*shape).to(BF16) for shape in ((rows, 8), (8, 8), (8,)))
    (found,) = load_text(text, "graph", "cpu", interpreter(graph))([x, w, c])
    torch.testing.assert_close(found, torch.addmm(c, x, w) @ w)
    biased = replace(biased, m=rows)
    assert asked == {
        biased: SECOND if rows == 8 else None,
        replace(biased, added=None): None,
    }


def asked_of(monkeypatch: pytest.MonkeyPatch) -> dict[Problem, Algorithm | None]:
    """By product, the algorithm it is prepared with."""
    found: dict[Problem, Algorithm | None] = {}
    prepare = products._prepare

    def note(problem: Problem, alignment: int, device: Any, algorithm: Any = None) -> Any:
        found[problem] = algorithm
        return prepare(problem, alignment, device)

    monkeypatch.setattr(products, "_prepare", note)
    return found


def test_products_in_numbers_are_those_that_come() -> None:
    """Whatever is added, stored wide, or stored beside."""
    for graph in (chain(S0), chain(4096)):
        for step in graph.steps:
            assert isinstance(step, AtenStep)
            assert step.product is not None
            for changed in (
                step.product,
                replace(step.product, added=(0, S0, 1), bias=True),
                replace(step.product, sums=(0, 2 * S0, 1), stored=torch.float32),
            ):
                found = in_numbers(changed, {"s0": 4096})
                assert found is not None
                assert hash(found) is not None
                assert not found.size_symbols
                assert found.bias == changed.bias
                assert found.stored == changed.stored
                numbers = [*found.a, *found.b, *found.out, *(found.added or found.sums or ())]
                assert {type(each) for each in numbers} == {int}


# --- inside of operators


def lce(rows: int, vocabulary: int, width: int, bias: bool = False) -> Plan:
    """A head and its loss with all gradients."""
    given: dict[str, Any] = {
        "x": half(rows, width),
        "w": half(vocabulary, width),
        "b": half(vocabulary),
        "t": spec(rows, dtype=torch.int64),
    }
    args = (Ref("x"), Ref("w"), Ref("b") if bias else None, Ref("t"), None, None)
    setting = (-100, 0.0, 1.0, 1.0, False, False, True, True, bias)
    outputs = (
        ("losses", spec(rows)),
        (None, None),
        ("dx", half(rows, width)),
        ("dw", half(vocabulary, width)),
        ("db", spec(vocabulary)) if bias else (None, None),
    )
    step = AtenStep(str(linear_cross_entropy.GRADIENTS), (*args, *setting), (), outputs, True)
    return plan(given, [step], (Ref("losses"), Ref("dx"), Ref("dw")))


CPU = torch.device("cpu")


@pytest.mark.parametrize("bias", [False, True])
def test_the_products_of_a_head_and_its_loss(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of a chunk; of the weight's gradient the first is written, others are added."""
    chunks = "iocompiler.ops.linear_cross_entropy_chunks.SCRATCH_BYTES"
    monkeypatch.setattr(chunks, 2 * 256 * 256)
    found = multiplied(lce(512, 256, 64, bias), CPU, {})
    project = Problem(
        1, 256, 256, 64, BF16, (0, 64, 1), (0, 1, 64), (0, 256, 1), (0, 0, 1) if bias else None
    )
    of_x = Problem(1, 256, 64, 256, BF16, (0, 256, 1), (0, 64, 1), (0, 64, 1))
    of_weight = Problem(1, 256, 64, 256, BF16, (0, 1, 256), (0, 64, 1), (0, 64, 1))
    added = replace(of_weight, added=(0, 64, 1))
    assert found == [project, of_x, of_weight, project, of_x, added]
    assert all(products.supported(problem) for problem in found)


def test_products_inside_of_operators_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = lce(2048, 8192, 1024)
    inside = multiplied(graph, CPU, {})
    assert len(inside) == 3
    bench = faster()
    after, found = tuned(graph, bench, inside=inside)
    assert {each.problem for each in found} == set(inside) == set(bench.timed)
    assert dict(after.algorithms) == dict.fromkeys(inside, THIRD)
    own = replace(inside[0], m=4096)
    graph = chain()
    after, found = tuned(graph, FakeBench({FIRST: 1.0}), inside=[own], machine="b")
    assert after.algorithms == ((own, FIRST),), "aten may take another"
    assert {each.problem for each in found} == {own, LAYER}


def summed() -> Plan:
    args = ([Ref("a"), Ref("a")], [Ref("b"), Ref("b")])
    step = AtenStep(str(sum_of_products.SUM_OF_PRODUCTS), args, (), (("y", half(64, 48)),), False)
    return plan({"a": half(64, 32), "b": half(32, 48)}, [step], (Ref("y"),))


def test_a_sum_of_products_notes_each() -> None:
    first = Problem(1, 64, 48, 32, BF16, (0, 32, 1), (0, 48, 1), (0, 48, 1))
    assert multiplied(summed(), CPU, {}) == [first, replace(first, added=(0, 48, 1))]


@pytest.mark.parametrize("measured", [0, 1, 2])
def test_a_module_passes_them_on(measured: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that it has; others are aten's. On the CPU by the library's stand-in."""
    inside = multiplied(summed(), CPU, {})
    algorithms = tuple((problem, SECOND) for problem in inside[:measured])
    text = emit_module(replace(summed(), algorithms=algorithms), "graph")
    assert ("module.algorithms({" in text) == (measured > 0)
    assert ('module.multiplying(function("sum_of_products"))' in text) == (measured > 0)
    run = load_text(text, "graph", "cpu", interpreter(summed()))
    asked = asked_of(monkeypatch)
    on_a_gpu_s_memory(monkeypatch)
    a, b = torch.randn(64, 32).to(BF16), torch.randn(32, 48).to(BF16)
    (found,) = run([a, b])
    assert asked == dict(algorithms)
    assert_near_exact([found], [a @ b * 2], [a.double() @ b.double() * 2], BF16)


def on_a_gpu_s_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors say that they are there."""
    stream = types.SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)


@pytest.mark.parametrize("form", ["plain", "bias", "add"])
def test_multiply_is_aten_s(form: str) -> None:
    a, b, bias, out = (torch.randn(*shape) for shape in ((5, 4), (4, 8), (8,), (5, 8)))
    given: dict[str, Any] = {"bias": bias} if form == "bias" else {"add": form == "add"}
    added = {"plain": 0.0, "bias": bias, "add": out.clone()}[form]
    seen: list[Problem] = []
    with noted(seen.append), using({}):
        multiply(a, b, out, **given)
    torch.testing.assert_close(out, a @ b + added)
    (problem,) = seen
    assert problem.added == {"plain": None, "bias": (0, 0, 1), "add": (0, 8, 1)}[form]
    multiply(a, b, out)
    assert len(seen) == 1


@pytest.mark.parametrize("form", ["plain", "bias", "add"])
def test_multiply_passes_addresses(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library's stand-in on the CPU: aten on the same addresses."""
    on_a_gpu_s_memory(monkeypatch)
    a, b, bias = (torch.randn(*s).to(BF16) for s in ((5, 16), (8, 16), (8,)))
    out = torch.randn(5, 8).to(BF16)
    given: dict[str, Any] = {"bias": bias} if form == "bias" else {"add": form == "add"}
    before = out.clone()
    seen: list[Problem] = []
    with noted(seen.append):
        multiply(a, b.t(), out.clone(), **given)
    asked = asked_of(monkeypatch)
    with using({seen[0]: SECOND}):
        multiply(a, b.t(), out, **given)
    assert asked == {seen[0]: SECOND}

    def wanted(dtype: torch.dtype) -> Tensor:
        added = {"plain": torch.zeros(8), "bias": bias, "add": before}[form].to(dtype)
        return torch.addmm(added, a.to(dtype), b.t().to(dtype))

    assert_near_exact([out], [wanted(BF16)], [wanted(torch.float64)], BF16)


def test_other_products_are_aten_s() -> None:
    """Of two dtypes; with a bias that has gaps; of lines that begin amid a vector, with a bias."""
    seen: list[Problem] = []
    wide, half_of = torch.empty(5, 3), torch.empty(5, 3, dtype=BF16)
    rows, columns = torch.ones(5, 4), torch.ones(4, 3)
    bias = torch.randn(6)
    with noted(seen.append), using({}):
        with pytest.raises(RuntimeError, match="dtype"):
            multiply(rows, columns, half_of)
        multiply(rows, columns, wide, bias=bias[::2])
        torch.testing.assert_close(wide, 4.0 + bias[::2].expand(5, 3))
        multiply(rows, columns, wide, bias=bias[:3])
        torch.testing.assert_close(wide, 4.0 + bias[:3].expand(5, 3))
    assert not seen
    with noted(seen.append):
        multiply(rows, columns, wide)
    with using({seen[0]: FIRST}):  # on the CPU
        multiply(rows, columns, wide)
    torch.testing.assert_close(wide, torch.full((5, 3), 4.0))


# --- what is written down


EVERYTHING = (
    (LAYER, FIRST),
    (replace(LAYER, added=(0, 0, 1), sums=(0, 1024, 1)), replace(SECOND, twin=1)),
    (replace(LAYER, batch=3, dtype=torch.float16, added=(7, 1024, 1), bias=True), THIRD),
    (replace(LAYER, stored=torch.float32), THIRD),
)


def test_rows_of_json() -> None:
    rows = json.loads(json.dumps(algorithm_rows(EVERYTHING)))
    assert algorithms_of(rows) == EVERYTHING


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: row.pop("algorithm"), "the fields product, algorithm"),
        (lambda row: row["algorithm"].pop("tile"), "an algorithm has the fields id, tile"),
        (lambda row: row["algorithm"].update(tile="20"), "tile is '20', not a number"),
        (lambda row: row["algorithm"].update(twin=-1), "twin is -1, not a number"),
        (lambda row: row["product"].update(more=1), "a product has the fields batch"),
        (lambda row: row["product"].update(m=None), "a product needs m"),
        (lambda row: row["product"].update(m=0), "m is 0, not a number"),
        (lambda row: row["product"].update(a=[1, 2]), "not three strides"),
        (lambda row: row["product"].update(bias=1), "bias is 1, not true or false"),
        (lambda row: row["product"].update(dtype="float64"), "no dtype 'float64'"),
    ],
)
def test_rows_that_are_none(change: Callable[[Any], object], words: str) -> None:
    rows = json.loads(json.dumps(algorithm_rows(EVERYTHING)))
    change(rows[0])
    with pytest.raises(ValueError, match=words):
        algorithms_of(rows)


def test_a_plan_file_has_them(tmp_path: Path) -> None:
    file, graph = PlanFile(tmp_path / "plan.json"), chain()
    bare = replace(graph, steps=tuple(replace(s, product=None) for s in graph.steps))  # type: ignore[call-arg,type-var]
    file.add(replace(bare, algorithms=EVERYTHING), bare, "forward", "h100")
    found = file.replayed(bare, "forward", "h100")
    assert found == replace(bare, algorithms=EVERYTHING)
    file.add(bare, bare, "forward", "h100")
    assert "products" not in file.path.read_text()
    assert file.replayed(bare, "forward", "h100") == bare


def test_a_plan_file_that_is_wrong_is_an_error(tmp_path: Path) -> None:
    file, graph = PlanFile(tmp_path / "plan.json"), chain()
    file.add(replace(graph, algorithms=EVERYTHING), graph, "forward", "h100")
    text = file.path.read_text()
    for wrong in ('"tile": -1', '"tile": "x"'):
        file.path.write_text(text.replace('"tile": 0', wrong))
        with pytest.raises(BadPlanFile, match="\"products\" of graph 'forward'"):
            file.replayed(graph, "forward", "h100")
    file.path.write_text(text.replace('"products": [', '"products": 3, "x": ['))
    with pytest.raises(BadPlanFile, match="it is no list"):
        file.replayed(graph, "forward", "h100")


def test_a_compilation_replays_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured when the file is made, and read from it from then on."""
    measured: list[Plan] = []

    def stand_in(graph: Plan, gm: GraphModule, options: Options) -> Any:
        measured.append(graph)
        record = Selection(title(LAYER), SECOND, FIRST, {FIRST: 2.0, SECOND: 1.0}, LAYER)
        return replace(graph, algorithms=((LAYER, SECOND),)), (record,)

    monkeypatch.setattr(engines, "with_algorithms", stand_in)
    path = tmp_path / "plan.json"
    first, again = compiled(path), compiled(path)
    assert len(measured) == 2
    for record in (first, again):
        assert {p.algorithms for p in record.plans.values()} == {((LAYER, SECOND),)}
    assert set(first.tuned) == {"forward", "backward"}
    assert not again.tuned


def test_a_report_says_so() -> None:
    graph = replace(chain(S0), algorithms=((LAYER, SECOND),))
    for rows, said in ((4096, True), (4095, False)):
        found = build_report([Part("forward", graph, {"s0": rows})], H100)
        assert [k.source.endswith("algorithm measured") for k in found.kernels] == [said] * 3


@pytest.mark.parametrize(
    "options",
    [
        Options(mode="max-autotune", engine="reference"),
        Options(mode="default"),
        Options(mode="reduce-overhead"),
        Options(mode="max-autotune"),  # the plan of a device that is not here
    ],
)
def test_only_max_autotune_on_a_gpu_measures(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert engines.with_algorithms(chain(), GraphModule({}, Graph()), options) == (chain(), ())


# --- the real thing


def mlp(x: Tensor, w: Tensor, c: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.linear(torch.tanh(torch.nn.functional.linear(x, w, c)), v)


def head(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w).float(), target)


PROGRAMS = {
    mlp: ((4096, 1024), (4096, 1024), (4096,), (1024, 4096)),
    head: ((4096, 1024), (32768, 1024)),
}


def step(f: Callable[..., Tensor], leaves: Sequence[Tensor], *rest: Tensor) -> list[Tensor]:
    result = f(*leaves, *rest)
    return [result, *torch.autograd.grad(result.float().square().mean(), leaves)]


def operands(f: Callable[..., Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those with a gradient, and the others."""
    leaves = [
        torch.randn(s, device="cuda", dtype=BF16).div_(8).requires_grad_() for s in PROGRAMS[f]
    ]
    rest = [torch.randint(32768, (4096,), device="cuda")] if f is head else []
    return leaves, rest


def assert_right(found: list[Tensor], f: Any, leaves: list[Tensor], rest: list[Tensor]) -> None:
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = step(head_in_float64 if f is head else f, wide, *rest)
    assert_near_exact(found, step(f, leaves, *rest), exact, BF16)


def head_in_float64(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w), target)


@pytest.mark.gpu
@pytest.mark.parametrize("f", PROGRAMS)
def test_on_a_gpu(
    f: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Measured once, then found in the cache, in a plan file, and in the graph's modules; the same
    bits each time.
    """
    from iocompiler.runtime.measure_products import GpuProductBench

    leaves, rest = operands(f)
    path = tmp_path / "plan.json"

    def run(**options: Any) -> tuple[Compilation, list[Tensor]]:
        records: list[Compilation] = []
        torch._dynamo.reset()
        backend = Compiler(on_compiled=records.append, strict=True, mode="max-autotune", **options)
        found = step(torch.compile(f, backend=backend, dynamic=False), leaves, *rest)
        return records[0], found

    def forbidden(*_: Any) -> None:
        raise AssertionError("measured a second time")

    made = [run(plan=path)]
    monkeypatch.setattr(GpuProductBench, "time", forbidden)
    made += [run(cache=False), run(plan=path), run(), run()]
    selections = [
        [s for found in record.tuned.values() for s in found if isinstance(s, Selection)]
        for record, _ in made
    ]
    assert selections[0] == selections[1] == selections[3] != []
    assert selections[2] == []
    assert (made[3][0].cache, made[4][0].cache) == ("stored", "found")
    for each in selections[0]:
        assert len(each.seconds) > 1
        assert 1e-6 < min(each.seconds.values()) < 1e-2
        assert each.gain >= 1.0
    algorithms = [{n: p.algorithms for n, p in r.plans.items()} for r, _ in made[:4]]
    assert all(each == algorithms[0] for each in algorithms)
    for _, results in made[1:]:
        assert all(map(torch.equal, results, made[0][1]))
    assert_right(made[0][1], f, leaves, rest)


@pytest.mark.gpu
@pytest.mark.parametrize("f", PROGRAMS)
def test_the_last_proposed_on_a_gpu(
    f: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is measured: every product by another algorithm than the library's first."""
    from iocompiler.runtime.measure_products import GpuProductBench

    def last(self: Any, problem: Problem, algorithms: Sequence[Algorithm]) -> list[float]:
        return [1.0 / (1 + place) for place in range(len(algorithms))]

    monkeypatch.setattr(GpuProductBench, "time", last)
    used: list[Algorithm] = []
    queue = products._prepare

    def noted_queue(*given: Any) -> Any:
        used.extend(each for each in given if isinstance(each, Algorithm))
        return queue(*given)

    monkeypatch.setattr(products, "_prepare", noted_queue)
    records: list[Compilation] = []
    leaves, rest = operands(f)
    backend = Compiler(on_compiled=records.append, cache=False, strict=True, mode="max-autotune")
    found = step(torch.compile(f, backend=backend, dynamic=False), leaves, *rest)
    assert_right(found, f, leaves, rest)
    chosen = {a for p in records[0].plans.values() for _, a in p.algorithms}
    assert chosen == set(used)
    assert chosen
