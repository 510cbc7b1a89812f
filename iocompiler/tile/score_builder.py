"""Builds score programs (`score.py`): constants folded, equal operations made once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Any

from iocompiler.tile.score import Empty, ScoreOp, ScoreProgram, Type

_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_ALWAYS_BOOL = (*_COMPARISONS, "isnan", "isinf", "logical_not")
_PAIRS = (("lt", "ge"), ("le", "gt"), ("eq", "ne"), ("and", "or"))
_OPPOSITE = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}


@dataclass
class ScoreBuilder:
    """Appends operations, folding constants; one equal to an earlier one is that one."""

    ops: list[ScoreOp] = field(default_factory=list)
    _seen: dict[Any, int] = field(default_factory=dict)

    def add(self, op: ScoreOp) -> int:
        # repr keeps 0.0 and -0.0, True and 1 apart: Python calls them equal
        key = (op, repr(op.value))
        if key not in self._seen:
            self._seen[key] = len(self.ops)
            self.ops.append(op)
        return self._seen[key]

    def type(self, value: int) -> Type:
        return self.ops[value].type

    def score(self) -> int:
        return self.add(ScoreOp("score", "float"))

    def index(self, name: str) -> int:
        return self.add(ScoreOp("index", "int", name))

    def number(self, place: int) -> int:
        return self.add(ScoreOp("number", "int", value=place))

    def const(self, value: float | int | bool) -> int:
        kind: Type = "bool" if isinstance(value, bool) else "int"
        return self.add(
            ScoreOp("const", "float" if isinstance(value, float) else kind, value=value)
        )

    def load(self, operand: int, subscripts: Iterable[int], type_: Type) -> int:
        return self.add(ScoreOp("load", type_, "", tuple(subscripts), operand))

    def literal(self, value: int) -> float | int | bool | None:
        """The number a value is, where it is a literal."""
        op = self.ops[value]
        return op.value if op.kind == "const" else None

    def cast(self, value: int, type_: Type) -> int:
        op = self.ops[value]
        if op.type == type_:
            return value
        if op.kind == "const":
            made = {"float": float, "int": int, "bool": bool}[type_](op.value)
            return self.const(made)
        if type_ == "bool":
            zero: float | int = 0.0 if op.type == "float" else 0
            return self.map("ne", value, self.const(zero))
        if type_ == "float" and op.type == "int" and op.fn in ("add", "sub", "neg"):
            # exact for positions, and of a row and a column cheaper before they meet in a tile
            return self.map(op.fn, *(self.cast(each, type_) for each in op.inputs))
        return self.add(ScoreOp("cast", type_, "", (value,)))

    def map(self, fn: str, *inputs: int) -> int:
        """A row of MAPS; operands of arithmetic are brought to one type first."""
        if fn == "where":
            inputs = (inputs[0], *self._alike(inputs[1:]))
            chosen = self.literal(inputs[0])
            if chosen is not None:
                return inputs[1] if chosen else inputs[2]
            inputs = (inputs[0], *(self._settled(inputs[0], n, inputs[n]) for n in (1, 2)))
            if inputs[1] == inputs[2]:
                return inputs[1]
        elif len(inputs) == 2:
            inputs = self._alike(inputs)
        if fn == "logical_not":
            return self._negated(inputs[0])
        folded = self._folded(fn, inputs)
        if folded is not None:
            return folded
        type_ = self.type(inputs[-1])
        if fn in _ALWAYS_BOOL:
            type_ = "bool"
        return self.add(ScoreOp("map", type_, fn, tuple(inputs)))

    def _settled(self, condition: int, place: int, branch: int) -> int:
        """A branch of a choice, without choices by the same condition or its opposite."""
        while self.ops[branch].fn == "where":
            inner = self.ops[branch].inputs
            if inner[0] == condition:
                branch = inner[place]
            elif inner[0] == self._negated(condition):
                branch = inner[3 - place]
            else:
                break
        return branch

    def _negated(self, value: int) -> int:
        """The opposite of a condition, moved to its comparisons where no NaN can be."""
        op = self.ops[value]
        if op.kind == "const":
            return self.const(not op.value)
        if op.fn == "logical_not" and self.type(op.inputs[0]) == "bool":
            return op.inputs[0]
        if op.fn in ("and", "or"):
            return self.map(_OPPOSITE[op.fn], *(self._negated(each) for each in op.inputs))
        if op.fn in _OPPOSITE and all(self.type(each) != "float" for each in op.inputs):
            return self.map(_OPPOSITE[op.fn], *op.inputs)
        return self.add(ScoreOp("map", "bool", "logical_not", (value,)))

    def _alike(self, inputs: Iterable[int]) -> tuple[int, ...]:
        values = tuple(inputs)
        types = [self.type(value) for value in values]
        widest: Type = "float" if "float" in types else "int" if "int" in types else "bool"
        return tuple(self.cast(value, widest) for value in values)

    def _folded(self, fn: str, inputs: tuple[int, ...]) -> int | None:
        literals = [self.literal(value) for value in inputs]
        if all(literal is not None for literal in literals) and fn in _FOLDS:
            return self.const(_FOLDS[fn](*literals))
        if fn in _COMPARISONS and literals[1] is not None:
            return self._compared(fn, *inputs)
        if fn in ("mul", "add") and literals[0] is not None and literals[1] is None:
            return self.map(fn, inputs[1], inputs[0])
        if len(literals) == 2 and literals[1] is not None and _is_neutral(fn, literals[1]):
            return inputs[0]
        if fn in ("and", "or"):
            for place in (0, 1):
                if literals[place] is not None:
                    return inputs[1 - place] if literals[place] == (fn == "and") else inputs[place]
            return inputs[0] if inputs[0] == inputs[1] else None
        if fn == "mul" and literals[1] is not None:
            inner = self.ops[inputs[0]]
            factor = self.literal(inner.inputs[1]) if inner.fn == "mul" else None
            if factor is not None and inner.type == "float":
                return self.map("mul", inner.inputs[0], self.const(factor * literals[1]))
        return None

    def _compared(self, fn: str, chosen: int, literal: int) -> int | None:
        """A comparison of a choice between literals: the condition, its opposite, or the same all
        over.
        """
        if self.ops[chosen].fn != "where":
            return None
        condition, *branches = self.ops[chosen].inputs
        if any(self.literal(each) is None for each in branches):
            return None
        then, other = (self.literal(self.map(fn, each, literal)) for each in branches)
        if then == other:
            return self.const(bool(then))
        return condition if then else self._negated(condition)

    def program(self, score: int, keep: int | None = None, empty: Empty = "nan") -> ScoreProgram:
        """The finished program, operations nothing needs left out."""
        if keep is not None and self.literal(keep) is True:
            keep = None
        return ScoreProgram(tuple(self.ops), score, keep, empty).needed()


def _is_neutral(fn: str, literal: float) -> bool:
    return (fn in ("mul", "div") and literal == 1) or (fn in ("add", "sub") and literal == 0)


_FOLDS: dict[str, Any] = {
    "log": lambda a: math.log(a) if a > 0.0 else -inf if a == 0.0 else math.nan,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "neg": lambda a: -a,
    "maximum": max,
    "minimum": min,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
