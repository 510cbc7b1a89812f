"""Where query, key and value are projected apart, of one input: what reads their gradients, and the
products of these that make the weights' gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from iocompiler.cost_model.product_order import ProductOrders
from iocompiler.graph import view
from iocompiler.graph.findings import Miss, record
from iocompiler.graph.sizes import known
from iocompiler.ops import target
from iocompiler.ops.aligned_mm import ALIGNED
from iocompiler.ops.packed_gradients import PARTS, Packing
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.axes import Dims, fresh
from iocompiler.passes.attention.dims.views import shape
from iocompiler.passes.packed_gradients.layout import (
    Order,
    Otherwise,
    gradients,
    letters,
    packing,
)
from iocompiler.tf32 import products_rounded

aten = torch.ops.aten

PATTERN = "packed_gradients"
_PRODUCTS = (aten.mm.default, aten.addmm.default)


class Reader(NamedTuple):
    """What reads a gradient of this order through views, the last of which is ``node``: with its
    back as the last dim; of a ``turned`` one, [back, front].
    """

    user: Node
    node: Node
    order: Order
    turned: bool

    @property
    def front(self) -> tuple[Any, ...]:
        """The sizes of the dims beside the back."""
        sizes = shape(self.node)
        return tuple(sizes[1:] if self.turned else sizes[:-1])

    @property
    def sums(self) -> bool:
        """Whether it sums over all but the last dim."""
        if self.user.target is not aten.sum.dim_IntList or self.turned:
            return False
        rank = len(shape(self.node))
        over: Any = view.spelled_out(self.user)[1]
        return {d % rank for d in over or ()} == set(range(rank - 1))

    @property
    def weighs(self) -> bool:
        """Whether it is a product of the turned gradient with another matrix: [back, columns]."""
        product = self.user.target is aten.mm.default and not self.user.kwargs
        return product and self.turned and self.user.args[0] is self.node

    @property
    def takes_rows(self) -> bool:
        """Whether it reads rows that lie apart as it does those that do not."""
        return self.user.target in _PRODUCTS or self.sums


class Projections(NamedTuple):
    """The gradients of query, key and value, as three projections of one input read them.

    Attributes:
        bounds: where each begins in a row of all three, and where the last ends.
        readers: of each.
        products: the gradients of the three weights, [back, columns], each of its gradient, turned,
            and of the same matrix.
        gain: the price of the products as one, and apart, in words.
    """

    packing: Packing
    bounds: list[int]
    readers: list[list[Reader]]
    products: list[Node]
    gain: str

    @property
    def fronts(self) -> dict[str, tuple[Any, ...]]:
        """Those of all readers, by their text: sizes that are symbols are no keys."""
        return {str(reader.front): reader.front for of in self.readers for reader in of}


def projected(gm: GraphModule, call: Node) -> Projections | None:
    """Those of a call whose gradients can be read as slices of one matrix, where that is expected
    to be faster.
    """
    read = [list(_readers(gradient)) for gradient in gradients(call)]
    weighing = [{r.user.args[1]: r for r in of if r is not None and r.weighs} for of in read]
    if not weighing or not all(weighing):
        return None
    try:
        return _together(gm, read, weighing)
    except Otherwise as reason:
        record(gm, Miss(PATTERN, view.where(call), str(reason)))
        return None


def _readers(gradient: Node) -> Iterator[Reader | None]:
    """All readers of it, through views; None for one of which it cannot be said how it reads."""
    start = fresh(shape(gradient))
    waiting: list[tuple[Node, Dims]] = [(gradient, start)]
    while waiting:
        node, dims = waiting.pop()
        for user in node.users:
            later = None
            if user.target in views.VIEWS and user.args[0] is node:
                later = views.after(user, dims)
            if later is not None:
                waiting.append((user, later))
            else:
                yield _reader(user, node, start, dims)


def _reader(user: Node, node: Node, start: Dims, dims: Dims) -> Reader | None:
    ways = [(dims[:-1], dims[-1:], False)]
    if len(dims) == 2:
        ways.append((dims[1:], dims[:1], True))
    for front, back, turned in ways:
        axes = [[axis for group in side for axis in group] for side in (front, back)]
        try:
            order = letters(start, tuple(axes[0]), tuple(axes[1]))
            packing([order], PARTS[0])
        except Otherwise:
            continue
        return Reader(user, node, order, turned)
    return None


def _together(
    gm: GraphModule, read: list[list[Reader | None]], weighing: list[dict[Any, Reader]]
) -> Projections:
    """Raises `Otherwise` with what is in the way."""
    inputs = [x for x in weighing[0] if all(x in of for of in weighing)]
    if not inputs:
        raise Otherwise("query, key and value are projected from different inputs")
    found = [of[inputs[0]] for of in weighing]
    try:
        whole = packing([reader.order for reader in found], PARTS)
    except Otherwise:
        raise Otherwise("their rows lie in different orders") from None
    readers: list[list[Reader]] = []
    for of, reader in zip(read, found, strict=True):
        like = [r for r in of if r is not None and r.order == reader.order and r.takes_rows]
        if len(like) < len(of):
            raise Otherwise("a gradient is read by more than products and sums down its columns")
        readers.append(like)
    products = [reader.user for reader in found]
    if any(reader.target is aten.add.Tensor for p in products for reader in view.shown(p)[1]):
        raise Otherwise(
            "a weight's gradient is added to another's, which the library does by itself"
        )
    if _is_written_between(gm, products):
        raise Otherwise("something is written between the products")
    widths = [shape(product)[0] for product in products]
    size = view.tensors(products[0])[0].element_size()
    if not all(known(width * size % ALIGNED == 0) for width in widths):
        raise Otherwise(f"rows of {widths} elements do not begin at whole vectors")
    bounds = list(accumulate(widths, initial=0))
    return Projections(whole, bounds, readers, products, _gain(products))


def _is_written_between(gm: GraphModule, products: Sequence[Node]) -> bool:
    inside = set(products)
    for node in gm.graph.nodes:
        if node in inside:
            inside.remove(node)
            if not inside:
                break
        elif len(inside) < len(products) and view.mutates(node):
            return True
    return False


def _gain(products: Sequence[Node]) -> str:
    """The price of the products as one, and apart; `Otherwise` where that is less."""
    made = view.tensors(products[0])[0]
    sizes = [_hinted(n) for n in shape(products[0].args[1])]  # rows, columns of the input
    widths = [_hinted(shape(product)[0]) for product in products]
    device, tf32 = target.any_row(made), products_rounded()

    def price(width: int) -> float:
        shapes = [(width, sizes[0]), (sizes[0], sizes[1])]
        return ProductOrders(shapes, made.dtype, device, tf32).seconds((0, 1)) * 1e6

    one, apart = price(sum(widths)), sum(map(price, widths))
    if one >= apart:
        raise Otherwise(f"the weights' gradients take {apart:.3g} us apart, in one {one:.3g} us")
    return f"{one:.3g} us for {apart:.3g}"


def _hinted(size: Any) -> int:
    if isinstance(size, torch.SymInt) and not size.node.has_hint():
        raise Otherwise("a size is not known when it is compiled")
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
