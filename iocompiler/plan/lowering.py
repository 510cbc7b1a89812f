"""The state of one lowering: iteration space, tile operations so far, values already computed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from iocompiler.plan.numbers import NoNumber, number
from iocompiler.plan.sizes import divide, size_of
from iocompiler.plan.views import (
    Index,
    NotAffine,
    broadcast_index,
    input_index,
    is_view,
    shape_of,
    storage_owner,
)
from iocompiler.tile.index import Affine, Axis, Size
from iocompiler.tile.ops import compute_dtype
from iocompiler.tile.program import Builder, Constant


class Unsupported(Exception):
    """These nodes cannot be one kernel; the message is the reason a report gives.

    It is made of texts and of nodes, which stand for their names: nodes of equal structure fail for
    the same reason under other names (`memo`).
    """

    def __init__(self, *parts: str | Node):
        super().__init__(*parts)
        self.parts = parts

    def __str__(self) -> str:
        return "".join(part if isinstance(part, str) else part.name for part in self.parts)


@dataclass(frozen=True)
class Space:
    """Iteration axes in row-major order of the widest tensor; those in ``reduced`` are folded."""

    axes: tuple[Axis, ...]
    reduced: frozenset[str] = frozenset()

    @staticmethod
    def of_shape(shape: tuple[Size, ...], reduced_dims: Iterable[int] = ()) -> tuple[Space, Index]:
        """A space with an axis for each dimension above size 1, and an element's index in it."""
        dims = set(reduced_dims)
        axes: list[Axis] = []
        index: list[Affine] = []
        for dim, size in enumerate(shape):
            if size == 1 and dim not in dims:
                index.append(Affine())
                continue
            axes.append(Axis(f"a{dim}", size))
            index.append(Affine.of(f"a{dim}"))
        return Space(tuple(axes), frozenset(f"a{d}" for d in dims)), tuple(index)

    @property
    def extents(self) -> dict[str, Size]:
        return {a.name: a.size for a in self.axes}

    def part(self, reduced: bool) -> tuple[Axis, ...]:
        return tuple(a for a in self.axes if (a.name in self.reduced) == reduced)

    def split(self, name: str, inner: Size) -> tuple[Space, dict[str, Affine]]:
        """The same space with one axis cut in two, and what the old axis is in the new ones."""
        axes: list[Axis] = []
        for axis in self.axes:
            if axis.name != name:
                axes.append(axis)
                continue
            outer = divide(axis.size, inner)
            assert outer is not None
            axes += [Axis(f"{name}o", outer), Axis(f"{name}i", inner)]
        reduced = self.reduced
        if name in reduced:
            reduced = (reduced - {name}) | {f"{name}o", f"{name}i"}
        return Space(tuple(axes), reduced), {
            name: Affine.of(f"{name}o") * inner + Affine.of(f"{name}i")
        }


Rule: TypeAlias = "Callable[[Lowering, Node, Index, int | None], int]"
"""(lowering, node, index in its output, mask) -> the value there, in the node's compute dtype."""


