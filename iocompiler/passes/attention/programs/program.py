"""The score program of a recognised attention, and what it loads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import sympy
from torch.fx import Node

from iocompiler.graph.patterns import HIDES
from iocompiler.graph.sizes import known
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.axes import Axis, Dims, indices
from iocompiler.passes.attention.masks.evaluate import Evaluator
from iocompiler.passes.attention.masks.limits import DROWNS, MOST_NEGATIVE, reach
from iocompiler.passes.attention.masks.places import At
from iocompiler.passes.attention.masks.values import Value, magnitude, spread
from iocompiler.passes.attention.programs.element import Elements
from iocompiler.passes.attention.programs.element_rules import apply
from iocompiler.passes.attention.programs.finish import check, renumbered
from iocompiler.passes.attention.programs.integers import NotExpressed
from iocompiler.passes.attention.programs.loads import Source
from iocompiler.passes.attention.programs.pointwise import on_score
from iocompiler.passes.attention.reading import library
from iocompiler.passes.attention.reading.description import (
    Attention,
    Beside,
    Bias,
    Cast,
    Causal,
    Declined,
    Fill,
    Inverse,
    Pointwise,
    Scale,
    Step,
)
from iocompiler.tile.score import Empty, ScoreProgram
from iocompiler.tile.score_algebra import NotDifferentiable
from iocompiler.tile.score_proof import always


@dataclass(frozen=True)
class Scored:
    """A program with the tensors it loads and the axes whose sizes are its numbers."""

    program: ScoreProgram
    sources: tuple[Source, ...]
    numbers: tuple[Axis, ...]


@dataclass(frozen=True)
class Mask:
    """Where ``keeps`` is false the score becomes ``value``, or has it added."""

    keeps: int
    value: float
    added: bool


class Extraction:
    """Goes through the steps of one attention; what masks hide may become structure at the end."""

    def __init__(self, found: Attention, elements: Elements) -> None:
        self.found, self.elements, self.build = found, elements, elements.build
        self.score = self.build.score()
        self.masks: list[Mask] = []
        self.size = 0.0  # what all that is added to the scores does not exceed

    @classmethod
    def extract(cls, found: Attention, evaluator: Evaluator) -> Scored:
        """The program of an attention.

        Raises:
            Declined: no program says it, or its gradient is not one the kernels compute.
        """
        try:
            return cls(found, Elements(found, evaluator)).scored()
        except (NotExpressed, NotDifferentiable) as reason:
            why = reason or "an operand out of place"
            raise Declined(f"no score program says it: {why}") from None

    def scored(self) -> Scored:
        for step in self.found.steps:
            self._step(step)
        keep, empty = self._kept()
        program = self.build.program(self.score, keep, empty)
        check(program)
        program, used = renumbered(program)
        sources = tuple(self.elements.loads.sources[n] for n in used)
        return Scored(program, sources, tuple(self.elements.integers.numbers))

    def _step(self, step: Step) -> None:
        if isinstance(step, Scale):
            self._scale(step)
        elif isinstance(step, Bias):
            self._bias(step)
        elif isinstance(step, Fill):
            keeps = self.build.cast(self._value(step.condition, step.dims), "bool")
            keeps = keeps if step.keep else self.build.map("logical_not", keeps)
            self._mask(Mask(keeps, step.value, False))
        elif isinstance(step, Causal):
            lower = self.build.map("le", self.build.index("j"), self._row())
            self._mask(Mask(lower, -math.inf, False))
        elif isinstance(step, Cast):
            if not step.dtype.is_floating_point:
                raise Declined(f"the scores are rounded to {step.dtype}")
        else:
            self._pointwise(step)

    def _row(self) -> int:
        return self.build.const(0) if self.found.row is None else self.build.index("i")

    def _value(self, node: object, dims: Dims) -> int:
        return self.elements.value(node, indices(dims))

    def _scale(self, step: Scale) -> None:
        inverse = isinstance(step.factor, Inverse)
        source = step.factor.of if inverse else step.factor
        rank = len(views.shape(source)) if views.is_tensor(source) else 0
        places: At = (sympy.Integer(0),) * rank
        value = self._value(source, step.dims) if step.dims else self.elements.value(source, places)
        literal = self.build.literal(value)
        if self._settles(None if literal is None else float(literal)):
            self._settle()
        if literal is not None:
            factor = 1.0 / float(literal) if inverse else float(literal)
            self.masks = [Mask(m.keeps, m.value * factor, m.added) for m in self.masks]
            self.score = self.build.map("mul", self.score, self.build.const(factor))
        else:
            self.score = self.build.map("div" if inverse else "mul", self.score, value)

    def _settles(self, literal: float | None) -> bool:
        """Whether a factor makes something else of what masks hide."""
        return literal is None or (literal <= 0.0 and bool(self.masks))

    def _bias(self, step: Bias) -> None:
        value = self.build.cast(self._value(step.node, step.dims), "float")
        if step.factor != 1.0:
            value = apply(self.elements, "mul", value, self.build.const(step.factor))
        parts = self._terms(value)
        masks = [self._added(part) for part in parts]
        # what a mask of its own hides there is no part of how large it is
        size = self._size(step, spread if any(masks) else magnitude)
        for part, mask in zip(parts, masks, strict=True):
            if mask is not None:
                self._mask(mask)
            elif self.build.literal(part) != 0.0:
                if -MOST_NEGATIVE < size < math.inf:  # others are loaded as they have to be
                    part = self.elements.loads.raised(part)
                self.size += size
                if not self._drown():
                    self._settle()  # a row of such masks differs by what is added
                self.score = self.build.map("add", self.score, part)

    def _drown(self) -> bool:
        """Whether nothing is left of what is added to a score that the masks so far hide."""
        most = min(DROWNS, -4.0 * self.size)
        return all(mask.value <= (DROWNS if mask.added else most) for mask in self.masks)

    def _size(self, step: Bias, of: Callable[[Value], float]) -> float:
        places = indices(step.dims)
        found = self.elements.evaluator.element(step.node, places, self.elements.bounds)
        return abs(step.factor) * of(found)

    def _terms(self, value: int) -> list[int]:
        """The terms of a sum; of ``where(keep, x, -1e9)`` x and the mask that it adds."""
        op = self.build.ops[value]
        if op.fn == "add" and op.kind == "map":
            return [part for each in op.inputs for part in self._terms(each)]
        if op.fn == "where":
            literals = [self.build.literal(each) for each in op.inputs[1:]]
            for place in (0, 1):
                masked, other = literals[place], op.inputs[2 - place]
                if masked is not None and literals[1 - place] is None and masked <= DROWNS:
                    zero = self.build.const(0.0)
                    pair = (op.inputs[1], zero) if place == 0 else (zero, op.inputs[2])
                    made = self.build.map("where", op.inputs[0], *pair)
                    return [*self._terms(other), made]
        return [value]

    def _added(self, value: int) -> Mask | None:
        op = self.build.ops[value]
        if op.kind != "map" or op.fn != "where":
            return None
        then, other = (self.build.literal(each) for each in op.inputs[1:])
        if then == 0.0 and other is not None and other <= HIDES:
            return Mask(op.inputs[0], float(other), True)
        if other == 0.0 and then is not None and then <= HIDES:
            return Mask(self.build.map("logical_not", op.inputs[0]), float(then), True)
        return None

    def _mask(self, mask: Mask) -> None:
        if self.build.literal(mask.keeps) is True:
            return
        if mask.value <= HIDES:
            self.masks.append(mask)
        else:
            self._settle()
            self.score = self._masked(self.score, mask)

    def _masked(self, score: int, mask: Mask) -> int:
        value = self.build.const(
            max(mask.value, MOST_NEGATIVE) if mask.value > -math.inf else mask.value
        )
        if not mask.added:
            return self.build.map("where", mask.keeps, score, value)
        return self.build.map(
            "add", score, self.build.map("where", mask.keeps, self.build.const(0.0), value)
        )

    def _settle(self) -> None:
        """Write the masks so far into the score: what follows may undo them."""
        for mask in self.masks:
            self.score = self._masked(self.score, mask)
        self.masks = []

    def _pointwise(self, step: Pointwise) -> None:
        self._settle()
        self._apply(step)

    def _apply(self, step: Pointwise) -> None:
        name = str(getattr(step.target, "_opname", step.target))
        self.score = on_score(self.build, name, self.score, step.arguments, step.dtype)

    def _kept(self) -> tuple[int | None, Empty]:
        """What counts at all, and what a row is in which nothing does."""
        hidden = [mask for mask in self.masks if mask.value == -math.inf]
        finite = [mask for mask in self.masks if mask.value > -math.inf]
        sink = self.found.sink
        guarded = self.found.anchor.target is library.TARGET or (sink is not None and sink.guards)
        nothing: Empty = "zero" if guarded else "nan"
        if not finite:
            return self._all(hidden), nothing
        everything = self._all(self.masks)
        rows_fit = self.found.row is None or known(self.found.row.size <= self.found.column.size)
        drowned = all(mask.value <= -4.0 * self.size for mask in finite)
        if drowned and always(self.build.ops, everything, diagonal=rows_fit):
            return everything, nothing
        same = len({mask.value for mask in finite}) == 1 and not any(m.added for m in finite)
        alone = len(finite) == 1 and (not finite[0].added or finite[0].value <= DROWNS)
        if sink is not None and drowned and self._outweighs(sink, finite):
            return everything, "zero"
        # with dropout such a row is no mean
        mean = not self.found.dropout_p and not self.found.reads_rows
        if drowned and not hidden and (same or alone) and mean:
            return everything, "uniform"
        if self.found.row_sums and any(mask.value < MOST_NEGATIVE for mask in finite):
            raise Declined("the log-sum-exp of a row that a mask may hide altogether is read")
        for mask in finite:
            self.score = self._masked(self.score, mask)
        return (self._all(hidden) if hidden else None), nothing

    def _outweighs(self, sink: Beside, masks: list[Mask]) -> bool:
        """Whether a row that is hidden altogether is the sink's."""
        places = indices(sink.dims)
        within = (self.elements.evaluator, self.elements.bounds)
        size = reach(sink.of, places, *within) if isinstance(sink.of, Node) else abs(sink.of)
        return all(mask.value <= min(DROWNS, -4.0 * size) for mask in masks)

    def _all(self, masks: list[Mask]) -> int:
        total = masks[0].keeps if masks else self.build.const(True)
        for mask in masks[1:]:
            total = self.build.map("and", total, mask.keeps)
        return total
