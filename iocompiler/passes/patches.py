"""Convolutions over patches that do not overlap, as one matrix product."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.findings import Miss, Rewrite, record
from iocompiler.graph.match import graph_pass
from iocompiler.ops import target

aten = torch.ops.aten
_CONVOLUTIONS: dict[Any, int] = {
    aten.conv1d.default: 1,
    aten.conv1d.padding: 1,
    aten.conv2d.default: 2,
    aten.conv2d.padding: 2,
    aten.conv3d.default: 3,
    aten.conv3d.padding: 3,
}


@graph_pass
def patches(gm: GraphModule) -> int:
    """A convolution whose stride is its kernel, in 16-bit floats on a GPU, is a linear layer over
    patches.

    Before::

        y = aten.conv2d.default(x, w, bias, [16, 16])                      # x [B, 3, 224, 224]

    After::

        rows = permute(view(x, [B, 3, 14, 16, 14, 16]), [0, 2, 4, 1, 3, 5])
        y = linear(reshape(rows, [B, 196, 768]), view(w, [O, 768]), bias)
        y = view(contiguous(transpose(y, 1, 2)), [B, O, 14, 14])

    Every element of x belongs to one patch, so the rows are a copy of x and no more; a library
    reorders x and y for its own kernels at the same price. Left alone: other strides, padding,
    dilation and groups; tensors with channels last, which libraries read where they lie; float32
    (its convolutions may round to tf32 where products do not).
    """
    sites = 0
    for node in list(view.calls(gm, *_CONVOLUTIONS)):
        dims = _CONVOLUTIONS[node.target]
        if not _separate(node, dims):
            continue
        reason = _declined(node, dims)
        if reason:
            record(gm, Miss("patches", view.where(node), reason))
            continue
        x, weight, bias = view.spelled_out(node)[:3]
        kernel = tuple(view.value(weight).shape[2:])
        record(gm, Rewrite("patches", view.where(node), " x ".join(map(str, kernel))))
        rewrite.substitute(
            gm,
            node,
            _as_product(view.value(x).shape, kernel, view.value(weight).shape[0]),
            x,
            weight,
            bias,
        )
        sites += 1
    return sites


def _separate(node: Node, dims: int) -> bool:
    """Whether patches neither overlap nor leave gaps, and hold more than one place."""
    _, weight, _, stride, padding, dilation, groups = view.spelled_out(node)
    kernel = list(view.value(weight).shape[2:])
    plain = _spread(dilation, dims) == [1] * dims and groups == 1
    unpadded = padding == "valid" or _spread(padding, dims) == [0] * dims
    return bool(plain and unpadded and _spread(stride, dims) == kernel and math.prod(kernel) > 1)


def _spread(setting: Any, dims: int) -> Any:
    given = list(setting) if isinstance(setting, (list, tuple)) else [setting]
    return given * dims if len(given) == 1 else given


def _declined(node: Node, dims: int) -> str:
    x, result = view.value(view.spelled_out(node)[0]), view.value(node)
    if target.device_type(x) != "cuda":
        return "not on a GPU"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"{x.dtype}: convolutions may round where products do not"
    if x.dim() != dims + 2:
        return "the input has no batch"
    if not (x.is_contiguous() and result.is_contiguous()):
        return "channels last: a library reads them where they lie"
    return ""


def _as_product(shape: Any, kernel: Sequence[int], channels: int) -> Callable[..., Any]:
    dims = len(kernel)
    outside = [2 + 2 * d for d in range(dims)]  # the patch's place
    inside = [1, *(3 + 2 * d for d in range(dims))]  # the place in the patch, as the weight has it

    def product(x: Any, weight: Any, bias: Any) -> Any:
        sizes = [
            size if isinstance(size, int) else aten.sym_size.int(x, dim)
            for dim, size in enumerate(shape)
        ]
        counts = [size // width for size, width in zip(sizes[2:], kernel, strict=True)]
        for dim, (count, width) in enumerate(zip(counts, kernel, strict=True), 2):
            if not isinstance(shape[dim], int) or shape[dim] % width:
                x = aten.slice.Tensor(x, dim, 0, count * width)
        parted = [each for pair in zip(counts, kernel, strict=True) for each in pair]
        parted = aten.view.default(x, [*sizes[:2], *parted])
        elements = shape[1] * math.prod(kernel)
        rows = aten.permute.default(parted, [0, *outside, *inside])
        rows = aten.reshape.default(rows, [sizes[0], math.prod(counts), elements])
        y = aten.linear.default(rows, aten.reshape.default(weight, [-1, elements]), bias)
        y = aten.contiguous.default(aten.transpose.int(y, 1, 2))
        return aten.view.default(y, [sizes[0], channels, *counts])

    return product
