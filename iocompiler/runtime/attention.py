"""Launching the attention templates with a score program, forward and backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from iocompiler.cost_model.attention_tiles import Row, Tile, padded
from iocompiler.ops.column_sums import ColumnSums
from iocompiler.runtime.attention_blocks import Visits, visits
from iocompiler.runtime.attention_classes import mask, proved_classes
from iocompiler.runtime.attention_decode import few_queries, split_forward
from iocompiler.runtime.attention_form import Form, Parts, form
from iocompiler.runtime.template_launch import Launch, launch_options, tile_arguments
from iocompiler.tile.score import ScoreProgram
from iocompiler.tile.score_blocks import Grid

_Strides: TypeAlias = tuple[tuple[int, ...], ...]
_TABLES: dict[Parts, tuple[int, int]] = {"both": (0, 1), "queries": (0, 0), "keys": (1, 1)}
"""Those of `Run.visits` that a backward's template is given; what a part does not read is any."""
_ROWS = 128
"""What is kept for each row has room for a multiple of so many (`attention_parts.padded_line`)."""
_SUMMED = 64
"""Rows one program sums."""


@dataclass(eq=False)
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
        tables: and the lists of the tiles of the kernels: of a forward one; of a backward that of
            the query's gradient and that of the key's.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    program: ScoreProgram
    operands: tuple[Tensor, ...] = ()
    numbers: tuple[int, ...] = ()
    tiles: Row | None = None
    parts: int = 0
    dropout_p: float = 0.0
    seed: Tensor | None = None
    known: Tensor | None = None
    tables: tuple[Tensor, ...] = ()
    form: Form = field(init=False)

    def __post_init__(self) -> None:
        self.form = form(
            (self.query, self.key, self.value), self.program, self.operands, self.numbers,
            self.tiles, self.parts, self.dropout_p,
        )  # fmt: skip

    def entries(self, found: Visits, place: int = 0) -> Tensor:
        """Those of the table of what a kernel visits, the one at ``place`` where that is known."""
        if found.proved is not None:
            return found.proved
        assert found.lists is not None
        for known in self.tables[place : place + 1]:
            if known.shape == found.lists.shape:
                return known
        return found.lists.entries(self._classes)

    @functools.cached_property
    def _classes(self) -> Tensor:
        """Found once for all kernels of a forward or a backward."""
        form = self.form
        if self.known is not None and self.known.shape == form.classes_shape:
            return self.known
        return self.classes(form.grain)

    def classes(self, grid: Grid) -> Tensor:
        """0, 1 or 2 for each block that is empty, partial or full, int8 [B or 1, H or 1, M, N]."""
        form = self.form
        if form.reads:
            return mask(self.program, self.operands, self.numbers, grid).classes(self.operands)
        name = ("classes", grid.m, grid.n)
        return form.once(name, proved_classes, form.program, grid, form.numbers, form.device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those all templates take, as `Form.tensors` names them."""
        seed = self.query if self.seed is None else self.seed  # not read without dropout
        return (self.query, self.key, self.value, *self.operands, seed)


class Run(NamedTuple):
    """A kernel of a form, and in how many programs it runs over which blocks: of a backward those
    that queries visit, then those that keys do.
    """

    launch: Launch
    programs: int
    visits: tuple[Visits, ...]


class RowSums(NamedTuple):
    """What the backward reads of each row, [B, H, S up to a multiple of 128] float32, contiguous:
    the sums over the output's width of gradient times output, and the first and the last plane of
    ``lse``, both as `attention_delta` changes them for a dropout and the gradient of ``lse``. With
    no softmax nothing is read.
    """

    delta: Tensor
    lse: Tensor
    rest: Tensor


READ = ("Grad", "Delta", "Lse", "Rest")
"""What the kernels of the backward read beside the tensors that all templates take."""


def forward(problem: Problem, out: Tensor) -> Tensor:
    """Write the output [B, H, S, E] to ``out`` (any strides).

    Returns:
        of each row log2 of the sum of the powers of two, +inf where nothing counts, [1, B, H, S]
        float32; where the program is `deep`, the largest score and log2 of what is left, in two
        planes; in none where there is no softmax.
    """
    form = problem.form
    lse = out.new_empty(form.rows_shape, dtype=torch.float32)
    planes = form.rows_shape[0]
    first = lse if planes else out  # not written
    rest = lse[1] if planes > 1 else first
    if few_queries(form):
        split_forward(form, problem.tensors, out, first, rest)
    else:
        _whole_forward(problem, out, first, rest)
    return lse


def _whole_forward(problem: Problem, out: Tensor, lse: Tensor, rest: Tensor) -> None:
    """Each block of queries by one program."""
    form, strides = problem.form, out.stride()
    mean = problem.value
    if form.program.empty == "uniform":
        mean = mean.mean(2, keepdim=True)
    found = form.once(("forward", strides), _forward_run, form, strides, mean)
    entries = problem.entries(found.visits[0])
    found.launch.run(found.programs, *problem.tensors, out, lse, rest, mean, entries)


def _forward_run(form: Form, strides: tuple[int, ...], mean: Tensor) -> Run:
    from iocompiler.codegen.kernels.attention import attention_forward

    tile = form.row.forward
    batch, heads, rows, _ = form.query.shape
    found = visits(form, tile, transposed=False)
    launch = Launch(
        attention_forward, (*form.tensors, "Out", "Lse", "Rest", "Mean", "table"),
        out_strides=strides, mean_strides=mean.stride(), heads=heads, rows=rows,
        columns=form.key.shape[2], EMPTY=form.program.empty, KEPT=form.functions.KEPT,
        **form.order("forward", listed=found.listed), **found.arguments, **form.strides,
        **form.common, **tile_arguments(tile),
    )  # fmt: skip
    return Run(launch, batch * heads * -(-rows // tile.m), (found,))


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
    sums = row_sums(problem.form, grad, out, lse, of_lse)
    beside = columns if columns is not None and _are_made(problem, columns) else None
    for parts in problem.form.once("launches", _launches, problem.form):
        gradients(problem, grad, sums, results, parts, beside)
    if problem.program.empty == "uniform":
        _add_uniform(results[2], grad, lse)
    if columns is not None and beside is None:
        columns.take(results)


def _are_made(problem: Problem, columns: ColumnSums) -> bool:
    """Whether the tiles are whole lines of the sums, and what they hold is all there is."""
    row = problem.form.row
    whole = row.dq.m % columns.rows == 0 and row.dkv.n % columns.rows == 0
    return whole and problem.program.empty != "uniform"


def _launches(form: Form) -> tuple[Parts, ...]:
    """What runs as one kernel: both parts, where their tiles are alike but for their sizes and
    scores load nothing. (On an H100 one kernel takes 10 % less where rows are short, 3 % where they
    are long and have no function; with loads for scores, which take all registers of both, 3 to 5 %
    more.)
    """
    alike = [(t.warps, t.stages, t.registers) for t in (form.row.dq, form.row.dkv)]
    loads = form.program.loads(form.program.score)
    return ("both",) if alike[0] == alike[1] and not loads else ("keys", "queries")


def gradients(
    problem: Problem,
    grad: Tensor,
    sums: RowSums,
    results: Sequence[Tensor],
    parts: Parts = "both",
    columns: ColumnSums | None = None,
) -> None:
    """Write the gradients of query, key and value to ``results``, or those of ``parts`` alone;
    ``sums`` are those of `row_sums`.
    """
    form, summed = problem.form, 0
    of_columns: Sequence[Tensor] = results  # not written
    if columns is not None:
        of_columns, summed = columns.parts, columns.rows
    strides: _Strides = tuple(x.stride() for x in (grad, *results, *of_columns))
    found = form.once((parts, strides, summed), _backward_run, form, strides, summed, parts)
    tables = {at: problem.entries(found.visits[at], at) for at in set(_TABLES[parts])}
    found.launch.run(
        found.programs, *problem.tensors, grad, *sums, *results, *of_columns,
        *[tables[at] for at in _TABLES[parts]],
    )  # fmt: skip


def _backward_run(form: Form, strides: _Strides, summed: int, parts: Parts) -> Run:
    from iocompiler.codegen.kernels.attention_backward import attention_backward

    of_queries, of_keys = form.row.dq, form.row.dkv
    batch, groups, keys, _ = form.key.shape
    rows = form.query.shape[2]
    found = visits(form, of_queries, transposed=False), visits(form, of_keys, transposed=True)
    results = "dq", "dk", "dv", "sums_q", "sums_k", "sums_v"
    named = {
        f"{name}_strides": each for name, each in zip(("grad", *results), strides, strict=True)
    }
    launch = Launch(
        attention_backward,
        (*form.tensors, *READ, "DQ", "DK", "DV", "SumsQ", "SumsK", "SumsV", "table_q", "table_k"),
        groups=groups, rows=rows, columns=keys, PARTS=parts, SUMMED=summed, **named, **form.slopes,
        **form.order(parts, listed=any(each.listed for each in found)),
        **_part("q", of_queries, found[0]), **_part("k", of_keys, found[1]),
        **form.strides, **form.common,
        **launch_options(of_queries if parts == "queries" else of_keys),
    )  # fmt: skip
    blocks = -(-keys // of_keys.n) * (parts != "queries")
    blocks += form.group * -(-rows // of_queries.m) * (parts != "keys")
    return Run(launch, batch * groups * blocks, found)


def _part(name: str, tile: Tile, found: Visits) -> dict[str, Any]:
    """The tiles of a part of the backward, and the blocks it visits, as its template takes them."""
    of = name.upper()
    tiles = {f"BLOCK_M_{of}": tile.m, f"BLOCK_N_{of}": tile.n}
    strides, room, ranges = (found.arguments[key] for key in ("table_strides", "room", "RANGES"))
    return {f"table_{name}_strides": strides, f"room_{name}": room, f"RANGES_{of}": ranges, **tiles}


def _add_uniform(dv: Tensor, grad: Tensor, lse: Tensor) -> None:
    """What flows to the values from rows that are their mean."""
    through = (grad * (lse[0] == float("inf")).unsqueeze(-1)).sum(2, dtype=torch.float32)
    batch, groups, columns, width = dv.shape
    through = through.reshape(batch, groups, -1, width).sum(2) / columns
    dv += through.unsqueeze(2).to(dv.dtype)


def row_sums(form: Form, grad: Tensor, out: Tensor, lse: Tensor, of_lse: Tensor | None) -> RowSums:
    """Those of a backward; ``delta`` has the planes behind it."""
    planes = form.rows_shape[0]
    if not planes:
        return RowSums(grad, grad, grad)
    strides, plain = (out.stride(), grad.stride()), of_lse is None
    launch, programs, shape = form.once(("sums", strides, plain), _sums_run, form, strides, plain)
    made = lse.new_empty(shape)
    padded = made[1]
    rest, padded_rest = (lse, padded) if planes == 1 else (lse[-1], made[-1])
    of_lse = lse if of_lse is None else of_lse
    launch.run(programs, out, grad, lse, rest, of_lse, padded, padded_rest, made)
    return RowSums(made, padded, padded_rest)


def _sums_run(form: Form, strides: _Strides, plain: bool) -> tuple[Launch, int, tuple[int, ...]]:
    """And the shape of what it makes."""
    from iocompiler.codegen.kernels.attention_delta import attention_delta

    planes, batch, heads, rows = form.rows_shape
    room, width, kept = -(-rows // _ROWS) * _ROWS, form.value.shape[3], form.functions.KEPT
    launch = Launch(
        attention_delta,
        ("Out", "Grad", "Lse", "Rest", "GradLse", "PaddedLse", "PaddedRest", "Delta"),
        out_strides=strides[0], grad_strides=strides[1], heads=heads, rows=rows, E=width,
        BLOCK_E=padded(width), BLOCK_M=_SUMMED, PLANES=planes, KEPT=kept, LOG_KEPT=math.log2(kept),
        BY_LSE=not plain,
    )  # fmt: skip
    return launch, batch * heads * (room // _SUMMED), (1 + planes, batch, heads, room)
