"""Launching the attention templates with a score program: its functions written and imported once,
its tables of blocks made or found again.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from iocompiler.codegen.score_functions import module_text
from iocompiler.cost_model.attention_tiles import Row, Tile, padded, row
from iocompiler.runtime.attention_blocks import classes, listed, proved, reads
from iocompiler.runtime.attention_decode import few_queries, split_forward
from iocompiler.runtime.load import module_file
from iocompiler.runtime.template_launch import launch, tile_arguments
from iocompiler.tile.score import ScoreProgram
from iocompiler.tile.score_blocks import Grid, Table
from iocompiler.tile.score_operands import use

_ROWS = 128
"""What is kept for each row has room for a multiple of so many (`attention_parts.padded_line`)."""
_SUMMED = 64
"""Rows one program sums."""
_NO_GPU = (9, 0)  # the interpreter: any row will do


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

    @functools.cached_property
    def functions(self) -> ModuleType:
        ranks = tuple(x.dim() for x in self.operands)
        lifts = self.query.element_size() < 4
        return functions(self.program, ranks, dropout_p=self.dropout_p, lifts=lifts)

    @functools.cached_property
    def row(self) -> Row:
        if self.tiles is not None:
            return self.tiles
        device = self.query.device
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else _NO_GPU
        width = max(self.query.shape[3], self.value.shape[3])
        found = row(capability, self.query.element_size(), width)
        loads, masked = _loads(self.program), width < padded(width)
        if self.dropout_p or masked:
            found = found.unlimited()
        if not loads and not masked:
            return found
        return found.lighter(gathers=loads == "diagonal" and (masked or width > 64))

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    def table(self, tile: Tile, *, transposed: bool = False) -> Table:
        grid = self._grid(tile.m, tile.n)
        if not reads(self.program):
            device = self.query.device
            return proved(self.program, grid, self.numbers, device, transposed=transposed)
        return listed(self._classes, self._grain, grid, transposed=transposed)

    @functools.cached_property
    def _classes(self) -> Tensor:
        """Of the blocks of `_grain`: found once for all kernels of a forward or a backward."""
        given = (self.program, self.functions.keep, self._grain, self.operands, self.numbers)
        return classes(*given, self.query.device)

    @functools.cached_property
    def _grain(self) -> Grid:
        """The largest blocks that tiles of all kernels are made of."""
        tiles = (self.row.forward, self.row.dq, self.row.dkv)
        return self._grid(math.gcd(*(t.m for t in tiles)), math.gcd(*(t.n for t in tiles)))

    def _grid(self, m: int, n: int) -> Grid:
        batch, heads, rows, _ = self.query.shape
        return Grid(batch, heads, rows, self.key.shape[2], m, n)

    @functools.cached_property
    def common(self) -> dict[str, Any]:
        """The arguments all templates have."""
        return {
            "operands": self.operands,
            "strides": tuple(s for x in self.operands for s in x.stride()),
            "numbers": self.numbers,
            "score": self.functions.new_score,
            "lift": self.functions.lift,
            "FACTOR": self.functions.FACTOR,
            "keep": self.functions.keep,
            "drop": self.functions.drop,
            "KEPT": self.functions.KEPT,
            "Seed": self.query if self.seed is None else self.seed,  # not read without dropout
            "GROUP": self.group,
            "D": self.query.shape[3],
            "E": self.value.shape[3],
            "BLOCK_D": padded(self.query.shape[3]),
            "BLOCK_E": padded(self.value.shape[3]),
            "SINKS": self.program.sinks,
            "PRECISION": _precision(self.query.dtype),
        }

    @property
    def slopes(self) -> dict[str, Any]:
        """The arguments of the templates that differentiate by the dot product."""
        return {"slope": self.functions.slope, "SCALE": self.functions.SCALE}


@functools.lru_cache(maxsize=512)
def functions(
    program: ScoreProgram,
    ranks: tuple[int, ...],
    gradients: tuple[int, ...] = (),
    dropout_p: float = 0.0,
    *,
    lifts: bool = False,
) -> ModuleType:
    """The module with the Triton functions of a program, imported from a real file."""
    path = module_file(module_text(program, ranks, gradients, dropout_p, lifts=lifts), "score")
    spec = importlib.util.spec_from_file_location("iocompiler_score", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.lru_cache(maxsize=512)
def _loads(program: ScoreProgram) -> str:
    """How an element is loaded for each score: "diagonal" for places that are computed, "tile", ""
    where none is.
    """
    ways = [use(program, load) for load in program.loads(program.score)]
    if any(way is None or way.way == "diagonal" for way in ways):
        return "diagonal"
    return "tile" if any(way is not None and way.way == "tile" for way in ways) else ""


def forward(problem: Problem, out: Tensor) -> Tensor:
    """Write the output [B, H, S, E] to ``out`` (any strides).

    Returns:
        of each row log2 of the sum of the powers of two, +inf where nothing counts, [1, B, H, S]
        float32; where the program has `sinks`, the largest score and log2 of what is left, in two
        planes.
    """
    query, value = problem.query, problem.value
    planes = 2 if problem.program.sinks else 1
    lse = query.new_empty((planes, *query.shape[:3]), dtype=torch.float32)
    arguments = {
        "Q": query, "K": problem.key, "V": value, "Out": out,
        "Lse": lse, "Rest": lse[1] if planes > 1 else lse,
        "q_strides": query.stride(), "k_strides": problem.key.stride(),
        "v_strides": value.stride(), "out_strides": out.stride(),
        "rows": query.shape[2], "columns": value.shape[2],
        "EMPTY": problem.program.empty, **problem.common,
    }  # fmt: skip
    if few_queries(problem):
        split_forward(problem, arguments)
    else:
        _whole_forward(problem, arguments)
    return lse


def _whole_forward(problem: Problem, arguments: dict[str, Any]) -> None:
    """Each block of queries by one program."""
    from iocompiler.codegen.kernels.attention import attention_forward

    batch, heads, rows, _ = problem.query.shape
    tile = problem.row.forward
    found = problem.table(tile)
    mean = problem.value
    if problem.program.empty == "uniform":
        mean = mean.mean(2, keepdim=True)
    launch(
        attention_forward, batch * heads * -(-rows // tile.m),
        **arguments, Mean=mean, mean_strides=mean.stride(),
        table=found.entries, table_strides=found.strides,
        heads=heads, room=found.room, RANGES=found.ranges, **tile_arguments(tile),
    )  # fmt: skip


def backward(
    problem: Problem, grad: Tensor, out: Tensor, lse: Tensor, results: Sequence[Tensor]
) -> None:
    """Write the gradients of query, key and value to ``results``."""
    dq, dk, dv = results
    sums = row_sums(problem, grad, out, lse)
    key_gradients(problem, grad, sums, dk, dv)
    query_gradients(problem, grad, sums, dq)
    if problem.program.empty == "uniform":
        _add_uniform(dv, grad, lse)


def key_gradients(problem: Problem, grad: Tensor, sums: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Write the gradients of key and value; ``sums`` are those of `row_sums`."""
    from iocompiler.codegen.kernels.attention_backward import attention_dkv

    query, key = problem.query, problem.key
    batch, groups, columns, _ = key.shape
    tile = problem.row.dkv
    found = problem.table(tile, transposed=True)
    launch(
        attention_dkv, batch * groups * -(-columns // tile.n),
        **backward_inputs(problem, grad, sums), DK=dk, DV=dv,
        dk_strides=dk.stride(), dv_strides=dv.stride(),
        table=found.entries, table_strides=found.strides,
        groups=groups, rows=query.shape[2], columns=columns, room=found.room,
        RANGES=found.ranges, **problem.slopes, **tile_arguments(tile), **problem.common,
    )  # fmt: skip


def query_gradients(problem: Problem, grad: Tensor, sums: Tensor, dq: Tensor) -> None:
    """Write the gradient of query."""
    from iocompiler.codegen.kernels.attention_backward import attention_dq

    query, key = problem.query, problem.key
    batch, heads, rows, _ = query.shape
    tile = problem.row.dq
    found = problem.table(tile)
    launch(
        attention_dq, batch * heads * -(-rows // tile.m),
        **backward_inputs(problem, grad, sums), DQ=dq, dq_strides=dq.stride(),
        table=found.entries, table_strides=found.strides,
        heads=heads, rows=rows, columns=key.shape[2], room=found.room,
        RANGES=found.ranges, **problem.slopes, **tile_arguments(tile), **problem.common,
    )  # fmt: skip


def _add_uniform(dv: Tensor, grad: Tensor, lse: Tensor) -> None:
    """What flows to the values from rows that are their mean."""
    through = (grad * (lse[0] == float("inf")).unsqueeze(-1)).sum(2, dtype=torch.float32)
    batch, groups, columns, width = dv.shape
    through = through.reshape(batch, groups, -1, width).sum(2) / columns
    dv += through.unsqueeze(2).to(dv.dtype)


def row_sums(problem: Problem, grad: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """What the backward reads of each row, [planes, B, H, S up to a multiple of 128] float32: the
    sums over the output's width of gradient times output, then the planes of ``lse``.
    """
    from iocompiler.codegen.kernels.attention_backward import attention_delta

    batch, heads, rows, width = out.shape
    room = -(-rows // _ROWS) * _ROWS
    sums = lse.new_empty((1 + len(lse), batch, heads, room))
    launch(
        attention_delta, batch * heads * (room // _SUMMED),
        Out=out, Grad=grad, Lse=lse, Rest=lse[-1], PaddedLse=sums[1], PaddedRest=sums[-1],
        Delta=sums, out_strides=out.stride(), grad_strides=grad.stride(), heads=heads, rows=rows,
        E=width, BLOCK_E=padded(width), BLOCK_M=_SUMMED, SINKS=problem.program.sinks,
    )  # fmt: skip
    return sums


def backward_inputs(problem: Problem, grad: Tensor, sums: Tensor) -> dict[str, Any]:
    """What every kernel of the backward reads."""
    query, key, value = problem.query, problem.key, problem.value
    return {
        "Q": query,
        "K": key,
        "V": value,
        "Grad": grad,
        "Lse": sums[1],
        "Rest": sums[-1],
        "Delta": sums,
        "q_strides": query.stride(),
        "k_strides": key.stride(),
        "v_strides": value.stride(),
        "grad_strides": grad.stride(),
    }


def _precision(dtype: torch.dtype) -> str:
    tf32 = dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"
