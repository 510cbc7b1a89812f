"""Which iteration space a kernel gets, and where in it each of its outputs lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.fx import Node

from iocompiler.plan.lowering import Lowering, Space, Unsupported
from iocompiler.plan.overwriting import elements_of, stored_into
from iocompiler.plan.rules import folded_dims, is_elementwise
from iocompiler.plan.sizes import equal, value_at
from iocompiler.plan.views import (
    RESHAPES,
    Index,
    NotAffine,
    SplitAxis,
    flatten,
    input_index,
    is_view,
    reshape_index,
    shape_of,
    unflatten,
)
from iocompiler.tile.index import Affine, Size, product

aten = torch.ops.aten


def root_space(
    home: frozenset[Node], outputs: tuple[Node, ...], order: Mapping[Node, int]
) -> tuple[Space, dict[Node, Index]]:
    """The space of a kernel, and the index of its root tensor there."""
    root, dims = root_of(home, outputs, order)
    space, index = Space.of_shape(shape_of(root), dims)
    return space, {root: index}


def root_of(
    home: frozenset[Node], outputs: tuple[Node, ...], order: Mapping[Node, int]
) -> tuple[Node, tuple[int, ...]]:
    """The tensor whose elements a kernel runs over, and which of its dimensions are reduced.

    With reductions, the input of the widest one is the root, and the dimensions it reduces are
    reduced; among equally wide ones that over the innermost dimension, whose rows lie contiguous.
    Without, the widest output is the root.
    """
    reductions = sorted((n for n in home if folded_dims(n) is not None), key=lambda n: order[n])
    if not reductions:
        stored = map(elements_of, sorted(outputs, key=lambda n: order[n]))
        return max(stored, key=points), ()
    best = max(reductions, key=_reduction_rank)
    source = best.args[0]
    assert isinstance(source, Node)
    return source, folded_dims(best) or ()


def points(node: Node) -> int:
    """How many elements a tensor has, symbolic sizes at a default."""
    return value_at(product(list(shape_of(node))), {})


def _reduction_rank(node: Node) -> tuple[int, bool]:
    source = node.args[0]
    assert isinstance(source, Node)
    dims = folded_dims(node) or ()
    return points(source), len(shape_of(source)) - 1 in dims


def settled(lowering: Lowering, outputs: tuple[Node, ...]) -> dict[Node, Index]:
    """The places of all outputs, where parallel and reduced extents are equal and an output may lie
    along either: the widest, which have one place, come first, and what they load tells where the
    others lie best. Nothing where no output has a choice.
    """
    across = product([a.size for a in lowering.space.part(reduced=True)])
    down = product([a.size for a in lowering.space.part(reduced=False)])
    if len(outputs) < 2 or not equal(across, down):
        return {}
    found = {}
    for output in sorted(outputs, key=lambda n: points(elements_of(n)), reverse=True):
        found[output], value = output_index(lowering, output)
        lowering.builder.store("", Affine(), value)
    return found


def output_index(lowering: Lowering, output: Node, place: Index | None = None) -> tuple[Index, int]:
    """Where ``output`` lies in the space, and its value there; ``place`` where that is known.

    Over equal extents there may be several places: that which loads least anew is taken, since
    in the others the columns of what is there already would be read as rows.

    Raises `Unsupported` where it has no place.
    """
    reasons: list[Unsupported] = []
    places: list[tuple[int, Index, int]] = []
    ops = lowering.builder.ops
    kept = _loads(lowering, [i for i, op in enumerate(ops) if op.kind == "store"])
    for index in _candidates(lowering, output) if place is None else [place]:
        try:
            value = lowering.value(elements_of(output), index)
        except Unsupported as error:
            reasons.append(error)
            continue
        except (SplitAxis, NotAffine):
            if not places:
                raise
            continue
        extra = lowering.varies(value) - lowering.axes_of(index)
        if not extra:
            if not kept:
                return index, value  # nothing was there: the rows are its own
            places.append((len(_loads(lowering, [value]) - kept), index, value))
            continue
        over = ", ".join(sorted(extra))
        reasons.append(Unsupported(output, f" varies over {over} beside its own elements"))
    if places:
        _, index, value = min(places, key=lambda place: place[0])
        return index, value
    if reasons:
        raise reasons[0]
    raise Unsupported(output, f" {list(shape_of(output))} does not fit the space")


def _loads(lowering: Lowering, values: list[int]) -> set[int]:
    """The loads that some values need; what was tried for another place is not among them."""
    ops = lowering.builder.ops
    needed, waiting = set(values), list(values)
    while waiting:
        for read in ops[waiting.pop()].reads:
            if read not in needed:
                needed.add(read)
                waiting.append(read)
    return {position for position in needed if ops[position].kind == "load"}


def _candidates(lowering: Lowering, output: Node) -> list[Index]:
    space, stored = lowering.space, elements_of(output)
    shape = shape_of(stored_into(output) if stored is output else stored)
    total = product(list(shape))
    if lowering.carried is None:
        lowering.carried = propagate(lowering)
    carried = lowering.carried.get(stored)
    found = [carried] if carried is not None and _covers(lowering, carried, total) else []
    spans = [space.axes, space.part(reduced=False)]
    if space.reduced:
        spans.append(space.part(reduced=True))
    for axes in spans:
        if equal(product([a.size for a in axes]), total):
            flat = flatten([Affine.of(a.name) for a in axes], [a.size for a in axes])
            try:
                index = unflatten(flat, shape, lowering.extents)
            except NotAffine:
                continue
            if index not in found:
                found.append(index)
    return found


def _covers(lowering: Lowering, index: Index, total: Size) -> bool:
    """Whether the index, one to one, reaches every element; that of a slice's base does not."""
    axes = [lowering.extents[name] for name in sorted(lowering.axes_of(index))]
    return equal(product(axes), total)


