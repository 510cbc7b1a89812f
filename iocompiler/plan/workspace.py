"""What operators allocate for themselves while they run, where that is much."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from iocompiler.cost_model.call import Call
from iocompiler.cost_model.embedding import scratch_bytes as embedding_scratch_bytes
from iocompiler.ops import linear_divergence_chunks
from iocompiler.ops.linear_cross_entropy_chunks import scratch_bytes
from iocompiler.plan.sizes import value_at

_LOSSES = "iocompiler.linear_cross_entropy_losses"
_GRADIENTS = "iocompiler.linear_cross_entropy_gradients"
_DIVERGENCES = tuple(f"iocompiler.linear_divergence_{of}" for of in ("losses", "gradients"))
_EMBEDDING_GRADIENTS = tuple(f"iocompiler.embedding_gradient{form}" for form in ("", "_onto", "_"))


def workspace_bytes(call: Call, hints: Mapping[str, int]) -> int:
    """Bytes that are neither the call's operands nor its results.

    Args:
        hints: an example value for every size symbol.
    """
    if call.name in _EMBEDDING_GRADIENTS:
        *tokens, columns = (value_at(size, hints) for size in call.argument("grad").spec.shape)
        return embedding_scratch_bytes(prod(tokens), columns)
    if call.name in _DIVERGENCES:
        return _of_divergence(call, hints)
    if call.name not in (_LOSSES, _GRADIENTS):
        return 0
    x, weight = (call.argument(name).spec for name in ("x", "weight"))
    rows, width, vocabulary = (value_at(size, hints) for size in (*x.shape, weight.shape[0]))
    kept = call.argument("keep") is True
    gradient = call.name == _GRADIENTS
    return scratch_bytes(rows, vocabulary, width, x.dtype.itemsize, gradient=gradient, kept=kept)


def _of_divergence(call: Call, hints: Mapping[str, int]) -> int:
    sizes: list[int] = []
    heads: list[tuple[int, int]] = []
    for data, weight in (("x", "weight"), ("other", "other_weight")):
        if call.argument(weight) is not None:
            spec, shape = call.argument(data).spec, call.argument(weight).spec.shape
            rows, width, classes = (value_at(size, hints) for size in (*spec.shape, shape[0]))
            sizes, heads = [rows, classes], [*heads, (width, spec.dtype.itemsize)]
    return linear_divergence_chunks.scratch_bytes(sizes[0], sizes[1], *heads)
