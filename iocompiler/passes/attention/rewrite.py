"""The pass: recognise, choose an execution, put it in place; and name what was nearly one."""

from __future__ import annotations

import operator

from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite as edit
from iocompiler.graph import view
from iocompiler.graph.findings import Miss, Rewrite, record
from iocompiler.graph.match import graph_pass
from iocompiler.ops import target
from iocompiler.passes.attention.masks.evaluate import Evaluator
from iocompiler.passes.attention.reading import alone, contraction, library, results
from iocompiler.passes.attention.reading.description import (
    Apart,
    Attention,
    Declined,
    Mix,
    Sum,
)
from iocompiler.passes.attention.reading.frame import forward_views
from iocompiler.passes.attention.reading.recognise import recognise
from iocompiler.passes.attention.running import forward, inductor, scored, strides
from iocompiler.passes.attention.running.choice import planned
from iocompiler.passes.attention.running.scored import ScoredCall
from iocompiler.passes.attention.sums.joined import Joined, join
from iocompiler.passes.attention.sums.mixed import Parted, part
from iocompiler.passes.attention.sums.rejoined import rejoin

_PATTERN = "attention"


@graph_pass
def attention(gm: GraphModule) -> int:
    """Run attention by a kernel that keeps no S x S matrix, forward and backward.

    Before::

        s = aten.matmul.default(q, aten.transpose.int(k, -2, -1)); s = aten.mul.Tensor(s, 0.125)
        s = aten.masked_fill.Scalar(s, above_the_diagonal, -inf)
        o = aten.matmul.default(aten.softmax.int(s, -1), v)

    After::

        o = iocompiler.attention_forward(q, k, v, None, 0.125, True, 0.0, "cudnn", "ssss")[0]
    """
    changed = 0
    for node in view.calls(gm, operator.getitem):
        edit.erase(gm, node)  # a result nobody takes is no reader
    for node in list(view.calls(gm, library.TARGET, *contraction.TARGETS)):
        if node.graph is gm.graph and not getattr(node, "_erased", False):
            changed += _rewrite(gm, node)
    if changed:
        strides.keep(gm)
    return changed


def _rewrite(gm: GraphModule, node: Node) -> int:
    joins: list[Joined] = []
    try:
        made = _call(gm, node, joins)
    except Mix as mix:
        return _rewrite_parts(gm, node, mix)
    except Declined as reason:
        _undo(gm, joins)
        record(gm, Miss(_PATTERN, view.where(node), str(reason)))
        return 0
    if made is None:
        return 0
    call, variant = made
    where = view.where(node)
    if isinstance(call, ScoredCall):
        scored.apply(gm, call)
    else:
        forward.apply(gm, call)
    for each in joins:
        edit.erase(gm, each.total)
    record(gm, Rewrite(_PATTERN, where, variant))
    return 1


def _call(
    gm: GraphModule, node: Node, joins: list[Joined]
) -> tuple[forward.Call | ScoredCall, str] | None:
    """What runs the attention that ends in a node, and its variant; ``joins``: what was made one in
    its scores.

    Raises:
        Declined: it is nearly one.
    """
    found = _joining(gm, node, joins)
    if found is None:
        return None
    found = results.private(found)
    alone.check(gm, found)
    results.check_readers(gm, found, forward_views(found)[0])
    call = planned(found, Evaluator(gm))
    if target.is_inductor():
        inductor.check(call)
    return call, call.variant + ("+weights" if found.is_shared else "")


def _undo(gm: GraphModule, joins: list[Joined]) -> None:
    for each in reversed(joins):
        each.undo(gm)


def _rewrite_parts(gm: GraphModule, node: Node, mix: Mix) -> int:
    """A sum of probabilities, times the values: all of its parts are attentions, or none is."""
    parted: Parted | None = None
    try:
        parted = part(gm, node, mix.node)
        for each in parted.products:
            joins: list[Joined] = []
            try:
                if _call(gm, each, joins) is None:
                    raise Declined("a term of the probabilities is no softmax of scores")
            finally:
                _undo(gm, joins)
    except Declined as reason:
        if parted is not None:
            parted.undo(gm)
        record(gm, Miss(_PATTERN, view.where(node), str(reason)))
        return 0
    edit.erase(gm, node)
    return sum(_rewrite(gm, each) for each in parted.products)


def _joining(gm: GraphModule, node: Node, joins: list[Joined]) -> Attention | None:
    """`recognise`, with sums of products in the scores made one; ``joins``: those that were."""
    while True:
        try:
            return recognise(node)
        except Sum as scores:
            joins.append(join(gm, scores.node))
        except Apart as scores:
            joins.append(rejoin(gm, scores.node))
