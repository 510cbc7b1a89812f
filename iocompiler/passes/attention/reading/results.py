"""What is read of an attention beside its output: the log-sum-exp of its rows, its
probabilities.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import view
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.axes import Dims
from iocompiler.passes.attention.reading import rows
from iocompiler.passes.attention.reading.description import Attention, Declined, RowSum
from iocompiler.passes.attention.reading.rows import LogSumExp, Softmax
from iocompiler.passes.attention.reading.scores import Scores

aten = torch.ops.aten
_STOPS = (aten.detach.default, aten.detach_.default)
_FAR = 8  # nodes from the scores to their log-sum-exp, spelled by hand


@dataclass(frozen=True)
class Found:
    """A log-sum-exp, and the nodes that compute it from the scores."""

    described: RowSum
    nodes: tuple[Node, ...]


def row_sums(softmax: Softmax, program: Scores, interior: Collection[Node]) -> list[Found]:
    """The log-sum-exps of an attention's scores that somebody reads who is not of its interior."""
    (scores, *casts) = _plain(softmax.scores)
    found: list[Found] = []
    for node in _behind(scores):
        sums = rows.logsumexp(node)
        if sums is None or sums.dim != softmax.dim or _plain(sums.scores)[0] is not scores:
            continue
        nodes = (*sums.nodes, *casts, *_plain(sums.scores)[1:])
        dims = _dims(program.dims, sums)
        found.append(Found(RowSum(node, dims), nodes))
    inside = {*interior, *(node for each in found for node in each.nodes)}
    ends = {each.described.node for each in found}
    return [each for each in found if _is_read(each.described.node, inside, ends)]


def _dims(dims: Dims, sums: LogSumExp) -> Dims:
    kept: Dims = ((),) if sums.keepdim else ()
    return (*dims[: sums.dim], *kept, *dims[sums.dim + 1 :])


def _plain(node: Node) -> list[Node]:
    """The node without casts to a floating dtype, and those."""
    casts: list[Node] = []
    while node.target in views.CASTS and views.dtype(node).is_floating_point:
        casts.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return [node, *casts]


def _behind(scores: Node) -> Iterator[Node]:
    """The calls near behind the scores."""
    seen: dict[Node, None] = {scores: None}
    border = [scores]
    for _ in range(_FAR):
        users = dict.fromkeys(user for node in border for user in node.users)
        border = [user for user in users if user.op == "call_function" and user not in seen]
        seen.update(dict.fromkeys(border))
        yield from border


def _is_read(node: Node, inside: Collection[Node], ends: Collection[Node]) -> bool:
    """Whether somebody not ``inside`` reads the node, or what is made of it and is of rows too."""
    for user in node.users:
        if user not in inside:
            return True
        if is_of_rows(user, inside, ends) and _is_read(user, inside, ends):
            return True
    return False


def is_of_rows(node: Node, inside: Collection[Node], ends: Collection[Node]) -> bool:
    """Whether all that a node reads of what is ``inside`` are ``ends``, or made of them alone."""
    if node in ends:
        return True
    own = [read for read in node.all_input_nodes if read in inside]
    return bool(own) and all(is_of_rows(read, inside, ends) for read in own)


def private(found: Attention) -> Attention:
    """The attention where nothing in between is read outside, but what the operator returns and, in
    training, the probabilities: they are computed as they were written, and only the output is
    tiled, whose backward then reads no matrix.

    Raises:
        Declined: something is.
    """
    ends = {found.anchor, *(each.node for each in found.row_sums)}
    shared: list[Node] = []
    for node in found.interior - ends:
        strangers = [u for u in node.users if u not in found.interior and not _is_dead(u)]
        if not strangers or is_of_rows(node, found.interior, ends):
            continue
        kind = "returned" if any(user.op == "output" for user in strangers) else "used"
        where = f"{view.where(node) or node.name}: {node.name} is {kind} elsewhere"
        if node not in found.probabilities:
            raise Declined(where)
        _check_shared(found, node, where)
        shared.append(node)
    return replace(found, is_shared=True) if shared else found


def _is_dead(node: Node, far: int = _FAR) -> bool:
    """Whether nobody reads a node, nor what is made of it, as what was just respelled."""
    kept = node.op != "call_function" or node.is_impure() or bool(view.mutates(node))
    return far > 0 and not kept and all(_is_dead(user, far - 1) for user in node.users)


def _check_shared(found: Attention, node: Node, where: str) -> None:
    """Raise `Declined` where a tiled output costs more than its product with probabilities that
    stand in memory anyway, or they are not the same.
    """
    place = found.probabilities.index(node)
    dropouts = [x for x in found.probabilities[: place + 1] if x.target is aten.dropout.default]
    if found.dropout_p and dropouts:
        raise Declined(f"{where}, after a dropout")
    if not is_differentiated(found.anchor):
        raise Declined(f"{where}: without gradients a product with them costs no more")
    readers = _readers(user for user in node.users if user not in found.interior)
    if not readers.isdisjoint(_readers(found.anchor.users)):
        raise Declined(f"{where}, together with the output: a gradient may flow through both")


def _readers(nodes: Iterable[Node]) -> set[Node]:
    """The calls among the nodes, and those that read them, where a gradient flows back."""
    seen: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in seen and node.op == "call_function" and node.target not in _STOPS:
            seen.add(node)
            waiting += node.users
    return seen


def is_differentiated(node: Node) -> bool:
    """Whether autograd may differentiate a node."""
    gm: Any = node.graph.owning_module
    wanted = any(x.meta.get("requires_grad") for x in gm.graph.find_nodes(op="placeholder"))
    return wanted and view.regions(gm)[node].grad


def check_readers(gm: GraphModule, found: Attention, anchor: Node) -> list[Node]:
    """The nodes before ``anchor``, in order, that read a log-sum-exp, and so wait for the output.

    Raises:
        Declined: one of them cannot.
    """
    ends = {each.node for each in found.row_sums}
    late, waiting = set(ends), list[Node]()
    for node in gm.graph.nodes:
        if node is anchor or not late:
            break
        inside = node in found.interior and not is_of_rows(node, found.interior, ends)
        gone = inside and not found.is_shared
        if not gone and node not in ends and not late.isdisjoint(node.all_input_nodes):
            late.add(node)
            waiting.append(node)
    regions: Any = view.regions(gm) if waiting else {}
    for node in waiting:
        effect = view.mutates(node) or view.is_switch(node) or view.is_random(node)
        if effect or node.is_impure() or regions.get(node) != regions.get(anchor):
            raise Declined(f"{view.where(node) or node.name} reads the log-sum-exp too early")
        if node not in found.interior and not found.interior.isdisjoint(node.users):
            raise Declined("the attention reads what is made of its own log-sum-exp")
    return waiting
