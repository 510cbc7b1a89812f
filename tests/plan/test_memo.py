"""Equal layers are lowered once, and no plan is another for it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from iocompiler.backend import Compiler
from iocompiler.codegen.module import emit_module
from iocompiler.cost_model.device import DEVICES
from iocompiler.ops.random import UNIFORM
from iocompiler.plan.build import build_plan
from iocompiler.plan.data import Plan
from iocompiler.plan.lower import Lowered, lower
from iocompiler.plan.lowering import Unsupported
from iocompiler.plan.memo import Memo
from iocompiler.plan.structure import Structure, Structures
from iocompiler.tile.program import TileProgram
from iocompiler.tile.rows import RowsTooLong, check_rows
from tests.models.zoo import CASES, TINY

aten = torch.ops.aten
H200 = DEVICES["h200"]


class Forgetful(Memo):
    """Lowers every set of nodes anew."""

    def lower(self, home: Any, virtual: Any, outputs: Any) -> Lowered:
        try:
            lowered = lower(home, virtual, outputs, self.order)
            check_rows(lowered.program)
        except RowsTooLong as error:
            raise Unsupported(str(error)) from error
        return lowered


def planned(gm: GraphModule, memo_class: type[Memo]) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iocompiler.plan.dataflow.Memo", memo_class)
        return build_plan(gm, H200, "graph")


def assert_same_plans(
    fn: Callable[..., Any], *inputs: Any, dynamic: bool = False, **named: Any
) -> None:
    """Every flat graph of a training step is planned alike with the memo and without."""
    graphs: list[GraphModule] = []

    def engine(plan: Plan, gm: GraphModule) -> Callable[[list[Any]], Any]:
        graphs.append(gm)
        remembered, anew = planned(gm, Memo), planned(gm, Forgetful)
        assert repr(remembered) == repr(anew)  # the reasons of what is not fused too; 1 is not 1.0
        assert emit_module(remembered, "graph") == emit_module(anew, "graph")
        return lambda args: Interpreter(gm).boxed_run(args)

    backend = Compiler(engine=engine, strict=True)
    result = torch.compile(fn, backend=backend, dynamic=dynamic)(*inputs, **named)
    if isinstance(result, dict):
        result = result["loss"]
    if result.requires_grad:
        result.float().sum().backward()
    assert graphs


QUICK = {("bert-eager", False), ("residual-block", False), ("encoder-layer", True)}


def _models() -> list[object]:
    """A model of equal layers, convolutions, and sizes that are symbols; the rest is slow."""
    found = []
    for name in ("bert-eager", "gpt2-eager", "t5-eager", "residual-block", "encoder-layer"):
        for dynamic in (False, True):
            marks = () if (name, dynamic) in QUICK else (pytest.mark.slow,)
            label = f"{name}-{'dynamic' if dynamic else 'static'}"
            found.append(pytest.param(name, dynamic, marks=marks, id=label))
    return found


@pytest.mark.parametrize(("name", "dynamic"), _models())
def test_models_are_planned_alike(name: str, dynamic: bool) -> None:
    case = CASES[name]
    module = case.module(TINY, dropout=0.1).train()
    assert_same_plans(module, dynamic=dynamic, **case.inputs())


def test_writes_in_place_are_planned_alike() -> None:
    def step(p: Tensor, q: Tensor, g: Tensor, h: Tensor) -> Tensor:
        for weight, gradient in ((p, g), (q, h)):
            weight.mul_(0.9).add_(gradient)
        p.copy_(p.t().contiguous() + 1)  # no kernel: it is read at other elements
        return p.sum() + q.sum()

    assert_same_plans(step, *(torch.randn(16, 16) for _ in range(4)))


# --- what is remembered


def traced(fn: Callable[..., Any], *inputs: Tensor) -> dict[str, Node]:
    """The nodes of a functional graph, by name."""
    graph = make_fx(fn, tracing_mode="fake")(*inputs).graph
    return {node.name: node for node in graph.nodes}


def order_of(nodes: dict[str, Node]) -> dict[Node, int]:
    return {node: place for place, node in enumerate(nodes.values())}


def test_what_is_equal_is_lowered_once() -> None:
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    nodes = traced(lambda x, y: (x.exp().sum(1), y.exp().sum(1)), x, y)
    remembered = Memo(order_of(nodes))
    first, second = (
        remembered.lower(frozenset({nodes[s]}), {nodes[e]: None}, (nodes[s],))
        for e, s in (("exp", "sum_1"), ("exp_1", "sum_2"))
    )
    assert first.program is second.program
    assert [n.name for n in first.nodes] == ["x_1", "sum_1"]
    assert [n.name for n in second.nodes] == ["y_1", "sum_2"]


def test_layers_that_read_other_seeds_are_lowered_once() -> None:
    def layers(seeds: Tensor) -> list[Tensor]:
        numbers = [UNIFORM(seeds, which, [4, 6]) for which in (0, 3, 2, 1, 2, 2)]
        return [one + other.exp() for one, other in zip(numbers[::2], numbers[1::2], strict=True)]

    nodes = traced(layers, torch.arange(5))
    remembered = Memo(order_of(nodes))

    def lowered(number: str, *within: str) -> Lowered:
        home = frozenset(nodes[name] for name in within)
        return remembered.lower(home, (), (nodes[f"add{number}"],))

    first = lowered("", "uniform", "uniform_1", "exp", "add")
    second = lowered("", "uniform", "uniform_1", "exp", "add")
    assert second.own() is first.program
    second = lowered("_1", "uniform_2", "uniform_3", "exp_1", "add_1")
    assert second.program is first.program
    assert (_elements(first.own()), _elements(second.own())) == ([0, 3], [2, 1])
    third = lowered("_2", "uniform_4", "uniform_5", "exp_2", "add_2")
    assert third.program is not first.program, "one seed where they read two"
    assert _elements(third.own()) == [2]


def _elements(program: TileProgram) -> list[Any]:
    return [op.index.const for op in program.ops if op.kind == "load" and op.index is not None]


def test_a_reason_names_the_nodes_at_hand() -> None:
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    nodes = traced(lambda x, y: (x.cumsum(0), x.sum(1), y.cumsum(0), y.sum(1)), x, y)
    remembered = Memo(order_of(nodes))
    reasons = []
    for names in (("cumsum", "sum_1"), ("cumsum_1", "sum_2")):
        outputs = tuple(nodes[name] for name in names)
        with pytest.raises(Unsupported) as caught:
            remembered.lower(frozenset(outputs), (), outputs)
        reasons.append(str(caught.value))
    assert reasons == [
        f"{name} scans along another axis than the kernel's" for name in ("cumsum", "cumsum_1")
    ]
    assert len(remembered._known) == 1


# --- what tells structures apart


def structures(
    fn: Callable[..., Any], *inputs: Tensor, virtual: tuple[str, ...] = ()
) -> list[Structure]:
    """Of each result of ``fn`` as a kernel of its own, which computes ``virtual`` nodes inside."""
    nodes = traced(fn, *inputs)
    found = Structures(order_of(nodes))
    inside = {nodes[name]: None for name in virtual}
    results: Any = nodes["output"].args[0]
    return [found.of(frozenset({node}), inside, (node,))[0] for node in results]


SQUARE, OTHER = torch.randn(4, 4), torch.randn(4, 4)
DIFFERENT: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "another operator": (lambda x: (x.exp(), x.sin()), (SQUARE,)),
    "an operand read twice": (lambda x, y: (x * x, x * y), (SQUARE, OTHER)),
    "operands the other way round": (lambda x, y: (x - y.t(), x.t() - y), (SQUARE, OTHER)),
    "an int and a float": (lambda x: (aten.mul.Scalar(x, 1), aten.mul.Scalar(x, 1.0)), (SQUARE,)),
    "the sign of zero": (lambda x: (x * 0.0, x * -0.0), (SQUARE,)),
    "a keyword": (lambda x: (torch.add(x, x, alpha=2), torch.add(x, x, alpha=3)), (SQUARE,)),
    "strides": (lambda x, y: (x.exp(), y.exp()), (SQUARE, OTHER.t())),
    "a size": (lambda x, y: (x.exp(), y.exp()), (SQUARE, OTHER[:3])),
    "a dtype": (lambda x, y: (x.exp(), y.exp()), (SQUARE, OTHER.bfloat16())),
    "a dimension": (lambda x: (x.sum(0), x.sum(1)), (SQUARE,)),
    "a part of a split": (lambda x: [part.exp() for part in x.split(2)], (SQUARE,)),
    "a view": (lambda x, y: (x + y, x + y.t()), (SQUARE, OTHER)),
}  # fmt: skip


@pytest.mark.parametrize(("fn", "inputs"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_structures_differ_by(fn: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
    first, second = structures(fn, *inputs)
    assert first != second


def test_structures_differ_by_what_is_computed_inside() -> None:
    fn = lambda x, y: (x.exp().sum(1), y.exp().sum(1))
    first, second = structures(fn, SQUARE, OTHER, virtual=("exp",))
    assert first != second
    first, second = structures(fn, SQUARE, OTHER, virtual=("exp", "exp_1"))
    assert first == second


def test_structures_differ_by_who_carries_an_index() -> None:
    """`propagate` goes over users that are computed inside, though no kernel reads them."""
    fn = lambda x, y: (x.sum(1), y.sum(1), x.exp() + 1, y.exp() + 1)
    first, second, *_ = structures(fn, SQUARE, OTHER, virtual=("exp",))
    assert first != second


def test_structures_differ_by_a_constant_of_the_graph() -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.same, self.other = (torch.tensor(c) for c in (0.5, 0.5, 0.3))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x * self.one, x * self.same, x * self.other

    gm = symbolic_trace(Scaled())
    FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(SQUARE)
    nodes = {node.name: node for node in gm.graph.nodes}
    for node in nodes.values():
        if node.target is operator.mul:
            node.target = aten.mul.Tensor
    found = Structures(order_of(nodes))
    one, same, other = (
        found.of(frozenset({node}), (), (node,))[0] for node in nodes["output"].args[0]
    )
    assert one == same != other
