"""Which operators keep integers affine in their place, one rule each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.graph.sizes import known
from iocompiler.passes.known_indices.affine import Affine, Integer

aten = torch.ops.aten
Read: TypeAlias = "Callable[[Any], Affine | None]"
"""What is known of an argument's elements."""
Rule: TypeAlias = "Callable[[Read, Node, list[Any]], Affine | None]"
"""(read, call, its arguments in the order of the schema) -> what is known of its elements."""


def shape(node: Any) -> tuple[Integer, ...]:
    return tuple(view.tensors(node)[0].shape)


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt))


# --- where they come from


def _arange(read: Read, node: Node, args: list[Any]) -> Affine | None:
    # (end), (start, end) or (start, end, step)
    start, step = 0, 1
    if node.target is not aten.arange.default:
        start = args[0]
    if node.target is aten.arange.start_step:
        step = args[2]
    if not _is_integer(start) or not _is_integer(step):
        return None
    (size,) = shape(node)
    return Affine(start, (0 if known(size == 1) else step,), (size,))


def _filled(place: int) -> Rule:
    def rule(read: Read, node: Node, args: list[Any]) -> Affine | None:
        value = int(args[place]) if isinstance(args[place], bool) else args[place]
        return Affine.constant(value, shape(node)) if _is_integer(value) else None

    return rule


def _of(value: int) -> Rule:
    return lambda read, node, args: Affine.constant(value, shape(node))


# --- views and copies


def _same(read: Read, node: Node, args: list[Any]) -> Affine | None:
    return read(args[0])


def _reshape(read: Read, node: Node, args: list[Any]) -> Affine | None:
    found = read(args[0])
    return found.reshaped(shape(node)) if found is not None else None


def _expand(read: Read, node: Node, args: list[Any]) -> Affine | None:
    found = read(args[0])
    return found.expanded(shape(node)) if found is not None else None


def _permute(read: Read, node: Node, args: list[Any]) -> Affine | None:
    found = read(args[0])
    if found is None:
        return None
    # which dim went where, a tensor whose sizes name its dims tells
    named = torch.empty([d + 2 for d in range(found.rank)], device="meta")
    return found.permuted([size - 2 for size in node.target(named, *args[1:]).shape])  # type: ignore[operator]


def _select(read: Read, node: Node, args: list[Any]) -> Affine | None:
    found = read(args[0])
    start = _from_front(args[2], found, args[1])
    return found.selected(args[1], start) if found is not None and start is not None else None


def _slice(read: Read, node: Node, args: list[Any]) -> Affine | None:
    found, dim = read(args[0]), args[1]
    start = _from_front(args[2] or 0, found, dim)
    step = 1 if node.target is aten.narrow.default else args[4]
    if found is None or start is None or not _is_integer(step):
        return None
    return found.sliced(dim, start, step, shape(node)[dim])


def _from_front(start: Any, found: Affine | None, dim: int) -> Integer | None:
    """A start, which may count from the end, as a place; None where that is not known."""
    if found is None or not _is_integer(start):
        return None
    size = found.sizes[dim]
    if known(start < 0):
        start = start + size
    inside = known(start >= 0) and known(start <= size)
    return start if inside else None  # one beyond the tensor is clamped


def _flip(read: Read, node: Node, args: list[Any]) -> Affine | None:
    found = read(args[0])
    for dim in args[1] if found is not None else ():
        found = found.flipped(dim)  # type: ignore[union-attr]
    return found


def _repeat(read: Read, node: Node, args: list[Any]) -> Affine | None:
    found, counts = read(args[0]), args[1]
    if found is None:
        return None
    tiled = zip(counts[len(counts) - found.rank :], found.steps, found.sizes, strict=True)
    if not all(known(n == 1) or known(step == 0) for n, step, _ in tiled):
        return None
    sizes = shape(node)
    steps = (0,) * (len(sizes) - found.rank) + found.steps
    return Affine(found.const, steps, sizes)


# --- arithmetic


def _operands(read: Read, node: Node, args: list[Any]) -> tuple[Affine, Affine] | None:
    sizes, found = shape(node), []
    for argument in args[:2]:
        one = Affine.constant(argument, ()) if _is_integer(argument) else read(argument)
        wide = one.expanded(sizes) if one is not None else None
        if wide is None or isinstance(argument, bool):
            return None
        found.append(wide)
    return found[0], found[1]


def _sum(sign: int, swapped: bool = False) -> Rule:
    """a + alpha * b; the difference for a negative sign, of the other from the one if swapped."""

    def rule(read: Read, node: Node, args: list[Any]) -> Affine | None:
        pair, alpha = _operands(read, node, args), args[2] if len(args) > 2 else 1
        if pair is None or not _is_integer(alpha):
            return None
        a, b = reversed(pair) if swapped else pair
        return a.plus(b.times(sign * alpha))

    return rule


def _product(read: Read, node: Node, args: list[Any]) -> Affine | None:
    pair = _operands(read, node, args)
    if pair is None:
        return None
    a, b = pair if pair[1].is_constant else reversed(pair)
    return a.times(b.const) if b.is_constant else None


def _negative(read: Read, node: Node, args: list[Any]) -> Affine | None:
    found = read(args[0])
    return found.times(-1) if found is not None else None


def _running_sum(read: Read, node: Node, args: list[Any]) -> Affine | None:
    """Of a constant c: c, 2c, 3c ..."""
    found = read(args[0])
    if found is None or not found.is_constant or not found.rank:
        return None
    at = args[1] % found.rank
    steps = [found.const if d == at else 0 for d in range(found.rank)]
    return Affine(found.const, tuple(steps), found.sizes)


RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), _arange),
    **dict.fromkeys((aten.full.default, aten.full_like.default), _filled(1)),
    aten.new_full.default: _filled(2),
    aten.scalar_tensor.default: _filled(0),
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), _of(0)),
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), _of(1)),
    **dict.fromkeys(
        (
            aten.clone.default,
            aten.contiguous.default,
            aten.alias.default,
            aten.detach.default,
            aten.detach_.default,
            aten.lift_fresh_copy.default,
            aten.to.dtype,
            aten.to.device,
            aten.to.dtype_layout,
            aten._to_copy.default,
        ),
        _same,
    ),
    **dict.fromkeys(
        (
            aten.reshape.default,
            aten.flatten.using_ints,
            aten.unflatten.int,
            aten.view_as.default,
            aten.reshape_as.default,
            aten.unsqueeze.default,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
        ),
        _reshape,
    ),
    **dict.fromkeys(
        (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default), _expand
    ),
    **dict.fromkeys(
        (aten.permute.default, aten.transpose.int, aten.movedim.int, aten.movedim.intlist), _permute
    ),
    aten.select.int: _select,
    **dict.fromkeys((aten.slice.Tensor, aten.narrow.default), _slice),
    aten.flip.default: _flip,
    aten.repeat.default: _repeat,
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _sum(1)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _sum(-1)),
    **dict.fromkeys((aten.rsub.Tensor, aten.rsub.Scalar), _sum(-1, swapped=True)),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _product),
    aten.neg.default: _negative,
    aten.cumsum.default: _running_sum,
}
