"""Single elements are passed by address: layers that differ in them alone share a kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler.backend import Compiler
from iocompiler.codegen.module import emit_module
from iocompiler.compilation import Compilation
from iocompiler.ops import target
from iocompiler.plan.data import KernelStep, Plan, ViewStep
from iocompiler.plan.elements import Argument, by_address
from iocompiler.tile.index import Affine
from iocompiler.tile.program import Builder, TileProgram
from tests.codegen.programs import F32, X0, axes, ins, outs


def picking(*elements: int, whole: bool = False) -> TileProgram:
    """out = x * some elements of ``few``, and its element x too if ``whole``."""
    build = Builder()
    total = build.load("x", X0, F32)
    for element in elements:
        total = build.map("mul", total, build.load("few", Affine.constant(element), F32))
    if whole:
        total = build.map("mul", total, build.load("few", X0, F32))
    build.store("out", X0, total)
    buffers = ins(x=(F32, 8), few=(F32, 8)) + outs(out=(F32, 8))
    return build.program(axes(8), (), buffers)


def test_each_element_has_an_address_of_its_own() -> None:
    program, arguments = by_address(picking(5, 2, 5))
    assert arguments == (
        Argument("x"), Argument("few", 5), Argument("few", 2), Argument("out")
    )  # fmt: skip
    assert [(b.name, b.elements) for b in program.buffers] == [
        ("x", 8), ("few_0", 1), ("few_1", 1), ("out", 8)
    ]  # fmt: skip
    assert program == by_address(picking(0, 7, 0))[0]
    assert program != by_address(picking(0, 7, 7))[0]


def test_a_tensor_that_is_read_elsewhere_too_stays_whole() -> None:
    program = picking(5, whole=True)
    found, arguments = by_address(program)
    assert found is program
    assert arguments == (Argument("x"), Argument("few"), Argument("out"))


def test_an_element_that_only_a_mask_could_mean_has_no_address() -> None:
    for program in (picking(5, 8), picking(5, -1)):
        assert by_address(program)[0] is program


def compiled(function: Any, *given: Tensor) -> tuple[Any, dict[str, Plan]]:
    records: list[Compilation] = []
    backend = Compiler(engine="reference", strict=True, on_compiled=records.append)
    with target.planned_for((9, 0)):
        found = torch.compile(function, backend=backend)(*given)
    return found, records[0].plans


def test_layers_with_dropout_share_their_kernels() -> None:
    def layers(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(4):
            x = F.dropout(F.relu(x @ w), 0.5, training=True) + x
        return x

    x, w = torch.randn(32, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    torch.manual_seed(1)
    out, plans = compiled(layers, x, w)
    for name, plan in plans.items():
        steps = [step for step in plan.steps if isinstance(step, KernelStep)]
        drawing = [s for s in steps if any(op.kind == "rand" for op in s.program.ops)]
        assert len(drawing) >= 3, name
        assert len({step.kernel for step in drawing}) < len(drawing), name
        text = emit_module(plan, name)
        assert text.count("# %% kernel") < len(steps)
    # masks differ from layer to layer, and gradients go through the masks that were drawn
    torch.manual_seed(1)
    again, _ = compiled(layers, x, w)
    torch.testing.assert_close(out, again, rtol=0, atol=0)
    tangent = torch.randn_like(out)
    (dx,) = torch.autograd.grad(out, x, tangent, retain_graph=True)
    with torch.no_grad():
        step = 1e-3 * torch.randn_like(x)
        torch.manual_seed(1)
        moved, _ = compiled(layers, x + step, w)
    expected = ((moved - out) * tangent).sum() / 1e-3
    torch.testing.assert_close((dx * step).sum() / 1e-3, expected, rtol=0.1, atol=1.0)


def test_elements_of_a_parameter_are_read_where_they_lie() -> None:
    def scaled(x: Tensor, scales: Tensor) -> Tensor:
        return torch.cat([(x * scales[n]).softmax(-1) @ x for n in (0, 3, 6)])

    x, scales = torch.randn(16, 16), torch.randn(7)
    found, plans = compiled(scaled, x, scales)
    torch.testing.assert_close(found, scaled(x, scales))
    (plan,) = plans.values()
    assert {v.offset for v in plan.steps if isinstance(v, ViewStep) and v.spec.shape == ()} >= {
        3,
        6,
    }
    steps = [step for step in plan.steps if isinstance(step, KernelStep)]
    assert len({s.kernel for s in steps if any(op.fn == "exp" for op in s.program.ops)}) == 1
