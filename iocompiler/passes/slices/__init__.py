"""What is cut off is not computed."""

from iocompiler.passes.slices.rewrite import slices

__all__ = ["slices"]
