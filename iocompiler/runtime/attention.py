"""Launching the attention templates with a score program, forward and backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from iocompiler.cost_model.attention_tiles import Row, Tile, padded
from iocompiler.ops.column_sums import ColumnSums
from iocompiler.runtime.attention_blocks import listed, proved, visited
from iocompiler.runtime.attention_classes import mask, proved_classes
from iocompiler.runtime.attention_decode import few_queries, split_forward
from iocompiler.runtime.attention_form import Form, form
from iocompiler.runtime.template_launch import Launch, tile_arguments
from iocompiler.tile.score import ScoreProgram
from iocompiler.tile.score_blocks import Grid
from iocompiler.tile.score_tables import Table

_ROWS = 128
"""What is kept for each row has room for a multiple of so many (`attention_parts.padded_line`)."""
_SUMMED = 64
"""Rows one program sums."""


@dataclass(frozen=True)
class Problem:
    """An attention of the templates.

    Attributes:
        query: [B, H, S, D]; key [B, G, K, D] and value [B, G, K, E] with G a divisor of H; any
            strides.
        operands: what the program loads.
        numbers: its run-time integers.
        tiles: instead of those of the cost model's table.
        parts: of the keys, where few queries meet them; 0: as many as are priced best.
        dropout_p, seed: of the probabilities; one int64 where dropout_p is not 0.
        known: the classes of the blocks of the form's grain, where somebody has found them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    program: ScoreProgram
    operands: tuple[Tensor, ...] = ()
    numbers: tuple[int, ...] = ()
    tiles: Row | None = field(default=None, compare=False)
    parts: int = field(default=0, compare=False)
    dropout_p: float = 0.0
    seed: Tensor | None = None
    known: Tensor | None = None

    @functools.cached_property
    def form(self) -> Form:
        return form(
            (self.query, self.key, self.value), self.program, self.operands, self.numbers,
            self.tiles, self.parts, self.dropout_p,
        )  # fmt: skip

    def table(self, tile: Tile, *, transposed: bool = False) -> Table:
        if self.form.reads:
            return listed(self.form, self._classes, tile, transposed=transposed)
        return proved(self.form, tile, transposed=transposed)

    @functools.cached_property
    def _classes(self) -> Tensor:
        """Found once for all kernels of a forward or a backward."""
        grain = self.form.grain
        if self.known is not None and self.known.shape[2:] == grain.counts:
            return self.known
        return self.classes(grain)

    def classes(self, grid: Grid) -> Tensor:
        """0, 1 or 2 for each block that is empty, partial or full, int8 [B or 1, H or 1, M, N]."""
        form = self.form
        if form.reads:
            return mask(self.program, self.operands, self.numbers, grid).classes(self.operands)
        return form.once(
            ("classes", grid.m, grid.n),
            lambda: proved_classes(form.program, grid, form.numbers, form.device),
        )

    @property
    def tensors(self) -> dict[str, Any]:
        """The tensors all templates take."""
        return {
            "Q": self.query,
            "K": self.key,
            "V": self.value,
            "operands": self.operands,
            "Seed": self.query if self.seed is None else self.seed,  # not read without dropout
        }


def forward(problem: Problem, out: Tensor) -> Tensor:
    """Write the output [B, H, S, E] to ``out`` (any strides).

    Returns:
        of each row log2 of the sum of the powers of two, +inf where nothing counts, [1, B, H, S]
        float32; where the program is `deep`, the largest score and log2 of what is left, in two
        planes; in none where there is no softmax.
    """
    planes = problem.program.planes
    lse = problem.query.new_empty((planes, *problem.query.shape[:3]), dtype=torch.float32)
    first = lse if planes else problem.query  # not written
    tensors = problem.tensors
    tensors |= {"Out": out, "Lse": first, "Rest": lse[1] if planes > 1 else first}
    if few_queries(problem.form):
        split_forward(problem.form, tensors)
    else:
        _whole_forward(problem, tensors)
    return lse


