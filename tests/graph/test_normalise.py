from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from iocompiler.graph import view
from iocompiler.graph.normalise import normalise
from iocompiler.pipeline import Pipeline

aten = torch.ops.aten
Captured = Callable[..., GraphModule]
X = torch.randn(2, 3, 4)


def _normal(captured: Captured, f: Callable[..., Any], *inputs: torch.Tensor) -> list[Any]:
    """The targets after normalising, checked to compute what the function computes."""
    gm = captured(f, *[x.clone() for x in inputs])
    Pipeline(normalise).run(gm)
    assert gm.graph.find_nodes(op="placeholder")[0].target == "L_x_"
    results = gm(*[x.clone() for x in inputs])
    expected = f(*[x.clone() for x in inputs])
    expected = expected if isinstance(expected, tuple) else (expected,)
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)
        assert result.stride() == wanted.stride()
    return [node.target for node in view.calls(gm)]


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.view(6, 4) + 1,
        lambda x: x.reshape(6, 4) + 1,
        lambda x: x.flatten(0, 1) + 1,
        lambda x: x.view(-1, 4) + 1,
        lambda x: x.reshape_as(torch.ones(6, 4)) + 1,
        lambda x: x.unflatten(1, (3, 1)).view(6, 4) + 1,
    ],
)
def test_every_reshape_is_reshape(f: Any, captured: Captured) -> None:
    targets = _normal(captured, f, X)
    assert set(targets) <= {aten.reshape.default, aten.add.Tensor}


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.transpose(-1, -2) * 2,
        lambda x: x.mT * 2,
        lambda x: x.swapaxes(1, 2) * 2,
        lambda x: x[0].t() * 2,
    ],
)
def test_every_transposition_of_two_dims_is_transpose(f: Any, captured: Captured) -> None:
    assert aten.transpose.int in _normal(captured, f, X)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.to(torch.float64) * 2,
        lambda x: x.double() * 2,
        lambda x: x.type(torch.float64) * 2,
        lambda x: x.to(dtype=torch.float64, copy=True) * 2,
        lambda x: x.to(torch.ones(1, dtype=torch.float64)) * 2,
        lambda x: x.type_as(torch.ones(1, dtype=torch.float64)) * 2,
    ],
)
def test_every_conversion_is_to_dtype(f: Any, captured: Captured) -> None:
    assert _normal(captured, f, X) == [aten.to.dtype, aten.mul.Tensor]


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.contiguous() * 2,
        lambda x: x.float() * 2,
        lambda x: x.to(x.device) * 2,
        lambda x: x.view(2, 3, 4) * 2,
        lambda x: x.expand(2, 3, 4) * 2,
        lambda x: torch.nn.functional.dropout(x, 0.5, training=False) * 2,
        lambda x: torch.nn.functional.dropout(x, 0.0, training=True) * 2,
        lambda x: torch.multiply(x, 2),
    ],
)
def test_what_does_nothing_is_left_out(f: Any, captured: Captured) -> None:
    assert _normal(captured, f, X) == [aten.mul.Tensor]


def test_a_copy_that_changes_strides_stays(captured: Captured) -> None:
    targets = _normal(captured, lambda x: x.transpose(0, 1).contiguous() * 2, X)
    assert aten.contiguous.default in targets


def test_a_copy_stays(captured: Captured) -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x.to(torch.float32, copy=True)
        y[0] = 0
        return x + 1, y

    _normal(captured, f, X)


def test_an_output_that_is_a_view_of_an_input_stays_one(captured: Captured) -> None:
    assert _normal(captured, lambda x: x.view(2, 3, 4), X) == [aten.reshape.default]


def test_default_arguments_are_left_out(captured: Captured) -> None:
    gm = captured(lambda x: torch.add(x, x, alpha=1).sum(dim=-1, keepdim=False), X)
    Pipeline(normalise).run(gm)
    add, total = view.calls(gm)
    assert (len(add.args), add.kwargs) == (2, {})
    assert total.args[1:] == ([-1],)
    assert total.kwargs == {}


@pytest.mark.parametrize(
    ("f", "instead"),
    [
        (lambda x: torch.cat([torch.tensor([]), x]) * 2, None),
        (lambda x: torch.cat([x[:, :0], x, x[:, 3:]], dim=1) * 2, None),
        (lambda x: torch.cat([torch.tensor([]), x.mT], dim=-2) * 2, aten.clone.default),
        (lambda x: torch.cat([torch.tensor([]), x.mT], dim=-2), aten.clone.default),
        (lambda x: torch.cat([x[:, 1:], x[:, :1]], dim=1) * 2, aten.cat.default),
        (lambda x: torch.cat([torch.tensor([]).double(), x]) * 2, aten.cat.default),
        (lambda x: torch.cat([x[:0], x[:0]]) * 2, aten.cat.default),
    ],
)
def test_a_cat_of_one_tensor_is_a_copy_at_most(f: Any, instead: Any, captured: Captured) -> None:
    """As a cache that holds nothing yet asks for: `torch.cat([cache.keys, keys], dim=-2)`."""
    found = set(_normal(captured, f, X)) & {aten.cat.default, aten.clone.default}
    assert found == ({instead} if instead else set())


