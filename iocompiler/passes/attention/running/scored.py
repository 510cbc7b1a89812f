"""The execution of a recognised attention by `iocompiler::scored_attention`: of what the library's
kernels do not express, or only by a matrix of biases, or more slowly.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.cost_model.attention_decode import MOST_QUERIES
from iocompiler.graph import rewrite as edit
from iocompiler.graph import view
from iocompiler.ops.attention_choice import order
from iocompiler.ops.attention_classes import CLASSES, TABLE
from iocompiler.ops.scored_attention import FORWARD, ROWS, choose, tiles_of
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.arrange import Arranger
from iocompiler.passes.attention.dims.axes import flat, resolved
from iocompiler.passes.attention.masks.evaluate import Evaluator
from iocompiler.passes.attention.programs.distances import Distances
from iocompiler.passes.attention.programs.loads import Source
from iocompiler.passes.attention.programs.program import Extraction, Scored
from iocompiler.passes.attention.programs.weights_program import WeightsExtraction
from iocompiler.passes.attention.reading.constants import literal
from iocompiler.passes.attention.reading.description import (
    Attention,
    Beside,
    Bias,
    Cast,
    Declined,
    Pointwise,
    RowSum,
    Scale,
    Step,
)
from iocompiler.passes.attention.reading.frame import Frame, forward_views
from iocompiler.passes.attention.reading.results import check_readers
from iocompiler.passes.attention.running import seeds, strides
from iocompiler.passes.attention.running.operands import (
    cast,
    check_dtypes,
    finish,
    multiplied,
    operands,
)
from iocompiler.tile.dropout import threshold
from iocompiler.tile.score import ScoreProgram

aten = torch.ops.aten


@dataclass(frozen=True)
class ScoredCall:
    """One call of the semantic op, before its operands are brought to its layout."""

    found: Attention
    scored: Scored
    factors: tuple[Scale, ...]  # what the query is multiplied by

    @property
    def variant(self) -> str:
        frame = Frame(self.found)
        steps = self.found.steps
        program = self.scored.program
        weights = self.found.weights
        scored = any(isinstance(step, (Pointwise, Bias)) for step in steps)
        names = (
            ("gqa", frame.heads != frame.groups),
            ("mask", program.keep is not None),
            (weights or "score", bool(weights) or scored),
            ("dropout", self.found.dropout_p > 0.0),
            ("sink", self.found.sink is not None),
            ("lse", bool(self.found.row_sums)),
        )
        return "+".join(["program", *(name for name, there in names if there)])


def plan(found: Attention, evaluator: Evaluator) -> ScoredCall:
    """The attention as a score program.

    Raises:
        Declined: there is none.
    """
    check_dtypes(found)
    if threshold(found.dropout_p) >= 2**32:
        raise Declined("a dropout of everything")
    factors, rest = _factors(found)
    kind = WeightsExtraction if found.weights else Extraction
    return ScoredCall(found, kind.extract(replace(found, steps=rest), evaluator), factors)


def _factors(found: Attention) -> tuple[tuple[Scale, ...], tuple[Step, ...]]:
    """The tensors that the scores are multiplied by before all else, which the query may be
    multiplied by instead: their gradient is then more exact. And the other steps.
    """
    first = list(takewhile(lambda step: isinstance(step, (Scale, Cast)), found.steps))
    factors = [
        step
        for step in first
        if isinstance(step, Scale)
        and (step.dims or literal(step.factor) is None)
        and found.column not in flat(step.dims)
    ]
    return tuple(factors), tuple(step for step in found.steps if step not in factors)


def apply(gm: GraphModule, call: ScoredCall) -> None:
    """Put the call where the attention's output was computed, and erase what it stands for."""
    found, frame = call.found, Frame(call.found)
    anchor, dims = forward_views(found)
    arranger = Arranger(gm, anchor, (found.query, found.key, found.value))
    query, key, value = operands(arranger, found, frame)
    query = multiplied(arranger, query, call.factors, frame, found.dtype)
    loaded = [_loaded(arranger, source, frame) for source in call.scored.sources]
    numbers = [arranger.size((axis,)) for axis in call.scored.numbers]
    q, k, v = (view.value(each) for each in (query, key, value))
    letters, kernel = order(q, k, v) + _out_order(anchor, q), choose(q, v)
    sizes = [arranger.size(group) for group in frame.scores]
    results = arranger.call(
        FORWARD,
        query,
        key,
        value,
        loaded,
        numbers,
        call.scored.program.key,
        kernel,
        letters,
        seeds.drawn(arranger, q.device) if found.dropout_p else None,
        found.dropout_p,
        *_blocks(arranger, call.scored.program, (q, v), loaded, numbers, sizes, kernel),
    )
    waiting = check_readers(gm, found, anchor)
    out = arranger.call(operator.getitem, results, 0)
    if found.reads_rows:
        sums = arranger.call(operator.getitem, results, 1)
        sums = arranger.call(ROWS, sums, results.args[6])
        if found.sink is not None:
            out = _shared(arranger, out, sums, found.sink, frame)
        for each in found.row_sums:
            edit.delay(waiting, _redirected(gm, arranger, each, sums, frame))
    finish(gm, found, arranger, out, anchor, dims)


