"""Where an attention's gradients are put together, our backward writes them there."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.match import graph_pass
from iocompiler.graph.sizes import known
from iocompiler.ops.aligned_mm import ALIGNED
from iocompiler.ops.packed_gradients import PACKED
from iocompiler.ops.scored_attention import BACKWARD
from iocompiler.passes.attention.dims.views import shape
from iocompiler.passes.packed_gradients.layout import packed

aten = torch.ops.aten


@graph_pass(stage="flat")
def packed_gradients(gm: GraphModule) -> int:
    """The gradients of query, key and value where the projection's that made all three lies.

    Before::

        dq, dk, dv = iocompiler.scored_attention_backward.default(...)
        y = aten.cat.default([dq.transpose(1, 2).view(2, 64, 256), ..., ...], 2)

    After::

        y = iocompiler.scored_attention_backward_packed.default(..., "bs|hd:qkv")

    Taken is what is put together by `cat`, or by sums of zeros with slices put in, through views
    and copies on the way, in any order of the three and of batch, heads and rows; keys may have
    fewer heads. Left as they are: gradients that somebody else reads, those that are computed with
    on the way (rotary angles), odd rows, and those of library kernels, which allocate them.
    """
    return sum(_pack(gm, node) for node in view.calls(gm, BACKWARD))


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
