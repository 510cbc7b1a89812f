"""Launching the kernels that sum the gradient of a tensor a score program loads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iocompiler.runtime import attention
from iocompiler.runtime.attention import Problem, RowSums
from iocompiler.runtime.attention_form import Form
from iocompiler.runtime.template_launch import Launch, tile_arguments
from iocompiler.tile.index import power_of_two
from iocompiler.tile.score_operands import Use, use


def operand_gradient(
    problem: Problem, grad: Tensor, out: Tensor, lse: Tensor, of_lse: Tensor | None, which: int
) -> Tensor:
    """The gradient of operand ``which``, in its shape and dtype, over all the places it is loaded.

    Raises:
        ValueError: it is loaded in a way whose gradient has no kernel.
    """
    sums = attention.row_sums(problem.form, grad, out, lse, of_lse)
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
    problem: Problem, grad: Tensor, sums: RowSums, found: Use, operand: Tensor
) -> Tensor:
    form = problem.form
    batch, heads, rows, _ = form.query.shape
    columns, tile = form.key.shape[2], form.row.operand
    grid = form.grid(tile.m, tile.n)
    down, across = grid.counts
    kinds = problem.classes(grid)
    tensors = (*problem.tensors, grad, *sums, kinds)

    def run(kernel: Any, programs: int, result: Tensor, **fixed: Any) -> None:
        def prepared() -> Launch:
            given, names = _arguments(form, kinds, found), (*form.tensors, *attention.READ)
            strides = {"grad_strides": grad.stride(), **fixed}
            return Launch(kernel, (*names, "Classes", "Result"), **strides, **given)

        launch = form.once(("operand", found.load, grad.stride()), prepared)
        launch.run(programs, *tensors, result)

    made = grad.new_empty
    if found.way == "tile":
        own = (batch if "b" in found.dims else 1, heads if "h" in found.dims else 1)
        result = made((*own, rows, columns), dtype=operand.dtype)
        owners = {"batch": batch, "own_batch": own[0], "own_heads": own[1]}
        run(_kernels().operand_tiles, own[0] * own[1] * down * across, result, **owners)
    elif found.way == "diagonal":
        result = made((batch, heads, 2, down + across - 1, tile.n), dtype=torch.float32)
        run(_kernels().operand_diagonals, batch * heads * (down + across - 1), result)
        result = _distances(result)[:, :, (down * tile.m - rows) :]
    elif found.way == "part":
        parts = operand.shape[found.dims.index("p")]
        result = made((batch, heads, rows, parts), dtype=torch.float32)
        span = found.span(problem.program, problem.numbers)
        fixed = {"SPAN": span, "REST": found.is_rest, "PARTS": parts}
        block = max(16, power_of_two(parts))  # the least columns of a product's tile
        run(_kernels().operand_parts, batch * heads * down, result, BLOCK_P=block, **fixed)
    else:
        along = found.way == "row"
        result = made((batch, heads, rows if along else columns), dtype=torch.float32)
        programs = batch * heads * (down if along else across)
        run(_kernels().operand_lines, programs, result, ROWS=along)
    return found.gathered(result, operand, problem.program, problem.numbers, rows)


def _arguments(form: Form, kinds: Tensor, found: Use) -> dict[str, Any]:
    return {
        "class_strides": tuple(
            0 if n == 1 and d < 2 else s
            for d, (n, s) in enumerate(zip(kinds.shape, kinds.stride(), strict=True))
        )[:3],
        "heads": form.query.shape[1],
        "rows": form.query.shape[2],
        "columns": form.key.shape[2],
        "gradient": getattr(form.functions_of((found.load,)), f"gradient_{found.load}"),
        **form.strides,
        **form.common,
        **tile_arguments(form.row.operand),
    }


def _distances(result: Tensor) -> Tensor:
    """[B, H, 2, diagonals, n] to sums by distance [B, H, (diagonals + 1) * n]."""
    n = result.shape[4]
    above, below = result.flatten(3).unbind(2)
    return torch.nn.functional.pad(above, (n, 0)) + torch.nn.functional.pad(below, (0, n))


def _kernels() -> Any:
    from iocompiler.codegen.kernels import attention_operands

    return attention_operands
