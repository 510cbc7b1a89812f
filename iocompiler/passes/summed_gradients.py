"""Sums down the columns of an attention's gradients, by the kernels that make these."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from iocompiler.cost_model.attention_tiles import row
from iocompiler.graph import rewrite, view
from iocompiler.graph.match import graph_pass
from iocompiler.graph.sizes import known, same_sizes
from iocompiler.ops import target
from iocompiler.ops.packed_gradients import DIMS, PACKED, Packing
from iocompiler.ops.scored_attention import BACKWARD
from iocompiler.ops.summed_gradients import PACKED_SUMMED, SUMMED
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.axes import Dims, flat, fresh, resolve
from iocompiler.passes.attention.dims.views import shape
from iocompiler.tile.score import parsed

aten = torch.ops.aten

_MOVES = frozenset(views.VIEWS)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FEW = 8
"""Rows of which a sum in float32 is no less than they are."""


@graph_pass(stage="flat")
def summed_gradients(gm: GraphModule) -> int:
    """Gradients of a projection's bias from the attention's backward.

    Before::

        dq, dk, dv = iocompiler.scored_attention_backward.default(...)
        y = aten.sum.dim_IntList(dq.transpose(1, 2).view(4096, 1024), [0], True)

    After::

        dq, dk, dv, sums_q, sums_k, sums_v = iocompiler.scored_attention_backward_summed(..., 64)
        y = aten.sum.dim_IntList(sums_q, [0, 2]).view(1, 1024)                  # and a cast

    Where all three are in one tensor (`packed_gradients`), so are the sums; columns of it may be
    summed by themselves. Each kernel has a block of rows in registers when it stores them: the
    gradients are not read again. Left as they are: sums over anything but batch and rows, or of
    what is computed from a gradient; few rows; library kernels; masks under which a row may be the
    mean of the values.
    """
    apart = sum(_of_three(gm, node) for node in list(view.calls(gm, BACKWARD)))
    return apart + sum(_of_one(gm, node) for node in list(view.calls(gm, PACKED)))


class _Sum(NamedTuple):
    """A sum over batch and rows, and of which columns of the last dim; None for all."""

    node: Node
    columns: tuple[Any, Any] | None


class _Seen(NamedTuple):
    """A view, what its dims mean, and what those of the whole, or of some columns, do."""

    node: Node
    dims: Dims
    start: Dims
    columns: tuple[Any, Any] | None = None


def _of_three(gm: GraphModule, call: Node) -> int:
    rows = _rows(call)
    gradients = [n for n in call.users if n.target is operator.getitem]
    if not rows or len(gradients) != len(call.users):
        return 0
    found = [(each, n.args[1]) for n in gradients for each in _sums(n, DIMS)]
    if not found:
        return 0
    new = rewrite.call(gm, SUMMED, (*view.spelled_out(call), rows), {}, near=call)
    for each, of in found:
        sums = rewrite.call(gm, operator.getitem, (new, 3 + of), {}, near=each.node)  # type: ignore[operator]
        _fold(gm, each, sums, DIMS)
    for gradient in gradients:
        again = rewrite.call(gm, operator.getitem, (new, gradient.args[1]), {}, near=gradient)
        rewrite.redirect(gm, gradient, again)
    return 1


def _of_one(gm: GraphModule, call: Node) -> int:
    arguments = view.spelled_out(call)
    dims = Packing.parsed(arguments[-1]).front + "*"
    rows = _rows(call)
    found = list(_sums(call, dims)) if rows else []
    if not found:
        return 0
    new = rewrite.call(gm, PACKED_SUMMED, (*arguments, rows), {}, near=call)
    gradients, sums = (
        rewrite.call(gm, operator.getitem, (new, n), {}, near=call) for n in range(2)
    )
    rewrite.redirect(gm, call, gradients)
    for each in found:
        _fold(gm, each, sums, dims)
    return 1


def _rows(call: Node) -> int:
    """How many rows a line of sums has: those of the smaller block of the kernels that make the
    gradients; 0 where none makes sums, or they would save nothing.
    """
    given = view.named(call)
    query, key, value = (view.tensors(given[name])[0] for name in ("query", "key", "value"))
    length, keys = query.shape[2], key.shape[2]
    if given["kernel"] != "template" or parsed(given["program"]).empty == "uniform":
        return 0
    if known(length < _FEW) or known(keys < _FEW):
        return 0
    width = max(query.shape[3], value.shape[3])
    tiles = row(target.capability(query), query.element_size(), width)
    return min(tiles.dq.m, tiles.dkv.n)


def _sums(node: Node, letters: str) -> Iterator[_Sum]:
    """The sums over batch and rows of ``node``, of these dims, through views of it; of columns of
    the last dim too.
    """
    start = fresh(shape(node))
    waiting = [_Seen(node, start, start)]
    while waiting:
        seen = waiting.pop()
        for user in seen.node.users:
            if user.target is aten.sum.dim_IntList and _is_over(user, seen, letters):
                yield _Sum(user, seen.columns)
            elif user.target in _MOVES and user.args[0] is seen.node:
                later = views.after(user, seen.dims)
                if later is not None:
                    waiting.append(seen._replace(node=user, dims=later))
                elif user.target is aten.slice.Tensor and seen.columns is None:
                    waiting += _columns(user, seen)


def _columns(node: Node, seen: _Seen) -> Iterator[_Seen]:
    """A slice along the last dim of the whole."""
    _, dim, begin, _end, step = view.spelled_out(node)
    axes, size = resolve(seen.dims[dim]), shape(node)[dim]
    is_plain = step == 1 and isinstance(begin, int) and begin >= 0
    if not is_plain or not axes or axes != resolve(seen.start[-1]):
        return
    one = fresh([size])
    dims = [*seen.dims]
    dims[dim] = one[0]
    yield _Seen(node, tuple(dims), (*seen.start[:-1], *one), (begin, begin + size))


def _is_over(node: Node, seen: _Seen, letters: str) -> bool:
    """Whether a sum of what is seen is over batch and rows, and leaves the rest as it lies."""
    dims, start = seen.dims, seen.start
    over, made = view.spelled_out(node)[1], view.tensors(node)[0]
    if not over or made.dtype not in _DTYPES or len(_symbols(made)) > 1:
        return False
    gone = {d % len(dims) for d in over}
    summed = flat(group for d, group in enumerate(dims) if d in gone)
    left = flat(group for d, group in enumerate(dims) if d not in gone)
    wanted = flat(group for group, x in zip(start, letters, strict=True) if x in "bs")
    kept = flat(group for group, x in zip(start, letters, strict=True) if x not in "bs")
    return set(summed) == set(wanted) and left == kept


def _fold(gm: GraphModule, found: _Sum, sums: Node, letters: str) -> None:
    """The rest of the sum, in the dtype and shape of its node."""
    node = found.node
    made = view.tensors(node)[0]
    if found.columns is not None:
        sums = rewrite.call(
            gm, aten.slice.Tensor, (sums, len(letters) - 1, *found.columns), {}, near=node
        )
    over = [d for d, x in enumerate(letters) if x in "bs"]
    new = rewrite.call(gm, aten.sum.dim_IntList, (sums, over), {}, near=node)
    if made.dtype != torch.float32:
        new = rewrite.call(gm, aten._to_copy.default, (new,), {"dtype": made.dtype}, near=node)
    if not same_sizes(shape(new), made.shape):
        symbols = _symbols(made)
        sizes = [-1 if d in symbols else n for d, n in enumerate(made.shape)]
        new = rewrite.call(gm, aten.view.default, (new, sizes), {}, near=node)
    rewrite.redirect(gm, node, new)


def _symbols(made: torch.Tensor) -> set[int]:
    """The dims whose sizes are no numbers."""
    return {d for d, size in enumerate(made.shape) if not isinstance(size, int)}
