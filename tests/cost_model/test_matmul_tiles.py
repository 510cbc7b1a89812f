"""Tiles of the matmul template: legal on the device, sensible for the shape."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch

from iocompiler.cost_model.device import DEVICES, Device
from iocompiler.cost_model.matmul import is_aligned, matmul_cost
from iocompiler.cost_model.matmul_tiles import candidates, choose
from iocompiler.cost_model.matmul_work import Work
from iocompiler.plan.product import MatmulTile, Product
from iocompiler.tile.index import Affine, Axis, Size
from iocompiler.tile.program import Buffer, Builder, TileProgram

H200, A100 = DEVICES["h200"], DEVICES["a100"]
S0 = sympy.Symbol("s0", integer=True, positive=True)


def product(
    m: Size, n: int, k: int, dtype: torch.dtype = torch.bfloat16, pair: bool = False
) -> Product:
    right = (1, k, 0)
    return Product(1, m, n, k, dtype, (k, 1, 0), (right,) * (1 + pair), (0,) * (1 + pair))


def added(made: Product) -> TileProgram:
    """``out = sums0 (* sums1) + in0``, in the products' dtype."""
    build, elements = Builder(), made.m * made.n
    at = Affine.of("m0") * made.n + Affine.of("n0")
    sums = [Buffer(f"sums{i}", torch.float32, "in", elements) for i in range(len(made.rights))]
    value = build.load("sums0", at, torch.float32)
    if len(sums) > 1:
        value = build.map("mul", value, build.load("sums1", at, torch.float32))
    other = build.cast(build.load("in0", at, made.dtype), torch.float32)
    build.store("out0", at, build.cast(build.map("add", value, other), made.dtype))
    tensors = (
        Buffer("in0", made.dtype, "in", elements),
        Buffer("out0", made.dtype, "out", elements),
    )
    axes = (Axis("m0", made.m), Axis("n0", made.n))
    return build.program(axes, (), (*sums, *tensors))


SHAPES = [(8192, 8192, 8192), (8192, 768, 768), (16, 4096, 4096), (1, 1, 1), (1000, 1001, 1002)]


@pytest.mark.parametrize("device", [H200, A100, DEVICES["l40s"]], ids=lambda d: d.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pair", [False, True])
def test_every_tile_is_legal(shape: tuple[int, int, int], device: Device, pair: bool) -> None:
    made = product(*shape, pair=pair)
    tiles = candidates(made, added(made), device, most=40)
    assert tiles
    assert len(set(tiles)) == len(tiles)
    assert choose(made, added(made), device) == tiles[0]
    for tile in tiles:
        sums = tile.m * tile.n * (1 + pair) // (32 * tile.num_warps)
        step = (tile.m + tile.n * (1 + pair)) * tile.k * 2
        assert sums <= 128
        assert step * tile.num_stages < device.shared_bytes_per_sm
        assert tile.loads == "pointers" or (tile.programs and is_aligned(made) and device is H200)


def test_large_products_have_large_tiles() -> None:
    made = product(8192, 8192, 8192)
    for device in (H200, A100):
        tile = choose(made, added(made), device)
        assert tile.m * tile.n >= 128 * 128
    assert choose(made, added(made), H200).loads == "descriptors"


def test_an_epilogue_of_many_tensors_has_small_parts() -> None:
    made = product(8192, 8192, 2048)
    few = added(made)
    build, at = Builder(), Affine.of("m0") * 8192 + Affine.of("n0")
    value = build.load("sums0", at, torch.float32)
    for name in ("in0", "in1", "in2"):
        value = build.map("add", value, build.load(name, at, torch.float32))
    build.store("out0", at, value)
    names = (("sums0", "in"), ("in0", "in"), ("in1", "in"), ("in2", "in"), ("out0", "out"))
    buffers = tuple(Buffer(name, torch.float32, role, 8192 * 8192) for name, role in names)
    many = build.program(few.parallel, (), buffers)
    assert choose(made, few, H200).parts == 2
    assert choose(made, many, H200).parts == 4


def test_few_rows_have_low_tiles() -> None:
    made = product(16, 4096, 4096)
    assert choose(made, added(made), H200).m == 16


def test_there_are_tiles_of_many_shapes() -> None:
    made = product(8192, 4096, 1024)
    found = {(tile.m, tile.n) for tile in candidates(made, added(made), H200, most=16)}
    assert len(found) >= 4


def test_float32_is_no_work_for_the_matrix_units() -> None:
    made = product(4096, 4096, 4096, torch.float32)
    tiles = candidates(made, added(made), H200, most=20)
    assert all(tile.m * tile.n <= 64 * 64 and tile.loads == "pointers" for tile in tiles)


def test_sizes_that_are_symbols_are_taken_at_their_hints() -> None:
    made = product(S0, 4096, 4096)
    few, many = (choose(made, added(made), H200, {"s0": n}) for n in (16, 8192))
    assert few.m < many.m


def test_a_better_overlap_is_faster() -> None:
    made = product(8192, 4096, 512)
    work = Work(made, added(made), H200, {})
    small = MatmulTile(64, 64, 64, num_warps=4, num_stages=3)
    assert work.seconds(small) < work.seconds(replace(small, num_stages=2))
    assert work.seconds(replace(small, m=128, n=128)) < work.seconds(small)


def test_the_cost_is_that_of_all_that_is_moved() -> None:
    made = product(128, 256, 64, pair=True)
    cost = matmul_cost(made, added(made))
    assert cost.read_bytes == 2 * (128 * 64 + 2 * 64 * 256 + 128 * 256)
    assert cost.written_bytes == 2 * 128 * 256
    assert cost.flops == 2 * (2 * 128 * 256 * 64) + 2 * 128 * 256
