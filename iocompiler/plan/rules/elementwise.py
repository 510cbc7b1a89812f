"""Elementwise operators: result element i from operand elements i, broadcast; one rule each."""

from __future__ import annotations

from typing import Any

import torch

from iocompiler.ops.fma import FMA
from iocompiler.plan.lowering import Rule
from iocompiler.plan.rules.arithmetic import (
    arithmetic,
    comparison,
    div,
    float_only,
    floor_divide,
    fmod,
    logical,
    mul,
    power,
    predicate,
    remainder,
    sum_or_difference,
)
from iocompiler.plan.rules.functions import (
    clamp,
    constant,
    convert,
    copy_into,
    fill,
    fma,
    gelu,
    gelu_backward,
    reciprocal,
    relu,
    sign,
    silu,
    square,
    where,
)

aten = torch.ops.aten
prims = torch.ops.prims

_UNARY = (
    *("neg", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh"),
    *("erf", "erfc", "sigmoid", "bitwise_not"),
)

ELEMENTWISE: dict[Any, Rule] = {
    **{getattr(aten, name).default: arithmetic(name, 1) for name in _UNARY},
    aten.abs.default: arithmetic("abs", 1),
    **{
        getattr(aten, name).default: float_only(name)
        for name in ("floor", "ceil", "trunc", "round")
    },
    **{getattr(aten, name).default: predicate(name) for name in ("isnan", "isinf", "logical_not")},
    aten.relu.default: relu,
    aten.reciprocal.default: reciprocal,
    aten.square.default: square,
    aten.sign.default: sign,
    aten.silu.default: silu,
    aten.gelu.default: gelu,
    aten.gelu_backward.default: gelu_backward,
    aten.add.Tensor: sum_or_difference("add"),
    aten.add.Scalar: sum_or_difference("add"),
    aten.sub.Tensor: sum_or_difference("sub"),
    aten.sub.Scalar: sum_or_difference("sub"),
    aten.mul.Tensor: mul,
    aten.mul.Scalar: mul,
    aten.div.Tensor: div,
    aten.true_divide.Tensor: div,  # of a float that is an input, by torch
    aten.div.Scalar: div,
    aten.div.Tensor_mode: div,
    aten.div.Scalar_mode: div,
    aten.floor_divide.default: floor_divide,
    aten.remainder.Tensor: remainder,
    aten.remainder.Scalar: remainder,
    aten.fmod.Tensor: fmod,
    aten.fmod.Scalar: fmod,
    aten.pow.Tensor_Scalar: power,
    aten.pow.Tensor_Tensor: power,
    aten.pow.Scalar: power,
    FMA: fma,
    aten.atan2.default: arithmetic("atan2", 2),
    aten.copysign.Tensor: arithmetic("copysign", 2),
    aten.maximum.default: arithmetic("maximum", 2, "or"),
    aten.minimum.default: arithmetic("minimum", 2, "and"),
    aten.clamp.default: clamp,
    aten.clamp.Tensor: clamp,
    **{
        getattr(getattr(aten, name), kind): comparison(name)
        for name in ("eq", "ne", "lt", "le", "gt", "ge")
        for kind in ("Tensor", "Scalar")
    },
    aten.logical_and.default: logical("and"),
    aten.logical_or.default: logical("or"),
    aten.logical_xor.default: logical("xor"),
    **{
        getattr(getattr(aten, f"bitwise_{name}"), kind): arithmetic(name, 2)
        for name in ("and", "or", "xor")
        for kind in ("Tensor", "Scalar")
    },
    aten.bitwise_left_shift.Tensor: arithmetic("shift_left", 2),
    aten.bitwise_right_shift.Tensor: arithmetic("shift_right", 2),
    aten.where.self: where,
    aten.where.ScalarOther: where,
    aten._to_copy.default: convert,
    prims.convert_element_type.default: convert,
    aten.clone.default: convert,
    aten.lift_fresh_copy.default: convert,
    aten.copy_.default: copy_into,
    aten.copy.default: copy_into,
    aten.full.default: fill(1),
    aten.full_like.default: fill(1),
    aten.scalar_tensor.default: fill(0),
    aten.fill.Scalar: fill(1),
    **{
        op: constant(0)
        for op in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
    },
    **{
        op: constant(1) for op in (aten.ones.default, aten.ones_like.default, aten.new_ones.default)
    },
    aten.new_full.default: fill(2),
}
