"""Indices that the graph itself makes: rows of a table that lie where arithmetic says."""

from iocompiler.passes.known_indices.recognise import known_indices

__all__ = ["known_indices"]
