"""What is read of an attention beside its output: the log-sum-exp of its rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from iocompiler.graph import view
from iocompiler.passes.attention import rows, views
from iocompiler.passes.attention.axes import Dims
from iocompiler.passes.attention.description import Attention, Declined, RowSum
from iocompiler.passes.attention.rows import LogSumExp, Softmax
from iocompiler.passes.attention.scores import Scores

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
        gone = node in found.interior and not is_of_rows(node, found.interior, ends)
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