@pytest.mark.parametrize("kept", [True, False], ids=["fresh", "seen"])
def test_a_cat_that_is_returned(kept: bool, captured: Captured) -> None:
    """The caller gets what it is a copy of, if nobody else has that."""

    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 2
        cat = torch.cat([torch.empty(0), y], -2)
        return (cat, cat.exp()) if kept else (cat, y)

    targets = _normal(captured, f, X)
    assert (aten.cat.default in targets) != kept


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.cat([torch.empty(0), x], -2),
        lambda x: torch.cat([torch.empty(0), x[:1]], -2),
        lambda x: (torch.cat([torch.empty(0), y := x * 2], -2), y.view(-1)),
        lambda x: (torch.cat([torch.empty(0), y := x * 2]), torch.cat([torch.empty(0), y])),
    ],
    ids=["an input", "a view of one", "a view of it", "the same again"],
)
def test_a_cat_that_is_returned_stays(f: Any, captured: Captured) -> None:
    assert aten.cat.default in _normal(captured, f, X)


def test_a_cat_written_into_stays(captured: Captured) -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.cat([torch.tensor([]), x])
        y[0].zero_()
        return y, x + 1

    assert aten.cat.default in _normal(captured, f, X)


def test_dynamic_sizes(captured: Captured) -> None:
    gm = captured(lambda x: x.contiguous().view(x.shape[0], -1).float() + 1, X, dynamic=True)
    Pipeline(normalise).run(gm)
    targets = [node.target for node in view.calls(gm)]
    assert aten.contiguous.default not in targets
    assert aten.to.dtype not in targets
    assert aten.reshape.default in targets


# in place ------------------------------------------------------------------------------------


def test_in_place_on_a_temporary_becomes_functional(captured: Captured) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        y.mul_(2).relu_()
        y += x
        return y

    assert _normal(captured, f, X) == [
        aten.add.Tensor,
        aten.mul.Tensor,
        aten.relu.default,
        aten.add.Tensor,
    ]


def test_readers_before_the_write_keep_the_old_value(captured: Captured) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        before = y * 3
        y.mul_(2)
        return before + y

    targets = _normal(captured, f, X)
    assert aten.mul_.Tensor not in targets


def test_masked_fill_on_scores(captured: Captured) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        scores = x @ x.transpose(-1, -2)
        scores.masked_fill_(scores > 0, float("-inf"))
        return scores

    assert aten.masked_fill.Scalar in _normal(captured, f, X)


@pytest.mark.parametrize("written", ["input", "view before", "view after", "view of input"])
def test_in_place_others_can_see_stays(written: str, captured: Captured) -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if written == "input":
            return (x.mul_(2) * 1,)
        y = x + 1
        if written == "view before":
            other = y[0]
            y.mul_(2)
            return other * 1, y
        if written == "view after":
            y[0].mul_(2)
            return (y * 1,)
        x.view(-1).mul_(2)
        return (x * 1,)

    assert aten.mul_.Tensor in _normal(captured, f, X)


def test_in_place_under_another_grad_mode_stays(captured: Captured) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        with torch.no_grad():
            y.mul_(2)
        return y * 1

    assert aten.mul_.Tensor in _normal(captured, f, X)


def test_in_place_that_would_change_the_dtype_stays(captured: Captured) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.to(torch.bfloat16)
        y.add_(x)
        return y * 1

    assert aten.add_.Tensor in _normal(captured, f, X)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.narrow(1, 0, 2) * 2,
        lambda x: x.narrow(1, 1, 2) * 2,
        lambda x: x.narrow(-1, 0, 3) * 2,
    ],
)
def test_narrow_is_a_slice(f: Any, captured: Captured) -> None:
    assert _normal(captured, f, X) == [aten.slice.Tensor, aten.mul.Tensor]


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.narrow(1, -2, 2) * 2,
        lambda x: x[:, ::2] * 2,
        lambda x: x[:, 1:] * 2,
        lambda x: x[:, :-1] * 2,
    ],
)
def test_a_part_stays_a_part(f: Any, captured: Captured) -> None:
    assert len(_normal(captured, f, X)) == 2


def test_a_slice_of_everything_is_nothing(captured: Captured) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return aten.slice.Tensor(aten.slice.Tensor(x, 1, 0, 2**63 - 1), 2) * 2

    assert _normal(captured, f, X) == [aten.mul.Tensor]
