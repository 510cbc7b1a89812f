from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import iocompiler as ioc
from iocompiler.errors import BadPattern, BadReplacement
from iocompiler.graph import view
from iocompiler.graph.findings import Rewrite, findings
from iocompiler.graph.match import RewritePass
from iocompiler.pipeline import Pipeline

aten = torch.ops.aten
Captured = Callable[..., GraphModule]


@ioc.rewrite(
    lambda x: aten.relu.default(aten.relu.default(x)),
    where=lambda m: m["x"].meta["val"].dim() == 2,
)
def relu_of_relu(x: Any) -> Any:
    return aten.relu.default(x)


@ioc.rewrite(lambda x, y: aten.add.Tensor(aten.mul.Tensor(x, y), x))
def mul_add(x: Any, y: Any) -> Any:
    return aten.mul.Tensor(x, aten.add.Tensor(y, 1))


def _targets(gm: GraphModule) -> list[Any]:
    return [node.target for node in view.calls(gm)]


def _apply(gm: GraphModule, rule: RewritePass) -> int:
    return Pipeline(rule).run(gm)


def test_the_name_is_the_functions() -> None:
    assert relu_of_relu.name == "relu_of_relu"


def test_takes_and_records_where(captured: Captured) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x.relu().relu()

    x = torch.randn(3, 4)
    gm = captured(f, x)
    assert _apply(gm, relu_of_relu) == 1
    assert _targets(gm) == [aten.relu.default]
    line = f.__code__.co_firstlineno + 1
    assert findings(gm) == (Rewrite("relu_of_relu", f"test_match.py:{line}"),)
    assert torch.equal(gm(x)[0], x.relu())


def test_keeps_name_trace_and_value(captured: Captured) -> None:
    gm = captured(lambda x: x.relu().relu() + 1, torch.randn(3, 4))
    last = list(view.calls(gm, aten.relu.default))[-1]
    name, trace = last.name, last.meta["stack_trace"]
    _apply(gm, relu_of_relu)
    (node,) = view.calls(gm, aten.relu.default)
    assert (node.name, node.meta["stack_trace"]) == (name, trace)
    assert view.value(node).shape == (3, 4)


def test_collapses_a_chain_in_one_go(captured: Captured) -> None:
    gm = captured(lambda x: x.relu().relu().relu().relu(), torch.randn(3, 4))
    assert _apply(gm, relu_of_relu) == 3
    assert _targets(gm) == [aten.relu.default]


def test_where_declines(captured: Captured) -> None:
    gm = captured(lambda x: x.relu().relu(), torch.randn(3))
    assert _apply(gm, relu_of_relu) == 0
    assert findings(gm) == ()


def test_an_inner_value_read_elsewhere_declines(captured: Captured) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        inner = x.relu()
        return inner.relu() + inner

    assert _apply(captured(f, torch.randn(3, 4)), relu_of_relu) == 0


def test_another_grad_mode_inside_declines(captured: Captured) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            inner = x.relu()
        return inner.relu()

    assert _apply(captured(f, torch.randn(3, 4)), relu_of_relu) == 0


def test_autocast_inside_declines(captured: Captured) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inner = x.relu()
        return inner.relu()

    assert _apply(captured(f, torch.randn(3, 4)), relu_of_relu) == 0


def test_an_input_written_in_between_declines(captured: Captured) -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        product = x * y
        x.add_(1)
        return product + x

    x, y = torch.randn(3), torch.randn(3)
    assert _apply(captured(f, x, y), mul_add) == 0


def test_a_view_of_an_input_written_in_between_declines(captured: Captured) -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        product = x * y
        x[1:].zero_()
        return product + x

    assert _apply(captured(f, torch.randn(3), torch.randn(3)), mul_add) == 0


def test_a_write_elsewhere_does_not_matter(captured: Captured) -> None:
    def f(x: torch.Tensor, y: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
        product = x * y
        counter.add_(1)
        return product + x

    assert _apply(captured(f, torch.randn(3), torch.randn(3), torch.zeros(1)), mul_add) == 1


@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: x * y + x,
        lambda x, y: x + x * y,
        lambda x, y: y * x + x,
        lambda x, y: x + y * x,
        lambda x, y: torch.add(x * y, x, alpha=1),
    ],
)
def test_either_order_and_defaults_spelled_out(f: Any, captured: Captured) -> None:
    x, y = torch.randn(3), torch.randn(3)
    gm = captured(f, x, y)
    assert _apply(gm, mul_add) == 1
    inputs = [{"L_x_": x, "L_y_": y}[str(p.target)] for p in gm.graph.find_nodes(op="placeholder")]
    torch.testing.assert_close(gm(*inputs)[0], x * (y + 1))


