"""Products in half precision that leave the graph in float32."""

from __future__ import annotations

from typing import Any

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
_CASTS = (aten._to_copy.default, prims.convert_element_type.default)


@graph_pass(stage="flat")
def wide_products(gm: GraphModule) -> int:
    """On a GPU, a product that is nothing but cast to float32 and returned, stored as float32.

    Before::

        g = aten.mm.default(d, x); y = aten.t.default(g).to(torch.float32)   # and return y

    After::

        g = iocompiler.wide_product.default(d, x); y = aten.t.default(g)

    The gradients of all weights that autocast casts: a pass over the product and back is saved, and
    a rounding. Where a kernel reads what is cast, it casts on its own and reads half the bytes.
    Extents that the library does not like stay, for what is done about those.
    """
    return sum(_store_wide(gm, node) for node in view.calls(gm, *_CASTS))


def _store_wide(gm: GraphModule, cast: Node) -> int:
    made = view.tensors(cast)[0]
    if made.dtype != torch.float32 or not _is_plain(cast):
        return 0
    if any(user.op != "output" for user in cast.users):
        return 0
    between, product = _behind(cast)
    if product is None or not _is_liked(product):
        return 0
    new = rewrite.call(gm, WIDE_PRODUCT, product.args, {}, near=product)
    for each in reversed(between):
        arguments = (new, *each.args[1:])
        new = rewrite.call(gm, each.target, arguments, dict(each.kwargs), near=each)
    if not same_sizes(view.tensors(new)[0].stride(), made.stride()):
        rewrite.erase(gm, new)
        return 0
    rewrite.redirect(gm, cast, new)
    return 1


def _is_plain(cast: Node) -> bool:
    """Whether it changes the dtype and nothing else."""
    return cast.target is not aten._to_copy.default or cast.kwargs.keys() == {"dtype"}


def _behind(cast: Node) -> tuple[list[Node], Node | None]:
    """The views between a cast and the product that it is of, last one first, all of which nobody
    else reads.
    """
    between: list[Node] = []
    node: Any = cast.args[0]
    while isinstance(node, Node) and node.op == "call_function" and len(node.users) == 1:
        if node.target in (aten.mm.default, aten.bmm.default):
            return between, node
        if not view.is_view(node) or node.all_input_nodes != [node.args[0]]:
            break
        between.append(node)
        node = node.args[0]
    return between, None


def _is_liked(product: Node) -> bool:
    a, b = (view.tensors(each)[0] for each in product.args)  # type: ignore[arg-type]
    if target.device_type(a) != "cuda" or a.dtype not in _HALF:
        return False
    extents = [e for e in (*a.shape[-2:], b.shape[-1]) if isinstance(e, int)]
    return all(e and e * a.element_size() % ALIGNED == 0 for e in extents)
