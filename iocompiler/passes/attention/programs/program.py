"""The score program of a recognised attention, and what it loads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy
from torch.fx import Node

from iocompiler.passes.attention.dims.axes import Axis, Dims, index, known
from iocompiler.passes.attention.masks.evaluate import Evaluator
from iocompiler.passes.attention.masks.places import At
from iocompiler.passes.attention.masks.structure import DROWNS, MASKS
from iocompiler.passes.attention.masks.values import spread
from iocompiler.passes.attention.programs.element import Elements, Source, reach
from iocompiler.passes.attention.programs.element_rules import NotExpressed, apply
from iocompiler.passes.attention.reading import library
from iocompiler.passes.attention.reading.description import (
    Attention,
    Beside,
    Bias,
    Cast,
    Causal,
    Declined,
    Fill,
    Pointwise,
    Scale,
    Step,
)
from iocompiler.passes.attention.reading.scores import Inverse
from iocompiler.tile.score import Empty, ScoreBuilder, ScoreProgram
from iocompiler.tile.score_algebra import NotDifferentiable, derivative
from iocompiler.tile.score_operands import use
from iocompiler.tile.score_proof import always

_MOST_OPS = 80
_MOST_OPERANDS = 8
_MOST_NEGATIVE = -1e30


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
        used = sorted(
            {int(program.ops[v].value) for v in program.loads(program.score, program.keep)}
        )
        _check(program)
        sources = tuple(self.elements.sources[n] for n in used)
        return Scored(_renumbered(program, used), sources, tuple(self.elements.numbers))

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
        places: At = tuple(index(group) for group in dims)
        return self.elements.value(node, places)

    def _scale(self, step: Scale) -> None:
        inverse = isinstance(step.factor, Inverse)
        source = step.factor.of if inverse else step.factor
        rank = len(source.meta["val"].shape) if _is_tensor(source) else 0
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
        for part in self._terms(value):
            mask = self._added(part)
            if mask is not None:
                self._mask(mask)
            elif self.build.literal(part) != 0.0:
                if any(mask.value > DROWNS for mask in self.masks):
                    self._settle()  # a row of such masks differs by what is added
                self.score = self.build.map("add", self.score, part)
                self.size += self._size(step)

    def _size(self, step: Bias) -> float:
        places: At = tuple(index(group) for group in step.dims)
        found = self.elements.evaluator.element(step.node, places, self.elements.bounds)
        return abs(step.factor) * spread(found)

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
        if then == 0.0 and other is not None and other <= MASKS:
            return Mask(op.inputs[0], float(other), True)
        if other == 0.0 and then is not None and then <= MASKS:
            return Mask(self.build.map("logical_not", op.inputs[0]), float(then), True)
        return None

    def _mask(self, mask: Mask) -> None:
        if self.build.literal(mask.keeps) is True:
            return
        if mask.value <= MASKS:
            self.masks.append(mask)
        else:
            self._settle()
            self.score = self._masked(self.score, mask)

    def _masked(self, score: int, mask: Mask) -> int:
        value = self.build.const(
            max(mask.value, _MOST_NEGATIVE) if mask.value > -math.inf else mask.value
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
        self.score = on_score(self.build, name, self.score, step.arguments)

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
        if self.found.row_sums and any(mask.value < _MOST_NEGATIVE for mask in finite):
            raise Declined("the log-sum-exp of a row that a mask may hide altogether is read")
        for mask in finite:
            self.score = self._masked(self.score, mask)
        return (self._all(hidden) if hidden else None), nothing

    def _outweighs(self, sink: Beside, masks: list[Mask]) -> bool:
        """Whether a row that is hidden altogether is the sink's."""
        places: At = tuple(index(group) for group in sink.dims)
        within = (self.elements.evaluator, self.elements.bounds)
        size = reach(sink.of, places, *within) if isinstance(sink.of, Node) else abs(sink.of)
        return all(mask.value <= min(DROWNS, -4.0 * size) for mask in masks)

    def _all(self, masks: list[Mask]) -> int:
        total = masks[0].keeps if masks else self.build.const(True)
        for mask in masks[1:]:
            total = self.build.map("and", total, mask.keeps)
        return total


def on_score(build: ScoreBuilder, name: str, score: int, arguments: tuple[object, ...]) -> int:
    """An operator applied to the score."""
    numbers = [float(x) for x in arguments if isinstance(x, (int, float))]
    if name in ("tanh", "neg", "sigmoid", "exp", "abs") and not arguments:
        return build.map(name, score)
    if name == "relu":
        return _bounded(build, "le", score, 0.0)
    if name == "square" or (name == "pow" and numbers == [2.0]):
        return build.map("mul", score, score)
    if name == "add" and len(numbers) == 1:
        return build.map("add", score, build.const(numbers[0]))
    beyond = {"clamp_min": "lt", "clamp_max": "gt"}
    if name in beyond and len(numbers) == 1:
        return _bounded(build, beyond[name], score, numbers[0])
    if name == "clamp" and arguments:
        low, high = (*arguments, None)[:2]
        for bound, fn in ((low, "lt"), (high, "gt")):
            if isinstance(bound, (int, float)):
                score = _bounded(build, fn, score, float(bound))
            elif bound is not None:
                raise Declined("a clamp of the scores by what is not known before")
        return score
    raise Declined(f"{name} on the scores, with arguments that are not understood")


def _bounded(build: ScoreBuilder, beyond: str, score: int, bound: float) -> int:
    """The score, or the bound where it lies beyond that: no gradient flows there, and all of it
    elsewhere, as of torch's; NaN stays.
    """
    limit = build.const(bound)
    return build.map("where", build.map(beyond, score, limit), limit, score)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Node) and hasattr(value.meta.get("val"), "shape")


def _check(program: ScoreProgram) -> None:
    """Raise `Declined` where a gradient is none the kernels compute, or the program is too long."""
    product = next((n for n, op in enumerate(program.ops) if op.kind == "score"), None)
    if product is None:
        raise Declined("the scores do not depend on the query")
    derivative(program, product)
    loads = program.loads(program.score, program.keep)
    if len(program.ops) > _MOST_OPS or len(loads) > _MOST_OPERANDS:
        raise Declined("the score program is too long")
    for load in program.loads(program.score):
        if program.ops[load].type == "float":
            if use(program, load) is None:
                raise Declined("a bias whose gradient has no kernel")
            widened, slope = derivative(program, load)
            # what a softmax sends back to the scores of a row adds up to zero
            if program.planes and product in widened.behind(slope):
                raise Declined("what the scores are multiplied by has a gradient that cancels out")


def _renumbered(program: ScoreProgram, used: list[int]) -> ScoreProgram:
    """Operands counted without those that nothing loads any more."""
    build = ScoreBuilder()
    for op in program.ops:
        if op.kind == "load":
            values = {**vars(op), "value": used.index(int(op.value))}
            op = type(op)(**values)
        build.ops.append(op)
    return ScoreProgram(tuple(build.ops), program.score, program.keep, program.empty)
