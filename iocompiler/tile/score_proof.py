"""Proofs about conditions of score programs."""

from __future__ import annotations

from collections.abc import Sequence

from iocompiler.tile.score import ScoreOp

_Affine = dict[int | str, int]


def always(ops: Sequence[ScoreOp], condition: int, *, diagonal: bool) -> bool:
    """Whether in every row some column is proved to satisfy a condition: the first one, or (where
    ``diagonal``: there are at least as many columns as rows) that of the row's own number.
    """
    places = ["0", "i"] if diagonal else ["0"]
    return any(_holds(ops, condition, at) is True for at in places)


def _holds(ops: Sequence[ScoreOp], value: int, column: str) -> bool | None:
    """A condition with j replaced; None where it is not known."""
    op = ops[value]
    if op.kind == "const":
        return bool(op.value)
    if op.kind != "map":
        return None
    if op.fn in ("and", "or"):
        sides = [_holds(ops, each, column) for each in op.inputs]
        decided = op.fn == "or"
        if decided in sides:
            return decided
        return None if None in sides else not decided
    if op.fn == "logical_not":
        inner = _holds(ops, op.inputs[0], column)
        return None if inner is None else not inner
    return _compared(ops, op, column)


def _compared(ops: Sequence[ScoreOp], op: ScoreOp, column: str) -> bool | None:
    if op.fn not in ("lt", "le", "gt", "ge", "eq", "ne"):
        return None
    left, right = (_affine(ops, each, column) for each in op.inputs)
    if left is None or right is None:
        same = _same(ops, op.inputs[0], op.inputs[1], column)
        integers = all(ops[each].type != "float" for each in op.inputs)  # no NaN
        return (op.fn in ("le", "ge", "eq")) if same and integers else None
    apart = {name: left.get(name, 0) - right.get(name, 0) for name in {*left, *right}}
    constant = apart.pop(1, 0)
    slopes = [slope for slope in apart.values() if slope]
    # rows are counted from 0: a difference with slopes of one sign only grows that way
    low = constant if all(slope > 0 for slope in slopes) else None
    high = constant if all(slope < 0 for slope in slopes) else None
    return _decided(op.fn, low, high)


def _decided(fn: str, low: int | None, high: int | None) -> bool | None:
    """A comparison of a difference in [low, high] with 0."""
    if fn in ("ge", "lt"):
        up = True if low is not None and low >= 0 else None
        up = False if high is not None and high < 0 else up
        return up if fn == "ge" or up is None else not up
    if fn in ("gt", "le"):
        up = True if low is not None and low > 0 else None
        up = False if high is not None and high <= 0 else up
        return up if fn == "gt" or up is None else not up
    equal = True if low == high == 0 and low is not None else None
    if (low is not None and low > 0) or (high is not None and high < 0):
        equal = False
    return equal if fn == "eq" or equal is None else not equal


def _affine(ops: Sequence[ScoreOp], value: int, column: str) -> _Affine | None:
    """Integer coefficients of the row ("i") and of 1."""
    op = ops[value]
    if op.kind == "const" and isinstance(op.value, int):
        return {1: int(op.value)}
    if op.kind == "index" and op.fn in "ij":
        name = op.fn if op.fn == "i" else column
        return {1: 0} if name == "0" else {name: 1}
    if op.kind != "map" or op.type != "int" or op.fn not in ("add", "sub", "mul", "abs", "neg"):
        return None
    parts = [_affine(ops, each, column) for each in op.inputs]
    if any(part is None for part in parts):
        return None
    known = [part or {} for part in parts]
    if op.fn in ("add", "sub"):
        sign = 1 if op.fn == "add" else -1
        names = {*known[0], *known[1]}
        return {n: known[0].get(n, 0) + sign * known[1].get(n, 0) for n in names}
    if op.fn == "neg":
        return {n: -c for n, c in known[0].items()}
    if op.fn == "abs":
        moving = any(c for n, c in known[0].items() if n != 1)
        return None if moving else {1: abs(known[0].get(1, 0))}
    for one, other in ((known[0], known[1]), (known[1], known[0])):
        if not any(c for n, c in one.items() if n != 1):
            return {n: c * one.get(1, 0) for n, c in other.items()}
    return None


def _same(ops: Sequence[ScoreOp], left: int, right: int, column: str) -> bool:
    """Whether two values are equal with j replaced by the row's number."""
    if left == right:
        return True
    a, b = ops[left], ops[right]
    if a.kind == b.kind == "index" and column == "i":
        return {a.fn, b.fn} <= {"i", "j"}
    if (a.kind, a.fn, a.value, a.type) != (b.kind, b.fn, b.value, b.type) or a.kind == "index":
        return False
    pairs = zip(a.inputs, b.inputs, strict=True)
    return bool(a.inputs) and all(_same(ops, x, y, column) for x, y in pairs)
