"""What a recognised head with its loss consists of."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node


class Declined(Exception):
    """It is nearly a linear + cross-entropy; the message is the broken condition."""


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


@dataclass(frozen=True)
class Labels:
    """The class of each row: ``target`` in the rows' order; -1 is the last where ``wrapped``.
    Rows with the target ``ignore_index`` have no cross-entropy; None: all have one.
    """

    target: Node
    wrapped: bool = False
    ignore_index: int | None = None
    smoothing: float = 0.0
