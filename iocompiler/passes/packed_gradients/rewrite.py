"""Where an attention's gradients are read together, our backward writes them so."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.findings import Rewrite, record
from iocompiler.graph.match import graph_pass
from iocompiler.graph.sizes import known
from iocompiler.ops.aligned_mm import ALIGNED
from iocompiler.ops.packed_gradients import PACKED
from iocompiler.ops.scored_attention import BACKWARD
from iocompiler.passes.attention.dims.views import shape
from iocompiler.passes.packed_gradients.layout import packed
from iocompiler.passes.packed_gradients.projections import PATTERN, projected
from iocompiler.passes.packed_gradients.whole import Whole

aten = torch.ops.aten


@graph_pass(stage="flat")
def packed_gradients(gm: GraphModule) -> int:
    """The gradients of query, key and value side by side: where the gradient of the projection lies
    that made all three, or where those of three projections of one input can be read as one.

    Before::

        dq, dk, dv = iocompiler.scored_attention_backward.default(...)
        y = aten.cat.default([dq.transpose(1, 2).view(2, 64, 256), ..., ...], 2)

    After::

        y = iocompiler.scored_attention_backward_packed.default(..., "bs|hd:qkv")

    Taken is what is put together by `cat`, or by sums of zeros with slices put in, through views
    and copies on the way, in any order of the three and of batch, heads and rows; keys may have
    fewer heads.

    Before::

        dq, dk, dv = iocompiler.scored_attention_backward.default(...)
        wq = aten.mm.default(dq.transpose(1, 2).view(128, 256).t(), x); wk = ...; wv = ...
        y = aten.mm.default(dq.transpose(1, 2).view(128, 256), q_weight); ...

    After::

        d = iocompiler.scored_attention_backward_packed.default(..., "bs|hd:qkv").view(128, 768)
        w = aten.mm.default(d.t(), x); wq, wk, wv = w[:256], w[256:512], w[512:]
        y = aten.mm.default(d[:, :256], q_weight); ...

    One product reads ``x`` once, and slices of rows of its result are the weights' gradients. Taken
    where products and sums down their columns are all that reads the gradients, and one product is
    priced below three.

    Left as they are: gradients that somebody else reads, those that are computed with on the way
    (rotary angles), odd rows, and those of library kernels, which allocate them.
    """
    return sum(_pack(gm, node) or _project(gm, node) for node in list(view.calls(gm, BACKWARD)))


def _pack(gm: GraphModule, call: Node) -> int:
    found = packed(call)
    if found is None:
        return 0
    root, packing = found
    arguments = (*view.spelled_out(call), str(packing))
    new = rewrite.call(gm, PACKED, arguments, {}, near=call)
    seen = _seen(gm, new, shape(root), call) if _is_aligned(new) else None
    if seen is None:
        rewrite.erase(gm, new)
        return 0
    rewrite.bypass(gm, root, seen)
    return 1


def _project(gm: GraphModule, call: Node) -> int:
    found = projected(gm, call)
    if found is None:
        return 0
    arguments = (*view.spelled_out(call), str(found.packing))
    new = rewrite.call(gm, PACKED, arguments, {}, near=call)
    row = shape(new)[-1]
    shown: dict[str, Node] = {}
    for key, front in found.fronts.items():
        seen = _seen(gm, new, torch.Size((*front, row)), call)
        if seen is None:
            rewrite.erase(gm, new)
            return 0
        shown[key] = seen
    record(gm, Rewrite(PATTERN, view.where(call), f"three weights' gradients in one, {found.gain}"))
    Whole(gm, call, found, shown).read()
    return 1


def _is_aligned(new: Node) -> bool:
    """Whether products read its rows fast as they are: a copy may get padded ones instead."""
    made = view.tensors(new)[0]
    return known(made.shape[-1] * made.element_size() % ALIGNED == 0)


def _seen(gm: GraphModule, new: Node, wanted: torch.Size, near: Node) -> Node | None:
    """``new`` in another shape; None where sizes of that are neither numbers nor sizes of its own,
    and more than one.
    """
    have = shape(new)
    if len(have) == len(wanted) and all(known(a == b) for a, b in zip(have, wanted, strict=True)):
        return new
    places = [next((d for d, n in enumerate(have) if known(n == size)), None) for size in wanted]
    given = list(zip(wanted, places, strict=True))
    if sum(place is None and not isinstance(size, int) for size, place in given) > 1:
        return None
    sizes = [_size(gm, new, size, place, near) for size, place in given]
    return rewrite.call(gm, aten.view.default, (new, sizes), {}, near=near)


def _size(gm: GraphModule, new: Node, wanted: Any, place: int | None, near: Node) -> Any:
    """A size as `view` takes it: a number, that of a dim of ``new``, or -1."""
    if isinstance(wanted, int):
        return wanted
    if place is None:
        return -1
    return rewrite.call(gm, aten.sym_size.int, (new, place), {}, near=near)
