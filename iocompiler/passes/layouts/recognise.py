"""The order of storage of images, chosen for a whole graph."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from iocompiler.graph import view
from iocompiler.graph.findings import Miss, Rewrite, record
from iocompiler.graph.match import graph_pass
from iocompiler.ops import target
from iocompiler.passes.layouts.cut import Value
from iocompiler.passes.layouts.prices import bytes_of
from iocompiler.passes.layouts.problem import Problem
from iocompiler.passes.layouts.rewrite import Rewriter
from iocompiler.passes.layouts.rules import rule_of


@graph_pass
def layouts(gm: GraphModule) -> int:
    """On a GPU, images lie with channels last between convolutions that compute so.

    Before::

        a = aten.conv2d.default(x, v)                      # x [N, C, H, W], contiguous
        b = aten.batch_norm.default(a, ...); c = aten.relu.default(b)
        d = aten.conv2d.default(c, w)
        return d

    After::

        a = aten.conv2d.default(laid_out(x, channels_last), laid_out(v, channels_last))
        b = aten.batch_norm.default(a, ...); c = aten.relu.default(b)
        d = aten.conv2d.default(c, laid_out(w, channels_last))
        return laid_out(d, contiguous_format)

    Every value gets one of two orders so that all copies together cost least, forward and backward:
    those put in here, and those that a library makes around a convolution in the order it does not
    compute in. The caller gets, and gives, every tensor in eager's order. Nothing changes where
    that is no gain.
    """
    convolutions = [node for node in view.calls(gm) if _convolves(node)]
    if not convolutions or any(_is_elsewhere(node) for node in convolutions):
        return 0
    problem = Problem(gm, target.row(view.value(convolutions[0])))
    for node, reason in problem.declined.items():
        if not problem.before[node]:
            record(gm, Miss("layout", view.where(node), reason))
    if all(problem.before[node] for node in problem.wanting):
        return 0
    labels = problem.labelling.cheapest()
    changed = [node for node in problem.free if labels[node] != problem.before[node]]
    _say_what_is_left(gm, problem, labels)
    if not changed:
        return 0
    rewriter = Rewriter(gm, problem, labels)
    rewriter.run()
    ours = sum(2 * bytes_of(view.value(node)) for node in rewriter.copies)
    theirs = sum(size for node, size in problem.wanting.items() if labels[node])
    copies = f"{len(rewriter.copies)} copies of {ours} bytes for {theirs} that the library made"
    record(gm, Rewrite("layout", view.where(changed[0]), f"{len(changed)} values, {copies}"))
    return len(changed)


def _convolves(node: Node) -> bool:
    rule = rule_of(node)
    return rule is not None and rule.convolves


def _is_elsewhere(node: Node) -> bool:
    return target.device_type(view.value(node)) != "cuda"


def _say_what_is_left(gm: GraphModule, problem: Problem, labels: dict[Value, bool]) -> None:
    """Of convolutions that stay in the order they do not compute in: what the other would cost."""
    left = [node for node in problem.wanting if not labels[node]]
    if not left:
        return
    cost = problem.labelling.price(labels)
    problem.labelling.fixed.update(dict.fromkeys(left, True))
    dearer = (problem.labelling.price(problem.labelling.cheapest()) - cost) / 1e6
    for node in left:
        reason = f"channels last would take {dearer:.3g} us more in copies"
        record(gm, Miss("layout", view.where(node), reason))
