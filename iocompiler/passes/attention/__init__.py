"""Attention, whatever way it is written, as one `iocompiler::attention_forward` that never holds an
S x S matrix.
"""

from iocompiler.passes.attention.rewrite import attention

__all__ = ["attention"]
