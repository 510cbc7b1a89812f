"""Costs of matmuls, convolutions and attention: operands and results once, and the contractions
inside.

FLOPs count a multiply and an add as two; the addition of a bias, and the softmax of attention, are
left out as in `torch.utils.flop_counter`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy

from iocompiler.cost_model import convolution_order
from iocompiler.cost_model.call import Call, Operand
from iocompiler.cost_model.cost import Contraction, Cost, nbytes
from iocompiler.plan.data import TensorSpec
from iocompiler.tile.index import Size, product
from iocompiler.tile.traffic import VECTOR_BYTES


def is_aligned(spec: TensorSpec) -> bool:
    """Whether rows of a matrix (its last two dimensions) start on 16-byte boundaries.

    A symbolic stride counts as aligned unless it is known not to be.
    """
    if len(spec.shape) < 2 or any(s == 1 for s in spec.shape[-2:]):
        return True
    row, column = spec.stride[-2:]
    leading = row if column == 1 else column if row == 1 else None
    if leading is None:
        return True  # a library copies such an operand first
    remainder = sympy.Mod(leading * spec.dtype.itemsize, VECTOR_BYTES)
    return not (remainder.is_Integer and remainder != 0)


def _contracted(call: Call, pair: tuple[Any, Any], batch: Size, m: Size, n: Size, k: Size) -> Cost:
    left, right = pair
    matrices = (left.spec, right.spec, *call.results[:1])
    inner = Contraction(batch, m, n, k, left.spec.dtype, all(is_aligned(s) for s in matrices))
    return _moved(call, (inner,))


def _moved(call: Call, inner: tuple[Contraction, ...]) -> Cost:
    return Cost(
        sum((nbytes(o.spec) for o in call.operands), 0),
        sum((nbytes(s) for s in call.results), 0),
        sum((c.flops for c in inner), 0),
        contractions=inner,
    )


def _product(call: Call, left: Any, right: Any) -> Cost:
    """left [.., m, k] @ right [.., k, n], the batch being the result's."""
    m, k = left.spec.shape[-2:]
    n = right.spec.shape[-1]
    batch = product(call.results[0].shape[:-2]) if call.results else 1
    return _contracted(call, (left, right), batch, m, n, k)


def mm(call: Call) -> Cost:
    return _product(call, call.args[0], call.args[1])


def aligned_mm(call: Call) -> Cost:
    """a [m, k], b [k, n] in parts the matrix units like. A result whose own rows they do not like
    passes through a scratch in L2.
    """
    cost = _product(call, call.args[0], call.args[1])
    operands = all(is_aligned(each.spec) for each in call.args[:2])
    inner = tuple(replace(each, aligned=operands) for each in cost.contractions)
    staged = sum((nbytes(s) for s in call.results if not is_aligned(s)), 0)
    return replace(cost, contractions=inner, staged_bytes=staged)


def sum_of_products(call: Call) -> Cost:
    """lefts [m, k_i], rights [k_i, n]: each product but the first reads what it is added to."""
    pairs = list(zip(call.args[0], call.args[1], strict=True))
    costs = [_product(call, left, right) for left, right in pairs]
    further = len(pairs) - 1
    total = sum((nbytes(spec) for spec in call.results), 0)
    moved = _moved(call, tuple(inner for each in costs for inner in each.contractions))
    return replace(
        moved,
        read_bytes=moved.read_bytes + further * total,
        written_bytes=moved.written_bytes + further * total,
        further_launches=further,
    )


def bmm(call: Call) -> Cost:
    return _product(call, call.args[0], call.args[1])


def addmm(call: Call) -> Cost:
    return _product(call, call.args[1], call.args[2])


def addmm_gelu(call: Call) -> Cost:
    """bias [n] or None, a [m, k], b [k, n]: the product and its activation are written."""
    cost = _product(call, call.args[1], call.args[2])
    inner = tuple(replace(each, kind="activated") for each in cost.contractions)
    return replace(cost, contractions=inner)


def biased_addmm(call: Call) -> Cost:
    return _product(call, call.args[2], call.args[3])


def baddbmm(call: Call) -> Cost:
    return _product(call, call.args[1], call.args[2])


def matrix_vector(call: Call) -> Cost:
    """mv, addmv, dot: each element of the matrix meets one of the vector."""
    matrices = [a for a in call.args if isinstance(a, Operand)][-2:]
    moved = _moved(call, ())
    flops = 2 * product(matrices[0].spec.shape)
    return Cost(moved.read_bytes, moved.written_bytes, flops)


def linear(call: Call) -> Cost:
    """input [.., k], weight [n, k]."""
    data, weight = call.args[0], call.args[1]
    rows, (n, k) = product(data.spec.shape[:-1]), weight.spec.shape
    return _contracted(call, (data, weight), 1, rows, n, k)


def linear_losses(call: Call) -> Cost:
    """input [t, k], weight [n, k]: a head's losses, its logits written and read in chunks; those
    that are kept are among the results.
    """
    return _moved(call, ()) + _head(call.args[0], call.args[1], 0)


def linear_loss_gradients(call: Call) -> Cost:
    """The logits, then a product for each gradient; the gradients overwrite the logits and are read
    by each product."""
    asked = _asked(call, "x_grad", "weight_grad")
    return _moved(call, ()) + _head(call.args[0], call.args[1], asked, True)


