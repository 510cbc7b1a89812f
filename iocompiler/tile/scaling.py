"""Products of a tensor with one number: by 1 they leave the tensor as it is, bit by bit."""

from __future__ import annotations

from typing import NamedTuple

import torch

from iocompiler.tile.program import Op, TileProgram

_EXACT_IN = (torch.float32, torch.float64)


class Scaling(NamedTuple):
    """The buffers of ``out = source * factor``; the factor is one element, ``at`` so many behind
    its pointer.
    """

    source: str
    factor: str
    out: str
    at: int


def scaling(program: TileProgram) -> Scaling | None:
    """What a program multiplies by one number, if it does that and no more: each element stands
    where it stood, in the dtype that it had, and has an exact place in the product's.
    """
    ops = program.ops
    stores = [op for op in ops if op.kind == "store"]
    loads = [op for op in ops if op.kind == "load"]
    products = [op for op in ops if op.kind == "map"]
    others = [op for op in ops if op.kind not in ("store", "load", "map", "cast")]
    if (len(stores), len(loads), len(products), len(others)) != (1, 2, 1, 0):
        return None
    (store,), (product,) = stores, products
    if product.fn != "mul" or _uncast(ops, store.inputs[0]) is not product:
        return None
    for source, factor in (product.inputs, product.inputs[::-1]):
        found = _of(program, store, _uncast(ops, source), _uncast(ops, factor), product.dtype)
        if found is not None:
            return found
    return None


def _uncast(ops: tuple[Op, ...], position: int) -> Op:
    while ops[position].kind == "cast":
        (position,) = ops[position].inputs
    return ops[position]


def _of(
    program: TileProgram, store: Op, source: Op, factor: Op, dtype: torch.dtype
) -> Scaling | None:
    if source.kind != "load" or factor.kind != "load" or factor.index is None:
        return None
    if any(len(op.inputs) or op.reads for op in (source, factor)) or len(store.inputs) > 1:
        return None  # masked, or at places that are computed
    place = factor.index
    if place.names or not isinstance(place.const, int) or source.index != store.index:
        return None
    held, written = (program.buffer(op.buffer) for op in (source, store))
    if held.dtype != written.dtype or held.role != "in" or written.role != "out":
        return None
    if not held.dtype.is_floating_point or dtype not in (held.dtype, *_EXACT_IN):
        return None
    if dtype == torch.float32 and held.dtype == torch.float64:
        return None
    if program.buffer(factor.buffer).role != "in":
        return None
    return Scaling(source.buffer, factor.buffer, store.buffer, place.const)
