"""Schedules and tensors in a few words."""

from __future__ import annotations

from iocompiler.plan.data import Schedule, TensorSpec
from iocompiler.plan.product import MatmulTile
from iocompiler.tile.index import product


def show_schedule(schedule: Schedule) -> str:
    """As "persistent 4 x 1024, 8 warps"."""
    blocks = {
        "pointwise": [schedule.y_block, schedule.x_block]
        if schedule.y_block > 1
        else [schedule.x_block],
        "persistent": [schedule.x_block, schedule.r_block],
        "looped": [schedule.x_block, schedule.r_block],
        "rows": [schedule.x_block, schedule.r_block],
    }[schedule.kind]
    words = f"{schedule.kind} {' x '.join(map(str, blocks))}, {schedule.num_warps} warps"
    words += f", {schedule.registers} registers at most" if schedule.registers else ""
    return words + (f", {schedule.programs} programs" if schedule.programs else "")


def show_tile(tile: MatmulTile) -> str:
    """As "matmul 128 x 256 x 64, 8 warps, 4 stages"."""
    words = (
        f"matmul {tile.m} x {tile.n} x {tile.k}, {tile.num_warps} warps, {tile.num_stages} stages"
    )
    words += f", {tile.programs} programs" if tile.programs else ""
    return words + (", by descriptors" if tile.loads == "descriptors" else "")


_SHORT = {
    "float32": "f32",
    "float64": "f64",
    "float16": "f16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
}


def show_spec(spec: TensorSpec) -> str:
    """As "bf16[8192, 768]"; strides follow where the tensor is not dense in row-major order."""
    name = str(spec.dtype).removeprefix("torch.")
    text = f"{_SHORT.get(name, name)}[{', '.join(map(str, spec.shape))}]"
    dense = tuple(product(spec.shape[i + 1 :]) for i in range(len(spec.shape)))
    regular = all(
        s == d or size == 1 for s, d, size in zip(spec.stride, dense, spec.shape, strict=True)
    )
    return text if regular else f"{text} by ({', '.join(map(str, spec.stride))})"
