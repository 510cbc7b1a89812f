"""What a recognised head with its loss consists of."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node


class Declined(Exception):
    """It is nearly a linear + cross-entropy; the message is the broken condition."""


@dataclass(frozen=True)
class Loss:
    """Cross-entropy of ``logits``, whose classes lie along ``dim``, by the call ``node``.

    ``nodes``: the calls between the logits and ``node``, which fall away.
    """

    node: Node
    logits: Node
    target: Node
    dim: int
    reduction: str
    ignore_index: int
    smoothing: float = 0.0
    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Head:
    """``x @ weight.T + bias`` by the call ``node``, then ``path``, in the graph's order.

    Attributes:
        weight: [V, D], or [D, V] where ``transposed``.
        outer, inner, capped: the logits' function, as `ops.linear_cross_entropy_chunks.Setting`
            has it.
        views: those calls of the path that move rows and keep the classes.
    """

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    transposed: bool
    path: tuple[Node, ...] = ()
    views: tuple[Node, ...] = ()
    outer: float = 1.0
    inner: float = 1.0
    capped: bool = False
    also: tuple[Node, ...] = field(default=())
