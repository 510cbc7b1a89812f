"""Activations that the library computes in a product's epilogue."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.match import graph_pass
from iocompiler.ops import target
from iocompiler.ops.aligned_mm import ALIGNED

aten = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)


@graph_pass(stage="flat")
def activations(gm: GraphModule) -> int:
    """``gelu(bias + a @ b)`` and ``relu(bias + a @ b)`` as one product, on a GPU in half precision.

    Before::

        y = aten.addmm.default(bias, a, b); z = aten.gelu.default(y, approximate="tanh")

    After::

        z = aten._addmm_activation.default(bias, a, b, use_gelu=True)

    What the activation reads is not rounded in between, and not written to memory: where somebody
    else reads it (the backward of a GELU does, that of a ReLU does not) both calls stay.
    """
    return sum(_fuse(gm, node) for node in view.calls(gm, aten.gelu.default, aten.relu.default))


def _fuse(gm: GraphModule, activation: Node) -> int:
    gelu = activation.target is aten.gelu.default
    if gelu and view.spelled_out(activation)[1] != "tanh":
        return 0
    product = _only_read(activation)
    if product is None or not _takes_epilogue(product):
        return 0
    new = rewrite.call(
        gm, aten._addmm_activation.default, product.args, {"use_gelu": gelu}, near=product
    )
    read = activation.args[0]
    rewrite.redirect(gm, product, new)
    rewrite.bypass(gm, activation, new if read is product else read)  # type: ignore[arg-type]
    return 1


def _only_read(activation: Node) -> Node | None:
    """The call that ``activation`` reads, through views, where nobody else reads either."""
    node = activation.args[0]
    while isinstance(node, Node) and len(node.users) == 1 and node.op == "call_function":
        if not view.is_view(node):
            return node
        node = node.args[0]
    return None


def _takes_epilogue(product: Node) -> bool:
    if product.target is not aten.addmm.default or product.kwargs:
        return False
    bias, a, b = (view.tensors(each)[0] for each in product.args[:3])  # type: ignore[arg-type]
    made = view.tensors(product)[0]
    if target.device_type(made) != "cuda" or made.dtype not in _HALF or bias.dim() != 1:
        return False
    extents = [e for e in (a.shape[1], b.shape[1]) if isinstance(e, int)]
    return all(e * made.element_size() % ALIGNED == 0 for e in extents)
