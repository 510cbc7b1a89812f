"""Sums down the columns of what becomes of a product: in its step, whole parts to a tile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler.cost_model.matmul_tiles import candidates
from iocompiler.plan.column_sums import rows_of_part
from iocompiler.plan.data import BatchStep, MatmulStep, Plan
from iocompiler.plan.fold import folded
from iocompiler.plan.peak import scheduled_peak
from iocompiler.plan.product import MatmulTile
from iocompiler.plan.sites import Declined, sites, survey
from tests.codegen.matmuls import Folded
from tests.plan.graphs import H200, Planned, relative_error

TILE = MatmulTile(128, 32, 32, num_warps=4, num_stages=2)
Two = Callable[..., tuple[Tensor, Tensor]]


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape)


def gelu_backward(x: Tensor, w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    d = torch.ops.aten.gelu_backward(x @ w, h)
    return d, d.flatten(0, -2).sum(0)


def relu_backward(x: Tensor, w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    d = (x @ w).masked_fill(h <= 0, 0.0)
    return d, d.flatten(0, -2).sum(0)


def two_sums(x: Tensor, w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    y = x @ w
    return y * h, torch.stack([(y * h).flatten(0, -2).sum(0), y.flatten(0, -2).sum(0)])


def sum_of_the_product(x: Tensor, w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.addmm(h[0], x, w)
    return y.sigmoid(), y.sum(0)


ROWS, WIDE, NARROW = 4096, 48, 16
FLAT = ((ROWS, WIDE), (WIDE, NARROW), (ROWS, NARROW))
DEEP = ((2, ROWS // 2, WIDE), (WIDE, NARROW), (2, ROWS // 2, NARROW))
ODD = ((ROWS + 64, WIDE), (WIDE, NARROW), (ROWS + 64, NARROW))
TAKEN: dict[str, tuple[Two, tuple[tuple[int, ...], ...]]] = {
    "GELU": (gelu_backward, FLAT),
    "GELU of three dims": (gelu_backward, DEEP),
    "parts of 64 rows": (gelu_backward, ODD),
    "ReLU": (relu_backward, FLAT),
    "two sums": (two_sums, FLAT),
    "of the product itself": (sum_of_the_product, FLAT),
}


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str) -> None:
    f, shapes = TAKEN[name]
    given = [rand(*shape) for shape in shapes]
    compiled = Folded(TILE)
    got = compiled(f)(*given)
    (step,) = compiled.steps
    rows = shapes[0][-2] * (shapes[0][0] if len(shapes[0]) == 3 else 1)
    part = rows_of_part(step.program)
    assert part == (64 if rows % 128 else 128)
    sums = [
        spec for _, spec in step.outputs if spec.dtype == torch.float32 and len(spec.shape) == 1
    ]
    assert {spec.shape for spec in sums} >= {(rows // part * NARROW,)}
    for ours, eager, exact in zip(got, f(*given), f(*(x.double() for x in given)), strict=True):
        assert relative_error(ours, exact) <= 3 * relative_error(eager, exact) + 1e-5


def across(x: Tensor, w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return (d := (x @ w) * h), d.sum(1)


def over_the_batch(x: Tensor, w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return (d := (x @ w) * h), d.sum(0)


def largest(x: Tensor, w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return (d := (x @ w) * h), d.amax(0)


@pytest.mark.parametrize(
    ("f", "shapes"),
    [
        (across, FLAT),
        (over_the_batch, ((64, 256, WIDE), (WIDE, NARROW), (64, 256, NARROW))),
        (largest, FLAT),
        (gelu_backward, ((ROWS + 8, WIDE), (WIDE, NARROW), (ROWS + 8, NARROW))),
        (gelu_backward, ((100, WIDE), (WIDE, NARROW), (100, NARROW))),
    ],
)
def test_declined(f: Two, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Sums of rows or of matrices, other reductions, rows that are no whole parts, and few."""
    given = [rand(*shape) for shape in shapes]
    compiled = Folded(TILE)
    for ours, eager in zip(compiled(f)(*given), f(*given), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-3)
    assert not any(rows_of_part(step.program) > 1 for step in compiled.steps)


def layers(x: Tensor, *weights: Tensor) -> Tensor:
    for w, b, v in zip(weights[::3], weights[1::3], weights[2::3], strict=True):
        x = x + F.linear(F.gelu(F.linear(x, w, b)), v)
    return x


@pytest.fixture(scope="module")
def backward() -> Plan:
    """Of two feed-forward layers, as it is planned."""
    planned = Planned()
    each = [(64, WIDE), (64,), (WIDE, 64)]
    given = [rand(*shape).requires_grad_() for shape in [(ROWS, WIDE), *each, *each]]
    planned(layers)(*given).sum().backward()
    return planned.plans[1]


def test_folds_that_run_together_take_the_new_parts(backward: Plan) -> None:
    chosen = {site.key: TILE for site in sites(backward) if site.parts}
    before = [s for s in backward.steps if isinstance(s, BatchStep) and s.parts]
    plan = folded(backward, chosen)
    after = [s for s in plan.steps if isinstance(s, BatchStep) and s.parts]
    resized = {name for site in sites(backward) for name in site.parts}
    assert len(resized) == 2
    assert before
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        assert old.members == new.members
        for (args, _), count in zip(new.members, new.parts, strict=True):
            if resized & set(args):
                assert count == ROWS // 128
    specs = {
        name: spec
        for step in plan.steps
        if isinstance(step, MatmulStep)
        for name, spec in step.outputs
    }
    assert all(specs[name].shape == (ROWS // 128 * 64,) for name in resized)


def test_less_is_held_at_once(backward: Plan) -> None:
    plan = folded(backward, {site.key: TILE for site in sites(backward)})
    nothing = Plan((), (), (), backward.device)
    before, after = (scheduled_peak(p, nothing, {}, {}) for p in (backward, plan))
    assert after <= before


def test_a_part_lies_in_one_tile(backward: Plan) -> None:
    (site, *_) = [site for site in sites(backward) if site.parts]
    tiles = candidates(*site.key, H200, most=100)
    assert tiles
    assert all(tile.m % rows_of_part(site.step.program) == 0 for tile in tiles)


def test_who_folds_otherwise_is_declined() -> None:
    def f(x: Tensor, w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        d = (x @ w) * h
        return d, d.sum(0) * torch.arange(float(NARROW))

    given = [rand(*shape) for shape in FLAT]
    planned = Planned()
    for ours, eager in zip(planned(f)(*given), f(*given), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-3)
    (found,) = survey(planned.plans[0])
    assert isinstance(found, Declined)
    assert found.reason == "what folds its sums is made for their parts"
