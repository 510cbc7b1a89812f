"""Norms of many inputs, each of a whole tensor (of gradients, to clip them), in one call."""

from __future__ import annotations

import math
import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.match import graph_pass
from iocompiler.ops import target

aten = torch.ops.aten
# fewer are kernels of ours, in which other work may find place
_LEAST = 4
_ORDERS = (1, 2, math.inf)  # those that aten's kernel over many tensors knows


@graph_pass
def norms_together(gm: GraphModule) -> int:
    """Norms of inputs on a GPU are one multi-tensor call.

    Before::

        a = aten.linalg_vector_norm.default(p, 2.0); b = aten.linalg_vector_norm.default(q, 2.0)

    After::

        norms = aten._foreach_norm.Scalar([p, q], 2.0); a = norms[0]; b = norms[1]

    as `torch.nn.utils.clip_grad_norm_` itself writes it with ``foreach``. Left alone: what is
    computed in the graph, which the kernel that makes it sums up, and norms between which anything
    is written, which inputs may share.
    """
    place = {node: at for at, node in enumerate(gm.graph.nodes)}
    regions = view.regions(gm)
    groups: dict[Hashable, list[_Norm]] = {}
    done: list[list[_Norm]] = []
    writes = 0
    for node in view.calls(gm):
        writes += bool(view.mutates(node))
        kind = _kind(node)
        if kind is None:
            continue
        norm = _norm(node, place)
        if norm.source.op == "call_function" and regions[norm.source] != regions[node]:
            continue
        group = groups.setdefault((kind, regions[node], writes), [])
        if max(n.since for n in (*group, norm)) > min(n.until for n in (*group, norm)):
            done.append([*group])
            group.clear()
        group.append(norm)
    return sum(_join(gm, group, place) for group in (*done, *groups.values()))


@dataclass(frozen=True)
class _Norm:
    """A norm of ``source``, which is there from the place ``since`` on; it is read first at
    ``until``.
    """

    node: Node
    source: Node
    since: int
    until: int


def _norm(node: Node, place: Mapping[Node, int]) -> _Norm:
    source: Any = node.args[0]
    readers = [place[user] for user in node.users]
    return _Norm(node, source, place[source], min(readers, default=len(place)))


def _kind(node: Node) -> Hashable | None:
    """What norms of one call have in common; None of what is no norm of a whole input."""
    if node.target is not aten.linalg_vector_norm.default:
        return None
    x, order, dims, keepdim, dtype = view.spelled_out(node)
    value = view.tensors(x)[0]
    if dims is not None or keepdim or dtype is not None or order not in _ORDERS:
        return None
    if view.owner(x).op == "call_function" or target.device_type(value) != "cuda":
        return None
    if not value.is_floating_point() or any(size == 0 for size in value.shape):
        return None
    return float(order), value.dtype, value.device


def _join(gm: GraphModule, group: Sequence[_Norm], place: Mapping[Node, int]) -> int:
    if len(group) < _LEAST:
        return 0
    first, order = group[0].node, view.spelled_out(group[0].node)[1]
    latest = max(group, key=lambda norm: norm.since)
    near = first if latest.since < place[first] else latest.source.next
    sources = [norm.source for norm in group]
    together = rewrite.call(gm, aten._foreach_norm.Scalar, (sources, order), {}, near=near)
    for at, norm in enumerate(group):
        own = rewrite.call(gm, operator.getitem, (together, at), {}, near=near)
        rewrite.redirect(gm, norm.node, own)
        near = own.next
    return len(group)
