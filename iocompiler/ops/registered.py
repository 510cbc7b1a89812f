"""Importing this registers every operator of ours with torch, as an emitted file needs it."""

from iocompiler.ops import aligned_mm, attention, linear_cross_entropy, random, scored_attention

__all__ = ["aligned_mm", "attention", "linear_cross_entropy", "random", "scored_attention"]