def _whole_forward(problem: Problem, tensors: dict[str, Any]) -> None:
    """Each block of queries by one program."""
    form, tile = problem.form, problem.form.row.forward
    batch, heads, rows, _ = form.query.shape
    found = problem.table(tile)
    mean = problem.value
    if form.program.empty == "uniform":
        mean = mean.mean(2, keepdim=True)
    strides = tensors["Out"].stride()

    def prepared() -> Launch:
        from iocompiler.codegen.kernels.attention import attention_forward

        return Launch(
            attention_forward, out_strides=strides, mean_strides=mean.stride(), heads=heads,
            rows=rows, columns=form.key.shape[2], EMPTY=form.program.empty,
            KEPT=form.functions.KEPT,
            **form.order(over_queries=False), **visited(found), **form.strides, **form.common,
            **tile_arguments(tile),
        )  # fmt: skip

    launch = form.once(("forward", strides), prepared)
    launch.run(batch * heads * -(-rows // tile.m), **tensors, Mean=mean, table=found.entries)


def backward(
    problem: Problem,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    of_lse: Tensor | None,
    results: Sequence[Tensor],
    columns: ColumnSums | None = None,
) -> None:
    """Write the gradients of query, key and value to ``results``, from those of the output and,
    [B, H, S] float32, contiguous, of lse; and the sums down their columns, where wanted.
    """
    dq, dk, dv = results
    sums = row_sums(problem.form, grad, out, lse, of_lse)
    beside = columns if columns is not None and _are_made(problem, columns) else None
    key_gradients(problem, grad, sums, dk, dv, beside)
    query_gradients(problem, grad, sums, dq, beside)
    if problem.program.empty == "uniform":
        _add_uniform(dv, grad, lse)
    if columns is not None and beside is None:
        columns.take(results)


def _are_made(problem: Problem, columns: ColumnSums) -> bool:
    """Whether the tiles are whole lines of the sums, and what they hold is all there is."""
    row = problem.form.row
    whole = row.dq.m % columns.rows == 0 and row.dkv.n % columns.rows == 0
    return whole and problem.program.empty != "uniform"


def key_gradients(
    problem: Problem,
    grad: Tensor,
    sums: Tensor,
    dk: Tensor,
    dv: Tensor,
    columns: ColumnSums | None = None,
) -> None:
    """Write the gradients of key and value; ``sums`` are those of `row_sums`."""
    form, tile = problem.form, problem.form.row.dkv
    batch, groups, keys, _ = form.key.shape
    found = problem.table(tile, transposed=True)
    of_k, of_v = (dk, dv) if columns is None else columns.parts[1:]  # not written where None
    strides = grad.stride(), dk.stride(), dv.stride(), of_k.stride(), of_v.stride()
    summed = 0 if columns is None else columns.rows

    def prepared() -> Launch:
        from iocompiler.codegen.kernels.attention_backward import attention_dkv

        return Launch(
            attention_dkv, grad_strides=strides[0], dk_strides=strides[1], dv_strides=strides[2],
            sums_k_strides=strides[3], sums_v_strides=strides[4], SUMMED=summed,
            groups=groups, rows=form.query.shape[2], columns=keys, **form.slopes,
            **form.order(over_queries=True), **visited(found), **form.strides, **form.common,
            **tile_arguments(tile),
        )  # fmt: skip

    form.once(("dkv", strides, summed), prepared).run(
        batch * groups * -(-keys // tile.n), **backward_tensors(problem, grad, sums),
        DK=dk, DV=dv, SumsK=of_k, SumsV=of_v, table=found.entries,
    )  # fmt: skip


def query_gradients(
    problem: Problem, grad: Tensor, sums: Tensor, dq: Tensor, columns: ColumnSums | None = None
) -> None:
    """Write the gradient of query."""
    form, tile = problem.form, problem.form.row.dq
    batch, heads, rows, _ = form.query.shape
    found = problem.table(tile)
    of_q = dq if columns is None else columns.parts[0]  # not written where None
    strides = grad.stride(), dq.stride(), of_q.stride()
    summed = 0 if columns is None else columns.rows

    def prepared() -> Launch:
        from iocompiler.codegen.kernels.attention_backward import attention_dq

        return Launch(
            attention_dq, grad_strides=strides[0], dq_strides=strides[1], sums_strides=strides[2],
            heads=heads, rows=rows, columns=form.key.shape[2], SUMMED=summed, **form.slopes,
            **form.order(over_queries=False), **visited(found), **form.strides, **form.common,
            **tile_arguments(tile),
        )  # fmt: skip

    form.once(("dq", strides, summed), prepared).run(
        batch * heads * -(-rows // tile.m), **backward_tensors(problem, grad, sums),
        DQ=dq, SumsQ=of_q, table=found.entries,
    )  # fmt: skip


def _add_uniform(dv: Tensor, grad: Tensor, lse: Tensor) -> None:
    """What flows to the values from rows that are their mean."""
    through = (grad * (lse[0] == float("inf")).unsqueeze(-1)).sum(2, dtype=torch.float32)
    batch, groups, columns, width = dv.shape
    through = through.reshape(batch, groups, -1, width).sum(2) / columns
    dv += through.unsqueeze(2).to(dv.dtype)


def row_sums(form: Form, grad: Tensor, out: Tensor, lse: Tensor, of_lse: Tensor | None) -> Tensor:
    """What the backward reads of each row, [planes, B, H, S up to a multiple of 128] float32: the
    sums over the output's width of gradient times output, then the planes of ``lse``, both as
    `attention_delta` changes them for a dropout and the gradient of ``lse``. With no softmax there
    is nothing to read.
    """
    if not form.program.planes:
        return lse
    batch, heads, rows, width = out.shape
    room = -(-rows // _ROWS) * _ROWS
    sums = lse.new_empty((1 + lse.shape[0], batch, heads, room))
    strides, kept = (out.stride(), grad.stride()), form.functions.KEPT

    def prepared() -> Launch:
        from iocompiler.codegen.kernels.attention_backward import attention_delta

        return Launch(
            attention_delta, out_strides=strides[0], grad_strides=strides[1], heads=heads,
            rows=rows, E=width, BLOCK_E=padded(width), BLOCK_M=_SUMMED, PLANES=form.program.planes,
            KEPT=kept, LOG_KEPT=math.log2(kept), BY_LSE=of_lse is not None,
        )  # fmt: skip

    form.once(("sums", strides, of_lse is None), prepared).run(
        batch * heads * (room // _SUMMED),
        Out=out, Grad=grad, Lse=lse, Rest=lse[-1], GradLse=lse if of_lse is None else of_lse,
        PaddedLse=sums[1], PaddedRest=sums[-1], Delta=sums,
    )  # fmt: skip
    return sums


def backward_tensors(problem: Problem, grad: Tensor, sums: Tensor) -> dict[str, Any]:
    """The tensors every kernel of the backward reads."""
    given = {**problem.tensors, "Grad": grad}
    if not problem.program.planes:
        return {**given, **dict.fromkeys(("Lse", "Rest", "Delta"), grad)}  # not read
    return {**given, "Lse": sums[1], "Rest": sums[-1], "Delta": sums}
