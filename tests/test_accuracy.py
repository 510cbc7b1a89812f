"""The accuracy rule itself: what it must let pass, and what it must catch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.accuracy import (
    Results,
    assert_as_accurate_as_eager,
    compare,
    named_outputs,
    relative_error,
)
from tests.models.zoo import CASES

NAN = float("nan")


def test_relative_error_is_a_ratio_of_norms() -> None:
    assert relative_error(torch.tensor([3.0, 4.4]), torch.tensor([3.0, 4.0])) == pytest.approx(0.08)
    assert relative_error(torch.tensor([1e-8]), torch.tensor([0.0]), floor=1e-2) == pytest.approx(
        1e-6
    )
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.empty(0, 3), torch.empty(0, 3)) == 0.0


@pytest.mark.parametrize(
    ("out", "ref"),
    [
        ([NAN, 1.0], [0.0, 1.0]),
        ([0.0, 1.0], [NAN, 1.0]),
        ([math.inf], [1.0]),
        ([math.inf], [-math.inf]),
    ],
)
def test_a_special_value_in_one_only_is_an_infinite_error(
    out: list[float], ref: list[float]
) -> None:
    assert relative_error(torch.tensor(out), torch.tensor(ref)) == math.inf


def test_the_same_special_values_are_no_error() -> None:
    out = torch.tensor([NAN, math.inf, -math.inf, 2.0])
    assert relative_error(out, out.clone()) == 0.0


def test_another_shape_is_refused() -> None:
    with pytest.raises(AssertionError, match="shape"):
        relative_error(torch.zeros(2, 1), torch.zeros(2))


def _one(value: Tensor, gradient: Tensor | None = None) -> Results:
    return Results({"out": value}, {} if gradient is None else {"w": gradient})


@pytest.mark.parametrize(("factor", "ok"), [(1.9, True), (2.1, False)])
def test_a_value_may_err_twice_as_much(factor: float, ok: bool) -> None:
    ref = torch.ones(100, dtype=torch.float64)
    eager, ours = (ref.float() * (1 + 1e-3 * f) for f in (1, factor))
    (found,) = compare(_one(ours), _one(eager), _one(ref), torch.float32)
    assert found.ok is ok


@pytest.mark.parametrize(("factor", "ok"), [(2.9, True), (3.1, False)])
def test_a_gradient_may_err_thrice_as_much(factor: float, ok: bool) -> None:
    ref = torch.ones(100, dtype=torch.float64)
    eager, ours = (ref.float() * (1 + 1e-3 * f) for f in (1, factor))
    found = compare(_one(ref, ours), _one(ref, eager), _one(ref, ref), torch.float32)
    assert found[-1].ok is ok


def test_a_loss_that_eager_hits_by_luck_may_still_err_by_a_rounding() -> None:
    ref = torch.tensor(1.0, dtype=torch.float64)
    for error, ok in ((0.003, True), (0.02, False)):
        found = compare(_one(ref + error), _one(ref.clone()), _one(ref), torch.bfloat16)
        assert found[0].ok is ok


def test_a_gradient_in_one_only_is_refused() -> None:
    ref = torch.ones(3)
    with pytest.raises(AssertionError, match="gradient of w"):
        compare(
            Results({}, {"w": None}),
            Results({}, {"w": ref}),
            Results({}, {"w": ref}),
            torch.float32,
        )


def test_another_dtype_is_refused() -> None:
    ref = torch.ones(20)
    with pytest.raises(AssertionError, match=r"compiled gives torch.float64"):
        compare(_one(ref.double()), _one(ref), _one(ref.double()), torch.float32)


def test_outputs_are_named_by_place() -> None:
    x = torch.zeros(1)
    assert list(named_outputs({"loss": x, "hidden": (x, [x]), "cache": object(), "n": 3})) == [
        "loss",
        "hidden.0",
        "hidden.1.0",
    ]


def _wrong_output(module: nn.Module) -> Callable[..., Any]:
    return lambda x: module(x) * 1.001


def _wrong_gradient(module: nn.Module) -> Callable[..., Any]:
    def call(x: Tensor) -> Any:
        out = module(x)
        return out.detach() + 1.001 * (out - out.detach())

    return call


def _nan(module: nn.Module) -> Callable[..., Any]:
    return lambda x: module(x).index_fill(0, torch.tensor([0]), NAN)


@pytest.mark.parametrize("wrong", [_wrong_output, _wrong_gradient, _nan])
def test_a_wrong_compiler_is_caught(wrong: Callable[[nn.Module], Callable[..., Any]]) -> None:
    case = CASES["mlp"]
    with pytest.raises(AssertionError, match="less accurate than eager"):
        assert_as_accurate_as_eager(case.module, case.inputs(), wrong, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mlp", "residual-block", "cell-loop"])
def test_eager_passes_its_own_rule(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    assert_as_accurate_as_eager(case.module, case.inputs(), lambda module: module, dtype=dtype)


def test_a_buffer_left_alone_is_caught() -> None:
    def forgetful(module: nn.Module) -> Callable[..., Any]:
        def call(**inputs: Tensor) -> Any:
            before = {n: b.clone() for n, b in module.named_buffers()}
            out = module(**inputs)
            for name, buffer in module.named_buffers():
                buffer.data = before[name]
            return out

        return call

    case = CASES["residual-block"]
    with pytest.raises(AssertionError, match="running_mean"):
        assert_as_accurate_as_eager(case.module, case.inputs(), forgetful, dtype=torch.float32)
