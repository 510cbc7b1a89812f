"""Attention, whatever way it is written, as one `iocompiler::attention_forward` that never holds an
S x S matrix.

The rooms, in the order a graph walks them: `dims`, `reading`, `sums`, `masks`, `programs`,
`running`. Each imports from those before it alone; `rewrite` walks.
"""

from iocompiler.passes.attention.rewrite import attention

__all__ = ["attention"]
