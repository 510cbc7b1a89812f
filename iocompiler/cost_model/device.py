"""Devices as rows of data: what each can move and compute, with the source of every figure.

Rates are dense (never counting structured sparsity) and per operand dtype. The H200 row holds rates
measured by this project; the others hold datasheet peaks, of which `Device.memory_rate` and
`Device.matmul_rate` take the share that was reached on the H200.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from iocompiler.errors import UnknownDevice, close_match

KIB = 1024
MIB = 1024**2

# what the H200 reached of its own datasheet: 4.3 of 4.8 TB/s in a copy, 790 of 989.5 TFLOP/s in a
# bf16 matmul
REACHED_MEMORY = 4.3 / 4.8
REACHED_MATMUL = 790 / 989.5

# what `python -m benchmarks.matmul --part epilogues,gates` prints as the median of "share" on an
# H100 SXM: of 59 regions, 0.89 to 1.03
TEMPLATE_ON_HOPPER = 0.99

# the first algorithm that cuBLASLt 13.0 proposes on an H100 SXM, in bf16, against torch's addmm:
# 1.34 for 8192 x 3072 x 768, 1.38 for 4096 x 4096 x 1024, 1.28 for 6304 x 3072 x 768
GELU_ON_HOPPER = 1.4


@dataclass(frozen=True)
class Device:
    """One device. Rates are bytes/s and dense FLOP/s (multiply and add counted as two), times in
    seconds."""

    name: str
    capability: tuple[int, int] | None  # CUDA compute capability; None for a CPU
    sm_count: int
    hbm_bytes_per_s: float
    l2_bytes: int
    l2_bytes_per_s: float
    shared_bytes_per_sm: int
    registers_per_sm: int  # 32-bit
    memory_bytes: int
    matmul_flops: Mapping[
        torch.dtype, float
    ]  # through the matrix units, by operand dtype; float32 is not TF32
    vector_flops: float  # float32 outside the matrix units
    launch_s: float  # from one small kernel's start to the next one's in a stream
    source: str
    tf32_flops: float = (
        0.0  # float32 operands rounded to TF32 in the matrix units; 0 where there is none
    )
    measured: bool = (
        False  # whether the memory and matmul rates are measured; else they are datasheet peaks
    )
    pattern: str = ""  # regular expression found in the name the CUDA driver gives
    # the share of the library's rate that the products of the matmul template reach
    # (`matmul_price.py` says what stands around them); None: not measured here, so that a
    # measurement alone (max-autotune) decides for it
    matmul_template: float | None = None
    # how often the time of a product the library takes that stores its GELU beside it, in one
    # launch; None: not measured here, so that nothing is known to be gained by it
    gelu_beside_product: float | None = None

    @property
    def memory_rate(self) -> float:
        """Bytes per second a long copy reaches."""
        return self.hbm_bytes_per_s * (1.0 if self.measured else REACHED_MEMORY)

    def matmul_rate(self, dtype: torch.dtype, tf32: bool = False) -> float:
        """FLOP/s a large aligned matmul of this operand dtype reaches; a dtype without a row runs
        at vector rate."""
        peak = self.matmul_flops.get(dtype, self.vector_flops)
        if tf32 and dtype == torch.float32 and self.tf32_flops:
            peak = self.tf32_flops
        return peak * (1.0 if self.measured else REACHED_MATMUL)

    @property
    def on_chip_bytes(self) -> int:
        """Everything on the chip that can hold an operand: registers and shared memory of all SMs,
        and L2."""
        return (
            self.sm_count * (self.shared_bytes_per_sm + 4 * self.registers_per_sm) + self.l2_bytes
        )


def _rates(
    half: float, fp8: float, int8: float, fp32: float, fp64: float
) -> Mapping[torch.dtype, float]:
    rates = {
        torch.bfloat16: half,
        torch.float16: half,
        torch.float32: fp32,
        torch.float64: fp64,
        torch.int8: int8,
    }
    if fp8:
        rates |= {torch.float8_e4m3fn: fp8, torch.float8_e5m2: fp8}
    return rates


DEVICES: dict[str, Device] = {
    "h200": Device(
        name="h200",
        capability=(9, 0),
        sm_count=132,
        hbm_bytes_per_s=4.3e12,
        l2_bytes=50 * MIB,
        l2_bytes_per_s=10e12,
        shared_bytes_per_sm=227 * KIB,
        registers_per_sm=65536,
        memory_bytes=141 * 10**9,
        matmul_flops=_rates(half=790e12, fp8=1580e12, int8=1580e12, fp32=51e12, fp64=53e12),
        tf32_flops=395e12,
        vector_flops=60e12,
        launch_s=2.5e-6,
        measured=True,
        gelu_beside_product=GELU_ON_HOPPER,
        pattern=r"\bH200\b",
        source="copy and bf16 8192^3 matmul measured on an H200 SXM (torch 2.11, 2026-11-22); "
        "tf32, fp8, int8 and fp64: NVIDIA H200 datasheet (dense) times the share bf16 "
        "reached; sizes: datasheet; L2 rate: estimate; the template's share: measured on an H100, "
        "same SMs",
        matmul_template=TEMPLATE_ON_HOPPER,
    ),
    "h100": Device(
        name="h100",
        capability=(9, 0),
        sm_count=132,
        hbm_bytes_per_s=3.35e12,
        l2_bytes=50 * MIB,
        l2_bytes_per_s=10e12,
        shared_bytes_per_sm=227 * KIB,
        registers_per_sm=65536,
        memory_bytes=80 * 10**9,
        matmul_flops=_rates(half=989.5e12, fp8=1979e12, int8=1979e12, fp32=67e12, fp64=67e12),
        tf32_flops=494.7e12,
        vector_flops=67e12,
        launch_s=2.5e-6,
        gelu_beside_product=GELU_ON_HOPPER,
        pattern=r"\bH100\b.*HBM3",
        source="NVIDIA H100 datasheet, SXM5 80 GB, figures halved where printed with sparsity; L2 "
        "rate: estimate; the template's share: measured on an H100 SXM (benchmarks/matmul.py, 59 "
        "regions, torch 2.11, Triton 3.6, 2026-11-26)",
        matmul_template=TEMPLATE_ON_HOPPER,
    ),
    "a100": Device(
        name="a100",
        capability=(8, 0),
        sm_count=108,
        hbm_bytes_per_s=2.039e12,
        l2_bytes=40 * MIB,
        l2_bytes_per_s=7.2e12,
        shared_bytes_per_sm=163 * KIB,
        registers_per_sm=65536,
        memory_bytes=80 * 10**9,
        matmul_flops=_rates(half=312e12, fp8=0, int8=624e12, fp32=19.5e12, fp64=19.5e12),
        tf32_flops=156e12,
        vector_flops=19.5e12,
        launch_s=3e-6,
        pattern=r"\bA100-SXM4-80GB\b",
        source="NVIDIA A100 datasheet, SXM4 80 GB, dense; L2: 5120 bytes a clock (NVIDIA A100 "
        "whitepaper) at 1.41 GHz",
    ),
    "l40s": Device(
        name="l40s",
        capability=(8, 9),
        sm_count=142,
        hbm_bytes_per_s=864e9,
        l2_bytes=96 * MIB,
        l2_bytes_per_s=5e12,
        shared_bytes_per_sm=99 * KIB,
        registers_per_sm=65536,
        memory_bytes=48 * 10**9,
        matmul_flops=_rates(half=362.05e12, fp8=733e12, int8=733e12, fp32=91.6e12, fp64=1.43e12),
        tf32_flops=183e12,
        vector_flops=91.6e12,
        launch_s=2.5e-6,
        pattern=r"\bL40S\b",
        source="NVIDIA L40S datasheet, the dense figures; float64 at 1/64 of float32; L2 rate: "
        "estimate",
    ),
    "rtx4090": Device(
        name="rtx4090",
        capability=(8, 9),
        sm_count=128,
        hbm_bytes_per_s=1.008e12,
        l2_bytes=72 * MIB,
        l2_bytes_per_s=5e12,
        shared_bytes_per_sm=99 * KIB,
        registers_per_sm=65536,
        memory_bytes=24 * 2**30,
        matmul_flops=_rates(half=165.2e12, fp8=330.3e12, int8=660.6e12, fp32=82.6e12, fp64=1.29e12),
        tf32_flops=82.6e12,
        vector_flops=82.6e12,
        launch_s=2.5e-6,
        pattern=r"\bRTX 4090$",
        source="NVIDIA Ada GPU architecture whitepaper, dense with float32 accumulation (half the "
        "rate of float16 accumulation on GeForce); L2 rate: estimate",
    ),
    "b200": Device(
        name="b200",
        capability=(10, 0),
        sm_count=148,
        hbm_bytes_per_s=8e12,
        l2_bytes=126 * MIB,
        l2_bytes_per_s=16e12,
        shared_bytes_per_sm=227 * KIB,
        registers_per_sm=65536,
        memory_bytes=180 * 10**9,
        matmul_flops=_rates(half=2250e12, fp8=4500e12, int8=4500e12, fp32=80e12, fp64=40e12),
        tf32_flops=1100e12,
        vector_flops=80e12,
        launch_s=2.5e-6,
        pattern=r"\bB200\b",
        source="NVIDIA HGX B200 datasheet (1000 W), one GPU, dense; L2 size as the driver reports "
        "it; L2 rate: estimate",
    ),
    "cpu": Device(
        name="cpu",
        capability=None,
        sm_count=16,
        hbm_bytes_per_s=100e9,
        l2_bytes=32 * MIB,
        l2_bytes_per_s=800e9,
        shared_bytes_per_sm=1 * MIB,
        registers_per_sm=512,
        memory_bytes=128 * 10**9,
        matmul_flops={torch.bfloat16: 1.5e12, torch.float32: 1.5e12, torch.float64: 0.75e12},
        vector_flops=1.5e12,
        launch_s=1e-6,
        measured=True,
        source="nominal server of 16 cores at 3 GHz with two 256-bit FMA units each and 100 GB/s "
        "of memory; no particular machine",
    ),
}
"""The rows; ``shared_bytes_per_sm`` is what one block may use (CUDA C++ Programming Guide,
technical specifications)."""


def device(name: str) -> Device:
    """The row of this name, in any case.

    Raises:
        UnknownDevice: there is none; the message lists the names that exist.
    """
    key = re.sub(r"[\s_-]", "", name.lower())
    if key not in DEVICES:
        raise UnknownDevice(name=name, hint=close_match(key, DEVICES), known=", ".join(DEVICES))
    return DEVICES[key]


def current_device(torch_device: torch.device) -> Device:
    """The row of the GPU behind ``torch_device``; for a GPU without one, its kin scaled by the
    driver's figures.

    Raises:
        UnknownDevice: a CUDA device on a machine without one, or a device that is neither CUDA nor
        CPU.
    """
    if torch_device.type == "cpu":
        return DEVICES["cpu"]
    if torch_device.type != "cuda" or not torch.cuda.is_available():
        raise UnknownDevice(
            name=str(torch_device), hint=" on this machine", known=", ".join(DEVICES)
        )
    return row_for(torch.cuda.get_device_properties(torch_device))


def row_for(properties: Any) -> Device:
    """The row for the properties of a CUDA device: the named row, or the nearest one of the same
    generation, scaled.

    A part of a GPU (MIG) has its own SM count and is scaled too.
    """
    named = [
        row for row in DEVICES.values() if row.pattern and re.search(row.pattern, properties.name)
    ]
    if named and named[0].sm_count == properties.multi_processor_count:
        return named[0]
    return _scaled(named[0] if named else kin((properties.major, properties.minor)), properties)


def kin(capability: tuple[int, int]) -> Device:
    """The row whose compute capability is nearest, older ones before newer ones."""
    rows = [row for row in DEVICES.values() if row.capability is not None]

    def distance(row: Device) -> tuple[int, bool]:
        assert row.capability is not None
        have, want = 10 * row.capability[0] + row.capability[1], 10 * capability[0] + capability[1]
        return abs(have - want), have > want

    return min(rows, key=distance)


def _scaled(row: Device, properties: Any) -> Device:
    own = (properties.major, properties.minor)
    share = properties.multi_processor_count / row.sm_count
    clock_khz, bus_bits = (
        getattr(properties, "memory_clock_rate", 0),
        getattr(properties, "memory_bus_width", 0),
    )
    whole = bool(clock_khz and bus_bits) and not re.search(r"\bMIG\b", properties.name)
    # twice the clock: two transfers a cycle; a measured row's rates are reached ones, so the
    # driver's peak becomes one
    driver = 2 * clock_khz * 1e3 * bus_bits / 8 * (REACHED_MEMORY if row.measured else 1.0)
    return dataclasses.replace(
        row,
        name=re.sub(r"\W+", "-", properties.name.lower()),
        capability=own,
        sm_count=properties.multi_processor_count,
        hbm_bytes_per_s=driver if whole else row.hbm_bytes_per_s * share,
        l2_bytes=getattr(properties, "L2_cache_size", 0) or int(row.l2_bytes * share),
        l2_bytes_per_s=row.l2_bytes_per_s * share,
        memory_bytes=properties.total_memory,
        matmul_flops={dtype: rate * share for dtype, rate in row.matmul_flops.items()},
        tf32_flops=row.tf32_flops * share,
        vector_flops=row.vector_flops * share,
        # these are of one kind of SM, however many there are
        matmul_template=row.matmul_template if row.capability == own else None,
        gelu_beside_product=row.gelu_beside_product if row.capability == own else None,
        pattern="",
        source=f"the {row.name} row scaled to {properties.multi_processor_count} SMs; "
        + ("bandwidth from the driver" if whole else "bandwidth by SM count"),
    )