@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: x * y + y * 2,
        lambda x, y: x * y - x,
        lambda x, y: torch.add(x * y, x, alpha=2),
        lambda x, y: x * y + x.abs(),
    ],
)
def test_look_alikes_are_declined(f: Any, captured: Captured) -> None:
    assert _apply(captured(f, torch.randn(3), torch.randn(3)), mul_add) == 0


def test_constants_may_be_parameters(captured: Captured) -> None:
    @ioc.rewrite(lambda x, a, b: aten.mul.Tensor(aten.mul.Tensor(x, a), b))
    def scales(x: Any, a: float, b: float) -> Any:
        return aten.mul.Tensor(x, a * b)

    gm = captured(lambda x: x * 2.0 * 3.0, torch.randn(3))
    assert _apply(gm, scales) == 1
    (node,) = view.calls(gm)
    assert node.args[1] == 6.0


def test_constants_are_compared(captured: Captured) -> None:
    @ioc.rewrite(lambda x: aten.softmax.int(x, -1))
    def last(x: Any) -> Any:
        return aten.exp.default(aten.log_softmax.int(x, -1))

    assert _apply(captured(lambda x: x.softmax(0), torch.randn(2, 3)), last) == 0
    assert _apply(captured(lambda x: x.softmax(-1), torch.randn(2, 3)), last) == 1
    assert _apply(captured(lambda x: x.softmax(1), torch.randn(2, 3)), last) == 1


def test_several_spellings(captured: Captured) -> None:
    @ioc.rewrite(
        lambda x: aten.mul.Tensor(x, aten.sigmoid.default(x)),
        lambda x: aten.div.Tensor(x, aten.add.Tensor(aten.exp.default(aten.neg.default(x)), 1)),
    )
    def silu(x: Any) -> Any:
        return aten.silu.default(x)

    x = torch.randn(5)
    for f in (lambda x: x * x.sigmoid(), lambda x: x.sigmoid() * x, lambda x: x / (1 + (-x).exp())):
        gm = captured(f, x)
        assert _apply(gm, silu) == 1
        torch.testing.assert_close(gm(x)[0], torch.nn.functional.silu(x))


def test_python_operators_in_a_pattern(captured: Captured) -> None:
    @ioc.rewrite(lambda x, y: -(x * y))
    def negated(x: Any, y: Any) -> Any:
        return aten.mul.Tensor(aten.neg.default(x), y)

    assert _apply(captured(lambda x, y: -(x * y), torch.randn(3), torch.randn(3)), negated) == 1


def test_dynamic_sizes(captured: Captured) -> None:
    gm = captured(lambda x: x.relu().relu(), torch.randn(3, 4), dynamic=True)
    assert _apply(gm, relu_of_relu) == 1
    assert _targets(gm) == [aten.relu.default]


def test_a_replacement_of_another_dtype_is_an_error(captured: Captured) -> None:
    @ioc.rewrite(lambda x: aten.relu.default(x))
    def narrows(x: Any) -> Any:
        return aten.to.dtype(aten.relu.default(x), torch.bfloat16)

    gm = captured(lambda x: x.relu(), torch.randn(3))
    with pytest.raises(BadReplacement, match=r"gives bfloat16\[3\] on cpu where float32\[3\]"):
        _apply(gm, narrows)


def test_a_replacement_names_what_the_pattern_binds() -> None:
    with pytest.raises(BadPattern, match="the pattern binds no z"):

        @ioc.rewrite(lambda x: aten.relu.default(x))
        def unknown(z: Any) -> Any:
            return z


def test_a_pattern_is_made_of_operators() -> None:
    with pytest.raises(BadPattern, match="returns the result of one operator"):
        ioc.rewrite(lambda x: x)(lambda x: x)
    with pytest.raises(BadPattern, match="write aten ops"):
        ioc.rewrite(lambda x: aten.relu.default(x.sin()))(lambda x: x)


def test_graph_pass_is_the_free_form(captured: Captured) -> None:
    @ioc.graph_pass
    def count(gm: GraphModule) -> int:
        return len(list(view.calls(gm)))

    assert count.name == "count"
    assert Pipeline(count).run(captured(lambda x: x.sin().cos(), torch.randn(2))) == 2
