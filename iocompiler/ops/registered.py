"""Importing this registers every operator of ours; emitted files take the functions behind them
from here.
"""

from iocompiler.ops import (
    aligned_mm,
    attention,
    embedding_gradient,
    linear_cross_entropy,
    packed_gradients,
    random,
    scored_attention,
)
from iocompiler.ops.library import function

__all__ = [
    "aligned_mm",
    "attention",
    "embedding_gradient",
    "function",
    "linear_cross_entropy",
    "packed_gradients",
    "random",
    "scored_attention",
]
