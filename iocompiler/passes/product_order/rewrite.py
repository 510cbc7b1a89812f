"""The pass: chains found, priced and made again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from iocompiler.cost_model.product_order import Order, ProductOrders, Shape
from iocompiler.graph import rewrite as edit
from iocompiler.graph import view
from iocompiler.graph.findings import Miss, Rewrite, record
from iocompiler.graph.match import graph_pass
from iocompiler.graph.sizes import same_sizes
from iocompiler.ops import target
from iocompiler.passes.product_order.chain import PRODUCTS, Chain, Matrix, is_product
from iocompiler.tf32 import products_rounded

aten = torch.ops.aten
_PATTERN = "product_order"
# A price is no measurement: another order must be expected to be faster by so much.
_GAIN = 0.9
# A matrix that is never made may have held what overflows, or have kept the other from it.
_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


@graph_pass
def product_order(gm: GraphModule) -> int:
    """Three or more matrices are multiplied in the order that costs least.

    Before::

        s = aten.matmul.default(q, transpose(k, -2, -1))  # [N, N]
        y = aten.matmul.default(aten.mul.Tensor(s, 0.125), v)

    After::

        s = aten.mul.Tensor(aten.matmul.default(transpose(k, -2, -1), v), 0.125)  # [D, D]
        y = aten.matmul.default(q, s)

    Exact but for rounding; of operands with infinities, which results are infinite and which NaN is
    a matter of the order.
    Left alone: products that are read elsewhere, anything between them but numbers and
    transpositions, matrices that are written, float16.
    """
    sites = 0
    done: set[Node] = set()
    for node in reversed(list(view.calls(gm, *PRODUCTS))):
        if node in done or not is_product(node):
            continue
        chain = _chain(gm, node)
        done.update(chain.inside)
        if len(chain.matrices) > 2 and _is_plain(gm, chain):
            sites += _reordered(gm, node, chain)
    return sites


def _chain(gm: GraphModule, top: Node) -> Chain:
    regions = view.regions(gm)

    def is_mine(node: Node) -> bool:
        alone = node.op == "call_function" and len(node.users) == 1
        return alone and regions[node] == regions[top]

    return Chain(is_mine).read(top)


def _is_plain(gm: GraphModule, chain: Chain) -> bool:
    """Whether the matrices have one dtype, are never written, and can stand in any order: a vector
    is a row at the one end, a column at the other, and beside several matrices neither.
    """
    values = [view.tensors(m.node)[0] for m in chain.matrices]
    dtypes = {x.dtype for x in values} | {view.tensors(n)[0].dtype for n in chain.inside}
    ranks = [x.dim() for x in values]
    if len(dtypes) > 1 or 1 in ranks[1:-1] or (1 in ranks and max(ranks) > 2):
        return False
    if not values[0].is_floating_point() or target.device_type(values[0]) not in ("cpu", "cuda"):
        return False
    roots = view.roots(gm)
    read = frozenset().union(*(roots[m.node] for m in chain.matrices))
    return not read & view.written(gm, roots)


def _reordered(gm: GraphModule, top: Node, chain: Chain) -> int:
    value = view.tensors(top)[0]
    shapes = [_shape(m, at == 0) for at, m in enumerate(chain.matrices)]
    if any(shape is None or not all(shape) for shape in shapes):
        return 0
    tf32 = products_rounded()
    orders = ProductOrders(shapes, value.dtype, target.any_row(value), tf32)  # type: ignore[arg-type]
    order = orders.cheapest()
    before, after = (orders.seconds(each) * 1e6 for each in (chain.order, order))
    if after > _GAIN * before:
        return 0
    if value.dtype not in _DTYPES:
        reason = f"{value.dtype} may overflow in another order, of {after:.3g} us for {before:.3g}"
        record(gm, Miss(_PATTERN, view.where(top), reason))
        return 0
    nodes = [m.node for m in chain.matrices]
    new = edit.insert(gm, _built(chain, order, orders.smallest(order)), *nodes, near=top)
    if not _lie_alike(view.tensors(new)[0], value):
        edit.erase(gm, new)
        return 0
    record(gm, Rewrite(_PATTERN, view.where(top), f"{after:.3g} us for {before:.3g}"))
    edit.redirect(gm, top, new)
    return 1


def _shape(matrix: Matrix, first: bool) -> Shape | None:
    """Sizes, symbols at their hints; None where one has none."""
    given: Sequence[Any] = view.tensors(matrix.node)[0].shape
    if any(isinstance(s, torch.SymInt) and not s.node.has_hint() for s in given):
        return None
    sizes = [int(s.node.hint) if isinstance(s, torch.SymInt) else int(s) for s in given]
    if len(sizes) == 1:
        return (1, *sizes) if first else (*sizes, 1)
    return (*sizes[:-2], *reversed(sizes[-2:])) if matrix.turned else tuple(sizes)


def _built(chain: Chain, order: Order, smallest: Order) -> Callable[..., Any]:
    """The chain in this order; what ``smallest`` comes to is multiplied by the chain's number."""

    def build(*matrices: Any) -> Any:
        def matrix(at: int) -> Any:
            given = chain.matrices[at]
            turned = given.turned and view.tensors(given.node)[0].dim() > 1
            return aten.transpose.int(matrices[at], -2, -1) if turned else matrices[at]

        def product(order: Order) -> Any:
            if isinstance(order, int):
                return matrix(order)
            whole = aten.matmul.default(product(order[0]), product(order[1]))
            scaled = order == smallest and chain.number != 1.0
            return aten.mul.Tensor(whole, chain.number) if scaled else whole

        return product(order)

    return build


def _lie_alike(new: Tensor, old: Tensor) -> bool:
    alike = same_sizes(new.shape, old.shape) and same_sizes(new.stride(), old.stride())
    return alike and new.dtype == old.dtype