def _blocks(
    arranger: Arranger,
    program: ScoreProgram,
    like: tuple[torch.Tensor, torch.Tensor],
    loaded: list[Node],
    numbers: list[Any],
    sizes: list[Any],
    kernel: str,
) -> tuple[Node | None, list[Node]]:
    """The blocks that a mask leaves of the scores and the list of those that the forward visits,
    where the template asks for them and the mask reads tensors; calls of their own, which layers
    with one mask share.

    Args:
        like: query and value.
        sizes: [B, H, S, K]; few queries are not asked for in blocks.
    """
    query, value = like
    alone, read = program.mask()
    few = isinstance(sizes[2], int) and sizes[2] <= MOST_QUERIES
    if kernel != "template" or not read or few:
        return None, []
    tiles = tiles_of(program, query, value)
    of_mask = [loaded[n] for n in read]
    block, tile = list(tiles.grain), [tiles.forward.m, tiles.forward.n]
    classes = arranger.call(CLASSES, of_mask, numbers, sizes, block, alone.key)
    return classes, [arranger.call(TABLE, classes, sizes[2:], block, tile, False)]


def _shared(arranger: Arranger, out: Node, sums: Node, sink: Beside, frame: Frame) -> Node:
    """The output less what of each row is the sink's: out * sigmoid(log-sum-exp - sink)."""
    of: Any = sink.of
    if isinstance(of, Node):
        node, dims = views.stages(of, sink.dims)[-1]
        of = arranger.arranged(node, dims, frame.scores[:3], widen=False)
        of = cast(arranger, of, views.dtype(sums))
    share = sums if of == 0.0 else arranger.call(aten.sub.Tensor, sums, of)
    share = arranger.call(aten.unsqueeze.default, arranger.call(aten.sigmoid.default, share), 3)
    return arranger.call(aten.mul.Tensor, out, share)


def _redirected(
    gm: GraphModule, arranger: Arranger, each: RowSum, sums: Node, frame: Frame
) -> Node:
    """Let the readers of a log-sum-exp read the operator's; returns what they read."""
    new = arranger.arranged(sums, frame.scores[:3], resolved(each.dims))
    new = cast(arranger, new, views.dtype(each.node))
    strides.note(new, view.value(each.node))
    return edit.redirect(gm, each.node, new)


def _out_order(anchor: Node, query: torch.Tensor) -> str:
    """The memory order of the output: the caller's where the graph returns it, else the query's."""
    value = view.value(anchor)
    returned = any(user.op == "output" for user in anchor.users)
    return order(value if returned and value.dim() == 4 else query)


def _loaded(arranger: Arranger, source: Source, frame: Frame) -> Node:
    if isinstance(source, Distances):
        return source.emit(arranger)
    return arranger.arranged(source.node, source.dims, source.layout(frame), widen=False)
