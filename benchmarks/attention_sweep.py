"""Tiles of the attention templates, timed: what `cost_model/attention_tiles.py` is filled from."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.attention_inputs import inputs, sizes
from benchmarks.attention_zoo import CASES, Case, Sizes, program
from benchmarks.harness import first_line, wanted
from iocompiler.cost_model.attention_tiles import Row, Tile, row
from iocompiler.runtime import attention, attention_decode
from iocompiler.runtime.attention import Problem
from iocompiler.runtime.attention_operands import operand_gradient

TILES = {
    "forward": (
        *((128, 64, 4, s) for s in (2, 3, 4)),
        *((128, 64, 8, s) for s in (2, 3)),
        *((128, 128, 8, s) for s in (2, 3)),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 32, 4, 3),
        (128, 32, 4, 3),
        (128, 32, 8, 2),
        (64, 128, 4, 3),
    ),
    "dq": (
        *((128, 64, 8, s) for s in (2, 3)),
        *((64, 64, 4, s) for s in (2, 3)),
        (128, 64, 4, 3),
        (128, 32, 4, 3),
        (128, 128, 8, 2),
        (64, 32, 4, 2),
        (64, 32, 8, 2),
        (64, 16, 4, 2),
    ),
    "dkv": (
        *((64, 128, 8, s) for s in (2, 3)),
        *((64, 64, 4, s) for s in (2, 3)),
        (32, 128, 4, 3),
        (128, 128, 8, 2),
        *((32, 64, 4, s) for s in (2, 3)),
        *((32, 32, w, 2) for w in (4, 8)),
        (16, 32, 4, 2),
    ),
    "operand": ((64, 64, 8, 1), (64, 64, 4, 2), (32, 32, 4, 2), (32, 32, 8, 1)),
}

PARTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48)


def sweep(args: argparse.Namespace) -> None:
    """Print the time of each tile for each row, and the best; of decoding, of each number of parts
    the keys are read in.
    """
    for case in CASES:
        if not wanted(case.name, args.only):
            continue
        if case.queries:
            _parts(args, case)
            continue
        for kernel, tiles in TILES.items():
            _kernel(args, case, sizes(args, case), kernel, tiles)


def _parts(args: argparse.Namespace, case: Case) -> None:
    given = {name: x.detach() for name, x in inputs(case, sizes(args, case)).items()}
    q, k, v = (given.pop(name) for name in "qkv")
    score, operands = program(case, q.shape[3]), tuple(given.values())
    out = torch.empty_like(q)
    found: list[tuple[float, int]] = []
    for parts in PARTS:
        problem = Problem(q, k, v, score, operands, parts=parts)
        call = partial(attention.forward, problem, out)
        time = timing.steps(call, args.steps, args.budget, flush=True)
        found.append((time.ms, parts))
        print(f"  {case.name} {parts} parts: {time.ms:.4f} ms", flush=True)
    priced = attention_decode.split(Problem(q, k, v, score, operands).form)[1]
    ms, parts = min(found)
    print(f"{case.name}: best {parts} parts {ms:.4f} ms; priced: {priced}", flush=True)


def _kernel(
    args: argparse.Namespace,
    case: Case,
    size: Sizes,
    kernel: str,
    tiles: tuple[tuple[int, int, int, int], ...],
) -> None:
    found: list[tuple[float, Tile]] = []
    for tile, call in _calls(case, size, kernel, tiles):
        try:
            time = timing.steps(call, args.steps, args.budget, flush=True)
        except Exception as error:  # too large for the device, say
            print(f"  {case.name} {kernel} {tile}: {type(error).__name__}: {first_line(error)}")
            continue
        found.append((time.ms, tile))
        print(f"  {case.name} {kernel} {tile}: {time.ms:.4f} ms", flush=True)
    if found:
        ms, tile = min(found, key=lambda each: each[0])
        print(f"{case.name} {kernel}: best {tile} {ms:.4f} ms", flush=True)


def _calls(
    case: Case, size: Sizes, kernel: str, tiles: tuple[tuple[int, int, int, int], ...]
) -> Iterator[tuple[Tile, Callable[[], object]]]:
    device = timing.device()
    shape = (size.batch, size.length, size.heads, size.width)
    q, k, v, grad, out = (
        torch.randn(shape, device=device).bfloat16().transpose(1, 2) for _ in range(5)
    )
    operands, numbers = _operands(case, size, device)
    score = program(case, size.width)
    capability = torch.cuda.get_device_capability() if timing.on_gpu() else (9, 0)
    base = row(capability, q.element_size(), size.width)
    first = Problem(q, k, v, score, operands, numbers, base)
    lse = attention.forward(first, out)
    sums = attention.row_sums(first.form, grad, out, lse, None)
    results = [torch.empty_like(x) for x in (q, k, v)]
    for each in tiles:
        tile = Tile(*each)
        tiled: Row = replace(base, **{kernel: tile})
        problem = Problem(q, k, v, score, operands, numbers, tiled)
        made: dict[str, Callable[[], object]] = {
            "forward": lambda p=problem: attention.forward(p, out),
            "dq": lambda p=problem: attention.gradients(p, grad, sums, results, "queries"),
            "dkv": lambda p=problem: attention.gradients(p, grad, sums, results, "keys"),
        }
        if kernel in made:
            yield tile, made[kernel]
        elif case.learned:
            yield tile, lambda p=problem: operand_gradient(p, grad, out, lse, None, 0)


def _operands(case: Case, size: Sizes, device: str) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    if case.learned:  # the table by distance that the recogniser makes of buckets
        table = torch.randn(size.heads, 2 * size.length - 1, device=device).bfloat16()
        return (table,), (size.length - 1,)
    return tuple(case.extra(size, device).values()), ()
