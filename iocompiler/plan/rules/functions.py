"""Rules of elementwise functions made of several rows of the op table, of casts and of fills."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from iocompiler.plan.lowering import Lowering, Rule, Unsupported
from iocompiler.plan.rules.arithmetic import as_rounded, keyword, result_dtype
from iocompiler.plan.views import Index
from iocompiler.tile.ops import compute_dtype
from iocompiler.tile.program import Builder


def clamp(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    dtype = result_dtype(node)
    value = low.operand(node.args[0], node, index, mask, dtype)
    least, most = keyword(node, 1, "min", None), keyword(node, 2, "max", None)
    for limit, fn, clamped in (
        (least, "maximum", torch.clamp_min),
        (most, "minimum", torch.clamp_max),
    ):
        if limit is not None:
            bound = low.operand(_taken(limit, node, clamped), node, index, mask, dtype)
            value = low.builder.map(fn, value, bound)
    return value


def _taken(limit: Any, node: Node, clamped: Callable[[Tensor, int], Tensor]) -> Any:
    """A bound of a short integer as this torch's own kernel takes it, which is asked: to a uint8,
    -1 is 255 in torch 2.13 and 0 in 2.15.
    """
    dtype = node.meta["val"].dtype
    if not isinstance(limit, int) or dtype not in (torch.uint8, torch.int8, torch.int16):
        return limit
    info = torch.iinfo(dtype)
    neutral = info.min if clamped is torch.clamp_min else info.max
    try:
        with unset_fake_temporarily():
            return int(clamped(torch.tensor(neutral, dtype=dtype), limit))
    except RuntimeError as error:
        raise Unsupported("a bound that its dtype does not hold") from error


def relu(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    dtype = result_dtype(node)
    value = low.operand(node.args[0], node, index, mask, dtype)
    return low.builder.map("maximum", value, low.builder.const(0, dtype))


def reciprocal(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    dtype = result_dtype(node)
    value = low.operand(node.args[0], node, index, mask, dtype)
    return low.builder.map(as_rounded("div", node), low.builder.const(1.0, dtype), value)


def square(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    value = low.operand(node.args[0], node, index, mask, result_dtype(node))
    return low.builder.map("mul", value, value)


def sign(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    build, dtype = low.builder, result_dtype(node)
    x = low.operand(node.args[0], node, index, mask, dtype)
    if dtype == torch.bool:
        return x
    zero = build.const(0, dtype)
    up = build.cast(build.map("gt", x, zero, dtype=torch.bool), dtype)
    down = build.cast(build.map("lt", x, zero, dtype=torch.bool), dtype)
    return build.map("sub", up, down)


def silu(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    x = low.operand(node.args[0], node, index, mask, result_dtype(node))
    return low.builder.map("mul", x, low.builder.map("sigmoid", x))


def gelu(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    """x * Phi(x), or as tanh approximates it (Hendrycks and Gimpel, 2016): x * sigmoid(2 u)."""
    build, dtype = low.builder, result_dtype(node)
    x = low.operand(node.args[0], node, index, mask, dtype)
    if keyword(node, 1, "approximate", "none") == "tanh":
        return gelu_by_tanh(build, x)
    return build.map("mul", x, build.map("normal_cdf", x))


def gelu_by_tanh(build: Builder, x: int) -> int:
    return build.map("mul", x, _tanh_gate(build, x)[0])


def gelu_backward(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    """grad * (Phi(x) + x phi(x)), or of the gate g that tanh gives, grad * (g + x g')."""
    build, dtype = low.builder, result_dtype(node)
    grad, x = (low.operand(each, node, index, mask, dtype) for each in node.args[:2])
    if keyword(node, 2, "approximate", "none") == "tanh":
        gate, slope = _tanh_gate(build, x)
    else:
        gate, slope = build.map("normal_cdf", x), build.map("normal_pdf", x)
    return build.map("mul", grad, build.map("add", gate, build.map("mul", x, slope)))


def _tanh_gate(build: Builder, x: int) -> tuple[int, int]:
    """g = (1 + tanh u) / 2 = sigmoid(2 u) for u = sqrt(2 / pi) (x + 0.044715 x^3), and g'; what a
    kernel does not use of it is never written.
    """
    dtype = build.dtype(x)
    twice = 2 * math.sqrt(2 / math.pi)
    one = build.const(1.0, dtype)
    square = build.map("mul", x, x)
    bent = build.map("add", build.map("mul", square, build.const(0.044715 * twice, dtype)),
                     build.const(twice, dtype))  # fmt: skip
    gate = build.map("sigmoid", build.map("mul", x, bent))
    inner = build.map("add", build.map("mul", square, build.const(3 * 0.044715 * twice, dtype)),
                      build.const(twice, dtype))  # fmt: skip
    spread = build.map("mul", gate, build.map("sub", one, gate))
    return gate, build.map("mul", spread, inner)


def fma(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    a, b, c = (low.operand(x, node, index, mask, result_dtype(node)) for x in node.args[:3])
    return low.builder.map("add", low.builder.map("mul", a, b), c)


def where(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    dtype = result_dtype(node)
    condition = low.operand(node.args[0], node, index, mask, torch.bool)
    a, b = (low.operand(x, node, index, mask, dtype) for x in node.args[1:3])
    return low.builder.map("where", condition, a, b, dtype=dtype)


def convert(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    """A cast. To a shorter float it rounds though the value stays in float32: the user wrote it."""
    dtype = node.meta["val"].dtype
    source = node.args[0]
    assert isinstance(source, Node)
    value = low.convert(low.operand(source, node, index, mask), compute_dtype(dtype))
    if compute_dtype(dtype) != dtype and source.meta["val"].dtype != dtype:
        value = low.builder.cast(low.builder.cast(value, dtype), compute_dtype(dtype))
    return value


def copy_into(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    """aten.copy_(target, source): the source broadcast, in the target's dtype."""
    return low.operand(node.args[1], node, index, mask, result_dtype(node))


def fill(position: int) -> Rule:
    def rule(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
        return low.operand(node.args[position], node, index, mask, result_dtype(node))

    return rule


def constant(number: float) -> Rule:
    def rule(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
        return low.builder.const(number, result_dtype(node))

    return rule
