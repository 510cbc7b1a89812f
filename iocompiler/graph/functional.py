"""In-place operators on temporaries become functional, so that recognisers may look through
them.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view


def make_functional(gm: GraphModule) -> int:
    """``aten.relu_(h)`` with ``h`` a temporary nobody else sees --> ``aten.relu(h)``, later readers
    reading that.

    What writes into an input, into a tensor some view of which is read later, or under another grad
        mode than the tensor was made in, stays as it is: AOTAutograd makes that functional later,
        with the bookkeeping it needs.

    Returns:
        the number of operators changed.
    """
    changed = 0
    for node in view.calls(gm):
        functional = _functional(node)
        if functional is not None and _only_one_sees(gm, node):
            changed += _replace(gm, node, functional)
    return changed


def _functional(node: Node) -> torch._ops.OpOverload | None:
    """The operator of the same name without the underscore, where it takes the same arguments."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    if target is torch.ops.aten.copy_.default:
        return None  # aten.copy has no derivative
    name = target._schema.name.split("::")[1]
    if not name.endswith("_") or name.startswith("__") or view.mutates(node) != (node.args[0],):
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    functional = getattr(packet, target._overloadname, None)
    if functional is None or view.changes_metadata(node):
        return None
    # the first is what is written, whatever it is called there (`dropout` says input)
    ours, theirs = ([a.name for a in op._schema.arguments[1:]] for op in (target, functional))
    return functional if ours == theirs else None


def _only_one_sees(gm: GraphModule, node: Node) -> bool:
    """True where the tensor written is a temporary and no other name of its storage is read
    afterwards.
    """
    target = node.args[0]
    assert isinstance(target, Node)
    roots, regions = view.roots(gm), view.regions(gm)
    order = {each: position for position, each in enumerate(gm.graph.nodes)}
    owners = roots[target]
    if any(owner.op != "call_function" or not _makes_new(owner) for owner in owners):
        return False
    if any(regions[owner] != regions[node] for owner in owners):
        return False
    names = [each for each in order if roots[each] & owners and each not in (target, node)]
    if any(view.is_untold_view(name) for name in names if order[name] > order[node]):
        return False
    return all(
        order[user] < order[node]
        for name in names
        if order[name] < order[node]
        for user in name.users
    )


def _makes_new(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and not view.is_view(node)


def _replace(gm: GraphModule, node: Node, functional: torch._ops.OpOverload) -> int:
    target = node.args[0]
    assert isinstance(target, Node)
    new = rewrite.call(gm, functional, node.args, dict(node.kwargs), near=node)
    made, old = view.tensors(new)[0], view.tensors(target)[0]
    if (
        made.dtype != old.dtype
        or tuple(made.shape) != tuple(old.shape)
        or made.stride() != old.stride()
    ):
        gm.graph.erase_node(new)
        return 0
    order = {each: position for position, each in enumerate(gm.graph.nodes)}
    target.replace_all_uses_with(new, delete_user_cb=lambda user: order[user] > order[node])
    name = node.name
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    new.name = name
    return 1
