"""Kernels around convolutions with channels last, as they are emitted."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

from iocompiler.backend import Compiler
from iocompiler.codegen.module import emit_module
from iocompiler.compilation import Compilation
from iocompiler.plan.data import Plan
from iocompiler.runtime.load import load_text
from tests.passes.layout_cases import Bottleneck, Classifier, UNet, launches_for_free, variants
from tests.runtime.text_engine import bind


def _engine(plan: Plan, gm: GraphModule) -> Callable[[list[Any]], Any]:
    text = emit_module(plan, "graph")
    return load_text(text, "graph", "cpu", lambda spec: bind(text, spec))


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "shape"),
    [(Bottleneck, (2, 32, 5, 7)), (UNet, (2, 16, 8, 6)), (Classifier, (2, 8, 16, 12))],
)
def test_a_training_step(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    module, records = make(), list[Compilation]()
    x = torch.randn(shape, requires_grad=True)
    wanted = [x, *module.parameters()]
    with launches_for_free():
        backend = Compiler(engine=_engine, strict=True, on_compiled=records.append)
        out = torch.compile(module, backend=backend)(x)
        got = torch.autograd.grad(out.square().sum(), wanted)
    expected = module(x)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
    assert out.stride() == expected.stride()
    want = torch.autograd.grad(expected.square().sum(), wanted)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-3 * float(w.abs().max()))
    assert variants(records)
