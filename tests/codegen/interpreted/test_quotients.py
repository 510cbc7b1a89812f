"""Coarse quotients and roots of any two numbers, as the emitted text computes them."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

from iocompiler.plan.data import Schedule
from iocompiler.tile.program import Builder
from tests.codegen.kernels import run_kernel
from tests.codegen.programs import F32, X0, axes, ins, outs

_COUNT = 1 << 16
_SMALLEST = 2.0**-149


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NaN and of overflow, which are meant
@pytest.mark.parametrize("fn", ["coarse_div", "coarse_sqrt"])
def test_any_numbers(fn: str) -> None:
    build = Builder()
    operands = [build.load("a", X0, F32)]
    if fn == "coarse_div":
        operands.append(build.load("b", X0, F32))
    build.store("out", X0, build.map(fn, *operands))
    given = {"a": (F32, _COUNT), "b": (F32, _COUNT)}
    program = build.program(axes(_COUNT), (), ins(**given) + outs(out=(F32, _COUNT)))
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (2, _COUNT), generator=generator).to(torch.int32)
    a, b = bits.view(torch.float32)
    buffers = {"a": a, "b": b, "out": torch.empty(_COUNT)}
    run_kernel(program, buffers, {}, Schedule("pointwise", x_block=1 << 14))
    out = buffers["out"]
    exact = a.double() / b.double() if fn == "coarse_div" else a.double().sqrt()
    rounded = exact.float()
    assert out.isnan().equal(rounded.isnan())
    usual = rounded.isfinite()
    assert out[~usual & ~rounded.isnan()].equal(rounded[~usual & ~rounded.isnan()])
    error = (out.double() - exact).abs()[usual]
    assert (error <= exact.abs()[usual] * 2.0**-22 + 2 * _SMALLEST).all()
    assert (out == rounded)[usual].double().mean() > 0.6  # most are the nearest number there is
