"""The score program of an attention: what becomes of each score between the two contractions, and
which scores are kept.

A program is a list in single-assignment form, evaluated for every (b, h, i, j): batch, query head,
query and key position. Its leaves are

====== =====================================================================================
score  the dot product of query i and key j, nothing multiplied to it
index  b, h, i or j (``fn``), an integer
number the run-time integer number ``value`` handed in beside the tensors
const  the literal ``value``
load   an element of operand number ``value``; the inputs are its subscripts, one for each dim
====== =====================================================================================

and its other operations ``map`` (a row of ``tile/ops.py`` MAPS) and ``cast`` (to another type).
Types are "float" (float32 in kernels), "int" (as wide as loaded; 32 bits otherwise) and "bool".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import inf
from typing import Any, Literal, TypeAlias, cast

Type: TypeAlias = Literal["float", "int", "bool"]
Kind: TypeAlias = Literal["score", "index", "number", "const", "load", "map", "cast"]
Empty: TypeAlias = Literal["nan", "zero", "uniform", "weights"]


@dataclass(frozen=True)
class ScoreOp:
    """One operation; its position in `ScoreProgram.ops` is the name of its value."""

    kind: Kind
    type: Type
    fn: str = ""
    inputs: tuple[int, ...] = ()
    value: float | int | bool = 0


@dataclass(frozen=True)
class ScoreProgram:
    """What the softmax is taken of; or, with no softmax, what values are multiplied by.

    Attributes:
        ops: the operations.
        score: the value that is the new score, a float.
        keep: the boolean value that says which scores count; None where all do. The others are
            as if they were -inf.
        empty: the result of a row in which no score counts: NaN, as softmax gives for a row of
            -inf; zero; or the mean of all values, as for a row of one finite number. "weights"
            where there is no softmax: scores are the weights of the values, those that do not
            count are 0, and a row without any is zero.
    """

    ops: tuple[ScoreOp, ...]
    score: int
    keep: int | None = None
    empty: Empty = "nan"

    def __hash__(self) -> int:
        return hash(self.key)  # a text's hash is kept: programs are looked up at every call

    @cached_property
    def key(self) -> str:
        """The program as text: what `parsed` reads, equal for equal programs."""
        ops = "; ".join(_word(op) for op in self.ops)
        keep = "" if self.keep is None else f" where {self.keep}"
        return f"{ops} -> {self.score}{keep} else {self.empty}"

    @cached_property
    def deep(self) -> bool:
        """Whether a row may consist of finite scores so negative that the logarithm of their sum is
        lost beside them: it is then kept apart.
        """
        ops = (self.ops[value] for value in self.behind(self.score))
        return any(
            op.kind == "const" and op.type == "float" and -inf < op.value < -1e6 for op in ops
        )

    @property
    def planes(self) -> int:
        """How many numbers say the log-sum-exp of a row: where it is `deep`, the largest score, and
        the logarithm of what is left; none where there is no softmax.
        """
        if self.empty == "weights":
            return 0
        return 2 if self.deep else 1

    def behind(self, *values: int | None) -> frozenset[int]:
        """The values that these are computed from, these included."""
        found: set[int] = set()
        waiting = [value for value in values if value is not None]
        while waiting:
            value = waiting.pop()
            if value not in found:
                found.add(value)
                waiting += self.ops[value].inputs
        return frozenset(found)

    def loads(self, *values: int | None) -> tuple[int, ...]:
        """The loads that these values are computed from."""
        return tuple(sorted(v for v in self.behind(*values) if self.ops[v].kind == "load"))

    def mask(self) -> tuple[ScoreProgram, tuple[int, ...]]:
        """A program that only says which scores are kept, and which operands of this one it reads,
        in order.
        """
        build = ScoreBuilder(list(self.ops))
        alone = build.program(build.const(0.0), self.keep)
        read = tuple(sorted({int(op.value) for op in alone.ops if op.kind == "load"}))
        ops = (
            replace(op, value=read.index(int(op.value))) if op.kind == "load" else op
            for op in alone.ops
        )
        return replace(alone, ops=tuple(ops)), read

    def __str__(self) -> str:
        lines = [f"%{place} = {_show(op)}" for place, op in enumerate(self.ops)]
        kept = "" if self.keep is None else f" where %{self.keep}, else {self.empty}"
        return "\n".join([*lines, f"score %{self.score}{kept}"])


def _show(op: ScoreOp) -> str:
    inputs = ", ".join(f"%{value}" for value in op.inputs)
    match op.kind:
        case "score":
            return "score"
        case "index":
            return op.fn
        case "const":
            return repr(op.value)
        case "number":
            return f"number {op.value}"
        case "load":
            return f"{op.type} operand {op.value}[{inputs}]"
        case _:
            return f"{op.fn or op.type}({inputs})"


def _word(op: ScoreOp) -> str:
    """An operation as text: ``kind.type.fn:value`` and its inputs, without what is empty."""
    value = f":{op.value!r}" if op.kind in ("const", "load", "number") else ""
    name = f"{op.kind}.{op.type}" + (f".{op.fn}" if op.fn else "")
    return " ".join([name + value, *map(str, op.inputs)])


@lru_cache(maxsize=512)
def parsed(text: str) -> ScoreProgram:
    """The program a `ScoreProgram.key` says."""
    words, _, results = text.partition(" -> ")
    result, _, empty = results.partition(" else ")
    score, _, keep = result.partition(" where ")
    ops = tuple(_read(word) for word in words.split("; "))
    return ScoreProgram(ops, int(score), int(keep) if keep else None, cast(Empty, empty))


def _read(word: str) -> ScoreOp:
    head, *inputs = word.split(" ")
    name, _, value = head.partition(":")
    kind, type_, *fn = name.split(".")
    places = tuple(int(each) for each in inputs)
    return ScoreOp(cast(Kind, kind), cast(Type, type_), "".join(fn), places, _number(type_, value))


def _number(type_: str, value: str) -> float | int | bool:
    if not value:
        return 0
    if value in ("True", "False"):
        return value == "True"
    return float(value) if type_ == "float" and not value.isdigit() else int(value)


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

    def program(self, score: int, keep: int | None = None, empty: Empty = "nan") -> ScoreProgram:
        """The finished program, operations nothing needs left out."""
        if keep is not None and self.literal(keep) is True:
            keep = None
        whole = ScoreProgram(tuple(self.ops), score, keep, empty)
        live = sorted(whole.behind(score, keep))
        renumber = {old: new for new, old in enumerate(live)}
        ops = (
            ScoreOp(op.kind, op.type, op.fn, tuple(renumber[v] for v in op.inputs), op.value)
            for op in (self.ops[old] for old in live)
        )
        place = None if keep is None else renumber[keep]
        return ScoreProgram(tuple(ops), renumber[score], place, whole.empty)


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
