"""The gradients of query, key and value of one projection, written where its own gradient lies."""

from iocompiler.passes.packed_gradients.rewrite import packed_gradients

__all__ = ["packed_gradients"]
