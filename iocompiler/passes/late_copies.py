"""Copies that are made where a reader needs them, not before: most readers need none."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.findings import Rewrite, record
from iocompiler.graph.match import graph_pass
from iocompiler.graph.sizes import known
from iocompiler.ops import target
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.arrange import Arranger
from iocompiler.passes.attention.dims.axes import Axis, Dims, Group, flat, fresh, resolve
from iocompiler.passes.attention.dims.views import Operand, shape
from iocompiler.passes.copied_operands import COPIES as _COPIES
from iocompiler.passes.copied_operands import read_originals

aten = torch.ops.aten

_LAYERS = (aten.linear.default, aten.matmul.default)
_ATTENTION = aten.scaled_dot_product_attention.default
_PIECES = (
    *(aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default),
    *(aten.unbind.int, operator.getitem),
)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
_BY_ROW = (
    _ATTENTION,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.softmax.int,
    aten.dropout.default,
)
"""What reads rows in any order, beside pointwise operators: kernels of ours, and attention."""


@graph_pass
def late_copies(gm: GraphModule) -> int:
    """On a GPU, rows are not put in another order for a linear layer, nor its result as a whole.

    Before::

        y = aten.linear.default(aten.transpose.int(x, 0, 1), w, b)             # x [B, S, D]: copied
        y = aten.contiguous.default(aten.permute.default(aten.reshape.default(y, ...), ...))
        q = aten.select.int(y, 0, 0)

    After::

        y = aten.transpose.int(aten.linear.default(x, w, b), 0, 1)
        y = aten.permute.default(aten.reshape.default(y, ...), ...)
        q = aten.contiguous.default(aten.select.int(y, 0, 0))

    As `nn.MultiheadAttention` is written. Nor for products that read it where it lies
    (`copied_operands.py`). The copies that are left are for whom they were made: an
    attention or a kernel of ours reads what is behind them. Left as they are: layers of whose
    result something reads rows that lie dense, where it has more columns than the input; results of
    the graph; what is written in place; a copy that is read as a whole.
    """
    roots = view.roots(gm)
    written = view.written(gm, roots)

    def still(node: Node) -> bool:
        return not roots.get(node, frozenset({node})) & written

    sites = 0
    for node in list(view.calls(gm, *_LAYERS)):
        sites += _turned(gm, node, still)
    for node in list(view.calls(gm, *_COPIES)):
        if not node._erased and _is_dense(node) and still(node) and still(node.args[0]):  # type: ignore[arg-type]
            sites += _dropped(gm, node) or _parted(gm, node)
    return sites + read_originals(gm, still)


def _is_on_gpu(x: torch.Tensor) -> bool:
    return target.device_type(x) == "cuda"


# --- layers of rows in another order


class _Rows(NamedTuple):
    """What rows are read from, the axes of its dims, and those of the rows in the order it has."""

    source: Node
    dims: Dims
    order: Group


def _turned(gm: GraphModule, node: Node, still: Callable[[Node], bool]) -> int:
    x, weight, *_ = view.spelled_out(node)
    made = view.tensors(node)[0]
    if len(shape(weight)) != 2 or not view.is_contiguous(made) or not _is_on_gpu(made):
        return 0
    dims = fresh(shape(x))
    stages = views.stages(x, dims)
    rows = _rows(stages, dims)
    if rows is None or not still(node) or not still(rows.source):
        return 0
    inner = 1 if node.target is aten.linear.default else 0
    narrows = known(shape(weight)[1 - inner] <= shape(weight)[inner])
    columns = (Axis(made.shape[-1]),)
    if rows.source.target is _ATTENTION:
        taken = _turns_back(node, (*dims[:-1], columns), rows.order)
    else:
        taken = _absorbed(node, narrows and not _serves_several(stages))
    if not taken:
        return 0
    arranger = Arranger(gm, node, [Operand(tuple(stages))])
    front = tuple((axis,) for axis in rows.order)
    given = arranger.arranged(rows.source, rows.dims, (*front, resolve(dims[-1])))
    product = arranger.call(node.target, given, *node.args[1:])
    wanted = tuple(resolve(group) for group in (*dims[:-1], columns))
    new = arranger.arranged(product, (*front, columns), wanted)
    record(gm, Rewrite("late_copies", view.where(node), "rows in another order"))
    rewrite.redirect(gm, node, arranger.call(aten.contiguous.default, new))
    return 1


def _rows(stages: list[tuple[Node, Dims]], dims: Dims) -> _Rows | None:
    """Where the rows that have these ``dims`` lie in another order: dense, or in what an attention
    writes, which may be any. None where nowhere.
    """
    deepest = next((n for n, (each, _) in enumerate(stages) if _is_kept(each)), -1)
    source, its = stages[deepest]
    rows, width = flat(dims[:-1]), resolve(dims[-1])
    lies = flat(its)
    order = tuple(axis for axis in lies if axis in rows)
    if order == rows or set(lies) != {*rows, *width} or not width:
        return None
    dense = view.is_contiguous(view.value(source)) and lies[len(rows) :] == width
    return _Rows(source, its, order) if dense or source.target is _ATTENTION else None


def _is_kept(node: Node) -> bool:
    """Whether it is a copy that others read too."""
    return node.target in views.VIEWS and len(node.users) > 1 and not view.is_shared(node)


def _serves_several(stages: list[tuple[Node, Dims]]) -> bool:
    """Whether rows are copied once for several readers, as an image's windows for query, key and
    value: products of theirs would copy each.
    """
    several = False
    for each, _ in stages[:-1]:
        several = several or len(each.users) > 1
        if several and not view.is_shared(each):
            return True
    return False


def _turns_back(node: Node, dims: Dims, order: Group) -> bool:
    """Whether all that is read of ``node``, of these dims, is a view with rows in this order."""
    while len(node.users) == 1:
        (node,) = node.users
        later = views.after(node, dims)
        if later is None:
            return False
        dims = later
        if flat(dims[:-1]) == order:
            return True
    return False


def _absorbed(node: Node, narrows: bool) -> bool:
    """Whether nobody needs the rows of ``node`` dense who does not copy them anyway; if it
    ``narrows``, products may: they then copy what has no more columns.
    """
    return bool(node.users) and all(_absorbs(user, narrows) for user in node.users)


def _absorbs(user: Node, narrows: bool) -> bool:
    if user.target in _COPIES or user.target in _BY_ROW:
        return True
    if user.target in views.VIEWS or user.target in _PIECES:
        return _absorbed(user, narrows)
    if user.target in _PRODUCTS:
        return narrows
    tags = getattr(user.target, "tags", ())
    return torch.Tag.pointwise in tags and not view.mutates(user)


# --- copies that are read through views


def _is_dense(node: Node) -> bool:
    """Whether a copy lays out what it is given, on a GPU, in the order of its dims."""
    made = view.value(node)
    if not isinstance(made, torch.Tensor) or not _is_on_gpu(made):
        return False
    kept = node.kwargs.get("memory_format", node.args[1] if len(node.args) > 1 else None)
    default = node.target is aten.contiguous.default and kept is None
    return (default or kept is torch.contiguous_format) and view.is_contiguous(made)


def _dropped(gm: GraphModule, node: Node) -> int:
    """A copy that is only read, through views, by other copies."""
    between: list[Node] = []
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        if user.target in _COPIES and _is_dense(user):
            continue
        if user.target not in views.VIEWS or user.target in _COPIES or not user.users:
            return 0
        between.append(user)
        waiting += user.users
    if not node.users:
        return 0
    rewrite.bypass(gm, node, node.args[0])  # type: ignore[arg-type]
    for each in _in_order(gm, between):
        if each.target is aten.view.default:
            rewrite.respell(each, aten.reshape.default, each.args)
        rewrite.compute_value(each)
    return 1


def _in_order(gm: GraphModule, nodes: list[Node]) -> Iterator[Node]:
    wanted = set(nodes)
    return (node for node in gm.graph.nodes if node in wanted)


def _parted(gm: GraphModule, node: Node) -> int:
    """A copy of which readers take one piece each, of those that lie dense in it."""
    source = node.args[0]
    assert isinstance(source, Node)
    pieces = list(node.users)
    if not pieces or view.is_contiguous(view.value(source)):
        return 0
    for piece in pieces:
        if piece.target is not aten.select.int or not _absorbed(piece, narrows=True):
            return 0
        dim = piece.args[1] % len(shape(node))  # type: ignore[operator]
        if not all(known(size == 1) for size in shape(node)[:dim]):
            return 0
    for piece in pieces:

        def copied(source: Any, *place: Any) -> Any:
            return aten.contiguous.default(aten.select.int(source, *place))

        rewrite.substitute(gm, piece, copied, source, *piece.args[1:])
    return 1
