"""Inputs of which a few places are written: a cache of keys, to which one position is added."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.findings import Miss, Rewrite, record
from iocompiler.graph.in_part import IN_PART
from iocompiler.graph.match import graph_pass
from iocompiler.graph.sizes import same_sizes

aten = torch.ops.aten

_PATTERN = "updates"


@graph_pass(stage="flat")
def updates(gm: GraphModule) -> int:
    """What becomes of an input that is written in part is written there: AOTAutograd makes a copy
    of all of it, and copies that back.

    Before::

        new = aten.index_copy.default(cache, 2, at, keys); y = aten.sum.default(new)
        aten.copy_.default(cache, new)

    After::

        new = aten.index_copy_.default(cache, 2, at, keys); y = aten.sum.default(new)

    Left alone: inputs that are read, as they were, behind the write; results that leave the graph,
    which the caller has in memory of their own; a second write into one input.
    """
    copies = list(view.calls(gm, aten.copy_.default))
    for copy in copies:
        _unwrap(gm, copy)
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    sites = 0
    for copy in copies:
        cache, new = copy.args[:2]
        if not isinstance(cache, Node) or not isinstance(new, Node) or new.target not in IN_PART:
            continue
        reason = _in_the_way(cache, new, copy, order)
        if reason:
            record(gm, Miss(_PATTERN, view.where(new), reason))
            continue
        rewrite.respell(new, IN_PART[new.target][0], new.args, dict(new.kwargs))
        gm.graph.erase_node(copy)
        record(gm, Rewrite(_PATTERN, view.where(new), str(new.target).split(".")[1]))
        sites += 1
    return sites


def _unwrap(gm: GraphModule, copy: Node) -> None:
    """``cache[:, at] = keys`` of symbolic sizes is written into slices, which are all there is of
    what they are slices of, and these into slices.
    """
    new: Any = copy.args[1]
    while isinstance(new, Node) and new.target is aten.slice_scatter.default:
        inner = new.args[1]
        if not isinstance(inner, Node) or len(inner.users) > 1 or not _is_alike(new, inner):
            return
        if inner.target not in (*IN_PART, aten.slice_scatter.default):
            return
        rewrite.bypass(gm, new, inner)
        new = inner
    if not isinstance(new, Node) or new.target not in IN_PART:
        return
    base: Any = new.args[0]
    while base.target is aten.slice.Tensor and _is_alike(base, base.args[0]):
        base = base.args[0]
    if base is not new.args[0]:
        sliced: Any = new.args[0]
        new.replace_input_with(sliced, base)
        rewrite.erase(gm, sliced)


def _in_the_way(cache: Node, new: Node, copy: Node, order: dict[Node, int]) -> str:
    """Why ``new`` is not made in the memory of ``cache``; "" where it is."""
    if cache.op != "placeholder" or new.args[0] is not cache:
        return "it is not made of the input by one write"
    if copy.kwargs or copy.users or not _is_alike(cache, new):
        return "it is not as the input is"
    if any(place >= order[new] for place in _read(cache, order, (new, copy))):
        return f"{cache.name} is read, as it was, behind the write"
    (output,) = new.graph.find_nodes(op="output")
    if order[output] in _read(new, order, (copy,)):
        return "it leaves the graph"
    return ""


def _is_alike(cache: Node, new: Node) -> bool:
    (old,), (made,) = view.tensors(cache), view.tensors(new)
    same = old.dtype == made.dtype and old.device == made.device
    laid_out = same_sizes(old.shape, made.shape) and same_sizes(old.stride(), made.stride())
    return same and laid_out


def _read(node: Node, order: dict[Node, int], aside: tuple[Node, ...]) -> set[int]:
    """The places of what reads a tensor or a view of it, some nodes ``aside``."""
    found: set[int] = set()
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if user in aside or order[user] in found:
                continue
            found.add(order[user])
            # what is no plain operator may return what it is given
            if view.is_view(user) or not isinstance(user.target, torch._ops.OpOverload):
                waiting.append(user)
    return found