def linear_divergences(call: Call) -> Cost:
    """The losses of a head beside another's, or beside rows that are given; with the gradients of
    either, where the operator has them.
    """
    gradients = "gradients" in call.name
    found = _moved(call, ())
    for names in (("x", "weight"), ("other", "other_weight")):
        data, weight = (call.argument(name) for name in names)
        if weight is not None:
            asked = _asked(call, *(f"{name}_grad" for name in names)) if gradients else 0
            found += _head(data, weight, asked, asked > 0)
    return found


def _asked(call: Call, *gradients: str) -> int:
    """How many of these gradients are; all, where it is not said."""
    return sum(call.argument(name, True) is True for name in gradients)


def _head(data: Operand, weight: Operand, products: int, gradient: bool = False) -> Cost:
    """Its logits, written by a product and read by a row kernel, which with a ``gradient`` writes
    that in their place, for so many further products to read.
    """
    (rows, k), n = data.spec.shape, weight.spec.shape[0]
    one = Contraction(1, rows, n, k, data.spec.dtype)
    inner = (one,) * (1 + products)
    logits, passes = rows * n * data.spec.dtype.itemsize, 2 + gradient + products
    return Cost(
        (passes - passes // 2) * logits,
        passes // 2 * logits,
        sum((each.flops for each in inner), 0) + 5 * rows * n,
        rows * n,
        inner,
    )


def matmul(call: Call) -> Cost:
    """Any ranks: a shared right operand makes one tall product of the batch."""
    left, right = call.args[0], call.args[1]
    if len(left.spec.shape) < 2 or len(right.spec.shape) < 2:
        return matrix_vector(call)
    if len(right.spec.shape) == 2:
        rows, (k, n) = product(left.spec.shape[:-1]), right.spec.shape
        return _contracted(call, (left, right), 1, rows, n, k)
    return _product(call, left, right)


def _convolved(points: Size, weight: TensorSpec, groups: Size) -> Contraction:
    """As an implicit matmul: points x (channels in, taps) by (channels in, taps) x channels out,
    per group."""
    n = weight.shape[0] // groups if isinstance(weight.shape[0], int) else weight.shape[0] / groups
    return Contraction(groups, points, n, product(weight.shape[1:]), weight.dtype, kind="conv")


def _points(spec: TensorSpec) -> Size:
    """Batch times spatial points of an activation."""
    return spec.shape[0] * product(spec.shape[2:])


def convolution(call: Call) -> Cost:
    """input [b, c, ..], weight [out, c / groups, ..]; transposed: weight [c, out / groups, ..]."""
    transposed, groups = call.argument("transposed", False), call.argument("groups", 1)
    data, weight = call.args[0].spec, call.args[1].spec
    sampled = data if transposed else call.results[0]
    moved = _moved(call, (_convolved(_points(sampled), weight, groups),))
    relaid = convolution_order.relaid_bytes(data, weight, call.results[0], groups)
    return replace(moved, relaid_bytes=relaid)


def transposed_convolution(call: Call) -> Cost:
    """As `convolution`, by the name that says so."""
    return convolution(replace(call, kwargs={**call.kwargs, "transposed": True}))


def convolution_backward(call: Call) -> Cost:
    """One convolution's work each for the input's and the weight's gradient, as the output mask
    asks."""
    gradient, data, weight = (call.args[i].spec for i in range(3))
    sampled = data if call.argument("transposed", False) else gradient
    groups = call.argument("groups", 1)
    inner = _convolved(_points(sampled), weight, groups)
    mask = call.argument("output_mask", (True, True, True))
    times = sum(bool(m) for m in mask[:2])
    relaid = times * convolution_order.relaid_bytes(data, weight, gradient, groups)
    return replace(_moved(call, (inner,) * times), relaid_bytes=relaid)


def attention(call: Call) -> Cost:
    """query [.., s, d], key [.., t, d], value [.., t, e]: the scores and their product with the
    values."""
    return _moved(call, _scores(call) + _values(call))


def attention_backward(call: Call) -> Cost:
    """The scores again, then the gradients of value, probabilities, query and key: five products of
    forward's two."""
    scores, values = _scores(call), _values(call)
    return _moved(call, scores * 3 + values * 2)


def _heads(call: Call) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    query, key, value = (call.argument(name).spec for name in ("query", "key", "value"))
    return query, key, value


def _kind(call: Call) -> Any:
    causal = call.argument("is_causal", call.argument("causal", False))
    return "causal attention" if causal is True else "attention"


def _scores(call: Call) -> tuple[Contraction, ...]:
    query, key, _ = _heads(call)
    (s, d), t = query.shape[-2:], key.shape[-2]
    return (Contraction(product(query.shape[:-2]), s, t, d, query.dtype, kind=_kind(call)),)


def _values(call: Call) -> tuple[Contraction, ...]:
    query, key, value = _heads(call)
    return (
        Contraction(
            product(query.shape[:-2]),
            query.shape[-2],
            value.shape[-1],
            key.shape[-2],
            query.dtype,
            kind=_kind(call),
        ),
    )
