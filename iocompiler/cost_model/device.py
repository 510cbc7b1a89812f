"""Devices as rows of data: what each can move and compute, with the source of every figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """One device. Rates are bytes/s and dense FLOP/s (multiply and add counted as two), times in seconds."""

    name: str
    capability: tuple[int, int] | None  # CUDA compute capability; None for a CPU
    sm_count: int
    hbm_bytes_per_s: float
    l2_bytes: int
    l2_bytes_per_s: float
    shared_bytes_per_sm: int
    registers_per_sm: int  # 32-bit
    memory_bytes: int
    matmul_flops: Mapping[torch.dtype, float]  # through the matrix units, by operand dtype
    vector_flops: float  # float32 outside the matrix units
    launch_s: float  # from one small kernel's start to the next one's in a stream
    source: str


DEVICES: dict[str, Device] = {
    "h200": Device(
        name="h200",
        capability=(9, 0),
        sm_count=132,
        hbm_bytes_per_s=4.3e12,
        l2_bytes=50 * 2**20,
        l2_bytes_per_s=10e12,
        shared_bytes_per_sm=227 * 1024,
        registers_per_sm=65536,
        memory_bytes=141 * 10**9,
        matmul_flops={torch.bfloat16: 790e12, torch.float16: 790e12, torch.float32: 51e12},
        vector_flops=60e12,
        launch_s=2.5e-6,
        source="copy and bf16 8192^3 matmul measured on an H200 SXM (torch 2.11, 2026-11-22); rest: datasheet",
    ),
}
