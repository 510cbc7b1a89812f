"""A backward graph without the tangents that nobody supplies."""

from iocompiler.passes.absent.fold import fold
from iocompiler.passes.absent.sizes import symbols_within

__all__ = ["fold", "symbols_within"]
