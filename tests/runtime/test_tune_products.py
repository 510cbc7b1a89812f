"""The library's algorithms for products by the clock: the fastest is kept, measured once, and used
for the product it was measured for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule

from iocompiler import engines, scheduling
from iocompiler.codegen.module import emit_module
from iocompiler.ops.library_product import Algorithm, Problem
from iocompiler.options import Options
from iocompiler.patience import Patience
from iocompiler.plan.addressed import addressed
from iocompiler.plan.data import AtenStep, Ref, Step
from iocompiler.report.build import Part, build_report
from iocompiler.runtime.ahead import multiplied
from iocompiler.runtime.load import load_text
from iocompiler.runtime.measure import DoesNotFit
from iocompiler.runtime.tune_products import problems_of, tune_products
from iocompiler.runtime.values import in_numbers
from tests.runtime.algorithms import (
    BF16,
    CPU,
    FIRST,
    H100,
    LAYER,
    SECOND,
    THIRD,
    FakeBench,
    asked_of,
    chain,
    faster,
    half,
    lce,
    mm,
    tuned,
)
from tests.runtime.plans import S0, UNMEASURED, interpreter, on_a_gpu, plan


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
    bench, now = faster(), iter([0.0, 0.5, 1.5, 2.5])
    _, found = tuned(chain(layers=8), bench, inside=[short, deep], clock=lambda: next(now))
    assert bench.timed == [LAYER, deep]
    assert len(found) == 2
    bench = faster()
    assert tune_products(chain(), H100, {}, bench, None, most=0.0) == (chain(), ())
    assert not bench.timed
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


def test_a_report_says_so() -> None:
    graph = replace(chain(S0), algorithms=((LAYER, SECOND),))
    for rows, said in ((4096, True), (4095, False)):
        found = build_report([Part("forward", graph, {"s0": rows})], H100)
        assert [k.source.endswith("algorithm measured") for k in found.kernels] == [said] * 3


@pytest.mark.parametrize("options", UNMEASURED)
def test_only_max_autotune_on_a_gpu_measures(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gm = GraphModule({}, Graph())
    assert scheduling.with_algorithms(chain(), gm, options, Patience()) == (chain(), ())


def test_max_autotune_measures_a_plan_as_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own products and, by what `ahead` finds, those inside of its operators."""
    own = replace(LAYER, m=4096, added=LAYER.out)

    class OnAGpu(FakeBench):
        def __init__(self, device: torch.device) -> None:
            super().__init__({SECOND: 1.0})
            assert device.type == "cuda"

        def release(self) -> None:
            released.append(self.timed)

    released: list[list[Problem]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(engines, "device_row", lambda gm, options: H100)
    monkeypatch.setattr("iocompiler.runtime.measure_products.GpuProductBench", OnAGpu)
    monkeypatch.setattr("iocompiler.runtime.ahead.multiplied", lambda *given: [own])
    gm, options = GraphModule({}, Graph()), Options(mode="max-autotune")
    patience = Patience()
    patience.started -= 100.0
    after, found = scheduling.with_algorithms(chain(), gm, options, patience)
    assert dict(after.algorithms) == {LAYER: SECOND, own: SECOND}
    assert {each.chosen for each in found} == {SECOND}
    assert released == [[LAYER, own]]
    options = Options(mode="default")
    assert scheduling.with_algorithms(chain(), gm, options, Patience()) == (chain(), ())
