"""The pass: recognise, check that nobody else needs the logits, put the operator in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite as edit
from iocompiler.graph import view
from iocompiler.graph.findings import Miss, Rewrite, record
from iocompiler.graph.match import graph_pass
from iocompiler.ops import target
from iocompiler.ops.linear_cross_entropy_chunks import SCRATCH_BYTES
from iocompiler.passes.linear_cross_entropy import loss as losses
from iocompiler.passes.linear_cross_entropy.description import Declined
from iocompiler.passes.linear_cross_entropy.emit import Emitter
from iocompiler.passes.linear_cross_entropy.found import STATISTICS, Found, find
from iocompiler.passes.linear_cross_entropy.head import MOVES, RESHAPES, TRANSPOSES
from iocompiler.passes.linear_cross_entropy.twins import Twins

aten = torch.ops.aten
_PATTERN = "linear_cross_entropy"
# logits that stay in a large L2 cost no traffic, and little memory
LEAST_BYTES = 32 << 20


@graph_pass
def linear_cross_entropy(gm: GraphModule) -> int:
    """A linear head and its cross-entropy in chunks: the logits are never whole in memory.

    Before::

        l = aten.to.dtype(aten.linear.default(x, w), torch.float32)
        loss = aten.cross_entropy_loss.default(aten.reshape.default(l, [-1, 32000]), y)

    After::

        loss = iocompiler.linear_cross_entropy(aten.reshape.default(x, [-1, 2048]), w, None, y,
                                               None, None, -100, 0.0, 1.0, 1.0, False, "mean")

    However it is spelled: by log-softmax or logsumexp, with masks, weights and squared logsumexps,
    as one number or row by row. On a GPU also where the program returns the logits: the pass over
    their rows that finds the loss, and its gradient, brings them to their place.
    """
    # Inductor's C++ fuses what a chunk is made of: there only memory is gained, from two chunks on
    return replace_losses(gm, SCRATCH_BYTES if target.is_inductor() else LEAST_BYTES)


def replace_losses(gm: GraphModule, least_bytes: int, devices: Sequence[str] = ("cuda",)) -> int:
    """The pass for logits of at least ``least_bytes`` (a symbolic size counts as large).

    Args:
        devices: where it pays although the program returns the logits too.
    """
    changed = 0
    seen: set[Node] = set()
    for node in list(view.calls(gm, *losses.TARGETS, *STATISTICS)):
        if node._erased or node in seen:
            continue
        try:
            changed += _replaced(gm, node, seen, least_bytes, devices)
        except Declined as reason:
            record(gm, Miss(_PATTERN, view.where(node), str(reason)))
    return changed


def _replaced(
    gm: GraphModule, statistic: Node, seen: set[Node], least_bytes: int, devices: Sequence[str]
) -> int:
    """1 where the loss that ``statistic`` is part of has been replaced, 0 where there is none."""
    problem: Declined | None = None
    for found in find(gm, statistic, seen):
        try:
            _check_devices(found)
            _check_kept(found, devices)
            _check_price(found, least_bytes)
            _check_order(gm, found)
            _replace(gm, found)
            return 1
        except Declined as reason:
            problem = problem or reason
    if problem is not None:
        raise problem
    return 0


def _check_order(gm: GraphModule, found: Found) -> None:
    regions = view.regions(gm)
    if len({regions[node].grad for node in found.region}) > 1:
        raise Declined("grad mode changes between the head and the loss")
    writes = [node for node in gm.graph.nodes if view.mutates(node)]
    if not writes:
        return
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    roots = view.roots(gm)
    storages = frozenset().union(*(roots[node] for node in (*found.read(), *found.region)))
    first = min(order[node] for node in found.region)
    for node in writes:
        between = first <= order[node] <= order[found.end]
        if between and any(roots[written] & storages for written in view.mutates(node)):
            raise Declined(f"{view.where(node) or node.name} writes in between")


def _check_devices(found: Found) -> None:
    tensors = [tensor for node in found.read() for tensor in view.tensors(node)]
    if len({tensor.device for tensor in tensors if tensor.dim()}) > 1:
        raise Declined("the targets, or what rows are multiplied by, are on another device")


def _check_kept(found: Found, devices: Sequence[str]) -> None:
    if not found.kept:
        return
    here = target.device_type(view.tensors(found.head.node)[0])
    if here not in devices:
        raise Declined(f"the logits are returned too, which saves nothing on {here!r}")
    moves = {n.target for n in found.path if n in found.region}
    if moves & {*MOVES} - {*RESHAPES}:
        raise Declined("the logits are returned, and the loss is of some of their rows only")
    if moves & {*TRANSPOSES}:
        raise Declined("the logits are returned, and the loss has their rows in another order")


def _check_price(found: Found, least_bytes: int) -> None:
    value = view.tensors(found.head.node)[0]
    if not all(isinstance(size, int) for size in value.shape):
        return
    size = value.numel() * value.element_size()
    if size < least_bytes:
        raise Declined(f"the logits take {size} bytes < {least_bytes}: chunks gain nothing")


def _replace(gm: GraphModule, found: Found) -> None:
    end, head = found.end, found.head
    try:
        x = Twins(gm, head, found.path).rows(found.logits, found.dim, end)
        weight = head.weight
        if head.transposed:
            weight = edit.call(gm, aten.transpose.int, (weight, 0, 1), {}, near=end)
        emitter = Emitter(gm, end, x, found.labels, head, keeps=found.kept)
        new = emitter.loss(found.form, weight)
    except Declined:
        edit.erase_dead(gm)
        raise
    record(gm, Rewrite(_PATTERN, view.where(end), _variant(found)))
    kept = _kept(gm, found, emitter) if found.kept else []
    edit.redirect(gm, end, new)
    for node in reversed(found.region):
        if not node._erased and not node.users:
            edit.erase(gm, node)
    for old, again in reversed(kept):
        edit.redirect(gm, old, again)


def _kept(gm: GraphModule, found: Found, emitter: Emitter) -> list[tuple[Node, Node]]:
    """The logits that the program returns, and what they are computed by from now on: after the
    operator, not before.
    """
    made = {found.head.node: emitter.logits()}

    def again(node: Node) -> Node:
        if node not in made:
            read, *rest = node.args
            given = (again(read), *rest)  # type: ignore[arg-type]
            made[node] = edit.call(gm, node.target, given, dict(node.kwargs), near=found.end)
        return made[node]

    inside = {*found.region}
    return [
        (node, again(node))
        for node in (found.head.node, *found.path)
        if node in inside and any(user not in inside for user in node.users)
    ]


def _variant(found: Found) -> str:
    form, head = found.form, found.head
    kinds = {f.kind for terms in form.terms.values() for t in terms for f in t.factors}
    parts = ["none" if not form.reduced else "mean" if kinds & {"kept", "rows"} else "sum"]
    parts += ["bias"] if head.bias is not None else []
    parts += ["soft-cap"] if head.capped else []
    parts += ["label smoothing"] if found.labels.smoothing else []
    parts += ["class weights"] if "class" in kinds else []
    parts += ["squared logsumexp"] if "square" in form.terms else []
    parts += ["logits kept"] if found.kept else []
    return ", ".join(parts)
