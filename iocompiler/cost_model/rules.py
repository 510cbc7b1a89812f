"""What each operator of a flat ATen graph moves and computes: a table of frozen rows, one rule a
family.

A rule maps a `Call` to a `Cost`. Bytes are the compulsory ones of the call alone: every distinct
element read once, every result written once. An operator without a row moves its inputs and outputs
once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from iocompiler.cost_model import contractions
from iocompiler.cost_model.call import Call, call_of_node, call_of_step, is_pointwise
from iocompiler.cost_model.cost import Cost
from iocompiler.cost_model.device import Device
from iocompiler.cost_model.families import (
    Rule,
    copied,
    embedding_backward,
    embedding_gradient,
    free,
    gathered,
    once,
    overwritten,
    pointwise,
    random,
    reduction,
    scattered,
    sliced_in,
    sort,
    written,
)
from iocompiler.cost_model.roofline import time
from iocompiler.plan.data import AtenStep, TensorSpec
from iocompiler.tf32 import rounded
from iocompiler.tile.ops import MAPS

# rows of the op table at or above this cost are transcendental, as `tile.traffic` counts them
_TRANSCENDENTAL = 8


@dataclass(frozen=True)
class Row:
    """``ops`` (names without overloads, blank-separated, "aten." understood) are priced by
    ``rule``."""

    ops: str
    rule: Rule


def cost(node: Node) -> Cost:
    """What an FX node with fake tensors in its metadata costs; nothing for placeholders, outputs
    and views."""
    return price(call_of_node(node)) if node.op == "call_function" else Cost()


def price(call: Call) -> Cost:
    """What a call costs, by its row, or as an unknown operator."""
    return rule_for(call.target, call.name)(call)


def call_seconds(
    step: AtenStep, specs: Mapping[str, TensorSpec], device: Device, hints: Mapping[str, int]
) -> float:
    """Modeled time of a library's call in a plan."""
    cost = price(call_of_step(step, specs))
    return time(cost, device, torch.float32, hints, rounded(step.target))


def rule_for(target: str, name: str) -> Rule:
    """The rule of an operator: by its name, by the name of its out-of-place form, by PyTorch's
    pointwise tag."""
    for candidate in (target, name, name.removesuffix("_")):
        if candidate in RULES:
            return RULES[candidate]
    return pointwise(1) if is_pointwise(target) else once


def has_rule(target: str) -> bool:
    """Whether the operator is priced by a row of its own, not as an unknown one."""
    return rule_for(target, target.rpartition(".")[0]) is not once


def _map_row(name: str) -> Rule:
    flops = MAPS[name].flops
    return pointwise(flops) if flops < _TRANSCENDENTAL else pointwise(0, 1)


