"""Elementwise operators: result element i from operand elements i, broadcast."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND, elementwise_dtypes
from torch.fx import Node

from iocompiler.plan.lowering import Lowering, Rule, Unsupported
from iocompiler.plan.views import Index
from iocompiler.tile.ops import compute_dtype

aten = torch.ops.aten
prims = torch.ops.prims


def result_dtype(node: Node) -> torch.dtype:
    """The dtype the node's arithmetic is done in."""
    return compute_dtype(node.meta["val"].dtype)


def operands_dtype(node: Node) -> torch.dtype:
    """The promoted dtype of the operands, for results of another dtype (comparisons)."""
    values = [a.meta["val"] if isinstance(a, Node) else a for a in node.args]
    dtype, _ = elementwise_dtypes(
        *values, type_promotion_kind=ELEMENTWISE_TYPE_PROMOTION_KIND.ALWAYS_BOOL
    )
    return compute_dtype(dtype)


def _keyword(node: Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _arithmetic(fn: str, arity: int, on_bool: str | None = None) -> Rule:
    def rule(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
        dtype = result_dtype(node)
        values = [low.operand(a, node, index, mask, dtype) for a in node.args[:arity]]
        if dtype == torch.bool and on_bool is not None:
            return low.builder.map(on_bool, *values)
        return low.builder.map(fn, *values)

    return rule


def _float_only(fn: str) -> Rule:
    """A function that is the identity on integers."""

    def rule(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
        value = low.operand(node.args[0], node, index, mask, result_dtype(node))
        return low.builder.map(fn, value) if result_dtype(node).is_floating_point else value

    return rule


def _compare(fn: str) -> Rule:
    def rule(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
        dtype = operands_dtype(node)
        values = [low.operand(a, node, index, mask, dtype) for a in node.args[:2]]
        return low.builder.map(fn, *values, dtype=torch.bool)

    return rule


def _predicate(fn: str) -> Rule:
    def rule(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
        value = low.operand(node.args[0], node, index, mask)
        if fn in ("isnan", "isinf") and not low.builder.dtype(value).is_floating_point:
            return low.builder.const(False, torch.bool)
        return low.builder.map(fn, value, dtype=torch.bool)

    return rule


def _logical(fn: str) -> Rule:
    def rule(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
        values = [low.operand(a, node, index, mask, torch.bool) for a in node.args[:2]]
        return low.builder.map(fn, *values, dtype=torch.bool)

    return rule


def _add(sign: str) -> Rule:
    def rule(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
        dtype = result_dtype(node)
        a, b = (low.operand(x, node, index, mask, dtype) for x in node.args[:2])
        alpha = _keyword(node, 2, "alpha", 1)
        if alpha != 1:
            b = low.builder.map("mul", b, low.operand(alpha, node, index, mask, dtype))
        if dtype == torch.bool:
            return low.builder.map("or", a, b)
        return low.builder.map(sign, a, b)

    return rule


def _div(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    dtype = result_dtype(node)
    a, b = (low.operand(x, node, index, mask, dtype) for x in node.args[:2])
    rounding = node.kwargs.get("rounding_mode")
    return _quotient(low, a, b, rounding)


def _quotient(low: Lowering, a: int, b: int, rounding: Any) -> int:
    build = low.builder
    if build.dtype(a).is_floating_point:
        quotient = build.map("div", a, b)
        return quotient if rounding is None else build.map(rounding, quotient)
    if rounding == "trunc":
        return build.map("int_trunc_div", a, b)
    return _floor_div(low, a, b)


def _floor_div(low: Lowering, a: int, b: int) -> int:
    """Integer a // b rounded down: truncated, less one where inexact with signs that differ."""
    build, dtype = low.builder, low.builder.dtype(a)
    zero, one = build.const(0, dtype), build.const(1, dtype)
    quotient = build.map("int_trunc_div", a, b)
    rest = build.map("int_trunc_mod", a, b)
    inexact = build.map("ne", rest, zero, dtype=torch.bool)
    down = build.map("and", inexact, _signs_differ(low, rest, b), dtype=torch.bool)
    return build.map("where", down, build.map("sub", quotient, one), quotient)


def _signs_differ(low: Lowering, a: int, b: int) -> int:
    build, zero = low.builder, low.builder.const(0, low.builder.dtype(a))
    a_below = build.map("lt", a, zero, dtype=torch.bool)
    b_below = build.map("lt", b, zero, dtype=torch.bool)
    return build.map("ne", a_below, b_below, dtype=torch.bool)


def _floor_divide(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    dtype = result_dtype(node)
    a, b = (low.operand(x, node, index, mask, dtype) for x in node.args[:2])
    return _quotient(low, a, b, "floor")


def _remainder(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    """Python's a % b: the sign of the divisor."""
    build, dtype = low.builder, result_dtype(node)
    a, b = (low.operand(x, node, index, mask, dtype) for x in node.args[:2])
    zero = build.const(0, dtype)
    rest = build.map("fmod" if dtype.is_floating_point else "int_trunc_mod", a, b)
    inexact = build.map("ne", rest, zero, dtype=torch.bool)
    wrong = build.map("and", inexact, _signs_differ(low, rest, b), dtype=torch.bool)
    return build.map("where", wrong, build.map("add", rest, b), rest)


def _fmod(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    dtype = result_dtype(node)
    a, b = (low.operand(x, node, index, mask, dtype) for x in node.args[:2])
    return low.builder.map("fmod" if dtype.is_floating_point else "int_trunc_mod", a, b)


def _power(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    """x ** y; small constant exponents as products and roots, which is exact and much cheaper."""
    build, dtype = low.builder, result_dtype(node)
    base, exponent = node.args[:2]
    x = low.operand(base, node, index, mask, dtype)
    if isinstance(exponent, (int, float)) and not isinstance(exponent, bool):
        special = _constant_power(low, x, exponent, dtype)
        if special is not None:
            return special
    if not dtype.is_floating_point:
        raise Unsupported("integer power")
    return build.map("pow", x, low.operand(exponent, node, index, mask, dtype))


def _constant_power(low: Lowering, x: int, exponent: float, dtype: torch.dtype) -> int | None:
    build = low.builder
    if exponent == 1:
        return x
    if exponent == 2:
        return build.map("mul", x, x)
    if exponent == 3:
        return build.map("mul", build.map("mul", x, x), x)
    if exponent == 4:
        square = build.map("mul", x, x)
        return build.map("mul", square, square)
    if not dtype.is_floating_point:
        return None
    if exponent == 0:
        return build.const(1.0, dtype)
    if exponent == 0.5:
        return build.map("sqrt", x)
    if exponent == -0.5:
        return build.map("rsqrt", x)
    if exponent == -1:
        return build.map("div", build.const(1.0, dtype), x)
    return None


def _clamp(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    dtype = result_dtype(node)
    value = low.operand(node.args[0], node, index, mask, dtype)
    least, most = _keyword(node, 1, "min", None), _keyword(node, 2, "max", None)
    if least is not None:
        value = low.builder.map("maximum", value, low.operand(least, node, index, mask, dtype))
    if most is not None:
        value = low.builder.map("minimum", value, low.operand(most, node, index, mask, dtype))
    return value


def _relu(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    dtype = result_dtype(node)
    value = low.operand(node.args[0], node, index, mask, dtype)
    return low.builder.map("maximum", value, low.builder.const(0, dtype))


def _reciprocal(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    dtype = result_dtype(node)
    return low.builder.map(
        "div", low.builder.const(1.0, dtype), low.operand(node.args[0], node, index, mask, dtype)
    )


def _square(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    value = low.operand(node.args[0], node, index, mask, result_dtype(node))
    return low.builder.map("mul", value, value)


def _sign(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    build, dtype = low.builder, result_dtype(node)
    x = low.operand(node.args[0], node, index, mask, dtype)
    if dtype == torch.bool:
        return x
    zero = build.const(0, dtype)
    up = build.cast(build.map("gt", x, zero, dtype=torch.bool), dtype)
    down = build.cast(build.map("lt", x, zero, dtype=torch.bool), dtype)
    return build.map("sub", up, down)


def _silu(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    x = low.operand(node.args[0], node, index, mask, result_dtype(node))
    return low.builder.map("mul", x, low.builder.map("sigmoid", x))


def _gelu(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    """x * Phi(x) by the error function, or as tanh approximates it (Hendrycks and Gimpel, 2016)."""
    build, dtype = low.builder, result_dtype(node)
    x = low.operand(node.args[0], node, index, mask, dtype)
    half, one = build.const(0.5, dtype), build.const(1.0, dtype)
    if _keyword(node, 1, "approximate", "none") == "tanh":
        cube = build.map("mul", build.map("mul", x, x), x)
        inner = build.map("add", x, build.map("mul", cube, build.const(0.044715, dtype)))
        bend = build.map(
            "tanh", build.map("mul", inner, build.const(math.sqrt(2 / math.pi), dtype))
        )
    else:
        bend = build.map("erf", build.map("mul", x, build.const(math.sqrt(0.5), dtype)))
    return build.map("mul", build.map("mul", x, half), build.map("add", bend, one))


def _fma(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    a, b, c = (low.operand(x, node, index, mask, result_dtype(node)) for x in node.args[:3])
    return low.builder.map("add", low.builder.map("mul", a, b), c)


def _where(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    dtype = result_dtype(node)
    condition = low.operand(node.args[0], node, index, mask, torch.bool)
    a, b = (low.operand(x, node, index, mask, dtype) for x in node.args[1:3])
    return low.builder.map("where", condition, a, b, dtype=dtype)


def _convert(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    """A cast. To a shorter float it rounds though the value stays in float32: the user wrote it."""
    dtype = node.meta["val"].dtype
    source = node.args[0]
    assert isinstance(source, Node)
    value = low.convert(low.operand(source, node, index, mask), compute_dtype(dtype))
    if compute_dtype(dtype) != dtype and source.meta["val"].dtype != dtype:
        value = low.builder.cast(low.builder.cast(value, dtype), compute_dtype(dtype))
    return value


def _copy_into(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    """aten.copy_(target, source): the source broadcast, in the target's dtype."""
    return low.operand(node.args[1], node, index, mask, result_dtype(node))


def _fill(position: int) -> Rule:
    def rule(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
        return low.operand(node.args[position], node, index, mask, result_dtype(node))

    return rule


def _constant(number: float) -> Rule:
    def rule(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
        return low.builder.const(number, result_dtype(node))

    return rule


_UNARY = (
    "neg exp exp2 expm1 log log2 log10 log1p sqrt rsqrt sin cos tan asin acos atan sinh cosh tanh erf erfc "
    "sigmoid bitwise_not"
).split()

ELEMENTWISE: dict[Any, Rule] = {
    **{getattr(aten, name).default: _arithmetic(name, 1) for name in _UNARY},
    aten.abs.default: _arithmetic("abs", 1),
    **{
        getattr(aten, name).default: _float_only(name)
        for name in ("floor", "ceil", "trunc", "round")
    },
    **{getattr(aten, name).default: _predicate(name) for name in ("isnan", "isinf", "logical_not")},
    aten.relu.default: _relu,
    aten.reciprocal.default: _reciprocal,
    aten.square.default: _square,
    aten.sign.default: _sign,
    aten.silu.default: _silu,
    aten.gelu.default: _gelu,
    aten.add.Tensor: _add("add"),
    aten.add.Scalar: _add("add"),
    aten.sub.Tensor: _add("sub"),
    aten.sub.Scalar: _add("sub"),
    aten.mul.Tensor: _arithmetic("mul", 2, "and"),
    aten.mul.Scalar: _arithmetic("mul", 2, "and"),
    aten.div.Tensor: _div,
    aten.div.Scalar: _div,
    aten.div.Tensor_mode: _div,
    aten.div.Scalar_mode: _div,
    aten.floor_divide.default: _floor_divide,
    aten.remainder.Tensor: _remainder,
    aten.remainder.Scalar: _remainder,
    aten.fmod.Tensor: _fmod,
    aten.fmod.Scalar: _fmod,
    aten.pow.Tensor_Scalar: _power,
    aten.pow.Tensor_Tensor: _power,
    aten.pow.Scalar: _power,
    prims.fma.default: _fma,
    aten.atan2.default: _arithmetic("atan2", 2),
    aten.copysign.Tensor: _arithmetic("copysign", 2),
    aten.maximum.default: _arithmetic("maximum", 2, "or"),
    aten.minimum.default: _arithmetic("minimum", 2, "and"),
    aten.clamp.default: _clamp,
    aten.clamp.Tensor: _clamp,
    **{
        getattr(getattr(aten, name), kind): _compare(name)
        for name in ("eq", "ne", "lt", "le", "gt", "ge")
        for kind in ("Tensor", "Scalar")
    },
    aten.logical_and.default: _logical("and"),
    aten.logical_or.default: _logical("or"),
    aten.logical_xor.default: _logical("xor"),
    **{
        getattr(getattr(aten, f"bitwise_{name}"), kind): _arithmetic(name, 2)
        for name in ("and", "or", "xor")
        for kind in ("Tensor", "Scalar")
    },
    aten.bitwise_left_shift.Tensor: _arithmetic("shift_left", 2),
    aten.bitwise_right_shift.Tensor: _arithmetic("shift_right", 2),
    aten.where.self: _where,
    aten.where.ScalarOther: _where,
    aten._to_copy.default: _convert,
    prims.convert_element_type.default: _convert,
    aten.clone.default: _convert,
    aten.lift_fresh_copy.default: _convert,
    aten.copy_.default: _copy_into,
    aten.copy.default: _copy_into,
    aten.full.default: _fill(1),
    aten.full_like.default: _fill(1),
    aten.scalar_tensor.default: _fill(0),
    aten.fill.Scalar: _fill(1),
    **{
        op: _constant(0)
        for op in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
    },
    **{
        op: _constant(1)
        for op in (aten.ones.default, aten.ones_like.default, aten.new_ones.default)
    },
    aten.new_full.default: _fill(2),
}
