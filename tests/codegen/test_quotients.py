"""Coarse quotients and powers of known numbers step by step, as a GPU rounds them: an instruction
for an inverse or a power of two may be off by some last bits, each way is tried.
"""

from __future__ import annotations

import math
import re

import pytest
import torch

from iocompiler.codegen.expressions import divided, powered
from iocompiler.plan.data import Schedule
from iocompiler.tile.program import Builder
from tests.codegen.compiling import compiled, instructions
from tests.codegen.programs import BF16, F32, X0, axes, ins, outs

_COUNT = 1 << 20
_SMALLEST, _LEAST_NORMAL = 2.0**-149, 2.0**-126


def _any_numbers(seed: int) -> torch.Tensor:
    """Of any bits, denormal numbers, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (_COUNT,), generator=generator).to(torch.int32)
    edges = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**126, 2.0**127, 1e-45])
    return torch.cat([bits.view(torch.float32), edges.repeat_interleave(len(edges)), edges])


def _range(divisor: torch.Tensor) -> torch.Tensor:
    exponent = ~divisor.view(torch.int32) & 0x7F800000
    return (exponent - 0x01000000).clamp(min=0x00800000).view(torch.float32)


def _moved(x: torch.Tensor, ulps: int) -> torch.Tensor:
    usual = x.isfinite() & (x != 0)
    return torch.where(usual, (x.view(torch.int32) + ulps).view(torch.float32), x)


@pytest.mark.parametrize("ulps", [-1, 0, 1])
def test_a_coarse_quotient_of_any_two_numbers(ulps: int) -> None:
    x, y = _any_numbers(1), _any_numbers(2)
    y[_COUNT:] = y[_COUNT:].flip(0)
    scale = _range(y)
    within = y * scale
    assert (within[y.isfinite() & (y.abs() >= _LEAST_NORMAL)].abs() >= 0.5).all()
    inverse = _moved(1.0 / within, ulps)  # of no denormal number, nor is one: nothing is flushed
    assert (within == 0).equal(y == 0)
    assert not (inverse.abs() < _LEAST_NORMAL)[y.isfinite()].any()
    found, exact = x * scale * inverse, x.double() / y.double()
    assert found.isnan().equal(exact.isnan())
    assert found[exact == 0].eq(0).all()
    assert found.signbit()[~exact.isnan()].equal(exact.signbit()[~exact.isnan()])
    largest = torch.finfo(F32).max
    over = exact.abs() > largest * (1 + 2.0**-22)
    assert found[over].isinf().all()
    usual = exact.abs() <= largest * (1 - 2.0**-22)
    error = (found.double() - exact).abs()[usual]
    assert (error <= (exact.abs() * 2.0**-22)[usual] + 2 * _SMALLEST).all()  # of two roundings


@pytest.mark.parametrize("ulps", [-2, 0, 2])
@pytest.mark.parametrize("base", [0.9, 0.999, 0.5, 3.0, 10000.0, 1e-30, 1.0 - 2.0**-24])
def test_a_power_of_a_known_number(base: float, ulps: int) -> None:
    called = re.fullmatch(r"_power_of\(x, (.*), (.*)\)", powered(base, "x", F32))
    assert called
    high, low = (torch.tensor(float(text)) for text in called.groups())
    held = torch.tensor(base).double()
    least, most = sorted((-126 / held.log2().item(), 128 / held.log2().item()))
    x = torch.cat([torch.rand(1 << 16) * (most - least) + least, torch.arange(1.0, 4096.0)])
    product = x * high
    rest = (x.double() * high - product.double()).float()
    rest = (x.double() * low + rest.double()).float()
    factor = (rest.double() * math.log(2.0) + 1.0).float()
    found = _moved(torch.exp2(product.double()).float(), ulps) * factor
    exact = held ** x.double()
    usual = (exact >= 2 * _LEAST_NORMAL) & (exact < torch.finfo(F32).max / 2)
    assert usual.any()
    error = (found.double() / exact - 1).abs()[usual]
    assert error.max() <= 4 * 2.0**-23
    plain = (torch.exp2(product.double()) / exact - 1).abs()[usual]
    assert base == 0.5 or plain.max() > 4 * error.max()  # the second part is needed


@pytest.mark.parametrize("base", [0.0, -2.0, 1.0, 1e-40, math.inf, math.nan])
def test_powers_that_are_left_to_the_library(base: float) -> None:
    assert powered(base, "x", F32) == ""
    assert powered(0.9, "x", torch.float64) == ""


def test_a_coarse_quotient_by_a_number_is_a_product() -> None:
    assert divided("x", 3.0, F32, coarse=True) == "x * 0.3333333432674408"
    for divisor in (0.0, 2.0**-126, 2.0**126, math.inf, math.nan):
        assert divided("x", divisor, F32, coarse=True) == ""


def test_one_inverse_for_all_elements() -> None:
    """Of sixteen elements of a thread, one inverse: of what it divides by, it finds one."""

    def inverses(index: object) -> int:
        build = Builder()
        by = build.load("b", index, F32)
        quotient = build.map("coarse_div", build.load("a", X0, F32), by)
        build.store("out", X0, build.cast(quotient, BF16))
        buffers = ins(a=(F32, 4096), b=(F32, 4096)) + outs(out=(BF16, 4096))
        program = build.program(axes(4096), (), buffers)
        text = instructions(compiled(program, Schedule("pointwise", x_block=512, num_warps=1)))
        assert "CALL" not in text  # no slow path
        return text.count("MUFU.RCP")

    assert (inverses(X0 * 0), inverses(X0)) == (1, 16)
