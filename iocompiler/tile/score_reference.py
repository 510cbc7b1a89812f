"""Score programs in plain torch, a tile of scores at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from iocompiler.tile.ops import MAPS
from iocompiler.tile.score import ScoreOp, ScoreProgram

_TORCH = {"int": torch.int64, "bool": torch.bool}


def evaluate(
    program: ScoreProgram,
    wanted: Sequence[int],
    score: Tensor | None,
    places: Mapping[str, Tensor],
    operands: Sequence[Tensor],
    numbers: Sequence[int],
    dtype: torch.dtype,
) -> list[Tensor]:
    """The wanted values of a program.

    Args:
        score: the dot products of a tile; None where no wanted value needs them.
        places: "b", "h", "i" and "j", integers that broadcast against it.
        operands: the tensors its loads read; floating ones are read as ``dtype``.
        numbers: the run-time integers.
        dtype: what floats are computed in.

    Returns:
        For each wanted value a tensor that broadcasts to the tile.
    """
    made: dict[int, Tensor] = {}
    for place in sorted(program.behind(*wanted)):
        op = program.ops[place]
        inputs = [made[v] for v in op.inputs]
        made[place] = _value(op, inputs, score, places, operands, numbers, dtype)
    return [made[value] for value in wanted]


def _value(
    op: ScoreOp,
    inputs: list[Tensor],
    score: Tensor | None,
    places: Mapping[str, Tensor],
    operands: Sequence[Tensor],
    numbers: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    device = places["i"].device
    if op.kind == "score":
        assert score is not None
        return score
    if op.kind == "index":
        return places[op.fn]
    if op.kind in ("const", "number"):
        value = op.value if op.kind == "const" else numbers[int(op.value)]
        return torch.tensor(value, dtype=_TORCH.get(op.type, dtype), device=device)
    if op.kind == "load":
        source = operands[int(op.value)]
        found = source[tuple(inputs)] if inputs else source
        return found.to(dtype) if found.is_floating_point() else found
    if op.kind == "cast":
        return inputs[0].to(_TORCH.get(op.type, dtype))
    return MAPS[op.fn].reference(*inputs)
