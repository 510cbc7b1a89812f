"""Small networks of convolutions, written as users write them, and a way to hold them against
eager: values, gradients, and the strides of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iocompiler.compilation import Compilation
from iocompiler.ops import target
from tests.accuracy import assert_as_accurate_as_eager
from tests.compiling import compiler

BF16 = torch.bfloat16


class Bottleneck(nn.Module):
    """The residual block of a ResNet."""

    def __init__(self, width: int = 32, inner: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 1, bias=False)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(inner, width, 1, bias=False)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(c) for c in (inner, inner, width))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x
        result: Tensor = self.relu(y)
        return result


class Plain(nn.Module):
    """One module, under the name of its input here."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


class Chain(nn.Module):
    """Convolutions of the given channels, one after the other, an activation between them."""

    def __init__(self, *channels: int, kernel: int = 3, **options: Any) -> None:
        super().__init__()
        options = {"padding": kernel // 2, **options}
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, kernel, **options) for a, b in pairwise(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.silu(conv(x))
        return x


class UNet(nn.Module):
    """Down, up again, and the skip beside it; group norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, 1)
        self.norm, self.up = nn.GroupNorm(4, 32), nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.mix = nn.Conv2d(32, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.first(x))
        deep = F.silu(self.norm(self.down(skip)))
        result: Tensor = self.mix(torch.cat([skip, self.up(deep)], 1))
        return result


class Classifier(nn.Module):
    """Stem, pools, a flatten and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(8, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
        self.conv, self.head = nn.Conv2d(16, 32, 3, padding=1), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.stem(x))), 3, 2, 1)
        x = F.adaptive_avg_pool2d(F.relu(self.conv(x)), (1, 1))
        result: Tensor = self.head(torch.flatten(x, 1))
        return result


class Tokens(nn.Module):
    """Convolutions whose places become tokens: a view of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.convs, self.head = Chain(16, 16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.convs(x).flatten(2).transpose(1, 2))
        return result


class Squeezed(nn.Module):
    """Squeeze and excitation between two convolutions, an upsampling behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Chain(16, 16, 16), Chain(16, 16)
        self.down, self.up = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        scale = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return F.interpolate(self.two(x * scale), scale_factor=2.0)


class Shared(nn.Module):
    """One weight for two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.conv(F.relu(self.conv(x))))


class Several(nn.Module):
    """What stands between convolutions leaves too, and so does a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Chain(16, 16, 16), Chain(16, 16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = self.one(x)
        z = self.two(y)
        return y, z, z[:, :4], (z > 0).to(z.dtype)


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv3d(8, 8, 3, padding=1), nn.Conv3d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm3d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(self.bn(self.one(x)))))


@contextmanager
def launches_for_free(planned: tuple[int, int] | None = (9, 0)) -> Iterator[None]:
    """A GPU (the one there is, or one that is planned for) on which the copies of small tensors pay
    too.
    """
    real = target.row
    free = mock.patch.object(target, "row", side_effect=lambda x: replace(real(x), launch_s=0.0))
    with free, target.planned_for(planned):
        yield


def variants(records: list[Compilation]) -> list[str]:
    """What the pass says of each graph it changed."""
    found = (each for record in records for each in record.rewrites)
    return [each.variant for each in found if each.pattern == "layout"]


def reasons(records: list[Compilation]) -> set[str]:
    found = (each for record in records for each in record.misses)
    return {each.reason for each in found if each.pattern == "layout"}


def check(
    make: Callable[[], nn.Module],
    *shape: int,
    dtype: torch.dtype = BF16,
    train: bool = True,
    device: str = "cpu",
    **options: Any,
) -> list[Compilation]:
    """As accurate as eager, with eager's strides; the record of what was compiled."""
    records: list[Compilation] = []
    compile_ = compiler(records, **options)

    def seeded() -> nn.Module:
        torch.manual_seed(0)
        return make()

    draws = [{"x": torch.randn(shape, requires_grad=train)} for _ in range(2)]
    assert_as_accurate_as_eager(seeded, draws, compile_, dtype=dtype, device=device, train=train)
    x = draws[0]["x"].detach().to(device, dtype)
    module = seeded().to(device, dtype).train(train)
    assert strides(compile_(module), module, x, train) == strides(module, module, x, train)
    return records


def strides(f: Callable[..., Any], module: nn.Module, x: Tensor, train: bool) -> dict[str, Any]:
    """Of results and, as autograd hands them out, of gradients; of these, where an extent is one
    the stride is as good as any (autograd's own rule where it accumulates them).
    """
    x = x.detach().clone().requires_grad_(train)
    with torch.set_grad_enabled(train):
        out = f(x)
    outs = [out] if isinstance(out, Tensor) else list(out)
    found = {f"out {i}": o.stride() for i, o in enumerate(outs)}
    if train:
        wanted = {"x": x, **dict(module.named_parameters())}
        loss = sum((o.float().square().sum() for o in outs if o.requires_grad), x.new_zeros(()))
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        found |= {n: g if g is None else _counting(g) for n, g in zip(wanted, grads, strict=True)}
    return found


def _counting(x: Tensor) -> list[int]:
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size != 1]
