"""The pass: recognise, check that nobody else needs the logits, put the operator in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
from iocompiler.passes.linear_cross_entropy.divergence import is_compared
from iocompiler.passes.linear_cross_entropy.emit import Emitter, Other
from iocompiler.passes.linear_cross_entropy.found import STATISTICS, Found, find
from iocompiler.passes.linear_cross_entropy.moves import MOVES, RESHAPES, TRANSPOSES
from iocompiler.passes.linear_cross_entropy.operands import operands, parameters
from iocompiler.passes.linear_cross_entropy.reader import fixed
from iocompiler.passes.linear_cross_entropy.rows_first import choose_rows_first
from iocompiler.passes.linear_cross_entropy.stacked import take_together
from iocompiler.passes.linear_cross_entropy.statistics import has_logarithm
from iocompiler.passes.linear_cross_entropy.twins import Twins

aten = torch.ops.aten
_PATTERN = "linear_cross_entropy"
# logits that stay in a large L2 cost no traffic, and little memory
LEAST_BYTES = 32 << 20
# A part of a loss that is read by itself costs one more product, half as long again as all passes
# over whole logits take: memory is what is gained, where it is much (1 GiB of logits on a GPU).
_MORE_FOR_PARTS = 32


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
    take_together(gm)
    choose_rows_first(gm)
    changed = 0
    seen: set[Node] = set()
    compared: set[Node] = set()
    declined: list[tuple[Node, Miss]] = []
    for node in _statistics(gm):
        if node._erased or node in seen:
            continue
        told = node in compared
        try:
            found = find(gm, node, seen, compared)
            changed += _replaced(gm, found, least_bytes, devices)
        except Declined as reason:
            if not told:
                declined.append((node, Miss(_PATTERN, view.where(node), str(reason))))
    for node, miss in declined:
        if not node._erased:  # with the other head that it was compared with
            record(gm, miss)
    return changed


def _statistics(gm: GraphModule) -> list[Node]:
    """Where logits come to a statistic of each row; of two heads that are compared, the one that
    has a gradient is asked for first: the student.
    """
    found = [
        node
        for node in view.calls(gm, *losses.TARGETS, *STATISTICS)
        if node.target is not aten.softmax.int or is_compared(node) or has_logarithm(node)
    ]
    without = fixed(gm) if len(found) > 1 else ()
    return sorted(found, key=lambda node: node in without)


def _replaced(
    gm: GraphModule, losses_: Iterable[Found], least_bytes: int, devices: Sequence[str]
) -> int:
    """1 where one of ``losses_``, the first that can be, has been replaced; 0 where there is none.

    Raises:
        Declined: none of them can be; why not the first.
    """
    problem: Declined | None = None
    for found in losses_:
        try:
            _check_devices(found)
            _check_kept(found, devices)
            _check_dtypes(found)
            _check_shift(found)
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
    learned = () if found.other is None or found.other.fixed else found.beside
    if len({regions[node].grad for node in (*found.region, *learned)}) > 1:
        raise Declined("grad mode changes between the head and the loss")
    writes = [node for node in gm.graph.nodes if view.mutates(node)]
    if not writes:
        return
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    roots = view.roots(gm)
    calls = (*found.region, *found.beside)
    storages = frozenset().union(*(roots[node] for node in (*found.read(), *calls)))
    first = min(order[node] for node in calls)
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
    if found.other is not None:
        raise Declined("the logits are returned too, beside a divergence")
    here = target.device_type(view.tensors(found.head.node)[0])
    if here not in devices:
        raise Declined(f"the logits are returned too, which saves nothing on {here!r}")
    if found.head.cuts:
        raise Declined("the logits are returned, and the loss is of some of their classes only")
    moves = {n.target for n in found.path if n in found.region}
    if moves & {*MOVES} - {*RESHAPES}:
        raise Declined("the logits are returned, and the loss is of some of their rows only")
    if moves & {*TRANSPOSES}:
        raise Declined("the logits are returned, and the loss has their rows in another order")


def _check_dtypes(found: Found) -> None:
    if found.other is None:
        return
    dtypes = {view.tensors(node)[0].dtype for node in (found.other.given, found.head.node)}
    if torch.float64 in dtypes and len(dtypes) > 1:
        raise Declined("one of the distributions is in float64, and the other is not")


def _check_shift(found: Found) -> None:
    if found.head.shifted and "square" in found.form.terms:
        raise Declined("a squared logsumexp of logits that a sigmoid bounds")


def _check_price(found: Found, least_bytes: int) -> None:
    value = view.tensors(found.head.node)[0]
    if not all(isinstance(size, int) for size in value.shape):
        return
    size = value.numel() * value.element_size()
    if size < least_bytes:
        raise Declined(f"the logits take {size} bytes < {least_bytes}: chunks gain nothing")
    least = least_bytes * _MORE_FOR_PARTS
    if found.shown and size < least:
        parts = f"{len(found.shown)} of its parts, for each of which they would be made again"
        raise Declined(f"the logits take {size} bytes < {least}: beside the loss are read {parts}")


def _replace(gm: GraphModule, found: Found) -> None:
    made: list[tuple[Node, Node]] = []
    try:
        for part in found.shown:
            made.append((part.end, _emitter(gm, part).loss(part.form, by_rows=True)))
        emitter = _emitter(gm, found)
        made.append((found.end, emitter.loss(found.form)))
    except Declined:
        edit.erase_dead(gm)
        raise
    record(gm, Rewrite(_PATTERN, view.where(found.end), _variant(found)))
    kept = _kept(gm, found, emitter) if found.kept else []
    for old, new in made:
        edit.redirect(gm, old, new)
    for node in reversed((*found.beside, *found.region)):
        if not node._erased and not node.users:
            edit.erase(gm, node)
    for old, again in reversed(kept):
        edit.redirect(gm, old, again)


def _emitter(gm: GraphModule, found: Found) -> Emitter:
    """What makes the operator's call, its operands made before ``found.end``."""
    end = found.end
    x = Twins(gm, found.head, found.path).rows(found.logits, found.dim, end)
    other = None
    if found.other is not None and found.comparison is not None:
        other = Other(found.comparison, *operands(gm, found.other, end))
    head = parameters(gm, found.head, end)
    return Emitter(gm, end, x, found.labels, head, keeps=found.kept, other=other)


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
    parts += ["label smoothing"] if found.labels and found.labels.smoothing else []
    parts += ["class weights"] if "class" in kinds else []
    parts += ["squared logsumexp"] if "square" in form.terms else []
    parts += ["logits kept"] if found.kept else []
    parts += [f"parts read: {len(found.shown)}"] if found.shown else []
    parts += _compared(found)
    return ", ".join(parts)


def _compared(found: Found) -> list[str]:
    other, how = found.other, found.comparison
    if other is None or how is None:
        return []
    what = f"{'reverse ' if how.reversed else ''}{'KL' if how.entropy else 'soft targets'}"
    source = f"given {other.kind}" if other.head is None else "another head"
    parts = [what, source, *([] if other.fixed else ["learned"])]
    return [*parts, *(["cross-entropy"] if found.labels is not None else [])]