def propagate(lowering: Lowering) -> dict[Node, Index]:
    """Carry the seeds' indices over elementwise nodes and one-to-one views, both ways."""
    known = dict(lowering.seeds)
    queue = list(known)
    while queue:
        node = queue.pop()
        for neighbour, index in _neighbours(lowering, node, known[node]):
            if neighbour not in known:
                known[neighbour] = index
                queue.append(neighbour)
    return known


def _neighbours(lowering: Lowering, node: Node, index: Index) -> list[tuple[Node, Index]]:
    found: list[tuple[Node, Index]] = []
    extents = lowering.extents
    try:
        if is_view(node):
            found.append(input_index(node, index, extents))
        elif lowering.computes(node):
            found += [
                (p, index)
                for p in node.all_input_nodes
                if same_shape(p, node) and is_elementwise(node)
            ]
        for user in node.users:
            if is_view(user) and leads_into(user, lowering.computes):
                inverse = _inverse(user, node, index, lowering)
                if inverse is not None:
                    found.append((user, inverse))
            elif lowering.computes(user) and same_shape(user, node) and is_elementwise(user):
                found.append((user, index))
    except NotAffine:
        pass
    return found


def leads_into(view: Node, computes: Callable[[Node], bool]) -> bool:
    """Whether something computed, or a further view, reads the view."""
    return any(computes(user) or is_view(user) for user in view.users)


def same_shape(a: Node, b: Node) -> bool:
    """Whether both are tensors, of shapes proved equal."""
    if not isinstance(a.meta.get("val"), torch.Tensor) or not isinstance(
        b.meta.get("val"), torch.Tensor
    ):
        return False
    left, right = shape_of(a), shape_of(b)
    return len(left) == len(right) and all(equal(x, y) for x, y in zip(left, right, strict=True))


def _inverse(view: Node, source: Node, index: Index, lowering: Lowering) -> Index | None:
    """The index in ``view`` of the element at ``index`` of its input, for one-to-one views."""
    if view.target in (aten.permute.default,):
        order = view.args[1]
        return tuple(index[d] for d in order)  # type: ignore[union-attr,index]
    if view.target in (aten.transpose.int, aten.t.default, aten.alias.default, aten.detach.default):
        return input_index(view, index, lowering.extents)[1]  # its own inverse
    if view.target in _RESHAPES:
        return reshape_index(index, shape_of(source), shape_of(view), lowering.extents)
    return None


_RESHAPES = RESHAPES | {
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
}
