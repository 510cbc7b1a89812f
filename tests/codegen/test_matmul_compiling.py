"""Steps of the matmul template compile with no GPU, and take what their tiles were chosen for."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from iocompiler.codegen.module import emit_module
from iocompiler.cost_model.device import DEVICES
from iocompiler.cost_model.matmul_tiles import candidates
from iocompiler.ops.sum_of_products import SUM_OF_PRODUCTS
from iocompiler.plan.fold import folded
from iocompiler.plan.product import MatmulTile
from iocompiler.plan.sites import sites
from iocompiler.runtime.compile import Compiled
from iocompiler.runtime.load import prepare
from iocompiler.runtime.module import Module
from iocompiler.versions import version_tuple
from tests.codegen.compiling import instructions
from tests.codegen.matmuls import plan_on_fakes

# to shared memory, 16 bytes at once; with Triton 3.9 a line of L2 is named
COPIES = r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128"
FUNCTIONS: dict[
    str, tuple[Callable[..., Tensor | tuple[Tensor, ...]], tuple[tuple[int, ...], ...]]
] = {
    "gelu": (lambda x, w, b: F.gelu(F.linear(x, w, b)), ((4096, 512), (2048, 512), (2048,))),
    "residual": (lambda x, w, r: x @ w + r, ((4096, 512), (512, 2048), (4096, 2048))),
    "gated": (lambda x, w, v: F.silu(x @ w) * (x @ v), ((4096, 512), (512, 2048), (512, 2048))),
    "odd": (lambda x, w, r: x @ w + r, ((1021, 333), (333, 510), (1021, 510))),
    "sum": (
        lambda x, w, y, v: SUM_OF_PRODUCTS([x, y], [w, v]),
        ((4096, 1024), (1024, 2048), (4096, 256), (256, 2048)),
    ),
    "group": (
        lambda x, q, k, v: (x @ q.t(), x @ k.t(), x @ v.t()),
        ((4096, 512), (2048, 512), (512, 512), (512, 512)),
    ),
    "batch": (lambda x, w, r: torch.bmm(x, w) + r, ((8, 2048, 512), (8, 512, 1024), (1024,))),
}


def prepared(
    name: str, device: str, rank: int, dtype: torch.dtype, loads: str = ""
) -> tuple[Module, MatmulTile]:
    """The module of the step with the tile of this rank, of those with these loads."""
    f, shapes = FUNCTIONS[name]
    plan = plan_on_fakes(f, *shapes, dtype=dtype)
    (site,) = sites(plan)
    row = DEVICES[device]
    found = candidates(*site.key, row, most=24)
    tile = [tile for tile in found if loads in ("", tile.loads)][rank]
    return prepare(folded(plan, {site.key: tile}), row), tile


def text_of(module: Module) -> str:
    """The instructions of its one kernel."""
    image = next(iter(module.images.values()))
    return instructions(Compiled(image.cubin, dict(image.metadata)))


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("residual", "h200"),
        ("gated", "h200"),
        ("odd", "h200"),
        ("sum", "h200"),
        ("group", "h200"),
        ("residual", "a100"),
    ],
)
def test_the_chosen_tile(name: str, device: str) -> None:
    module, tile = prepared(name, device, 0, torch.bfloat16)
    (taken,) = module.resources.values()
    assert taken["spills"] == 0
    assert not any(image.metadata["serialized"] for image in module.images.values())
    assert 0 < taken["registers"] <= 255
    assert 0 < taken["shared"] <= DEVICES[device].shared_bytes_per_sm
    text = text_of(module)
    assert ("HGMMA" if device == "h200" else "HMMA") in text
    assert ("UTMALDG" in text) == (tile.loads == "descriptors")
    if name != "odd" and tile.loads == "pointers":  # without alignment no 16 bytes are copied
        assert re.search(COPIES, text)


def test_by_pointers_on_hopper() -> None:
    module, _ = prepared("residual", "h200", 0, torch.bfloat16, "pointers")
    assert re.search(COPIES, text_of(module))
    (taken,) = module.resources.values()
    assert taken["spills"] == 0


@pytest.mark.parametrize("name", ["sum", "group"])
def test_one_loop_for_all_products(name: str) -> None:
    """However many pairs of operands: one place where each is brought and multiplied, in flight."""
    module, tile = prepared(name, "h200", 0, torch.bfloat16, "descriptors")
    text = text_of(module)
    steps = tile.k // 16
    blocks = max(tile.m, 64) * tile.n // (64 * 256) // (tile.num_warps // 4)
    assert text.count("HGMMA") == steps * max(blocks, 1)
    assert text.count("UTMALDG") == 2 * tile.num_stages


def test_pointers_that_are_not_aligned_have_a_kernel_of_their_own() -> None:
    module, _ = prepared("residual", "h200", 0, torch.bfloat16, "descriptors")
    (spec,) = module.kernels.values()
    assert spec.any_pointers is not None
    other = spec.unhinted
    assert other.name != spec.name
    module._compile([(other, False, False)], 90)
    image = module.images[other.launcher, False, False]
    assert image.metadata["spills"] == 0
    text = instructions(Compiled(image.cubin, dict(image.metadata)))
    assert "UTMALDG" not in text
    assert ".128" not in text, "nothing is known of where the operands lie"


@pytest.mark.slow
@pytest.mark.parametrize("device", ["h200", "a100"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_tiles(name: str, device: str, rank: int, dtype: torch.dtype) -> None:
    module, _ = prepared(name, device, rank, dtype)
    (taken,) = module.resources.values()
    assert taken["spills"] <= 32  # what spills is not taken by the clock
    if (name, dtype) != ("gated", torch.float16):  # some are, with Triton 3.6: the clock finds it
        assert not any(image.metadata["serialized"] for image in module.images.values())


@pytest.mark.slow
def test_float32() -> None:
    module, _ = prepared("residual", "h200", 0, torch.float32)
    (taken,) = module.resources.values()
    assert taken["spills"] == 0
    assert "MMA" not in text_of(module), "nothing is rounded"


@pytest.mark.parametrize("rows", [4096, 64 * 197])
def test_with_sums_down_the_columns(rows: int) -> None:
    """In parts as high as a tile, and half as high."""

    def f(x: Tensor, w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        d = torch.ops.aten.gelu_backward(x @ w, h)
        return d, d.sum(0)

    plan = plan_on_fakes(f, (rows, 512), (512, 2048), (rows, 2048), dtype=torch.bfloat16)
    (site,) = sites(plan)
    row = DEVICES["h200"]
    tile = candidates(*site.key, row)[0]
    assert tile.loads == "descriptors"
    module = prepare(folded(plan, {site.key: tile}), row)
    assert len(module.resources) == 2, "and the kernel that folds the parts"
    # with Triton 3.9, of those whose last rows are not whole, a few
    most = 64 if version_tuple(triton.__version__) >= (3, 9) else 0
    assert all(taken["spills"] <= most for taken in module.resources.values()), module.resources
    assert all(taken["shared"] <= row.shared_bytes_per_sm for taken in module.resources.values())


def test_the_file_reads_well() -> None:
    f, shapes = FUNCTIONS["gelu"]
    plan = plan_on_fakes(f, *shapes, dtype=torch.bfloat16)
    (site,) = sites(plan)
    tile = candidates(site.step.product, site.step.program, DEVICES["h200"])[0]
    text = emit_module(folded(plan, {site.key: tile}), "gelu")
    assert "aten.addmm" not in text
    assert "def matmul(" in text.split("# %% kernel")[0], "the template stands in the prelude"
    assert max(map(len, text.splitlines())) <= 100
