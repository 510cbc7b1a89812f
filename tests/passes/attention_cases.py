"""A compiled function whose graph only the attention pass has rewritten, run as it is; and what the
pass said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from iocompiler.graph.capture import capture
from iocompiler.graph.findings import Miss, Rewrite, findings
from iocompiler.graph.held import look
from iocompiler.graph.normalise import normalise
from iocompiler.passes.attention import attention

FORWARD = torch.ops.iocompiler.attention_forward.default


class Compiled:
    """``function`` under torch.compile, its graphs rewritten by `normalise` and `attention` and
    nothing else.
    """

    def __init__(self, function: Callable[..., Any], *, dynamic: bool | None = None) -> None:
        self.findings: list[Rewrite | Miss] = []
        self.graphs: list[GraphModule] = []
        torch._dynamo.reset()
        self._run = torch.compile(function, backend=self._backend, dynamic=dynamic, fullgraph=True)

    def _backend(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        look(gm, inputs)
        graph = capture(gm, inputs)
        normalise(graph)
        sites = attention(graph)
        graph.graph.lint()
        graph.recompile()
        self.graphs.append(graph)
        self.findings += findings(graph)
        assert sites == sum(isinstance(each, Rewrite) for each in findings(graph))
        return graph

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    @property
    def variants(self) -> list[str]:
        return [each.variant for each in self.findings if isinstance(each, Rewrite)]

    @property
    def misses(self) -> list[str]:
        return [each.reason for each in self.findings if isinstance(each, Miss)]

    @property
    def calls(self) -> list[torch.fx.Node]:
        return [
            node for graph in self.graphs for node in graph.graph.nodes if node.target is FORWARD
        ]


class Spelling(nn.Module):
    """A function of named tensors as a module, so that the accuracy rule can be applied to it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, **tensors: Tensor) -> Any:
        return self.function(**tensors)


Taken: TypeAlias = "tuple[Callable[..., Any], dict[str, Tensor], str]"
"""A function, what it is called with, and the variant of its rewrite."""


def in_float32(taken: list[Taken], *in_bfloat16: Callable[..., Any]) -> list[Any]:
    """Parameters of a test: each with float32, those of these functions with bfloat16 too."""
    pairs = [(each, torch.float32) for each in taken]
    pairs += [(each, torch.bfloat16) for each in taken if each[0] in in_bfloat16]
    return [
        pytest.param(*each, dtype, id=f"{each[0].__name__}-{str(dtype)[6:]}")
        for each, dtype in pairs
    ]


def heads(
    batch: int = 2, heads: int = 4, rows: int = 7, columns: int = 7, width: int = 8, groups: int = 0
) -> dict[str, Tensor]:
    """Query, key and value [B, H, S, D], each requiring its gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (heads, rows), "k": (groups or heads, columns), "v": (groups or heads, columns)}
    return {
        name: torch.randn(batch, h, n, width, generator=generator).requires_grad_()
        for name, (h, n) in shapes.items()
    }
