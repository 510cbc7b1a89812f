"""What a row of scores is reduced to. The softmax, by its name or by hand: exp(x - max) / sum, the
division early or late, with a sink or without; and the log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from iocompiler.passes.attention.dims.views import CASTS, dtype, shape
from iocompiler.passes.attention.reading import powers, sinks
from iocompiler.passes.attention.reading.powers import Powers
from iocompiler.passes.attention.reading.sinks import Sink

aten = torch.ops.aten
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_LOG_SOFTMAX = (aten.log_softmax.int, aten._log_softmax.default)
_PARTED = 4  # so far behind a slice its softmax is looked for


@dataclass(frozen=True)
class Softmax:
    """``node`` is softmax over ``dim`` of ``scores``; ``nodes`` are what it takes, the last one
    ``node``. With a sink, of the two together, without the sink's probability.

    Where ``late``, ``node`` is only exp(scores - max), to be divided by ``total``, its sum over
    ``dim``, later.
    """

    node: Node
    scores: Node
    dim: int
    nodes: tuple[Node, ...]
    total: Node | None = None
    sink: Sink | None = None


def read(node: Node) -> Softmax | None:
    """The softmax a node is; None where it is none."""
    if node.op != "call_function":
        return None
    if node.target in _SOFTMAX:
        scores: Any = node.args[0]
        return Softmax(node, scores, _dim(node, node.args[1]), (node,))
    divided = powers.quotient(node)
    if divided is not None:
        return _divided(node, *divided)
    if node.target is aten.exp.default:
        return _log_sum(node)
    return None


def without_sink(node: Node) -> Softmax | None:
    """The softmax of scores with a sink beside them, if the node is what is left of it without the
    sink's probability.
    """
    source, casts = node, list[Node]()
    for _ in range(_PARTED):
        if source.op != "call_function" or not source.all_input_nodes:
            return None
        source = source.all_input_nodes[0]
        whole = read(source)
        if whole is not None:
            return _parted(node, whole, casts)
        casts.append(source)
    return None


def _parted(node: Node, whole: Softmax, between: list[Node]) -> Softmax | None:
    scores, moved = _unmoved(whole.scores, whole.dim)
    found = sinks.joined(scores)
    if found is None or found.dim != whole.dim or whole.sink is not None:
        return None
    source = sinks.without(node, found)
    while source is not None and source.target in CASTS and dtype(source).is_floating_point:
        source = source.args[0]  # type: ignore[assignment]
    if source is not whole.node:
        return None
    nodes = (scores, *moved, *whole.nodes, *between, node)
    return Softmax(node, found.scores, found.dim, nodes, None, found.sink)


def _unmoved(node: Node, dim: int) -> tuple[Node, tuple[Node, ...]]:
    """``node`` without what no softmax over ``dim`` sees: a cast, its own maximum subtracted."""
    nodes: list[Node] = []
    while node.op == "call_function":
        source: Any = node.args[0] if node.args else None
        if node.target in CASTS and dtype(node).is_floating_point:
            nodes.append(node)
        elif node.target is aten.sub.Tensor and len(node.args) == 2 and not node.kwargs:
            shift = node.args[1]
            found = powers.maximum(shift, source) if isinstance(shift, Node) else None
            if found is None or found[0] != (dim,):
                break
            nodes += [node, *found[1]]
        else:
            break
        node = source
    return node, tuple(nodes)


def late(node: Node) -> Softmax | None:
    """exp(scores - max) whose sums over one dim are divided by later, if the node is that."""
    found = powers.read(node)
    if found is None:
        return None
    sums = [user for user in node.users if user.target is aten.sum.dim_IntList]
    if len(sums) != 1:
        return None
    total = sums[0]
    keeps = powers.keepdim(total) or len(total.users) != 1
    last = total if keeps else next(iter(total.users))
    totals = powers.totals(last, node) or (total,)
    if len(totals[-1].users) == 1:
        added = powers_and_sink(next(iter(totals[-1].users)), found)
        if added is not None:
            return _over(found, *added)
    return _over(found, totals, None)


def powers_and_sink(total: Node, found: Powers) -> tuple[tuple[Node, ...], Sink] | None:
    """The nodes of a sum of powers and of a sink, if ``total`` is that, which is the last one."""
    both = sinks.beside(total, found)
    if both is None:
        return None
    of_powers, sink = both
    return (*powers.totals(of_powers, found.node), *sink.nodes), sink


def _divided(node: Node, top: Node, bottom: Node, between: tuple[Node, ...]) -> Softmax | None:
    found = powers.read(top)
    if found is None:
        return None
    totals, sink = powers_and_sink(bottom, found) or (powers.totals(bottom, top), None)
    softmax = _over(found, totals, sink) if totals else None
    return softmax and Softmax(
        node, softmax.scores, softmax.dim, (*softmax.nodes, *between, node), None, sink
    )


def _over(found: Powers, totals: tuple[Node, ...], sink: Sink | None) -> Softmax | None:
    """The powers, to be divided by the last of ``totals``, the first of which sums them."""
    dim = powers.summed_dim(found, totals[0])
    if dim is None:
        return None
    return Softmax(found.node, found.scores, dim, (*found.nodes, *totals), totals[-1], sink)


def _log_sum(node: Node) -> Softmax | None:
    """exp(x - logsumexp(x)), exp(log_softmax(x))."""
    inner = node.args[0]
    if not isinstance(inner, Node):
        return None
    if inner.target in _LOG_SOFTMAX:
        scores: Any = inner.args[0]
        return Softmax(node, scores, _dim(inner, inner.args[1]), (inner, node))
    if inner.target is not aten.sub.Tensor or len(inner.args) != 2 or inner.kwargs:
        return None
    given, total = inner.args
    if not isinstance(total, Node) or not isinstance(given, Node):
        return None
    of_rows, sink = sinks.of_sum(total) or (total, None)
    found = logsumexp(of_rows)
    if found is None or not found.keepdim:
        return None
    joined = sinks.joined(found.scores)
    nodes = (*found.nodes, *(sink.nodes if sink else ()), inner, node)
    if joined is not None and joined.scores is given and joined.dim == found.dim and not sink:
        return Softmax(node, given, found.dim, (joined.node, *nodes), None, joined.sink)
    return Softmax(node, given, found.dim, nodes, None, sink) if found.scores is given else None


@dataclass(frozen=True)
class LogSumExp:
    """``nodes``, of which the last is it, are the log-sum-exp over ``dim`` of ``scores``."""

    scores: Node
    dim: int
    keepdim: bool
    nodes: tuple[Node, ...]


def logsumexp(node: Node) -> LogSumExp | None:
    """The log-sum-exp a node is, also by hand: max + log(sum(exp(x - max))); None if none."""
    if node.target is aten.logsumexp.default:
        scores, dims = node.args[:2]
        dims = [dims] if isinstance(dims, int) else list(dims)  # type: ignore[arg-type]
        if len(dims) != 1 or not isinstance(scores, Node):
            return None
        return LogSumExp(scores, _dim(scores, dims[0]), powers.keepdim(node), (node,))
    if node.target is aten.log.default:
        return _log(node, None)
    if node.target is not aten.add.Tensor or len(node.args) != 2 or node.kwargs:
        return None
    for log, shift in (node.args, node.args[::-1]):
        if isinstance(log, Node) and isinstance(shift, Node) and log.target is aten.log.default:
            found = _log(log, shift)
            if found is not None:
                return LogSumExp(found.scores, found.dim, found.keepdim, (*found.nodes, node))
    return None


def _log(node: Node, shift: Node | None) -> LogSumExp | None:
    """The log-sum-exp that log(sum(exp(x - shift))) is with its shift added."""
    total: Any = node.args[0]
    if total.target is not aten.sum.dim_IntList:
        return None
    found = powers.read(total.args[0])
    dim = None if found is None else powers.summed_dim(found, total)
    if found is None or dim is None:
        return None
    moved = powers.same_rows(found.shift, shift, dim)
    if moved is None:
        return None
    if shift is not None and len(shape(shift)) != len(shape(total)):
        return None  # broadcast against each other
    nodes = (*found.nodes, total, *moved, node)
    return LogSumExp(found.scores, dim, powers.keepdim(total), nodes)


def _dim(node: Node, dim: Any) -> int:
    return int(dim) % max(len(shape(node)), 1)
