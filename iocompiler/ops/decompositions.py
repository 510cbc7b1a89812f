"""The one table of decompositions AOTAutograd uses for our graphs.

What comes out: pointwise operators on basic functions, plain reductions, views, gathers and
concatenations, contractions, and opaque calls. Every decomposition of short floats computes in
float32 and casts its result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._decomp import _core_aten_decompositions_post_autograd, decomposition_table
from torch._ops import OpOverload, OpOverloadPacket

from iocompiler.ops import laid_out
from iocompiler.ops.decomposed import (
    activations,
    embeddings,
    indexing,
    losses,
    moments,
    norms,
    products,
    recurrent,
)

aten = torch.ops.aten

# kept whole though torch decomposes them; what a rule of the planner generates, or a library does
# better
_KEPT: tuple[Any, ...] = (
    # one row each in the planner
    aten.silu.default,
    aten.square.default,
    aten.gelu_backward.default,
    aten.tril,
    aten.triu,
    aten.all,
    aten.sum,
    aten.arange,
    aten.full,
    aten.zeros,
    aten.ones,
    aten.full_like,
    aten.zeros_like,
    aten.ones_like,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten.fill.Scalar,
    aten.floor_divide.default,
    aten.where,
    aten.select_scatter,
    aten.slice_scatter,
    # contractions
    aten.baddbmm,
    aten.addmm,
    # attention is taken whole, or decomposed by hand
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_attention_math,
    # a library's kernel beats the generic form
    aten.embedding_dense_backward,
    aten.index_add,
    aten.index_copy,
    aten.index_fill,  # torch's is an index_copy, which takes no negative index
    aten.max_pool2d_with_indices,
    aten.max_pool3d_with_indices,
    aten.max_unpool2d,
    aten.max_unpool3d,
    aten.col2im,
    aten.im2col,
    aten.reflection_pad1d_backward,
    aten.reflection_pad2d_backward,
    aten.reflection_pad3d_backward,
    aten.unfold_backward,
    aten.pixel_shuffle,
    aten.bernoulli,
    aten.native_dropout,
)

# decomposed by torch outside of its core set
_TAKEN: tuple[Any, ...] = (
    aten._log_softmax,
    aten.native_batch_norm,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_functional,
    aten._native_batch_norm_legit_no_training,
    aten._batch_norm_with_update,
    aten._batch_norm_with_update_functional,
    aten._batch_norm_no_update,
    aten.batch_norm_backward,
    aten.linalg_vector_norm,
    aten.addmv,
    aten.elu,
    aten.leaky_relu,
    aten.hardtanh,
    aten.dist,
    aten.empty_like,
    aten.rrelu_with_noise_backward,
    aten.permute_copy,
    aten.unbind_copy,
    aten.tril_indices,
    aten.triu_indices,
)


@cache
def _built() -> dict[OpOverload, Callable[..., Any]]:
    # without those that the dispatcher decomposes by itself: looking for these takes 80 ms
    rules: dict[Any, Callable[..., Any]] = dict(_core_aten_decompositions_post_autograd())
    for operator in _overloads(_TAKEN):
        if operator in decomposition_table:
            rules[operator] = decomposition_table[operator]
    for operator in _overloads(_KEPT):
        rules.pop(operator, None)
    for family in (
        activations,
        moments,
        norms,
        losses,
        indexing,
        embeddings,
        products,
        recurrent,
        laid_out,
    ):
        rules.update(family.DECOMPOSITIONS)
    return rules


def table() -> dict[OpOverload, Callable[..., Any]]:
    """For AOTAutograd's ``decompositions``: each operator that does not stand in our flat graphs,
    and what it means.
    """
    return dict(_built())


def _overloads(operators: tuple[Any, ...]) -> list[OpOverload]:
    found: list[OpOverload] = []
    for operator in operators:
        if isinstance(operator, OpOverloadPacket):
            names: list[str] = operator.overloads()  # type: ignore[no-untyped-call]
            found += [getattr(operator, name) for name in names]
        else:
            found.append(operator)
    return found
