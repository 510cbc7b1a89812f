"""GELU of every bfloat16 and float16 number, as a kernel computes it."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

from iocompiler.plan.data import Schedule
from iocompiler.tile.program import Builder, TileProgram
from tests.codegen.kernels import run_kernel
from tests.codegen.programs import F32, X0, axes, ins, outs

_COUNT = 1 << 16
# of Phi: what the series of Abramowitz and Stegun is off, and float32's roundings
_PHI = 3e-7


def gelu(dtype: torch.dtype) -> TileProgram:
    build = Builder()
    x = build.cast(build.load("a", X0, dtype), F32)
    # rounded by torch: Triton's interpreter rounds denormal numbers wrongly
    build.store("out", X0, build.map("mul", x, build.map("normal_cdf", x)))
    return build.program(axes(_COUNT), (), ins(a=(dtype, _COUNT)) + outs(out=(F32, _COUNT)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NaN and of overflow, which are meant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gelu_of_every_short_float_is_rounded_once(dtype: torch.dtype) -> None:
    x = torch.arange(_COUNT, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = torch.empty(_COUNT)
    run_kernel(gelu(dtype), {"a": x, "out": wide}, {}, Schedule("pointwise", x_block=1 << 14))
    out = wide.to(dtype)
    exact = F.gelu(x.double())
    exact = torch.where(x == float("-inf"), float("nan"), exact)  # -inf 0, as on a GPU
    specials = ~exact.to(dtype).isfinite()
    torch.testing.assert_close(
        out[specials], exact.to(dtype)[specials], rtol=0, atol=0, equal_nan=True
    )
    info = torch.finfo(dtype)
    usual = ~specials & (x.abs() >= info.smallest_normal)  # the rest Triton's interpreter misreads
    error = (out.double() - exact).abs()[usual]
    rounding = (exact.abs() * info.eps / 2).clamp(min=info.smallest_normal * info.eps / 2)[usual]
    assert (error <= rounding + _PHI * x.double().abs()[usual].clamp(max=9.0)).all()
    # nearly all are the nearest number there is
    nearest = (out == exact.to(dtype))[usual & (x.abs() < 4)]
    assert nearest.double().mean() > 0.99
