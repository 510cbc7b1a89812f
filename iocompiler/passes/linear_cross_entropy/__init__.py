"""A linear head and its cross-entropy as one `iocompiler::linear_cross_entropy`, logits in chunks."""

from iocompiler.passes.linear_cross_entropy.rewrite import linear_cross_entropy, replace_losses

__all__ = ["linear_cross_entropy", "replace_losses"]
