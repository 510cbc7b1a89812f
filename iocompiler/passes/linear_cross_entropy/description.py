"""What a recognised head with its loss consists of."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

# no target is this: every row has a cross-entropy
NEVER = -(1 << 62)


class Declined(Exception):
    """It is nearly a linear + cross-entropy; the message is the broken condition."""


@dataclass(frozen=True)
class Head:
    """``x @ weight.T + bias`` by the call ``node``, then ``path``, in the graph's order.

    Attributes:
        weight: [V, D], or [D, V] where ``transposed``.
        bias: [V], in any number of dims, of a dtype as wide as the weight's or wider.
        outer, inner, capped: the logits' function, as `ops.linear_cross_entropy_rows.Setting`
            has it.
        shifted: whether a number is added to all logits, which changes no softmax.
        views: those calls of the path that move rows, or cut the classes.
        cuts: of these, the slices of the classes.
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
    shifted: bool = False
    cuts: tuple[Node, ...] = ()
    also: tuple[Node, ...] = field(default=())


@dataclass(frozen=True)
class Distribution:
    """What logits are compared with: one of the ``kind``s of `ops.linear_divergence_rows`.

    Attributes:
        read: what meets the logits, classes along ``dim``.
        sign: -1 where its negative meets them.
        fixed: whether no gradient flows into it.
        given: what holds it if no head is to compute it, classes along ``given_dim``, as ``kind``
            says; logits are to be multiplied by ``outer``.
        head: of the linear that computes it, whose rows ``path``, the calls from there on in the
            graph's order, brings to those of ``read``; None where there is none.
        rows: how it does, as `head.rows` has it.
    """

    read: Node
    dim: int
    sign: float
    fixed: bool
    given: Node
    given_dim: int
    kind: str
    outer: float
    head: Head | None = None
    path: tuple[Node, ...] = ()
    rows: tuple[object, ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """What two that are the same have in common."""
        if self.head is None:
            return (self.fixed, self.given, self.given_dim, self.kind, self.outer)
        head = self.head
        return (self.fixed, head.node, head.outer, head.inner, head.capped, self.rows)


@dataclass(frozen=True)
class Comparison:
    """Which divergence it is, of logits multiplied by ``scale``, as
    `ops.linear_divergence_rows.Divergence` has it.
    """

    scale: float
    entropy: bool = True
    reversed: bool = False
    spread: float = 0.0


@dataclass(frozen=True)
class Labels:
    """The class of each row: ``target`` in the rows' order; -1 is the last where ``wrapped``.
    Rows with the target ``ignore_index`` have no cross-entropy; None: all have one.
    """

    target: Node
    wrapped: bool = False
    ignore_index: int | None = None
    smoothing: float = 0.0
