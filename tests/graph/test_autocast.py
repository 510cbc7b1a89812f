from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from iocompiler.graph import view
from iocompiler.graph.autocast import autocast
from iocompiler.graph.capture import capture
from iocompiler.graph.normalise import normalise
from iocompiler.pipeline import Pipeline

aten = torch.ops.aten
Captured = Callable[..., GraphModule]


def _normal(gm: GraphModule) -> list[Any]:
    Pipeline(normalise).run(gm)
    return [node.target for node in view.calls(gm)]


def test_casts_become_nodes_and_switches_go(captured: Captured) -> None:
    linear = torch.nn.Linear(4, 4)

    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = linear(x)
        return h.float() + x

    gm = captured(f, torch.randn(3, 4))
    assert _normal(gm) == [
        *[aten.to.dtype] * 3,
        aten.linear.default,
        aten.to.dtype,
        aten.add.Tensor,
    ]
    assert [view.value(n).dtype for n in view.calls(gm)] == [torch.bfloat16] * 4 + [
        torch.float32
    ] * 2


def test_a_weight_is_cast_once(captured: Captured) -> None:
    linear = torch.nn.Linear(4, 4)

    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear(linear(x).relu())

    gm = captured(f, torch.randn(3, 4))
    assert _normal(gm).count(aten.to.dtype) == 3


def test_a_weight_written_in_between_is_cast_again(captured: Captured) -> None:
    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            first = x @ w
            w.add_(1)
            return first + x @ w

    x, w = torch.randn(3, 3), torch.randn(3, 3)
    gm = captured(f, x, w.clone())
    _normal(gm)
    inputs = [x, w.clone()]
    torch.testing.assert_close(gm(*inputs)[0], f(x, w.clone()))


def test_operators_it_does_not_touch_stay(captured: Captured) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.nn.functional.layer_norm(x.exp(), (4,)).float()

    assert _normal(captured(f, torch.randn(3, 4))) == [aten.exp.default, aten.layer_norm.default]


def test_a_region_inside_that_switches_off(captured: Captured) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = x @ x
            with torch.autocast("cpu", enabled=False):
                h = h.float() @ x
            return h @ x

    gm = captured(f, torch.randn(4, 4))
    _normal(gm)
    dtypes = [view.value(n).dtype for n in view.calls(gm, aten.matmul.default)]
    assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16]
    x = torch.randn(4, 4)
    torch.testing.assert_close(gm(x)[0], f(x))


def test_what_casts_inside_keeps_its_switches(captured: Captured) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.einsum("ij,kj->ik", x.exp(), x).float()

    x = torch.randn(3, 4)
    gm = captured(f, x)
    targets = _normal(gm)
    torch.testing.assert_close(gm(x)[0], f(x))
    if torch.amp.autocast_mode._enter_autocast in targets:
        assert targets.index(torch.amp.autocast_mode._enter_autocast) > targets.index(
            aten.exp.default
        )


def test_mixed_dtypes_that_only_autocast_makes_one(
    captured: Captured, caplog: pytest.LogCaptureFixture
) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = x.bfloat16()
            attended = torch.nn.functional.scaled_dot_product_attention(x, x, h)
            return torch.bmm(x, attended).float()

    x = torch.randn(2, 3, 3)
    gm = captured(f, x)
    targets = _normal(gm)
    assert torch.amp.autocast_mode._enter_autocast not in targets
    torch.testing.assert_close(gm(x)[0], f(x))
    assert not [r for r in caplog.records if r.levelname == "ERROR"]


def test_the_cuda_lists_without_cuda() -> None:
    graph = torch.fx.symbolic_trace(lambda x, w: (torch.softmax(x @ w, -1), (x @ w).exp()))
    with FakeTensorMode():
        inputs = [torch.empty(4, 4, device="cuda") for _ in range(2)]
    with autocast({"cuda": torch.float16}):
        gm = capture(graph, inputs)
        _normal(gm)
        (softmax,) = view.calls(gm, aten.softmax.int)
        (exp,) = view.calls(gm, aten.exp.default)
        assert view.value(softmax).dtype == torch.float32
        assert view.regions(gm)[softmax].autocast == ()
    assert torch.float32 in (*softmax.args, softmax.kwargs.get("dtype"))
    assert exp.args[0].target is aten.to.dtype


def _fails_inside() -> None:
    with autocast({"cpu": torch.bfloat16, "cuda": None}):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        raise KeyError


@pytest.mark.parametrize("enabled", [True, False])
def test_the_setting_is_put_back(enabled: bool) -> None:
    with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
        with pytest.raises(KeyError):
            _fails_inside()
        assert torch.is_autocast_enabled("cpu") is enabled
        assert torch.is_autocast_cache_enabled()
