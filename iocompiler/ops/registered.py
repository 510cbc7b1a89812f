"""Importing this registers every operator of ours; emitted files take the functions behind them
from here.
"""

from iocompiler.ops import (
    aligned_mm,
    attention,
    embedding_gradient,
    laid_out,
    linear_cross_entropy,
    packed_gradients,
    random,
    scored_attention,
    summed_gradients,
)
from iocompiler.ops.library import function

__all__ = [
    "aligned_mm",
    "attention",
    "embedding_gradient",
    "function",
    "laid_out",
    "linear_cross_entropy",
    "packed_gradients",
    "random",
    "scored_attention",
    "summed_gradients",
]
