"""Modeled time: the longest of moving the bytes and of each kind of arithmetic, after one launch.

Matmuls are slower than the peak in ways their shape tells: the last wave of tiles is not full,
short inner dimensions pay for filling and draining the pipeline, and rows that do not start on
16-byte boundaries go through slow loads. On an H200 in bf16 (torch 2.11, cuBLAS): 790 TFLOP/s at
8192^3; 650 over Llama's matmuls (8192 rows, k 2048); 227 where the vocabulary is 50257 or 30522
columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from iocompiler.cost_model.convolution_order import computes_in_matrix_units
from iocompiler.cost_model.cost import Contraction, Cost, value_of
from iocompiler.cost_model.device import Device
from iocompiler.tile.index import Size

TRANSCENDENTAL_FLOPS = 8
"""A special-function result takes the time of about this many additions."""
BURST = 2.0
"""What one multiprocessor alone may take of the memory's bandwidth, over its part of it."""

UNALIGNED = 0.35
"""The share of its speed a matmul keeps when a leading stride is no multiple of 16 bytes (measured,
see above)."""

FILL_K = 192
"""A tile's prologue and epilogue take as long as this much of its inner dimension in bf16: they
wait for memory, so at a lower rate of arithmetic they are that much less."""


@dataclass(frozen=True)
class Tile:
    """A library's output tile and the share of an SM's peak its main loop reaches."""

    m: int
    n: int
    speed: float


TILES = (
    Tile(256, 128, 1.0),
    Tile(128, 256, 1.0),
    Tile(128, 128, 0.88),
    Tile(128, 64, 0.7),
    Tile(64, 64, 0.5),
    Tile(32, 32, 0.25),
)
SPLITS = (1, 2, 4, 8, 16)
"""Into how many parts the inner dimension may be cut where tiles alone do not fill the SMs."""

ATTENTION_SPEED = {64: 0.56, 128: 0.75}
"""Share of the matmul peak fused attention reaches, by head size (cuDNN 9.19 on an H200: 443 and
594 TFLOP/s)."""
CAUSAL_SPEED = 0.77
"""What of that remains with a causal mask (460 of 594 TFLOP/s)."""


def time(
    cost: Cost,
    device: Device,
    dtype: torch.dtype = torch.float32,
    hints: Mapping[str, int] | None = None,
    tf32: bool = False,
) -> float:
    """Seconds one launch of this cost takes.

    Args:
        dtype: in which the arithmetic outside contractions is done; float64 runs at the device's
        float64 rate.
        hints: values of the size symbols.
        tf32: float32 matmuls may be rounded to TF32 (`tf32.products_rounded`).
    """
    moving = value_of(cost.bytes, hints) / device.memory_rate
    work = value_of(cost.vector_flops, hints) + TRANSCENDENTAL_FLOPS * value_of(
        cost.transcendentals, hints
    )
    computing = work / vector_rate(device, dtype)
    contracting = sum(contraction_time(c, device, hints, tf32) for c in cost.contractions)
    copied = value_of(cost.staged_bytes, hints)
    copying = max(copied / device.l2_bytes_per_s, copied / device.memory_rate)
    relaying = value_of(relaid_bytes(cost, device, dtype, tf32), hints) / device.memory_rate
    launching = (1 + cost.further_launches) * device.launch_s
    return launching + max(moving, computing, contracting) + copying + relaying


def relaid_bytes(cost: Cost, device: Device, dtype: torch.dtype, tf32: bool = False) -> Size:
    """Bytes a library moves for the order of storage that this device's matrix units take."""
    return cost.relaid_bytes if computes_in_matrix_units(dtype, device, tf32) else 0


def vector_rate(device: Device, dtype: torch.dtype) -> float:
    """FLOP/s outside the matrix units: halves are computed as float32, float64 at most at half its
    rate."""
    if dtype != torch.float64:
        return device.vector_flops
    return min(
        device.vector_flops / 2, device.matmul_flops.get(torch.float64, device.vector_flops / 2)
    )


def contraction_time(
    contraction: Contraction,
    device: Device,
    hints: Mapping[str, int] | None = None,
    tf32: bool = False,
) -> float:
    """Seconds of arithmetic of one contraction."""
    flops = value_of(contraction.flops, hints)
    if flops <= 0:
        return 0.0
    rate = device.matmul_rate(contraction.dtype, tf32)
    return flops / (rate * efficiency(contraction, device, hints))


def efficiency(
    contraction: Contraction, device: Device, hints: Mapping[str, int] | None = None
) -> float:
    """The share of the device's matmul rate this shape reaches, in (0, 1]."""
    m, n, k, batch = (
        value_of(s, hints) for s in (contraction.m, contraction.n, contraction.k, contraction.batch)
    )
    if contraction.kind.endswith("attention"):
        head = min(n, k)
        speed = (
            ATTENTION_SPEED[128]
            if head >= 128
            else ATTENTION_SPEED[64] * min(1.0, max(head, 16) / 64)
        )
        return speed * (CAUSAL_SPEED if contraction.kind.startswith("causal") else 1.0)
    half = device.matmul_flops.get(torch.bfloat16, device.vector_flops)
    fill = FILL_K * device.matmul_flops.get(contraction.dtype, device.vector_flops) / half
    work = (batch, m, n, k)
    shape = max(
        _filled(tile, split, work, fill, device.sm_count) for tile in TILES for split in SPLITS
    )
    if contraction.kind == "activated":
        shape /= device.gelu_beside_product or 1.0
    return shape * (1.0 if contraction.aligned or contraction.dtype.itemsize > 2 else UNALIGNED)


def _filled(
    tile: Tile, split: int, work: tuple[float, float, float, float], fill: float, sm_count: int
) -> float:
    """Useful work over the work of all SMs for as many waves as the tiles take."""
    batch, m, n, k = work
    tiles = batch * math.ceil(m / tile.m) * math.ceil(n / tile.n) * split
    waves = math.ceil(tiles / sm_count)
    # the partial results of a split go through L2 once more
    depth = math.ceil(k / split / 32) * 32 + fill * (1 if split == 1 else 2)
    return tile.speed * batch * m * n * k / (waves * sm_count * tile.m * tile.n * depth)
