"""Launching the template for few queries over many keys."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from iocompiler.cost_model.attention_decode import MOST_QUERIES, Decode, parts, tile
from iocompiler.cost_model.device import DEVICES, current_device
from iocompiler.runtime.attention_launch import launch, tile_arguments

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
    batch, heads, rows, width = problem.query.shape
    groups, columns = problem.key.shape[1:3]
    wide, size = problem.value.shape[3], problem.query.element_size()
    return Decode(batch, groups, heads // groups, rows, columns, width, wide, size)


def split_forward(problem: Problem, arguments: dict[str, Any]) -> None:
    """The forward with the keys of each head in parts.

    Args:
        arguments: what `attention.forward` gives to both templates.
    """
    from iocompiler.codegen.kernels.attention_decode import attention_combine, attention_split

    query, value = problem.query, problem.value
    task = work(problem)
    chosen = tile(task)
    count = min(problem.parts or parts_of(task, query.device), -(-task.columns // chosen.n))
    queries = query.shape[0] * query.shape[1] * query.shape[2]
    lines = queries * count if count > 1 else 0
    acc = query.new_empty((lines, value.shape[3]), dtype=torch.float32)
    sums = query.new_empty((2, lines), dtype=torch.float32)
    partial = {"Acc": acc, "Tops": sums[0], "Totals": sums[1], "parts": count}
    launch(
        attention_split, task.heads * -(-task.packed // chosen.m) * count,
        **arguments, **partial, groups=task.groups, **tile_arguments(chosen),
    )  # fmt: skip
    if count == 1:
        return
    launch(
        attention_combine, queries, **{name: arguments[name] for name in _COMBINED}, **partial,
        heads=query.shape[1], BLOCK_P=_PARTS_AT_ONCE, BLOCK_N=chosen.n, num_warps=4,
    )  # fmt: skip


def parts_of(task: Decode, device: torch.device) -> int:
    """In how many parts the keys are read."""
    rounded = -(-task.columns // _COLUMNS) * _COLUMNS
    return _parts(replace(task, columns=rounded), device)


@functools.lru_cache(maxsize=4096)
def _parts(task: Decode, device: torch.device) -> int:
    return parts(task, _row(device))


@functools.lru_cache(maxsize=64)
def _row(device: torch.device) -> Any:
    return current_device(device) if device.type == "cuda" else DEVICES[_NO_GPU]
