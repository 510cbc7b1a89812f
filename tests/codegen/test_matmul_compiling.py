"""Steps of the matmul template compile with no GPU, and take what their tiles were chosen for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler.codegen.module import emit_module
from iocompiler.cost_model.device import DEVICES
from iocompiler.cost_model.matmul_tiles import candidates
from iocompiler.plan.fold import folded, sites
from iocompiler.runtime.compile import Compiled
from iocompiler.runtime.load import prepare
from tests.codegen.compiling import instructions
from tests.codegen.matmuls import plan_on_fakes

FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "gelu": (lambda x, w, b: F.gelu(F.linear(x, w, b)), ((4096, 512), (2048, 512), (2048,))),
    "residual": (lambda x, w, r: x @ w + r, ((4096, 512), (512, 2048), (4096, 2048))),
    "gated": (lambda x, w, v: F.silu(x @ w) * (x @ v), ((4096, 512), (512, 2048), (512, 2048))),
    "odd": (lambda x, w, r: x @ w + r, ((1021, 333), (333, 510), (1021, 510))),
    "batch": (lambda x, w, r: torch.bmm(x, w) + r, ((8, 2048, 512), (8, 512, 1024), (1024,))),
}


def built(name: str, device: str, rank: int, dtype: torch.dtype) -> tuple[Any, Compiled]:
    """Resources and cubin of the step with the tile of this rank."""
    f, shapes = FUNCTIONS[name]
    plan = plan_on_fakes(f, *shapes, dtype=dtype)
    (site,) = sites(plan)
    row = DEVICES[device]
    tile = candidates(site.step.product, site.step.program, row)[rank]
    module = prepare(folded(plan, {site.key: tile}), row)
    (taken,) = module.resources.values()
    image = next(iter(module.images.values()))
    return taken, Compiled(image.cubin, dict(image.metadata))


@pytest.mark.parametrize(
    ("name", "device"),
    [*((name, "h200") for name in FUNCTIONS), ("gelu", "a100"), ("gated", "a100")],
)
def test_the_chosen_tile(name: str, device: str) -> None:
    taken, kernel = built(name, device, 0, torch.bfloat16)
    assert taken["spills"] == 0
    assert 0 < taken["registers"] <= 255
    assert 0 < taken["shared"] <= DEVICES[device].shared_bytes_per_sm
    text = instructions(kernel)
    assert ("HGMMA" if device == "h200" else "HMMA") in text
    if name != "odd":  # of rows without alignment no 16 bytes can be copied at once
        assert "LDGSTS.E.BYPASS.128" in text


@pytest.mark.slow
@pytest.mark.parametrize("device", ["h200", "a100"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("rank", range(1, 4))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_tiles(name: str, device: str, rank: int, dtype: torch.dtype) -> None:
    taken, _ = built(name, device, rank, dtype)
    assert taken["spills"] <= 32  # what spills is not taken by the clock


@pytest.mark.parametrize("tf32", [False, True])
def test_float32(tf32: bool) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        taken, kernel = built("residual", "h200", 0, torch.float32)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert taken["spills"] == 0
    assert ("MMA" in instructions(kernel)) == tf32


def test_the_file_reads_well() -> None:
    f, shapes = FUNCTIONS["gelu"]
    plan = plan_on_fakes(f, *shapes, dtype=torch.bfloat16)
    (site,) = sites(plan)
    tile = candidates(site.step.product, site.step.program, DEVICES["h200"])[0]
    text = emit_module(folded(plan, {site.key: tile}), "gelu")
    assert "aten.addmm" not in text
    assert "def matmul(" in text.split("# %% kernel")[0], "the template stands in the prelude"
    assert "_second" not in text
    assert max(map(len, text.splitlines())) <= 100
