"""How a program reads an operand, which decides how its gradient is summed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from iocompiler.tile.score import ScoreProgram

Way: TypeAlias = Literal["tile", "row", "column", "diagonal", "part"]
_PARTS = ("int_trunc_div", "int_trunc_mod")


@dataclass(frozen=True)
class Use:
    """A load whose gradient can be summed without atomic additions.

    Attributes:
        load: its place in the program.
        way: one element for each (i, j) is a "tile"; for each i (or none at all) a "row"; for each
            j a "column"; for each j - i a "diagonal"; for each i and either j // n or j % n a
            "part".
        dims: for each dim of the operand the index that is its subscript, "d" for j - i plus the
            values ``shifts``, "p" for the part of j, or the literal it is.
        shifts: values of the program.
        part: what makes the part of j, and the value of the program that is n.
    """

    load: int
    way: Way
    dims: tuple[str | int, ...]
    shifts: tuple[tuple[int, int], ...] = ()
    part: tuple[str, int] | None = None

    def gathered(
        self,
        found: Tensor,
        operand: Tensor,
        program: ScoreProgram,
        numbers: Sequence[int],
        rows: int,
    ) -> Tensor:
        """The operand's gradient, from the sums [B, H, S, K], [B, H, S], [B, H, K], of parts
        [B, H, S, parts] or, of distances from -rows on, [B, H, ...]; axes already summed have
        size 1.
        """
        last = {"tile": "ij", "row": "i", "column": "j", "diagonal": "d", "part": "ip"}[self.way]
        names = "bh" + last
        summed = [d for d, name in enumerate(names) if name not in self.dims]
        if summed:
            found = found.sum(summed, keepdim=True)
        order = [names.index(each) for each in self.dims if isinstance(each, str)]
        rest = [d for d in range(len(names)) if d not in order]
        found = found.permute(*order, *rest).reshape([found.shape[d] for d in order])
        gradient = torch.zeros(operand.shape, dtype=found.dtype, device=found.device)
        target = gradient
        for dim in reversed(range(len(self.dims))):
            each = self.dims[dim]
            if isinstance(each, int):
                target = target.select(dim, each)
        if self.way != "diagonal":
            target[tuple(slice(0, n) for n in found.shape)] = found
            return gradient.to(operand.dtype)
        place = [each for each in self.dims if isinstance(each, str)].index("d")
        first = self._shift(program, numbers) - rows
        low, high = max(0, first), min(target.shape[place], first + found.shape[place])
        part = found.narrow(place, low - first, high - low)
        target.narrow(place, low, high - low).copy_(part)
        return gradient.to(operand.dtype)

    @property
    def is_rest(self) -> bool:
        """Whether the part of j is j % n, not j // n."""
        return self.part is not None and self.part[0] == _PARTS[1]

    def span(self, program: ScoreProgram, numbers: Sequence[int]) -> int:
        """The n that j is divided by for its part."""
        assert self.part is not None
        op = program.ops[self.part[1]]
        return int(op.value if op.kind == "const" else numbers[int(op.value)])

    def _shift(self, program: ScoreProgram, numbers: Sequence[int]) -> int:
        total = 0
        for value, sign in self.shifts:
            op = program.ops[value]
            total += sign * int(op.value if op.kind == "const" else numbers[int(op.value)])
        return total


def use(program: ScoreProgram, load: int) -> Use | None:
    """How a load reads its operand; None where no kernel sums its gradient."""
    dims: list[str | int] = []
    shifts: tuple[tuple[int, int], ...] = ()
    part: tuple[str, int] | None = None
    for value in program.ops[load].inputs:
        op = program.ops[value]
        if op.kind == "index":
            dims.append(op.fn)
        elif op.kind == "const":
            dims.append(int(op.value))
        elif op.fn in _PARTS and _is_part(program, op.inputs):
            part = (op.fn, op.inputs[1])
            dims.append("p")
        else:
            terms = _terms(program, value, 1)
            if terms is None:
                return None
            moving = {program.ops[v].fn: s for v, s in terms if program.ops[v].kind == "index"}
            if moving != {"j": 1, "i": -1} or "d" in dims:
                return None
            dims.append("d")
            shifts = tuple((v, s) for v, s in terms if program.ops[v].kind != "index")
    named = [each for each in dims if isinstance(each, str)]
    if len(set(named)) < len(named) or ("d" in named and {"i", "j"} & set(named)):
        return None
    if "p" in named and ({"j", "d"} & set(named) or "i" not in named):
        return None
    if "p" in named:
        way: Way = "part"
    elif "d" in named:
        way = "diagonal"
    elif {"i", "j"} <= set(named):
        way = "tile"
    else:
        way = "column" if "j" in named else "row"
    return Use(load, way, tuple(dims), shifts, part)


def _is_part(program: ScoreProgram, inputs: tuple[int, ...]) -> bool:
    """Whether it is the column that is divided, and by a number."""
    whole, span = (program.ops[value] for value in inputs)
    return (whole.kind, whole.fn) == ("index", "j") and span.kind in ("const", "number")


def _terms(program: ScoreProgram, value: int, sign: int) -> list[tuple[int, int]] | None:
    """The signed leaves of a sum of integers, each index once; None where it is something else."""
    op = program.ops[value]
    if op.kind in ("index", "const", "number"):
        return [(value, sign)]
    if op.fn not in ("add", "sub") or op.type != "int":
        return None
    left = _terms(program, op.inputs[0], sign)
    right = _terms(program, op.inputs[1], sign if op.fn == "add" else -sign)
    if left is None or right is None:
        return None
    found = left + right
    indices = [v for v, _ in found if program.ops[v].kind == "index"]
    return found if len(set(indices)) == len(indices) else None
