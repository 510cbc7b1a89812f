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

`ScoreBuilder` (`score_builder.py`) makes them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import inf
from typing import Literal, TypeAlias, cast

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

    def needed(self) -> ScoreProgram:
        """The same, operations nothing needs left out."""
        live = sorted(self.behind(self.score, self.keep))
        places = {old: new for new, old in enumerate(live)}
        ops = (
            replace(op, inputs=tuple(places[value] for value in op.inputs))
            for op in (self.ops[old] for old in live)
        )
        keep = None if self.keep is None else places[self.keep]
        return ScoreProgram(tuple(ops), places[self.score], keep, self.empty)

    def mask(self) -> tuple[ScoreProgram, tuple[int, ...]]:
        """A program that only says which scores are kept, and which operands of this one it reads,
        in order.
        """
        zero = ScoreOp("const", "float", value=0.0)
        alone = ScoreProgram((*self.ops, zero), len(self.ops), self.keep).needed()
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
