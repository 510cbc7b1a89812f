"""Products in half precision that leave the graph in float32."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.match import graph_pass
from iocompiler.graph.sizes import same_sizes
from iocompiler.ops import target
from iocompiler.ops.aligned_mm import ALIGNED
from iocompiler.ops.wide_product import WIDE_PRODUCT

aten, prims = torch.ops.aten, torch.ops.prims
_HALF = (torch.bfloat16, torch.float16)
_PRODUCTS = (aten.mm.default, aten.bmm.default)
_CASTS = (aten._to_copy.default, prims.convert_element_type.default)


@graph_pass(stage="flat")
def wide_products(gm: GraphModule) -> int:
    """On a GPU, a product that is nothing but cast to float32 and returned, stored as float32.

    Before::

        g = aten.mm.default(d, x); y = aten.t.default(g).to(torch.float32)   # and return y

    After::

        g = iocompiler.wide_product.default(d, x); y = aten.t.default(g)

    The gradients of all weights that autocast casts: a pass over the product and back is saved, and
    a rounding. Taken are any views between, and products whose parts are returned (one for several
    weights). Where a kernel reads what is cast, it casts on its own and reads half the bytes.
    Extents that the library does not like stay, for what is done about those.
    """
    return sum(_store_wide(gm, node) for node in list(view.calls(gm, *_PRODUCTS)))


def _store_wide(gm: GraphModule, product: Node) -> int:
    between, casts = view.shown(product)
    if not casts or not all(map(_is_returned, casts)) or not _is_liked(product):
        return 0
    there = {product: rewrite.call(gm, WIDE_PRODUCT, product.args, {}, near=product)}
    for each in between:
        arguments = (there[each.args[0]], *each.args[1:])  # type: ignore[index]
        there[each] = rewrite.call(gm, each.target, arguments, dict(each.kwargs), near=each)
    wide = [(cast, there[cast.args[0]]) for cast in casts]  # type: ignore[index]
    if not all(_lie_alike(cast, new) for cast, new in wide):
        for new in reversed(there.values()):
            rewrite.erase(gm, new)
        return 0
    for cast, new in wide:
        rewrite.redirect(gm, cast, new)
    return 1


def _is_returned(node: Node) -> bool:
    """Whether it is a cast to float32 that changes nothing else, and nobody else reads it."""
    if node.target not in _CASTS or view.tensors(node)[0].dtype != torch.float32:
        return False
    plain = node.target is not aten._to_copy.default or node.kwargs.keys() == {"dtype"}
    return plain and all(user.op == "output" for user in node.users)


def _lie_alike(one: Node, other: Node) -> bool:
    return same_sizes(view.tensors(one)[0].stride(), view.tensors(other)[0].stride())


def _is_liked(product: Node) -> bool:
    a, b = (view.tensors(each)[0] for each in product.args)  # type: ignore[arg-type]
    if target.device_type(a) != "cuda" or a.dtype not in _HALF:
        return False
    extents = [e for e in (*a.shape[-2:], b.shape[-1]) if isinstance(e, int)]
    return all(e and e * a.element_size() % ALIGNED == 0 for e in extents)
