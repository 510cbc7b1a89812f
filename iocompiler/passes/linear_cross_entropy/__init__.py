"""A linear head and its cross-entropy as one operator that works in chunks."""

from iocompiler.passes.linear_cross_entropy.rewrite import linear_cross_entropy, replace_losses

__all__ = ["linear_cross_entropy", "replace_losses"]
