"""Orders of storage, chosen for a whole graph."""

from iocompiler.passes.layouts.recognise import layouts

__all__ = ["layouts"]