@dataclass
class Lowering:
    """One attempt over one space.

    ``home`` and ``virtual`` nodes are evaluated by their rule, all others are loaded; ``stored``
    ones are written to memory, too. ``seeds`` are the indices the attempt begins with, ``carried``
    all that follow from them, once somebody asks (`space.propagate`).
    """

    space: Space
    home: frozenset[Node]
    virtual: Container[Node]
    rule_of: Callable[[Node], Rule]
    stored: Container[Node]
    seeds: Mapping[Node, Index]
    carried: Mapping[Node, Index] | None = None
    builder: Builder = field(default_factory=Builder)
    names: dict[Node, str] = field(default_factory=dict)
    _values: dict[tuple[Node, Index, int | None], int] = field(default_factory=dict)
    _varies: list[frozenset[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.extents = self.space.extents

    def computes(self, node: Node) -> bool:
        return node in self.home or node in self.virtual

    # --- values

    def value(self, node: Node, index: Index, mask: int | None = None) -> int:
        """The value of ``node`` at ``index``, held in its compute dtype; loads obey ``mask``."""
        key = (node, index, mask)
        found = self._values.get(key)
        if found is None:
            found = self._evaluate(node, index, mask)
            if node in self.stored:
                # what reads it in here sees what reads it from memory sees: the backward, say
                found = self.rounded(found, node.meta["val"].dtype)
            self._values[key] = found
        return found

    def _evaluate(self, node: Node, index: Index, mask: int | None) -> int:
        if is_view(node):
            return self._through_view(node, index, mask)
        if self.computes(node):
            value = self.rule_of(node)(self, node, index, mask)
            return self._narrowed(value, node.meta["val"].dtype)
        constant = known_scalar(node)
        if constant is not None:
            dtype = compute_dtype(node.meta["val"].dtype)
            return self.builder.const(constant, dtype)
        return self._load(node, index, mask)

    def _through_view(self, node: Node, index: Index, mask: int | None) -> int:
        try:
            source, inner = input_index(node, index, self.extents)
        except NotAffine:
            if self.computes(storage_owner(node)):
                raise
            return self._load(node, index, mask)  # the view lies in memory with strides of its own
        return self.value(source, inner, mask)

    def _narrowed(self, value: int, dtype: torch.dtype) -> int:
        """Wrap short integers as their own dtype does; leave everything else."""
        if (
            dtype in (torch.int8, torch.int16, torch.uint8)
            and self.builder.ops[value].kind == "map"
        ):
            return self.builder.cast(self.builder.cast(value, dtype), compute_dtype(dtype))
        return value

    def _load(self, node: Node, index: Index, mask: int | None) -> int:
        tensor = node.meta["val"]
        if not isinstance(tensor, torch.Tensor):
            raise Unsupported(node, " is no tensor")
        address = Affine()
        for position, stride in zip(index, tensor.stride(), strict=True):
            address = address + position * size_of(stride)
        value = self.builder.load(self.buffer_name(node), address, tensor.dtype, mask)
        return self.builder.cast(value, compute_dtype(tensor.dtype))

    def buffer_name(self, node: Node) -> str:
        return self.names.setdefault(node, f"b{len(self.names)}")

    # --- operands

    def operand(
        self, arg: Any, node: Node, index: Index, mask: int | None, dtype: torch.dtype | None = None
    ) -> int:
        """An argument (broadcast tensor, number, size) of an elementwise ``node``, as ``dtype``."""
        if isinstance(arg, Node) and isinstance(arg.meta["val"], torch.Tensor):
            inner = broadcast_index(index, shape_of(node), shape_of(arg))
            value = self.value(arg, inner, mask)
            if dtype is None:
                return value
            if _widens(arg, node):
                value = self.rounded(value, arg.meta["val"].dtype)
            return self.convert(value, dtype)
        assert dtype is not None
        number_of = arg.meta["val"] if isinstance(arg, Node) else arg
        if isinstance(number_of, torch.SymFloat):
            return self._computed(number_of, dtype)
        return self.builder.const(_wrapped(literal(arg), node), dtype)

    def rounded(self, value: int, dtype: torch.dtype) -> int:
        """``value`` as a tensor of a short dtype holds it, in the dtype it is computed in."""
        op = self.builder.ops[value]
        stored = op.kind == "cast" and self.builder.ops[op.inputs[0]].dtype == dtype
        if compute_dtype(dtype) == dtype or stored:
            return value
        return self.builder.cast(self.builder.cast(value, dtype), op.dtype)

    def _computed(self, arg: torch.SymFloat, dtype: torch.dtype) -> int:
        try:
            return number(self.builder, arg.node.expr, dtype)
        except NoNumber as error:
            raise Unsupported(str(error)) from error

    def convert(self, value: int, dtype: torch.dtype) -> int:
        """``value`` as ``dtype``; to bool it is compared with zero, as torch does."""
        have = self.builder.dtype(value)
        if dtype == torch.bool and have != torch.bool:
            return self.builder.map("ne", value, self.builder.const(0, have), dtype=torch.bool)
        return self.builder.cast(value, dtype)

    def below(self, index: Affine, limit: Size) -> int:
        """The predicate ``index < limit``."""
        return self.builder.map(
            "lt", self.builder.iota(index), self.builder.const(limit, torch.int64), dtype=torch.bool
        )

    def at_least(self, index: Affine, limit: Size) -> int:
        """The predicate ``index >= limit``."""
        return self.builder.map(
            "ge", self.builder.iota(index), self.builder.const(limit, torch.int64), dtype=torch.bool
        )

    def both(self, a: int | None, b: int) -> int:
        return b if a is None else self.builder.map("and", a, b, dtype=torch.bool)

    # --- what an index or a value varies over

    def varies(self, value: int) -> frozenset[str]:
        while len(self._varies) <= value:
            op = self.builder.ops[len(self._varies)]
            names = set(op.index.axes if op.index else ())
            for read in op.reads:
                names |= self._varies[read]
            if op.kind == "reduce":
                over_reduced = op.over == "reduced"
                names -= {a.name for a in self.space.part(reduced=over_reduced)}
            self._varies.append(frozenset(names))
        return self._varies[value]

    def axes_of(self, index: Iterable[Affine]) -> frozenset[str]:
        names: set[str] = set()
        for position in index:
            for name in position.names:
                names |= self.varies(int(name[1:])) if name.startswith("%") else {name}
        return frozenset(names)


def known_scalar(node: Node) -> bool | int | float | None:
    """The element of a one-element constant of the graph (the user's ``torch.tensor(0.5)``)."""
    if node.op != "get_attr" or node.meta["val"].numel() != 1 or node.meta["val"].is_complex():
        return None
    return constant_values(node)[0]


def constant_values(node: Node) -> tuple[bool | int | float, ...]:
    """The elements, row-major, of the tensor behind a ``get_attr`` node."""
    with unset_fake_temporarily():
        tensor: torch.Tensor = attrgetter(str(node.target))(node.graph.owning_module)
        return tuple(tensor.detach().cpu().flatten().tolist())


def _widens(arg: Node, node: Node) -> bool:
    """Whether a float is promoted to a wider one in ``node``: eager rounds it before, and the
    backward, which computes it again, must meet the same value.
    """
    made, result = arg.meta["val"].dtype, node.meta["val"]
    if not isinstance(result, torch.Tensor) or not result.dtype.is_floating_point:
        return False
    return bool(made.is_floating_point and made.itemsize < result.dtype.itemsize)


def _wrapped(number: Constant, node: Node) -> Constant:
    """An integer as the tensors it meets in the node hold it: -1 is 255 among bytes."""
    if not isinstance(number, int) or isinstance(number, bool):
        return number
    values = [a.meta["val"] if isinstance(a, Node) else a for a in node.args]
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.bool)
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        return number
    limits = torch.iinfo(dtype)
    return limits.min + (number - limits.min) % (limits.max - limits.min + 1)


def literal(arg: Any) -> Constant:
    if isinstance(arg, Node):
        arg = arg.meta["val"]
    if isinstance(arg, torch.SymInt):
        return size_of(arg)
    if isinstance(arg, (bool, int, float)):
        return arg
    raise Unsupported(f"an argument of type {type(arg).__name__}")
