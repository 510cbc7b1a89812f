"""Differences (and sums) of probabilities, as in the Diff Transformer: by linearity attentions of
their own over one value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite as edit
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.arrange import Arranger
from iocompiler.passes.attention.dims.axes import broadcast, flat, resolve, resolved
from iocompiler.passes.attention.dims.views import Operand
from iocompiler.passes.attention.reading import contraction
from iocompiler.passes.attention.reading.contraction import Contraction
from iocompiler.passes.attention.reading.description import Declined
from iocompiler.passes.attention.reading.scores import SUMS

aten = torch.ops.aten
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default, aten.einsum.default)


@dataclass(frozen=True)
class Parted:
    """A product with the values, what stands for it, and the products that this is a sum of."""

    whole: Node
    total: Node
    products: tuple[Node, ...]

    def undo(self, gm: GraphModule) -> None:
        """Let the readers read the whole again."""
        edit.bypass(gm, self.total, self.whole)


def part(gm: GraphModule, whole: Node, mix: Node) -> Parted:
    """Let each term of ``mix``, a sum of probabilities, have a product with the values of its own.

    Before: ``matmul(sub(p, mul(r, scale)), v)``
    After: ``sub(matmul(p, v), mul(matmul(r, v), scale))``; where both are selected from one tensor,
        its product with the values is.

    Raises:
        Declined: a factor differs from key to key, a term is no matrix of its own.
    """
    second = contraction.read(whole)
    side = next((side for side in ("left", "right") if _below(second, side) is mix), None)
    if second is None or side is None or whole.target not in _PRODUCTS:
        raise Declined(f"{mix.target} between the softmax and the second contraction")
    parting = _Parting(gm, whole, second, side, {})
    total = parting.term(mix)
    if views.dtype(total) != views.dtype(whole):
        total = edit.call(gm, aten.to.dtype, (total, views.dtype(whole)), {}, near=whole)
    whole.replace_all_uses_with(total)
    return Parted(whole, total, tuple(parting.products.values()))


def _below(second: Contraction | None, side: str) -> Node | None:
    """An operand without casts."""
    node = second.operand(side)[0] if second is not None else None
    while node is not None and node.target in views.CASTS:
        (node,) = node.all_input_nodes
    return node


@dataclass(frozen=True)
class _Parting:
    gm: GraphModule
    whole: Node
    second: Contraction
    side: str
    products: dict[Any, Node]

    def term(self, node: Any) -> Node:
        """The product of one term with the values."""
        if not views.is_tensor(node):
            raise Declined("a number is added to the probabilities")
        if not views.alike(node, self.second.operand(self.side)[0]):
            raise Declined("the probabilities are broadcast")
        if node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
            return self._scaled(node)
        if node.target in SUMS:
            left, right = (self.term(each) for each in node.args[:2])
            rest = (*node.args[2:],)
            return edit.call(
                self.gm, node.target, (left, right, *rest), dict(node.kwargs), near=self.whole
            )
        if node.target is aten.neg.default:
            return edit.call(self.gm, node.target, (self.term(node.args[0]),), {}, near=self.whole)
        if node.target is aten.select.int:
            return self._selected(node)
        if node not in self.products:
            self.products[node] = self._product(node)
        return self.products[node]

    def _product(self, probabilities: Node) -> Node:
        value = self.second.operand("right" if self.side == "left" else "left")[0]
        own = self.second.operand(self.side)[0]
        if views.dtype(probabilities) != views.dtype(own):
            wanted = views.dtype(own)
            probabilities = edit.call(
                self.gm, aten.to.dtype, (probabilities, wanted), {}, near=self.whole
            )
        pair = (probabilities, value) if self.side == "left" else (value, probabilities)
        if self.whole.target is aten.einsum.default:
            pair = (self.whole.args[0], list(pair))  # type: ignore[assignment]
        return edit.call(self.gm, self.whole.target, pair, {}, near=self.whole)

    def _scaled(self, node: Node) -> Node:
        behind: list[Any] = list(node.args[:2])
        full = [views.is_tensor(each) and views.alike(each, node) for each in behind]
        if not full[0]:
            behind.reverse()
        source, factor = behind
        divided = node.target in (aten.div.Tensor, aten.div.Scalar)
        if not any(full):
            raise Declined("the probabilities are broadcast")
        if divided and source is not node.args[0]:
            raise Declined("the probabilities are divided by")
        product = self.term(source)
        if views.is_tensor(factor):
            factor = self._factor(factor)
        return edit.call(self.gm, node.target, (product, factor), {}, near=self.whole)

    def _factor(self, factor: Node) -> Node:
        """A factor of the probabilities as one of the product with the values."""
        dims = broadcast(resolved(self.second.operand(self.side)[1]), views.shape(factor))
        column = set(resolve((self.second.contracted,)))
        if dims is None or set(flat(dims)) & column:
            raise Declined("the probabilities are multiplied by what differs from key to key")
        own = (Operand(((factor, dims),)),)
        return Arranger(self.gm, self.whole, own).arranged(
            factor, dims, resolved(self.second.dims), widen=False
        )

    def _selected(self, node: Node) -> Node:
        """One of several matrices of probabilities: the product is made of all, and selected."""
        arguments: Any = node.args
        source, dim, place = arguments
        rank = len(views.shape(source))
        last = dim % rank - rank
        if self.side != "left" or self.whole.target is not aten.matmul.default or last > -3:
            raise Declined(f"{node.target} between the softmax and the second contraction")
        key = (source, last)
        if key not in self.products:
            value = self.second.right
            if len(views.shape(value)) >= -last - 1:
                value = edit.call(
                    self.gm, aten.unsqueeze.default, (value, last), {}, near=self.whole
                )
            self.products[key] = edit.call(
                self.gm, aten.matmul.default, (source, value), {}, near=self.whole
            )
        return edit.call(
            self.gm, aten.select.int, (self.products[key], last, place), {}, near=self.whole
        )
