"""Launching the template for few queries over many keys."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from iocompiler.cost_model.attention_decode import MOST_QUERIES, Decode, parts, tile
from iocompiler.cost_model.attention_tiles import Tile
from iocompiler.cost_model.device import DEVICES, current_device
from iocompiler.runtime.template_launch import launch, tile_arguments

if TYPE_CHECKING:
    from iocompiler.runtime.attention import Problem

_COLUMNS = 128
"""Lengths are priced in steps of this: a cache that grows by one key asks seldom."""
_PARTS_AT_ONCE = 16
_COMBINED = (
    *("V", "Out", "Lse", "Rest", "v_strides", "out_strides", "rows", "columns"),
    *("GROUP", "E", "BLOCK_E", "KEPT", "EMPTY", "SINKS"),
)
"""What the second kernel takes of the first one's arguments."""
_NO_GPU = "h200"  # the interpreter: any row will do


def few_queries(problem: Problem) -> bool:
    """Whether this template runs the forward of a problem."""
    return problem.query.shape[2] <= MOST_QUERIES and problem.tiles is None


def work(problem: Problem) -> Decode:
    """A problem as the cost model sees it."""
    return Decode(*_sizes(problem, problem.key.shape[2]))


def _sizes(problem: Problem, columns: int) -> tuple[int, ...]:
    batch, heads, rows, width = problem.query.shape
    groups, wide = problem.key.shape[1], problem.value.shape[3]
    return batch, groups, heads // groups, rows, columns, width, wide, problem.query.element_size()


def split_forward(problem: Problem, arguments: dict[str, Any]) -> None:
    """The forward with the keys of each head in parts.

    Args:
        arguments: what `attention.forward` gives to both templates.
    """
    from iocompiler.codegen.kernels.attention_decode import attention_combine, attention_split

    query, width = problem.query, problem.value.shape[3]
    batch, heads, rows, _ = query.shape
    groups = problem.key.shape[1]
    chosen, count = split(problem)
    queries = batch * heads * rows
    lines = queries * count if count > 1 else 0
    partial = {
        "Acc": query.new_empty(lines * (width + 2), dtype=torch.float32),
        "parts": count,
        "lines": lines,
    }
    tiles = -(-(heads // groups * rows) // chosen.m)
    launch(
        attention_split, batch * groups * tiles * count,
        **arguments, **partial, groups=groups, **tile_arguments(chosen),
    )  # fmt: skip
    if count > 1:
        launch(
            attention_combine, queries, **{name: arguments[name] for name in _COMBINED}, **partial,
            heads=heads, BLOCK_P=_PARTS_AT_ONCE, BLOCK_N=chosen.n, num_warps=4,
        )  # fmt: skip


def split(problem: Problem) -> tuple[Tile, int]:
    """The tile, and in how many parts the keys are read."""
    columns = problem.key.shape[2]
    rounded = -(-columns // _COLUMNS) * _COLUMNS
    chosen, count = _split(_sizes(problem, rounded), problem.query.device)
    return chosen, min(problem.parts or count, -(-columns // chosen.n))


@functools.lru_cache(maxsize=4096)
def _split(sizes: tuple[int, ...], device: torch.device) -> tuple[Tile, int]:
    task = Decode(*sizes)
    return tile(task), parts(task, _row(device))


@functools.lru_cache(maxsize=64)
def _row(device: torch.device) -> Any:
    return current_device(device) if device.type == "cuda" else DEVICES[_NO_GPU]
