"""Launching the kernels that sum the gradient of a tensor a score program loads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iocompiler.cost_model.attention_tiles import Tile
from iocompiler.runtime import attention
from iocompiler.runtime.attention import Problem
from iocompiler.runtime.attention_blocks import classes
from iocompiler.runtime.template_launch import launch, tile_arguments
from iocompiler.tile.score_blocks import Grid
from iocompiler.tile.score_operands import Use, use


def operand_gradient(
    problem: Problem, grad: Tensor, out: Tensor, lse: Tensor, which: int
) -> Tensor:
    """The gradient of operand ``which``, in its shape and dtype, over all the places it is loaded.

    Raises:
        ValueError: it is loaded in a way whose gradient has no kernel.
    """
    sums = attention.row_sums(problem, grad, out, lse)
    total: Tensor | None = None
    for load in problem.program.loads(problem.program.score):
        if problem.program.ops[load].value != which:
            continue
        found = use(problem.program, load)
        if found is None:
            raise ValueError(f"operand {which} is loaded in a way whose gradient has no kernel")
        part = _of_one_load(problem, grad, sums, found, problem.operands[which])
        total = part if total is None else total + part
    return torch.zeros_like(problem.operands[which]) if total is None else total


def _of_one_load(
    problem: Problem, grad: Tensor, sums: Tensor, found: Use, operand: Tensor
) -> Tensor:
    batch, heads, rows, _ = problem.query.shape
    columns = problem.key.shape[2]
    tile = problem.row.operand
    down, across = -(-rows // tile.m), -(-columns // tile.n)
    grid = Grid(batch, heads, rows, columns, tile.m, tile.n)
    kept = problem.functions.keep
    mask = (problem.program, kept, grid, problem.operands, problem.numbers, problem.query.device)
    arguments = _arguments(problem, classes(*mask), tile, found)
    arguments |= attention.backward_inputs(problem, grad, sums)
    made = grad.new_empty
    if found.way == "tile":
        own = (batch if "b" in found.dims else 1, heads if "h" in found.dims else 1)
        result = made((*own, rows, columns), dtype=operand.dtype)
        owners = {"batch": batch, "own_batch": own[0], "own_heads": own[1]}
        programs = own[0] * own[1] * down * across
        launch(_kernels().operand_tiles, programs, Result=result, **owners, **arguments)
    elif found.way == "diagonal":
        result = made((batch, heads, 2, down + across - 1, tile.n), dtype=torch.float32)
        programs = batch * heads * (down + across - 1)
        launch(_kernels().operand_diagonals, programs, Result=result, **arguments)
        result = _distances(result)[:, :, (down * tile.m - rows) :]
    else:
        along = found.way == "row"
        result = made((batch, heads, rows if along else columns), dtype=torch.float32)
        programs = batch * heads * (down if along else across)
        launch(_kernels().operand_lines, programs, Result=result, ROWS=along, **arguments)
    return found.gathered(result, operand, problem.program, problem.numbers, rows)


def _arguments(problem: Problem, kinds: Tensor, tile: Tile, found: Use) -> dict[str, Any]:
    _, heads, rows, _ = problem.query.shape
    functions = attention.functions(
        problem.program, tuple(x.dim() for x in problem.operands), (found.load,), problem.dropout_p
    )
    return {
        "Classes": kinds,
        "class_strides": tuple(
            0 if n == 1 and d < 2 else s
            for d, (n, s) in enumerate(zip(kinds.shape, kinds.stride(), strict=True))
        )[:3],
        "heads": heads,
        "rows": rows,
        "columns": problem.key.shape[2],
        "gradient": getattr(functions, f"gradient_{found.load}"),
        **tile_arguments(tile),
        **problem.common,
    }


def _distances(result: Tensor) -> Tensor:
    """[B, H, 2, diagonals, n] to sums by distance [B, H, (diagonals + 1) * n]."""
    n = result.shape[4]
    above, below = result.flatten(3).unbind(2)
    return torch.nn.functional.pad(above, (n, 0)) + torch.nn.functional.pad(below, (0, n))


def _kernels() -> Any:
    from iocompiler.codegen.kernels import attention_operands

    return attention_operands
