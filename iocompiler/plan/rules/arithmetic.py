"""Rules of arithmetic: one-to-one rows of the op table, comparisons, division, powers."""

from __future__ import annotations

from typing import Any

import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND, elementwise_dtypes
from torch.fx import Node

from iocompiler.plan.lowering import Lowering, Rule, Unsupported
from iocompiler.plan.views import Index
from iocompiler.tile.coarse import COARSE, may_be_coarse
from iocompiler.tile.ops import compute_dtype


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


def as_rounded(fn: str, node: Node) -> str:
    """The row of a quotient or root that is the node's own result, which eager rounds."""
    return COARSE.get(fn, fn) if may_be_coarse(node.meta["val"].dtype) else fn


def keyword(node: Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def arithmetic(fn: str, arity: int, on_bool: str | None = None) -> Rule:
    def rule(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
        dtype = result_dtype(node)
        values = [low.operand(a, node, index, mask, dtype) for a in node.args[:arity]]
        if dtype == torch.bool and on_bool is not None:
            return low.builder.map(on_bool, *values)
        return low.builder.map(as_rounded(fn, node), *values)

    return rule


def mul(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    """A product. (x keep) s, as dropout is written, is x (s where keep, else 0 s): the same
    numbers, infinite or not, by one product less.
    """
    dtype, build = result_dtype(node), low.builder
    a, b = (low.operand(x, node, index, mask, dtype) for x in node.args[:2])
    if dtype == torch.bool:
        return build.map("and", a, b)
    product, scale = build.ops[a], build.ops[b]
    known = scale.kind == "const" and isinstance(scale.value, float)
    if known and (product.kind, product.fn) == ("map", "mul"):
        x, factor = product.inputs
        kept = build.ops[factor]
        if kept.kind == "cast" and build.dtype(kept.inputs[0]) == torch.bool:
            nothing = build.const(0.0 * scale.value, dtype)
            return build.map("mul", x, build.map("where", kept.inputs[0], b, nothing, dtype=dtype))
    return build.map("mul", a, b)


def float_only(fn: str) -> Rule:
    """A function that is the identity on integers."""

    def rule(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
        value = low.operand(node.args[0], node, index, mask, result_dtype(node))
        return low.builder.map(fn, value) if result_dtype(node).is_floating_point else value

    return rule


def comparison(fn: str) -> Rule:
    def rule(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
        dtype = operands_dtype(node)
        values = [_as_stored(low, a, node, index, mask, dtype) for a in node.args[:2]]
        return low.builder.map(fn, *values, dtype=torch.bool)

    return rule


def _as_stored(
    low: Lowering, arg: Any, node: Node, index: Index, mask: int | None, dtype: torch.dtype
) -> int:
    """An operand to compare. A short float is rounded first: the gradient of ``amax`` looks for
    the stored maximum among values that are computed again, unrounded.
    """
    value = low.operand(arg, node, index, mask, dtype)
    made = arg.meta["val"] if isinstance(arg, Node) else None
    return low.rounded(value, made.dtype) if isinstance(made, torch.Tensor) else value


def predicate(fn: str) -> Rule:
    def rule(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
        value = low.operand(node.args[0], node, index, mask)
        if fn in ("isnan", "isinf") and not low.builder.dtype(value).is_floating_point:
            return low.builder.const(False, torch.bool)
        return low.builder.map(fn, value, dtype=torch.bool)

    return rule


def logical(fn: str) -> Rule:
    def rule(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
        values = [low.operand(a, node, index, mask, torch.bool) for a in node.args[:2]]
        return low.builder.map(fn, *values, dtype=torch.bool)

    return rule


def sum_or_difference(sign: str) -> Rule:
    def rule(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
        dtype = result_dtype(node)
        a, b = (low.operand(x, node, index, mask, dtype) for x in node.args[:2])
        alpha = keyword(node, 2, "alpha", 1)
        if alpha != 1:
            b = low.builder.map("mul", b, low.operand(alpha, node, index, mask, dtype))
        if dtype == torch.bool:
            return low.builder.map("or", a, b)
        return low.builder.map(sign, a, b)

    return rule


def div(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    dtype = result_dtype(node)
    a, b = (low.operand(x, node, index, mask, dtype) for x in node.args[:2])
    rounding = node.kwargs.get("rounding_mode")
    if rounding is None and dtype.is_floating_point:
        return low.builder.map(as_rounded("div", node), a, b)
    return _quotient(low, a, b, rounding)


def _quotient(low: Lowering, a: int, b: int, rounding: Any) -> int:
    build = low.builder
    if build.dtype(a).is_floating_point:
        if rounding == "floor":
            return _float_floor_div(low, a, b)
        return build.map(rounding, build.map("div", a, b))
    if rounding == "trunc":
        return build.map("int_trunc_div", a, b)
    return _floor_div(low, a, b)


def _float_floor_div(low: Lowering, a: int, b: int) -> int:
    """Python's a // b: from the exact rest, since the rounded quotient may be the next integer
    (1.5 / 0.3 is 5 in float32, 1.5 // 0.3 is 4). A quotient of zero has the sign of a / b.
    """
    build, dtype = low.builder, low.builder.dtype(a)
    zero, one, half = (build.const(number, dtype) for number in (0.0, 1.0, 0.5))
    rest = build.map("fmod", a, b)
    quotient = build.map("div", build.map("sub", a, rest), b)
    inexact = build.map("ne", rest, zero, dtype=torch.bool)
    down = build.map("and", inexact, _signs_differ(low, rest, b), dtype=torch.bool)
    quotient = build.map("where", down, build.map("sub", quotient, one), quotient)
    floor = build.map("floor", quotient)
    short = build.map("gt", build.map("sub", quotient, floor), half, dtype=torch.bool)
    floor = build.map("where", short, build.map("add", floor, one), floor)
    ratio = build.map("div", a, b)
    none = build.map("eq", quotient, zero, dtype=torch.bool)
    floor = build.map("where", none, build.map("copysign", zero, ratio), floor)
    by_zero = build.map("eq", b, zero, dtype=torch.bool)
    return build.map("where", by_zero, ratio, floor)


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


def floor_divide(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    dtype = result_dtype(node)
    a, b = (low.operand(x, node, index, mask, dtype) for x in node.args[:2])
    return _quotient(low, a, b, "floor")


def remainder(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    """Python's a % b: the sign of the divisor."""
    build, dtype = low.builder, result_dtype(node)
    a, b = (low.operand(x, node, index, mask, dtype) for x in node.args[:2])
    zero = build.const(0, dtype)
    rest = build.map("fmod" if dtype.is_floating_point else "int_trunc_mod", a, b)
    inexact = build.map("ne", rest, zero, dtype=torch.bool)
    wrong = build.map("and", inexact, _signs_differ(low, rest, b), dtype=torch.bool)
    return build.map("where", wrong, build.map("add", rest, b), rest)


def fmod(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    dtype = result_dtype(node)
    a, b = (low.operand(x, node, index, mask, dtype) for x in node.args[:2])
    return low.builder.map("fmod" if dtype.is_floating_point else "int_trunc_mod", a, b)


def power(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    """x ** y; small constant exponents as products and roots, which is exact and much cheaper."""
    build, dtype = low.builder, result_dtype(node)
    base, exponent = node.args[:2]
    x = low.operand(base, node, index, mask, dtype)
    if isinstance(exponent, (int, float)) and not isinstance(exponent, bool):
        special = _constant_power(low, x, exponent, node)
        if special is not None:
            return special
    if not dtype.is_floating_point:
        raise Unsupported("integer power")
    return build.map("pow", x, low.operand(exponent, node, index, mask, dtype))


def _constant_power(low: Lowering, x: int, exponent: float, node: Node) -> int | None:
    build, dtype = low.builder, low.builder.dtype(x)
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
        return build.map(as_rounded("sqrt", node), x)
    if exponent == -0.5:
        return build.map("rsqrt", x)
    if exponent == -1:
        return build.map(as_rounded("div", node), build.const(1.0, dtype), x)
    return None
