"""Equal calls of a joint graph, made once.

AOTAutograd does this when it partitions, and imports all of Inductor for it: half a second of a
first training step.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.equal import frozen

_UNWRITTEN = torch.ops.aten.empty


def merge_equal_calls(joint: GraphModule) -> None:
    """The same call of the same values is one.

    Left alone: what is random, and memory that nothing is written to yet; what lies where a result
    lies (two results stay two); calls that one that writes stands between; what finds sizes, each
    by a name of its own, and the masks that it finds them in.
    """
    (output,) = joint.graph.find_nodes(op="output")
    returned = {_storage(node) for node in output.all_input_nodes} - {None}
    found: dict[Hashable, Node] = {}
    writes = 0
    for node in view.calls(joint):
        writes += bool(view.mutates(node))
        if view.is_random(node) or _is_empty(node) or _storage(node) in returned:
            continue
        if any(map(view.finds_sizes, (node, *node.users))):
            continue
        key = writes, node.target, frozen(node.args), frozen(node.kwargs)
        same = found.setdefault(key, node)
        if same is not node:
            rewrite.bypass(joint, node, same)


def _is_empty(node: Node) -> bool:
    return getattr(node.target, "overloadpacket", None) is _UNWRITTEN


def _storage(node: Node) -> int | None:
    """Of a tensor with memory of its own, or that of another; None for anything else."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    try:
        return int(value.untyped_storage()._cdata)
    except NotImplementedError:  # a sparse tensor has none
        return None
