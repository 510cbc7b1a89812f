"""Tensors brought to other dims, by views wherever strides allow."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite as edit
from iocompiler.graph import view
from iocompiler.graph.sizes import known
from iocompiler.ops import target as device
from iocompiler.ops.aligned_mm import ALIGNED
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.axes import Axis, Dims, Group, flat, resolved, size
from iocompiler.passes.attention.dims.views import Operand

aten = torch.ops.aten


class Arranger:
    """Inserts views before ``near``."""

    def __init__(self, gm: GraphModule, near: Node, operands: Sequence[Operand]) -> None:
        self._gm = gm
        self._near = near
        self._seen = [stage for operand in operands for stage in operand.stages]
        self._sizes: dict[Axis, Any] = {}

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Insert a call."""
        return edit.call(self._gm, target, args, kwargs, near=self._near)

    def operand(self, operand: Operand, target: Dims) -> Node:
        """The operand with these dims: something it already is a view of, where that has them; what
        that is a copy of, where kernels read it as it lies.
        """
        node, dims = operand.stages[-1]
        for found, its in reversed(operand.stages):
            if resolved(its) == target:
                if found is node or _is_view_of(found, node):
                    return found
                seen = self.arranged(node, dims, target)
                if _is_view_of(seen, node) and _is_aligned(seen):
                    return seen
                self._forget(seen)
                return found
        return self.arranged(node, dims, target)

    def _forget(self, node: Node) -> None:
        """Erase what nobody reads, and the sizes that were there for it."""
        edit.erase(self._gm, node)
        sizes = self._sizes.items()
        gone = [axis for axis, size in sizes if isinstance(size, Node) and size._erased]
        for axis in gone:
            del self._sizes[axis]

    def arranged(self, node: Node, dims: Dims, target: Dims, *, widen: bool = True) -> Node:
        """The tensor, with ``dims`` now, with ``target`` dims: by views wherever strides allow.

        Axes of the target that the tensor lacks are repeated; with ``widen`` false, a target dim
        whose axes it lacks altogether gets size 1 instead.
        """
        dims = resolved(dims)
        if not widen:
            present = set(flat(dims))
            target = tuple(group if present & set(group) else () for group in target)
        if dims == target and len(dims) == len(views.shape(node)):
            return node
        have, wanted = list(flat(dims)), flat(target)
        if have == list(wanted):
            return self._reshape(node, dims, target)
        node = self._reshape(node, dims, tuple((axis,) for axis in have))
        order = [have.index(axis) for axis in wanted if axis in have]
        if order != list(range(len(order))):
            node = self.call(aten.permute.default, node, order)
        missing = [axis for axis in wanted if axis not in have]
        if missing:
            for place, axis in enumerate(wanted):
                if axis in missing:
                    node = self.call(aten.unsqueeze.default, node, place)
            node = self.call(
                aten.expand.default,
                node,
                [self.size((axis,)) if axis in missing else -1 for axis in wanted],
            )
        return self._reshape(node, tuple((axis,) for axis in wanted), target)

    def _reshape(self, node: Node, dims: Dims, target: Dims) -> Node:
        if dims == target and len(dims) == len(views.shape(node)):
            return node
        sizes = [self.size(group) for group in target]
        symbolic = [place for place, size in enumerate(sizes) if isinstance(size, Node)]
        if len(symbolic) == 1 and 0 not in sizes:  # beside a 0 no size follows from the others
            sizes[symbolic[0]] = -1
        return self.call(aten.reshape.default, node, sizes)

    def size(self, group: Group) -> Any:
        """The size of a dim: a number, or a node where it is symbolic."""
        whole: Any = 1
        for axis in group:
            if axis not in self._sizes:
                self._sizes[axis] = (
                    axis.size if isinstance(axis.size, int) else self._symbolic(axis)
                )
            one = self._sizes[axis]
            whole = (
                self.call(operator.mul, whole, one)
                if isinstance(whole, Node) or isinstance(one, Node)
                else whole * one
            )
        return whole

    def _symbolic(self, axis: Axis) -> Node:
        for node, dims in self._seen:
            for place, group in enumerate(resolved(dims)):
                if group == (axis,):
                    return self.call(aten.sym_size.int, node, place)
        for node, dims in self._seen:
            for place, group in enumerate(resolved(dims)):
                rest = [other for other in group if other is not axis]
                if axis in group and all(isinstance(other.size, int) for other in rest):
                    whole = self.call(aten.sym_size.int, node, place)
                    return self.call(operator.floordiv, whole, size(rest))
        raise LookupError("an axis of no operand")


def _is_view_of(node: Node, source: Node) -> bool:
    """Whether both lie in the same memory."""
    one, other = (view.value(each).untyped_storage()._cdata for each in (node, source))
    return bool(one == other)


def _is_aligned(node: Node) -> bool:
    """Whether kernels on a GPU read rows as fast as where they lie dense."""
    x = view.value(node)
    steps = [s for n, s in zip(x.shape[:-1], x.stride(), strict=False) if not known(n == 1)]
    whole = all(known(s * x.itemsize % ALIGNED == 0) for s in (*steps, x.storage_offset()))
    return device.device_type(x) == "cuda" and known(x.stride(-1) == 1) and whole
