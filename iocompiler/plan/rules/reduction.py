"""Reductions and scans: which dimensions a node folds, and how over the kernel's axes."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from iocompiler.plan.lowering import Lowering, Rule, Unsupported
from iocompiler.plan.sizes import equal
from iocompiler.plan.views import Index, flatten, shape_of, unflatten
from iocompiler.tile.index import Affine, Axis, product
from iocompiler.tile.ops import compute_dtype
from iocompiler.tile.program import Over

aten = torch.ops.aten


def _listed(position: int) -> Any:
    """Dimensions in the list or int argument at ``position``; all where it is absent or empty."""

    def dims(node: Node) -> Any:
        return node.args[position] if len(node.args) > position else None

    return dims


def _every(node: Node) -> Any:
    return None


_DIMS: dict[Any, Any] = {
    aten.sum.default: _every,
    aten.sum.dim_IntList: _listed(1),
    aten.mean.default: _every,
    aten.mean.dim: _listed(1),
    aten.amax.default: _listed(1),
    aten.amin.default: _listed(1),
    aten.max.default: _every,
    aten.min.default: _every,
    aten.prod.default: _every,
    aten.prod.dim_int: _listed(1),
    aten.any.default: _every,
    aten.any.dim: _listed(1),
    aten.any.dims: _listed(1),
    aten.all.default: _every,
    aten.all.dim: _listed(1),
    aten.all.dims: _listed(1),
    aten.argmax.default: _listed(1),
    aten.argmin.default: _listed(1),
    aten.cumsum.default: _listed(1),
    aten.cumprod.default: _listed(1),
}


def folded_dims(node: Node) -> tuple[int, ...] | None:
    """The input dimensions (sorted) the node reduces or scans along, None for any other node."""
    dims_of = _DIMS.get(node.target)
    if dims_of is None:
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    rank = len(shape_of(source))
    dims = dims_of(node)
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return tuple(range(rank))
    listed = dims if isinstance(dims, (list, tuple)) else [dims]
    return tuple(sorted({d % rank for d in listed})) if rank else ()


def source_index(low: Lowering, node: Node, index: Index) -> tuple[Index, Over]:
    """The index into the reduced tensor over which to fold, and which axes of the space fold it."""
    source = node.args[0]
    assert isinstance(source, Node)
    shape, dims = shape_of(source), folded_dims(node) or ()
    keepdim = len(shape_of(node)) == len(shape)
    kept = [i for d, i in enumerate(index) if d not in dims] if keepdim else list(index)
    used = low.axes_of(kept)
    over: Over = "parallel" if used and used <= low.space.reduced else "reduced"
    axes = low.space.part(reduced=over == "reduced")
    if over == "reduced" and used & low.space.reduced:
        raise Unsupported(node, " is read along the axes it reduces")
    inner = _spread(axes, [shape[d] for d in dims], low, node)
    places = iter(inner)
    rest = iter(kept)
    return tuple(next(places) if d in dims else next(rest) for d in range(len(shape))), over


def _spread(axes: tuple[Axis, ...], sizes: list[Any], low: Lowering, node: Node) -> Index:
    """The folded dimensions as affine functions of the folding axes, one to one."""
    if not equal(product([a.size for a in axes]), product(sizes)):
        raise Unsupported(node, f" reduces {sizes}, the kernel {[a.size for a in axes]}")
    flat = flatten([Affine.of(a.name) for a in axes], [a.size for a in axes])
    return unflatten(flat, sizes, low.extents)


def _reduction(fn: str) -> Rule:
    def rule(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
        if node.kwargs.get("dtype") not in (None, node.meta["val"].dtype):
            raise Unsupported("a reduction with a dtype other than its result's")
        inner, over = source_index(low, node, index)
        _check_mask(low, mask, over, node)
        source = node.args[0]
        assert isinstance(source, Node)
        value = low.value(source, inner, mask)
        dtype = compute_dtype(node.meta["val"].dtype)
        if fn in ("any", "all"):
            return _truth(low, value, fn, over)
        if fn in ("argmax", "argmin"):
            return low.builder.reduce(fn, value, torch.int64, over)
        value = low.convert(value, dtype)
        if fn == "sum":
            single = _one_hot(low, value, over)
            if single is not None:
                return single
        folded = low.builder.reduce("sum" if fn == "mean" else fn, value, dtype, over)
        if fn != "mean":
            return folded
        shape = shape_of(source)
        count = product([shape[d] for d in folded_dims(node) or ()])
        return low.builder.map("div", folded, low.builder.const(count, dtype))

    return rule


def _one_hot(low: Lowering, value: int, over: Over) -> int | None:
    """The sum of where(place == v, a, 0) along the one axis it runs over, where neither v nor a
    differs: a if there is such a place, else 0. None for any other value.
    """
    build = low.builder
    axes = low.space.part(reduced=over == "reduced")
    chosen = build.ops[value]
    if len(axes) != 1 or (chosen.kind, chosen.fn) != ("map", "where"):
        return None
    condition, there, elsewhere = chosen.inputs
    zero, test = build.ops[elsewhere], build.ops[condition]
    if (zero.kind, zero.value) != ("const", 0) or (test.kind, test.fn) != ("map", "eq"):
        return None
    for place, sought in (test.inputs, test.inputs[::-1]):
        iota = build.ops[place]
        fixed = axes[0].name not in low.varies(sought) | low.varies(there)
        if fixed and iota.kind == "iota" and iota.index == Affine.of(axes[0].name):
            kind = build.dtype(sought)
            first, end = build.const(0, kind), build.const(axes[0].size, kind)
            above = build.map("ge", sought, first, dtype=torch.bool)
            below = build.map("lt", sought, end, dtype=torch.bool)
            inside = build.map("and", above, below, dtype=torch.bool)
            return build.map("where", inside, there, elsewhere, dtype=chosen.dtype)
    return None


def _check_mask(low: Lowering, mask: int | None, over: Over, node: Node) -> None:
    """What is read for a result must not depend on where the result goes: under ``cat``, each half
    is asked for only in its own places, but a sum needs every element everywhere.
    """
    folded = {a.name for a in low.space.part(reduced=over == "reduced")}
    if mask is not None and low.varies(mask) & folded:
        raise Unsupported(node, " is needed at some places along the axes it folds")


def _truth(low: Lowering, value: int, fn: str, over: Over) -> int:
    value = low.convert(value, torch.bool)
    if fn == "any":
        return low.builder.reduce("any", value, torch.bool, over)
    negated = low.builder.map("logical_not", value, dtype=torch.bool)
    return low.builder.map(
        "logical_not", low.builder.reduce("any", negated, torch.bool, over), dtype=torch.bool
    )


def _scan(fn: str) -> Rule:
    def rule(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
        source = node.args[0]
        assert isinstance(source, Node)
        (dim,) = folded_dims(node) or (0,)
        axes = low.space.part(reduced=True)
        along = [Affine.of(a.name) for a in axes]
        if (
            len(along) != 1
            or index[dim] != along[0]
            or not equal(axes[0].size, shape_of(source)[dim])
        ):
            raise Unsupported(node, " scans along another axis than the kernel's")
        if low.axes_of(index[:dim] + index[dim + 1 :]) & low.space.reduced:
            raise Unsupported(node, " varies along the axis it scans")
        _check_mask(low, mask, "reduced", node)
        value = low.convert(low.value(source, index, mask), compute_dtype(node.meta["val"].dtype))
        return low.builder.scan(fn, value)

    return rule


REDUCTIONS: dict[Any, Rule] = {
    aten.sum.default: _reduction("sum"),
    aten.sum.dim_IntList: _reduction("sum"),
    aten.mean.default: _reduction("mean"),
    aten.mean.dim: _reduction("mean"),
    aten.amax.default: _reduction("max"),
    aten.amin.default: _reduction("min"),
    aten.max.default: _reduction("max"),
    aten.min.default: _reduction("min"),
    aten.prod.default: _reduction("prod"),
    aten.prod.dim_int: _reduction("prod"),
    **{getattr(aten.any, k): _reduction("any") for k in ("default", "dim", "dims")},
    **{getattr(aten.all, k): _reduction("all") for k in ("default", "dim", "dims")},
    aten.argmax.default: _reduction("argmax"),
    aten.argmin.default: _reduction("argmin"),
}

SCANS: dict[Any, Rule] = {
    aten.cumsum.default: _scan("cumsum"),
    aten.cumprod.default: _scan("cumprod"),
}
