"""What read three gradients reads slices of the one tensor that they lie in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.passes.packed_gradients.projections import Projections, Reader

aten = torch.ops.aten


class Whole:
    """The gradients of three projections in one tensor.

    Args:
        call: what makes them apart; the one is made before it.
        shown: it in each shape that is read, [*front, all widths], by the front's text.
    """

    def __init__(
        self, gm: GraphModule, call: Node, found: Projections, shown: Mapping[str, Node]
    ) -> None:
        self.gm, self.call, self.found, self.shown = gm, call, found, shown
        self.place = {node: at for at, node in enumerate(gm.graph.nodes)}

    def read(self) -> None:
        """Nobody reads what ``call`` made any more."""
        self._multiply()
        for part, readers in enumerate(self.found.readers):
            # what is a view of another comes behind it
            for reader in sorted(readers, key=lambda r: self.place[r.node], reverse=True):
                if not reader.node._erased:
                    rewrite.redirect(self.gm, reader.node, self._slice(reader, part))

    def _multiply(self) -> None:
        """The weights' gradients, slices of rows of one product."""
        products = self.found.products
        reader = next(r for r in self.found.readers[0] if r.user is products[0])
        near = min(products, key=self.place.__getitem__)
        turned = self._call(aten.permute.default, self._shown(reader), [1, 0], near=near)
        made = self._call(aten.mm.default, turned, products[0].args[1], near=near)
        for part, product in enumerate(products):
            views, _ = view.shown(product)
            rewrite.redirect(self.gm, product, self._part(made, 0, part, near))
            for each in views:  # of memory that begins elsewhere
                rewrite.compute_value(each)

    def _slice(self, reader: Reader, part: int) -> Node:
        """One of the three, as it is read."""
        whole = self._shown(reader)
        one = self._part(whole, len(reader.front), part, self.call)
        if not reader.turned:
            return one
        return self._call(aten.permute.default, one, [1, 0], near=self.call)

    def _shown(self, reader: Reader) -> Node:
        return self.shown[str(reader.front)]

    def _part(self, whole: Node, dim: int, part: int, near: Node) -> Node:
        begin, end = self.found.bounds[part : part + 2]
        return self._call(aten.slice.Tensor, whole, dim, begin, end, near=near)

    def _call(self, target: Any, *args: Any, near: Node) -> Node:
        return rewrite.call(self.gm, target, args, {}, near=near)
