"""A torch.compile backend that treats memory traffic as the thing to minimise."""

from iocompiler.backend import Compiler
from iocompiler.convenience import compile, explain
from iocompiler.errors import FallbackWarning, IOCompilerError
from iocompiler.graph.match import graph_pass, rewrite
from iocompiler.pipeline import DEFAULT, Pipeline

__all__ = [
    "DEFAULT",
    "Compiler",
    "FallbackWarning",
    "IOCompilerError",
    "Pipeline",
    "compile",
    "explain",
    "graph_pass",
    "rewrite",
]
