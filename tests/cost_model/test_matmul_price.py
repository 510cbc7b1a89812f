"""The price of the matmul template with its tile, beside what was measured on an H100."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler.cost_model.device import DEVICES
from iocompiler.cost_model.matmul_price import AROUND_S, matmul_seconds, template_time
from iocompiler.cost_model.matmul_tiles import choose
from iocompiler.cost_model.matmul_work import Work
from iocompiler.plan.data import Plan
from iocompiler.plan.priced import priced
from iocompiler.plan.product import MatmulTile, Product
from iocompiler.plan.sites import SiteKey, sites
from iocompiler.tile.index import Affine, Axis, Size
from iocompiler.tile.program import Buffer, Builder, TileProgram
from tests.codegen.matmuls import plan_on_fakes

H100 = DEVICES["h100"]
TILE = MatmulTile(128, 256, 64, num_warps=8, num_stages=4, parts=2, programs=132)


def gelu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(F.linear(x, w, b))


def residual(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    return x @ w.t() + r


def gated(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.silu(x @ w.t()) * (x @ v.t())


def regions(f: Callable[..., Tensor], m: int, n: int, k: int) -> Plan:
    last = {gelu: (n,), residual: (m, n), gated: (n, k)}[f]
    return plan_on_fakes(f, (m, k), (n, k), last, dtype=torch.bfloat16)


# microseconds on an H100 SXM: of the library's products, of these and our kernel, of the template
MEASURED: dict[tuple[Callable[..., Tensor], int, int, int], tuple[float, float, float]] = {
    (gelu, 8192, 4096, 1024): (99.6, 142.9, 125.2),
    (gelu, 8192, 1024, 1024): (28.3, 38.6, 37.1),
    (gelu, 8192, 8192, 768): (153.6, 243.7, 206.5),
    (gelu, 8192, 2048, 4096): (177.2, 198.8, 191.9),
    (gelu, 8192, 768, 2048): (39.6, 47.1, 56.6),
    (gelu, 8192, 768, 8192): (135.7, 144.3, 188.9),
    (residual, 8192, 4096, 1024): (100.7, 167.4, 126.1),
    (residual, 8192, 8192, 1024): (196.1, 330.1, 239.6),
    (gated, 8192, 8192, 2048): (745.1, 872.3, 789.5),
    (gated, 2048, 4096, 1024): (55.0, 71.6, 62.1),
}


@pytest.mark.parametrize("row", MEASURED, ids=lambda r: f"{r[0].__name__} {r[1:]}")
def test_the_choice_is_that_of_the_clock(
    row: tuple[Callable[..., Tensor], int, int, int],
) -> None:
    library, apart, template = MEASURED[row]
    plan = regions(*row)
    (each,) = priced(plan, H100, {})
    assert each.tile == choose(*each.site.key, H100)
    assert each.folded_s is not None
    assert each.folded_s / each.library_s == pytest.approx(template / library, rel=0.07)
    assert each.pays == (template < apart)


def product(m: Size, n: int, k: int) -> Product:
    return Product(1, m, n, k, torch.bfloat16, (k, 1, 0), ((1, k, 0),), (0,))


def program(made: Product, read: int = 0, stored: int = 1) -> TileProgram:
    """Sums and so many tensors added, stored so many times, in bfloat16."""
    build, elements = Builder(), made.m * made.n
    at = Affine.of("m0") * made.n + Affine.of("n0")
    value = build.load("sums0", at, torch.float32)
    buffers = [Buffer("sums0", torch.float32, "in", elements)]
    for number in range(read):
        buffers.append(Buffer(f"in{number}", made.dtype, "in", elements))
        other = build.load(f"in{number}", at, made.dtype)
        value = build.map("add", value, build.cast(other, torch.float32))
    for number in range(stored):
        buffers.append(Buffer(f"out{number}", made.dtype, "out", elements))
        build.store(f"out{number}", at, build.cast(value, made.dtype))
    return build.program((Axis("m0", made.m), Axis("n0", made.n)), (), tuple(buffers))


def seconds(made: Product, epilogue: TileProgram, tile: MatmulTile = TILE) -> float:
    found = matmul_seconds(made, epilogue, tile, H100, {})
    assert found is not None
    return found


def test_every_tensor_that_is_stored_takes_its_time_and_what_is_read_is_hidden() -> None:
    made = product(8192, 4096, 1024)
    bare, twice = seconds(made, program(made)), seconds(made, program(made, stored=2))
    assert twice - bare == pytest.approx(2 * 8192 * 4096 / H100.memory_rate)
    reading = seconds(made, program(made, read=1))
    assert reading - bare == pytest.approx(8192 * 4096 / H100.vector_flops)


def test_short_sums_wait_for_what_is_read() -> None:
    made = product(8192, 4096, 64)
    found = template_time(made, program(made, read=2), TILE, H100, {})
    assert found.at(1.0) == found.reading + found.apart
    assert found.reading > 2 * 2 * 8192 * 4096 / H100.memory_rate


@pytest.mark.parametrize("tile", [TILE, replace(TILE, programs=0)])
def test_the_last_wave_counts_whole(tile: MatmulTile) -> None:
    def contracting(m: int) -> float:
        made = product(m, 256, 4096)
        return template_time(made, program(made), tile, H100, {}).contracting

    made = product(8192, 256, 4096)
    slots = tile.programs or H100.sm_count * Work(made, program(made), H100, {}).resident(tile)
    full = 128 * slots
    assert contracting(128) == contracting(full)
    assert contracting(full + 1) == 2 * contracting(full)


def test_two_products_are_twice_the_work_and_narrow_tiles_slower() -> None:
    one = product(8192, 4096, 1024)
    two = replace(one, rights=one.rights * 2, starts=(0, 0))
    times = [template_time(made, program(made), TILE, H100, {}) for made in (one, two)]
    assert times[1].contracting == 2 * times[0].contracting
    narrow = replace(TILE, m=64, programs=0)
    assert seconds(one, program(one), narrow) > seconds(one, program(one))


def test_sizes_that_are_symbols_are_taken_at_their_hints() -> None:
    made = product(sympy.Symbol("s0", integer=True, positive=True), 4096, 1024)
    found = matmul_seconds(made, program(made), TILE, H100, {"s0": 8192})
    whole = product(8192, 4096, 1024)
    assert found == seconds(whole, program(whole))


def test_the_share_is_found_again() -> None:
    made = product(8192, 4096, 1024)
    found = template_time(made, program(made), TILE, H100, {})
    assert found.share(found.at(0.8)) == pytest.approx(0.8)
    assert found.share(found.apart) == float("inf")
    assert found.apart > H100.launch_s + AROUND_S


def test_only_what_was_measured_has_a_price() -> None:
    made = product(8192, 4096, 1024)
    epilogue = program(made)
    for device in ("a100", "b200", "cpu"):
        assert matmul_seconds(made, epilogue, TILE, DEVICES[device], {}) is None
    for other in (replace(made, dtype=torch.float32), replace(made, aligned=False)):
        assert matmul_seconds(other, epilogue, TILE, H100, {}) is None
    assert matmul_seconds(made, epilogue, replace(TILE, m=32), H100, {}) is None


def test_equal_sites_are_priced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*key: object) -> MatmulTile:
        calls.append(key)
        return choose(*key)  # type: ignore[arg-type]

    monkeypatch.setattr("iocompiler.plan.priced.choose", counted)
    shapes = ((8192, 1024), (1024, 1024), (8192, 1024))
    plan = plan_on_fakes(
        lambda x, w, r: residual(torch.sort(residual(x, w, r))[0], w, r), *shapes,
        dtype=torch.bfloat16,
    )  # fmt: skip
    known: dict[SiteKey, MatmulTile] = {}
    found = priced(plan, H100, {}, known)
    keys = [site.key for site in sites(plan)]
    assert len(keys) == 2
    assert [each.site.key for each in found] == keys[:1] == list(known)
    assert len(calls) == 1
    assert priced(plan, H100, {}, known) == found
    assert len(calls) == 1