ROWS: tuple[Row, ...] = (
    Row(
        """
        view _unsafe_view reshape _reshape_alias expand expand_as permute transpose t mT unsqueeze
        squeeze slice select alias detach as_strided split split_with_sizes chunk unbind diagonal
        view_as view_as_real view_as_complex real imag unfold narrow movedim swapaxes lift
        lift_fresh sym_size sym_stride sym_numel sym_storage_offset empty empty_like empty_strided
        new_empty new_empty_strided empty_permuted _assert_scalar _assert_tensor_metadata getitem
        """,
        free,
    ),
    Row(
        """
        full full_like zeros zeros_like ones ones_like new_full new_zeros new_ones arange eye
        scalar_tensor fill zero linspace
        """,
        written,
    ),
    Row(
        """
        clone contiguous _to_copy to copy_to cat stack constant_pad_nd repeat roll flip index_copy
        pixel_shuffle lift_fresh_copy tril triu view_copy expand_copy slice_copy reflection_pad2d
        replication_pad2d
        """,
        copied,
    ),
    Row("copy", overwritten),
    Row("slice_scatter select_scatter diagonal_scatter as_strided_scatter", sliced_in),
    Row(
        """
        rand rand_like randn randn_like randint randint_like randperm bernoulli normal uniform
        """,
        random(20),
    ),
    Row(
        """
        relu threshold_backward leaky_relu hardtanh clamp clamp_min clamp_max neg abs masked_fill
        lerp
        """,
        pointwise(1),
    ),
    Row(
        """
        gelu silu elu mish softplus tanh_backward sigmoid_backward logit hardswish hardsigmoid
        """,
        pointwise(8, 1),
    ),
    Row("gelu_backward silu_backward elu_backward softplus_backward", pointwise(12, 2)),
    Row("native_dropout dropout", pointwise(24)),
    Row("addcmul addcdiv _foreach_addcmul _foreach_addcdiv _foreach_lerp", pointwise(3)),
    Row("_fused_adam _fused_adamw", pointwise(8, 1)),
    Row("sum mean amax amin max min any all argmax argmin prod count_nonzero nansum", reduction(1)),
    Row("iocompiler.attention_classes iocompiler.attention_table", reduction(1)),
    Row("var std var_mean std_mean norm linalg_vector_norm", reduction(3)),
    Row("logsumexp", reduction(4, 1)),
    Row("_softmax _log_softmax softmax log_softmax _safe_softmax", reduction(5, 1)),
    Row("_softmax_backward_data _log_softmax_backward_data", reduction(4, 1)),
    Row(
        """
        native_layer_norm layer_norm native_group_norm group_norm rms_norm _fused_rms_norm
        native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional
        _native_batch_norm_legit_no_training cudnn_batch_norm batch_norm_with_update
        """,
        reduction(8),
    ),
    Row(
        """
        native_layer_norm_backward native_group_norm_backward native_batch_norm_backward
        _fused_rms_norm_backward cudnn_batch_norm_backward batch_norm_backward
        """,
        reduction(14),
    ),
    Row(
        "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d", reduction(1)
    ),
    Row("nll_loss_forward nll_loss_backward mse_loss", reduction(2)),
    Row("cumsum cumprod cummax cummin logcumsumexp", reduction(2)),
    Row("sort topk argsort msort", sort),
    Row("embedding gather index index_select take _unsafe_index take_along_dim", gathered),
    Row("embedding_dense_backward", embedding_backward),
    Row(
        """
        iocompiler.embedding_gradient iocompiler.embedding_gradient_onto
        iocompiler.embedding_gradient_
        """,
        embedding_gradient,
    ),
    Row("scatter index_put _unsafe_index_put index_fill masked_scatter", scattered("self")),
    Row("scatter_add scatter_reduce index_add index_reduce", scattered("self", flops=1)),
    Row("mm", contractions.mm),
    Row("iocompiler.wide_product", contractions.bmm),
    Row("iocompiler.aligned_mm", contractions.aligned_mm),
    Row("iocompiler.sum_of_products", contractions.sum_of_products),
    Row("addmm _addmm_activation", contractions.addmm),
    Row("iocompiler.addmm_gelu", contractions.addmm_gelu),
    Row("iocompiler.biased_addmm", contractions.biased_addmm),
    Row("bmm", contractions.bmm),
    Row("baddbmm", contractions.baddbmm),
    Row("mv dot addmv", contractions.matrix_vector),
    Row("linear", contractions.linear),
    Row("matmul", contractions.matmul),
    Row("iocompiler.linear_cross_entropy_losses", contractions.linear_losses),
    Row("iocompiler.linear_cross_entropy_gradients", contractions.linear_loss_gradients),
    Row("iocompiler.linear_divergence_losses", contractions.linear_divergences),
    Row("iocompiler.linear_divergence_gradients", contractions.linear_divergences),
    Row("convolution conv1d conv2d conv3d", contractions.convolution),
    Row("conv_transpose2d conv_transpose3d", contractions.transposed_convolution),
    Row("convolution_backward", contractions.convolution_backward),
    Row(
        """
        scaled_dot_product_attention _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
        _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_fused_attention_overrideable
        _scaled_dot_product_attention_math iocompiler.attention_forward
        iocompiler.scored_attention
        """,
        contractions.attention,
    ),
    Row(
        """
        _scaled_dot_product_flash_attention_backward
        _scaled_dot_product_efficient_attention_backward
        _scaled_dot_product_cudnn_attention_backward
        _scaled_dot_product_flash_attention_for_cpu_backward
        _scaled_dot_product_fused_attention_overrideable_backward iocompiler.attention_backward
        iocompiler.scored_attention_backward iocompiler.scored_attention_backward_packed
        iocompiler.scored_attention_backward_summed
        iocompiler.scored_attention_backward_packed_summed
        """,
        contractions.attention_backward,
    ),
    Row("iocompiler.scored_attention_operand", contractions.attention),
)


def _qualified(name: str) -> str:
    return name if "." in name else f"aten.{name}"


_ALIASES = {
    "remainder": "fmod",
    "reciprocal": "div",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_xor": "xor",
}

RULES: dict[str, Rule] = {f"aten.{name}": _map_row(name) for name in MAPS}
RULES |= {f"aten.{name}": _map_row(row) for name, row in _ALIASES.items()}
RULES |= {f"aten._foreach_{name}": _map_row(name) for name in MAPS}
RULES |= {_qualified(name): row.rule for row in ROWS for name in row.ops.split()}
RULES |= {
    "getitem": free,
    "sym_size": free,
    "sym_min": free,
    "sym_max": free,
    "mul": free,
    "add": free,
    "sub": free,
}
RULES |= {"floordiv": free, "aten.sym_size": free}

__all__ = ["RULES", "Row", "Rule", "cost", "has_rule", "price", "rule_for"]
