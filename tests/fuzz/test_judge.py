"""What the judge of random programs calls wrong, and what it leaves to a program's conditioning."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.accuracy import Results
from tests.fuzz import judge
from tests.fuzz.judge import judged, verdict_of
from tests.fuzz.perturbed import Perturbed
from tests.fuzz.program import ATTENTION, Given, Program, Step

Call = Callable[..., tuple[Tensor, ...]]

SQUARE = Given((6, 6), grad=True)


def _program(texts: str, *given: Given) -> Program:
    """Steps v0, v1 ... as ``texts`` has them, one a line; the last is returned."""
    lines = texts.split("\n")
    names = [f"x{i}" for i in range(len(given))]
    steps = tuple(Step(f"v{i}", text, ()) for i, text in enumerate(lines))
    train = any(one.grad for one in given)
    return Program(tuple(zip(names, given, strict=True)), steps, (steps[-1].name,), train)


def _scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` with a gradient that is ``factor`` times what it should be."""
    return x.detach() + factor * (x - x.detach())


NORM = "F.layer_norm(x0 / 3, (2,))"  # a gradient of nearly nothing: what is left of a cancellation
EXPANDED = "F.group_norm(x0.expand(1, 2), 1)"  # a gradient of exactly nothing
DISTANCE = "torch.cdist(x0 * 1.1, x0 * 1.1)"  # roots of what roundings leave, on the diagonal

