from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.fx import Graph, GraphModule

import iocompiler as ioc
from iocompiler.errors import DuplicatePass, InvalidGraph, InvalidOption, NotAPass, UnknownPass
from iocompiler.passes.attention import attention
from iocompiler.pipeline import Done, Pipeline

aten = torch.ops.aten


def _named(name: str, sites: int = 0, stage: str = "graph", respells: bool = False) -> ioc.Pipeline:
    def function(gm: GraphModule) -> int:
        return sites

    function.__name__ = name
    return ioc.graph_pass(stage=stage, respells=respells)(function)


def _graph() -> GraphModule:
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2)
    y = graph.call_function(aten.relu.default, (x,))
    y.meta["val"] = torch.empty(2)
    graph.output((y,))
    return GraphModule({}, graph)


A, B, C = _named("a"), _named("b"), _named("c")


def test_before_after_without_return_new_pipelines() -> None:
    pipeline = Pipeline(A, B)
    assert pipeline.before("b", C).names == ("a", "c", "b")
    assert pipeline.after("b", C).names == ("a", "b", "c")
    assert pipeline.without("a").names == ("b",)
    assert pipeline.names == ("a", "b")
    assert len(pipeline) == 2
    assert pipeline[0] is A
    assert pipeline[1:] == Pipeline(B)


def test_two_can_be_put_in_at_once() -> None:
    assert Pipeline(A).before("a", B, C).names == ("b", "c", "a")


@pytest.mark.parametrize("method", ["before", "after", "without"])
def test_a_wrong_name_is_answered_with_the_names(method: str) -> None:
    with pytest.raises(UnknownPass, match=r"no pass named 'd'; the passes are a, b"):
        getattr(Pipeline(A, B), method)("d")


def test_a_close_name_is_suggested() -> None:
    with pytest.raises(UnknownPass, match=r"did you mean 'normalise'"):
        ioc.DEFAULT.without("normalize")


def test_a_name_stands_once() -> None:
    with pytest.raises(DuplicatePass, match="named 'a' already"):
        Pipeline(A).after("a", _named("a"))


def test_nothing_can_be_assigned() -> None:
    with pytest.raises(TypeError):
        ioc.DEFAULT[0] = A  # type: ignore[index]


def test_stages_are_told_apart() -> None:
    flat = _named("flat", stage="flat")
    pipeline = Pipeline(A, flat, B)
    assert pipeline.stage("graph").names == ("a", "b")
    assert pipeline.stage("flat").names == ("flat",)


def test_observers_see_each_pass_and_the_graph_before_the_first() -> None:
    seen: list[tuple[str, int, int, int]] = []

    def observer(gm: GraphModule, done: Done) -> None:
        seen.append((done.name, done.number, done.total, done.sites))

    changed = Pipeline(_named("one", 3), _named("two", 4, respells=True)).run(_graph(), [observer])
    assert seen == [("capture", 0, 2, 0), ("one", 1, 2, 3), ("two", 2, 2, 4)]
    assert changed == 3


def test_an_error_says_in_which_pass() -> None:
    @ioc.graph_pass
    def breaks(gm: GraphModule) -> int:
        raise KeyError("x")

    with pytest.raises(KeyError) as caught:
        Pipeline(A, breaks, B).run(_graph())
    assert caught.value.__notes__ == ["in pass 'breaks' (2 of 3)"]


def test_a_graph_that_does_not_lint_is_refused() -> None:
    @ioc.graph_pass
    def out_of_order(gm: GraphModule) -> int:
        x, relu, _ = gm.graph.nodes
        relu.append(x)
        return 1

    with pytest.raises(InvalidGraph, match="'out_of_order' left an invalid graph"):
        Pipeline(out_of_order).run(_graph())


def test_fake_values_a_pass_leaves_out_are_computed() -> None:
    @ioc.graph_pass
    def adds(gm: GraphModule) -> int:
        relu = list(gm.graph.nodes)[1]
        with gm.graph.inserting_after(relu):
            gm.graph.call_function(aten.unsqueeze.default, (relu, 0))
        return 1

    gm = _graph()
    Pipeline(adds).run(gm)
    assert list(gm.graph.nodes)[2].meta["val"].shape == (1, 2)


def test_a_call_that_cannot_be_made_is_refused() -> None:
    @ioc.graph_pass
    def wrong(gm: GraphModule) -> int:
        relu = list(gm.graph.nodes)[1]
        with gm.graph.inserting_after(relu):
            gm.graph.call_function(aten.unsqueeze.default, (relu, 7))
        return 1

    with pytest.raises(InvalidGraph, match="'wrong' left an invalid graph"):
        Pipeline(wrong).run(_graph())


@pytest.mark.parametrize("wrong", [lambda gm: 0, "attention", None])
def test_what_is_no_pass_is_refused(wrong: object) -> None:
    with pytest.raises(NotAPass, match="graph_pass"):
        ioc.DEFAULT.after("attention", wrong)  # type: ignore[arg-type]


def test_a_pipeline_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidOption, match="'pipeline' must be a Pipeline"):
        ioc.Compiler([attention])  # type: ignore[arg-type]


def test_compilers_are_pickled_by_the_names_of_their_passes() -> None:
    compiler = ioc.Compiler(ioc.DEFAULT.without("patches"), strict=True)
    again = pickle.loads(pickle.dumps(compiler))
    assert again.pipeline == compiler.pipeline
    assert again.options == compiler.options
    with pytest.raises(pickle.PicklingError, match="the pass 'a' does not stand"):
        pickle.dumps(ioc.Compiler(Pipeline(A)))
    assert copy.deepcopy(ioc.Compiler(Pipeline(A))).pipeline == Pipeline(A)
