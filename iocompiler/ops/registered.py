"""Importing this registers every operator of ours; emitted files take the functions behind them
from here.
"""

from iocompiler.ops import (
    addmm_gelu,
    aligned_mm,
    attention,
    attention_classes,
    biased_addmm,
    embedding_gradient,
    laid_out,
    linear_cross_entropy,
    linear_divergence,
    packed_gradients,
    random,
    scored_attention,
    sum_of_products,
    summed_gradients,
    wide_product,
)
from iocompiler.ops.library import function

__all__ = [
    "addmm_gelu",
    "aligned_mm",
    "attention",
    "attention_classes",
    "biased_addmm",
    "embedding_gradient",
    "function",
    "laid_out",
    "linear_cross_entropy",
    "linear_divergence",
    "packed_gradients",
    "random",
    "scored_attention",
    "sum_of_products",
    "summed_gradients",
    "wide_product",
]