FAULTS: dict[str, tuple[Program, Call]] = {
    "a constant": (
        _program("x0.sin() * 2 + 1", SQUARE),
        lambda x: (x.sin() * 2 + 1.001,),
    ),
    "a dropped mask": (
        _program("x0.masked_fill(x1, -30.0).softmax(-1)", SQUARE, Given((6, 6), "bool")),
        lambda x, m: (x.softmax(-1),),
    ),
    "a transposed operand": (
        _program("x0 @ x1", SQUARE, SQUARE),
        lambda x, y: (x @ y.mT,),
    ),
    "a gradient without a factor": (
        _program("x0.tanh() * 3", SQUARE),
        lambda x: (_scaled_gradient(x.tanh() * 3, 1 / 3),),
    ),
    "a gradient with the wrong sign": (
        _program("x0.tanh()", SQUARE),
        lambda x: (_scaled_gradient(x.tanh(), -1.0),),
    ),
    "a hundredth in bfloat16": (
        _program("x0.sin()", Given((6, 6), "bfloat16")),
        lambda x: (x.sin() * 1.01,),
    ),
    "NaN where there is none": (
        _program("x0.abs().sqrt()", SQUARE),
        lambda x: (x.abs().sqrt().masked_fill(x == x.max(), float("nan")),),
    ),
    "infinity where there is none": (
        _program("x0.exp()", Given((6, 6), "float16")),
        lambda x: (x.exp().masked_fill(x == x.max(), float("inf")),),
    ),
    "no NaN where there is one": (
        _program("(x0.abs() * -1).sqrt()", Given((6, 6))),
        lambda x: (x.abs().sqrt(),),
    ),
    "a dtype": (_program("x0.sin()", Given((6, 6), "float16")), lambda x: (x.float().sin(),)),
    "a finite number where eager overflows": (
        _program("x0.abs().to(float16).add(1).mul(60000).to(float32).div(60000)", Given((6, 6))),
        lambda x: (x * 7,),
    ),
    "a gradient beyond what cancels": (
        _program(NORM, Given((3, 2), grad=True)),
        lambda x: (_scaled_gradient(F.layer_norm(x / 3, (2,)), 1.0) + 1e-3 * (x - x.detach()),),
    ),
    "a gradient where float64 has none": (
        _program(EXPANDED, Given((1, 1), grad=True)),
        lambda x: (F.group_norm(x.expand(1, 2), 1) + 1e-2 * (x - x.detach()),),
    ),
    "a distance beyond its conditioning": (
        _program(DISTANCE, Given((30, 3))),
        lambda x: (torch.cdist(x * 1.1, x * 1.1) + 0.01 * torch.eye(30),),
    ),
    "one distance of many": (
        _program(DISTANCE, Given((30, 3))),
        lambda x: (torch.cdist(x * 1.1, x * 1.1).index_fill(0, torch.tensor([4]), 0.5),),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_called_wrong(name: str) -> None:
    program, faulty = FAULTS[name]
    assert not verdict_of(program, program.function())
    assert verdict_of(program, faulty)


CANCELLED: dict[str, tuple[Program, Call]] = {
    "the norm of two numbers": (
        _program(EXPANDED, Given((1, 1), grad=True)),
        lambda x: (
            F.group_norm(x.expand(1, 2), 1)
            + 1e-5 * (x - x.detach()),  # as (g - mean(g)) * rstd has it in another order
        ),
    ),
    "a distance of a point to itself": (
        _program(DISTANCE, Given((1, 8))),
        lambda x: (torch.cdist(x * 1.1, (x.double() * 1.1).float()),),
    ),
    "a value that one reader has before it is rounded": (
        _program("F.mse_loss(x0 * 1.1, (x0 * 1.1).clone())", Given((40,), "bfloat16")),
        lambda x: (F.mse_loss(x.float() * 1.1, (x * 1.1).float()).to(x.dtype),),
    ),
    "a product that is subtracted from its own multiply-add": (
        _program("F.smooth_l1_loss(x0 * x0, x0 * x0)", Given((40,))),
        lambda x: (F.smooth_l1_loss((x.double() * x.double()).float(), x * x * (1 + 2e-7)),),
    ),
    "the difference of what is computed twice": (
        _program("x0 * 0.1 - x0 * 0.1", Given((40,), "float16")),
        lambda x: ((x.float() * 0.1 - x * 0.1).half(),),
    ),
}


@pytest.mark.parametrize("name", CANCELLED)
def test_roundings_that_fall_differently_are_right(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, otherwise = CANCELLED[name]
    assert not verdict_of(program, otherwise)
    monkeypatch.setattr(judge, "PERTURBED", 0)
    assert verdict_of(program, otherwise)


FINER: dict[str, tuple[Program, Call]] = {
    "a product that underflows": (
        _program("x0.to(float16).mul(1e-5).mul(1e-4).to(float32).mul(1e6)", Given((6, 6))),
        lambda x: (x.half().float() * 1e-3,),
    ),
    "what is too large for eager's dtype, and not for a wider one": (
        _program("(x0.to(float16) * 20).exp().mul(0.5).log()", Given((6, 6))),
        lambda x: ((x.half().float() * 20 - 0.6931471805599453).half(),),
    ),
    "a number that only eager lacks": (
        _program("F.normalize(x0 * 0, dim=-1)", Given((6, 6), "float16")),
        lambda x: (x * 0,),
    ),
}


@pytest.mark.parametrize("name", FINER)
def test_what_only_eager_rounds_away_is_right(name: str) -> None:
    program, finer = FINER[name]
    assert not verdict_of(program, finer)


@pytest.mark.parametrize(("place", "right"), [(0, True), (1, False)])
def test_an_infinity_is_right_where_a_run_of_eager_has_one(place: int, right: bool) -> None:
    ref = torch.full((20,), 65519.0, dtype=torch.float64)  # a unit below what float16 rounds to inf
    eager, moved = (ref.clamp(max=65504).half() for _ in range(2))
    ours = eager.clone()
    moved[0] = ours[place] = float("inf")
    runs = [Results({"0 v0": t}, {}) for t in (ours, eager, ref, moved)]
    assert (not judged(*runs[:3], lambda: runs[3:])) is right


def test_attention_of_a_vector_is_judged_without_the_fused_kernel() -> None:
    steps = (Step("v0", ATTENTION, ("x0", "x1")),)
    program = Program((("x0", Given((5,))), ("x1", Given((5, 5)))), steps, ("v0",))
    assert not verdict_of(program, program.function())
    assert verdict_of(program, lambda x, y: (((x @ y.mT).softmax(-1) @ y) * 1.1,))


def _bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_results_move_by_units_in_the_last_place(dtype: torch.dtype) -> None:
    """Operands do too, of each reader by itself."""
    x = (torch.rand(1000) + 0.1).to(dtype)
    with Perturbed(0):
        moved, apart = x.sin(), x - x
    assert 2 <= (_bits(moved).long() - _bits(x.sin()).long()).abs().max() <= 5
    assert 0 < apart.abs().max() <= 4 * torch.finfo(dtype).eps
    with Perturbed(1):
        assert not torch.equal(moved, x.sin())


def test_what_rounds_nothing_stays() -> None:
    x, y = torch.randn(2, 1000)

    def results() -> list[Tensor]:
        whole = torch.arange(-8.0, 9).repeat(100)
        return [x[::2], x.clone(), torch.maximum(x, y), x.gather(0, x.argsort()), x.double(),
                torch.stack([x, y]).flip(0), torch.where(x > 0, x, y), whole + whole]  # fmt: skip

    with Perturbed(0):
        moved, narrowed = results(), x.to(torch.bfloat16)
    assert all(map(torch.equal, moved, results()))
    assert not torch.equal(narrowed, x.to(torch.bfloat16))


def test_gradients_and_what_is_written_in_place_move() -> None:
    x = torch.randn(1000, requires_grad=True)
    y = x.detach().clone()
    loss = x.sin().sum()
    with Perturbed(0):
        (moved,) = torch.autograd.grad(loss, x)
        y.mul_(0.3)
    torch.testing.assert_close(moved, x.cos(), atol=1e-6, rtol=1e-6)
    assert not torch.equal(moved, x.cos())
    assert not torch.equal(y, x.detach() * 0.3)


def test_roundings_within_a_kernel_move() -> None:
    points = torch.arange(5.0, 35).reshape(30, 1)  # more than 25: a product, of whole numbers
    x = torch.randn(8, 1, requires_grad=True)
    normed, grad = F.layer_norm(x, (1,)), torch.randn(8, 1)
    assert not torch.cdist(points, points).diagonal().any()
    assert not torch.autograd.grad(normed, x, grad, retain_graph=True)[0].any()
    with Perturbed(0):
        distances = torch.cdist(points, points).diagonal()
        (moved,) = torch.autograd.grad(normed, x, grad)
    assert 0 < distances.max() < 0.1
    assert 0 < moved.abs().max() < 1e-3


def test_the_result_of_a_kernel_moves_in_its_own_dtype() -> None:
    x = torch.randn(40, 5).to(torch.bfloat16)
    with Perturbed(0):
        moved = [F.layer_norm(x, (5,)), x.softmax(-1)]
    for found, exact in zip(moved, [F.layer_norm(x, (5,)), x.softmax(-1)], strict=True):
        assert (_bits(found).int() - _bits(exact).int()).abs().max() <= 2
        assert not torch.equal(found, exact)
