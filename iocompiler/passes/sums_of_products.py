"""Products that are added up: one sum instead of a tensor for each product."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.findings import Miss, Rewrite, record
from iocompiler.graph.match import graph_pass
from iocompiler.graph.sizes import same_sizes
from iocompiler.ops import target
from iocompiler.ops.aligned_mm import ALIGNED
from iocompiler.ops.sum_of_products import SUM_OF_PRODUCTS

aten = torch.ops.aten

_PATTERN = "sum_of_products"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# what others wait for, with every operator of ours; all else is computed from it by kernels
_CALLS = frozenset(
    f"aten::{name}"
    for name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
)


@graph_pass(stage="flat")
def sums_of_products(gm: GraphModule) -> int:
    """The sum of products of matrices, on a GPU, as one call.

    Before::

        x = aten.mm.default(dq, wq).view(8, 512, 1024); y = aten.mm.default(dk, wk).view(8, ...)
        z = aten.add.Tensor(aten.add.Tensor(residual, x), y)

    After::

        x = iocompiler.sum_of_products.default([dq, dk], [wq, wk]).view(8, 512, 1024)
        z = aten.add.Tensor(residual, x)

    So the gradient of what Q, K and V, or a gate and its value, are computed from. Taken together
    are products whose left operands are computed from the same calls, which therefore are there
    at about the same time: operands of others would be held in memory until the last is there.
    Left alone: products that somebody else reads, sums in a wider dtype, with a factor or with
    broadcasting, odd extents in half precision, which `plan/padding.py` cuts, and products that
    would run behind a write into memory.
    """
    sites = 0
    sources = _Sources()
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    writes = [place for node, place in order.items() if view.mutates(node)]
    for node in reversed(list(view.calls(gm, aten.add.Tensor))):
        if not node._erased and _is_plain_sum(node) and not _is_inner(node):
            products = [term.product for term in _terms(node, node) if term.product is not None]
            first = min((order[product] for product in products), default=order[node])
            if not any(first < write < order[node] for write in writes):
                sites += _taken(gm, node, sources)
    return sites


@dataclass(frozen=True)
class _Term:
    """One summand: ``node`` as it is added, and the product that it shows, if any."""

    node: Node
    product: Node | None


def _taken(gm: GraphModule, root: Node, sources: _Sources) -> int:
    """Write the sum that ends at ``root`` anew, where products of it belong together."""
    terms = _terms(root, root)
    groups: dict[Hashable, list[_Term]] = {}
    for term in terms:
        if term.product is not None:
            key = sources.of(term.product.args[0]), str(view.tensors(term.product)[0].shape)
            groups.setdefault(key, []).append(term)
    groups = {key: group for key, group in groups.items() if len(group) > 1}
    if not groups:
        if sum(term.product is not None for term in terms) > 1:
            reason = "the operands of its products are computed from different calls"
            record(gm, Miss(_PATTERN, view.where(root), reason))
        return 0
    first = {id(group[0].node): group for group in groups.values()}
    gone = {id(term.node) for group in groups.values() for term in group[1:]}
    total: Node | None = None
    for term in terms:
        if id(term.node) in gone:
            continue
        one = _summed(gm, root, first[id(term.node)]) if id(term.node) in first else term.node
        total = one if total is None else rewrite.call(
            gm, aten.add.Tensor, (total, one), {}, near=root
        )  # fmt: skip
    assert total is not None
    for group in groups.values():
        record(gm, Rewrite(_PATTERN, view.where(root), f"{len(group)} products"))
    rewrite.redirect(gm, root, total)
    return len(groups)


def _summed(gm: GraphModule, root: Node, group: list[_Term]) -> Node:
    """The products of a group in one call, seen as they were."""
    products = [term.product for term in group if term.product is not None]
    lefts, rights = ([product.args[i] for product in products] for i in (0, 1))
    made = rewrite.call(gm, SUM_OF_PRODUCTS, (lefts, rights), {}, near=root)
    return _seen(gm, made, group[0].node, products[0], root)


def _seen(gm: GraphModule, made: Node, shown: Node, product: Node, root: Node) -> Node:
    """``made`` through the views that lead from ``product`` to ``shown``."""
    if shown is product:
        return made
    base = _seen(gm, made, shown.args[0], product, root)  # type: ignore[arg-type]
    return rewrite.call(gm, shown.target, (base, *shown.args[1:]), dict(shown.kwargs), near=root)


def _terms(node: Node, root: Node) -> list[_Term]:
    """The summands of a tree of plain sums, in order."""
    one, other = node.args
    assert isinstance(one, Node)
    assert isinstance(other, Node)
    if one is other:
        return [_Term(one, None), _Term(one, None)]
    return [term for each in (one, other) for term in _part(each, root)]


def _part(node: Node, root: Node) -> list[_Term]:
    """The summands of what is added: its own, where it is a sum that nobody else reads."""
    if _is_plain_sum(node) and len(node.users) == 1 and _is_like(node, root):
        return _terms(node, root)
    return [_Term(node, _product(node))]


def _is_inner(node: Node) -> bool:
    """Whether a plain sum is part of a larger one."""
    if len(node.users) != 1:
        return False
    (user,) = node.users
    return _is_plain_sum(user) and user.args[0] is not user.args[1]


def _is_plain_sum(node: Node) -> bool:
    """Two tensors of one shape and dtype, neither with a factor."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return False
    if not all(isinstance(arg, Node) and view.tensors(arg) for arg in node.args):
        return False
    return all(_is_like(arg, node) for arg in node.args)  # type: ignore[arg-type]


def _is_like(one: Node, other: Node) -> bool:
    a, b = view.value(one), view.value(other)
    return a.dtype == b.dtype and a.device == b.device and same_sizes(a.shape, b.shape)


def _product(node: Node) -> Node | None:
    """The product that a summand shows, through views of it that nobody else reads."""
    while len(node.users) == 1:
        if node.target is aten.mm.default:
            return node if _is_taken(node) else None
        if node.target not in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
            return None
        node = node.args[0]  # type: ignore[assignment]
    return None


def _is_taken(product: Node) -> bool:
    made = view.tensors(product)[0]
    if product.kwargs or target.device_type(made) != "cuda" or made.dtype not in _DTYPES:
        return False
    if made.dtype == torch.float32:
        return True
    left, right = (view.tensors(each)[0] for each in product.args)  # type: ignore[arg-type]
    extents = [e for e in (*left.shape, right.shape[1]) if isinstance(e, int)]
    return all(e * made.element_size() % ALIGNED == 0 for e in extents)


def _is_call(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target._schema.name
    return name in _CALLS or name.startswith("iocompiler::")


class _Sources:
    """Of a tensor, the calls that it is computed from by kernels and views: what is there at the
    same time has the same.
    """

    def __init__(self) -> None:
        self._known: dict[Node, frozenset[Node]] = {}

    def of(self, node: object) -> frozenset[Node]:
        assert isinstance(node, Node)
        waiting = [node]
        while waiting:
            at = waiting[-1]
            missing = [n for n in self._read(at) if n not in self._known]
            if missing:
                waiting += missing
                continue
            waiting.pop()
            self._known[at] = self._from(at)
        return self._known[node]

    def _read(self, node: Node) -> list[Node]:
        return [] if _is_call(node) else node.all_input_nodes

    def _from(self, node: Node) -> frozenset[Node]:
        if _is_call(node):
            return frozenset({node})
        return frozenset().union(*(self._known[n] for n in node.all_input_nodes))
