"""Products that free memory run first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.plan.data import AtenStep, Plan, Ref, TensorSpec, ViewStep
from iocompiler.plan.early import early

F32 = torch.float32


def spec(*shape: int) -> TensorSpec:
    return TensorSpec(shape, torch.empty(shape, device="meta").stride(), F32, "cuda:0")


def mm(name: str, left: str, right: str, *shape: int, target: str = "aten.mm.default") -> AtenStep:
    return AtenStep(target, (Ref(left), Ref(right)), (), ((name, spec(*shape)),), False, name)


SAVED, GRAD, W = spec(64, 512), spec(64, 8), spec(8, 512)
INPUTS = (("saved", SAVED), ("grad", GRAD), ("primals_1", W))
TURNED = ViewStep("turned", "grad", TensorSpec((8, 64), (1, 8), F32, "cuda:0"))
DX, DW = mm("dx", "grad", "primals_1", 64, 512), mm("dw", "turned", "saved", 8, 512)


def test_what_frees_a_saved_input_comes_first_with_its_view() -> None:
    found = early([DX, TURNED, DW], INPUTS, (Ref("dx"), Ref("dw")), {})
    assert found == [TURNED, DW, DX]


def test_what_frees_nothing_stays() -> None:
    later = mm("again", "saved", "dw", 64, 64)
    for inputs, outputs, more in (
        (INPUTS, (Ref("dx"), Ref("saved")), []),  # returned
        (INPUTS, (Ref("dx"),), [later]),  # read again
        ((("primals_9", SAVED), *INPUTS[1:]), (Ref("dx"),), []),  # the caller's
    ):
        dw = mm("dw", "turned", inputs[0][0], 8, 512)
        steps = [DX, TURNED, dw, *more]
        assert early(steps, inputs, outputs, {}) == steps


def test_what_makes_more_than_it_frees_stays() -> None:
    steps = [DX, mm("large", "grad", "primals_1", 512, 512)]
    assert early(steps, INPUTS, (Ref("dx"),), {}) == steps


def test_not_before_what_it_reads_or_what_is_no_product() -> None:
    made = mm("made", "grad", "primals_1", 64, 512)
    after = mm("after", "turned", "made", 8, 512)
    steps = [DX, made, TURNED, after]
    assert early(steps, INPUTS, (Ref("dx"), Ref("after")), {}) == steps
    sort = mm("dw", "turned", "saved", 8, 512, target="aten.searchsorted.Tensor")
    assert early([DX, TURNED, sort], INPUTS, (Ref("dx"),), {}) == [DX, TURNED, sort]


def test_not_before_what_overwrites_what_it_reads() -> None:
    copy = AtenStep("aten.copy_.default", (Ref("saved"), Ref("grad")), (), (), False)
    steps = [DX, copy, TURNED, DW]
    assert early(steps, INPUTS, (Ref("dx"), Ref("dw")), {}) == steps


def test_of_a_layer_the_gradient_of_the_weight_is_first() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
    records: list[Compilation] = []
    torch._dynamo.reset()
    compiler = Compiler(engine="reference", strict=True, on_compiled=records.append)
    x = torch.randn(32, 8)
    loss = torch.compile(model, backend=compiler)(x).square().sum()
    loss.backward()
    found = [p.grad for p in model.parameters()]
    model.double().zero_grad()
    model(x.double()).square().sum().backward()
    for ours, exact in zip(found, model.parameters(), strict=True):
        assert isinstance(ours, Tensor)
        torch.testing.assert_close(ours.double(), exact.grad, rtol=1e-4, atol=1e-4)
    shapes = products(records[0].plans["backward"])
    assert shapes == [(8, 64), (32, 64), (64, 8)]


def products(plan: Plan) -> list[tuple[object, ...]]:
    calls = [step for step in plan.steps if isinstance(step, AtenStep)]
    return [made.shape for step in calls for _, made in step.outputs if made is not None]
