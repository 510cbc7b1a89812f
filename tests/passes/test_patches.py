"""Convolutions over separate patches as products: what is taken, what is declined, the results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import iocompiler as ioc
from iocompiler.backend import Compiler
from iocompiler.graph.findings import Miss, Rewrite, findings
from iocompiler.ops import target
from iocompiler.passes.patches import patches
from tests.accuracy import compare_with_eager

Captured = Callable[..., GraphModule]
aten = torch.ops.aten
BF16 = torch.bfloat16


def image(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape).to(dtype)


def rewritten(gm: GraphModule) -> tuple[GraphModule, int]:
    with target.planned_for((9, 0)):
        sites = patches(gm)
    gm.graph.lint()
    gm.recompile()
    return gm, sites


TAKEN: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "ViT": (
        lambda x, w, b: F.conv2d(x, w, b, stride=4).flatten(2).transpose(1, 2),
        (image(2, 3, 16, 12), image(8, 3, 4, 4), image(8)),
    ),
    "no bias": (lambda x, w: F.conv2d(x, w, stride=4), (image(2, 3, 8, 8), image(5, 3, 4, 4))),
    "a rest that belongs to no patch": (
        lambda x, w: F.conv2d(x, w, stride=(3, 2)),
        (image(2, 3, 11, 9), image(5, 3, 3, 2)),
    ),
    "audio": (lambda x, w: F.conv1d(x, w, stride=5), (image(3, 2, 32), image(4, 2, 5))),
    "video": (
        lambda x, w: F.conv3d(x, w, stride=(2, 3, 4)),
        (image(2, 2, 4, 6, 8), image(5, 2, 2, 3, 4)),
    ),
    "padding by name": (
        lambda x, w: F.conv2d(x, w, stride=2, padding="valid"),
        (image(2, 3, 8, 8), image(5, 3, 2, 2)),
    ),
    "one image, one patch": (
        lambda x, w: F.conv2d(x, w, stride=4),
        (image(1, 3, 4, 4), image(5, 3, 4, 4)),
    ),
    "nothing": (lambda x, w: F.conv2d(x, w, stride=4), (image(0, 3, 8, 8), image(5, 3, 4, 4))),
}

DECLINED: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], str]] = {
    "patches that overlap": (
        lambda x, w: F.conv2d(x, w, stride=2),
        (image(2, 3, 8, 8), image(5, 3, 4, 4)),
        "",
    ),
    "gaps": (lambda x, w: F.conv2d(x, w, stride=5), (image(2, 3, 9, 9), image(5, 3, 4, 4)), ""),
    "padding": (
        lambda x, w: F.conv2d(x, w, stride=4, padding=1),
        (image(2, 3, 8, 8), image(5, 3, 4, 4)),
        "",
    ),
    "padding to the same size": (
        lambda x, w: F.conv2d(x, w, padding="same"),
        (image(2, 3, 8, 8), image(5, 3, 3, 3)),
        "",
    ),
    "dilation": (
        lambda x, w: F.conv2d(x, w, stride=2, dilation=2),
        (image(2, 3, 8, 8), image(5, 3, 2, 2)),
        "",
    ),
    "groups": (
        lambda x, w: F.conv2d(x, w, stride=2, groups=2),
        (image(2, 4, 8, 8), image(6, 2, 2, 2)),
        "",
    ),
    "a kernel of one place": (
        lambda x, w: F.conv2d(x, w),
        (image(2, 3, 8, 8), image(5, 3, 1, 1)),
        "",
    ),
    "transposed": (
        lambda x, w: F.conv_transpose2d(x, w, stride=4),
        (image(2, 3, 8, 8), image(3, 5, 4, 4)),
        "",
    ),
    "float32": (
        lambda x, w: F.conv2d(x, w, stride=4),
        (image(2, 3, 8, 8, dtype=torch.float32), image(5, 3, 4, 4, dtype=torch.float32)),
        "torch.float32: convolutions may round where products do not",
    ),
    "channels last": (
        lambda x, w: F.conv2d(x, w, stride=4),
        (image(2, 3, 8, 8).to(memory_format=torch.channels_last), image(5, 3, 4, 4)),
        "channels last: a library reads them where they lie",
    ),
    "no batch": (
        lambda x, w: F.conv2d(x, w, stride=4),
        (image(3, 8, 8), image(5, 3, 4, 4)),
        "the input has no batch",
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_taken(captured: Captured, name: str) -> None:
    f, given = TAKEN[name]
    gm, sites = rewritten(captured(f, *given))
    assert sites == 1
    assert not list(gm.graph.find_nodes(op="call_function", target=aten.conv2d.default))
    wide = [x.double() for x in given]
    (got,), expected = gm(*given), f(*wide)
    assert got.shape == expected.shape
    assert got.is_contiguous() == f(*given).is_contiguous()
    torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=2e-2 * 6)


@pytest.mark.parametrize("name", DECLINED)
def test_declined(captured: Captured, name: str) -> None:
    f, given, reason = DECLINED[name]
    gm, sites = rewritten(captured(f, *given))
    assert sites == 0
    assert [miss.reason for miss in findings(gm) if isinstance(miss, Miss)] == [reason] * bool(
        reason
    )


def test_on_a_cpu_the_library_keeps_it(captured: Captured) -> None:
    gm = captured(*TAKEN["ViT"][:1], *TAKEN["ViT"][1])
    assert patches(gm) == 0


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.place = nn.Parameter(torch.randn(1, 13, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1) + self.place


@pytest.mark.parametrize("dynamic", [False, True])
def test_gradients_and_any_batch(dynamic: bool) -> None:
    def compiled(module: nn.Module) -> Any:
        return torch.compile(
            module, backend=Compiler(engine="reference", strict=True), dynamic=dynamic
        )

    given = {"x": torch.randn(3, 3, 17, 13, requires_grad=True)}
    with target.planned_for((9, 0)):
        for each in compare_with_eager(
            Embedding, given, compiled, dtype=BF16, device="cpu", train=True
        ):
            assert each.ok, each


def test_the_rows_are_the_only_copy() -> None:
    """Nothing is reordered behind the product: its reader takes it as it lies."""
    module = Embedding().to(BF16)
    report = ioc.explain(module, image(8, 3, 16, 12), device="h200")
    assert [each.variant for each in report.rewrites if isinstance(each, Rewrite)] == ["4 x 4"]
    names = [each.name for each in report.kernels]
    assert names == ["inference_clone", "aten.addmm.default", "inference_add"]
