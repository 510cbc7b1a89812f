"""Products in half precision whose only reader is a cast that leaves the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import iocompiler as ioc
from iocompiler.graph import view
from iocompiler.ops import target
from iocompiler.ops.wide_product import WIDE_PRODUCT
from iocompiler.passes.wide_products import wide_products
from tests.accuracy import relative_error
from tests.compiling import compiled

aten = torch.ops.aten
BF16, FP16 = torch.bfloat16, torch.float16
Function = Callable[..., Any]


def flat(f: Function, *given: Tensor, on_gpu: bool = True, mode: str = "fake") -> GraphModule:
    """The graph of a function after the pass, as for a GPU."""
    gm: GraphModule = make_fx(f, tracing_mode=mode)(*given)
    with target.planned_for((9, 0) if on_gpu else None):
        wide_products(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def count(gm: GraphModule) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=WIDE_PRODUCT))


def draw(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def returned(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b).float()


def turned(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b).t().float()


def seen_otherwise(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b).view(2, -1, 8).permute(1, 0, 2).float()


def of_batches(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b).transpose(1, 2).float()


def two(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.mm(a, b).float(), torch.mm(a.neg(), b).float()


def by_name(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.prims.convert_element_type(torch.mm(a, b), torch.float32)


def in_parts(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of two weights, by one product."""
    product = torch.mm(a, b)
    return product[:8].float(), product[8:].t().float()


TAKEN: dict[str, tuple[Function, list[Tensor], int]] = {
    "returned": (returned, [draw(16, 24), draw(24, 32)], 1),
    "float16": (returned, [draw(16, 24, dtype=FP16), draw(24, 32, dtype=FP16)], 1),
    "turned": (turned, [draw(16, 24), draw(24, 32)], 1),
    "seen otherwise": (seen_otherwise, [draw(16, 24), draw(24, 32)], 1),
    "operands by columns": (returned, [draw(24, 16).t(), draw(32, 24).t()], 1),
    "batches": (of_batches, [draw(3, 16, 24), draw(3, 24, 32)], 1),
    "in parts": (in_parts, [draw(16, 24), draw(24, 32)], 1),
    "two": (two, [draw(16, 24), draw(24, 32)], 2),
    "by its name": (by_name, [draw(16, 24), draw(24, 32)], 1),
}


def _all(found: Any) -> list[Tensor]:
    return [x for x in tree_leaves(found) if isinstance(x, Tensor)]


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str) -> None:
    f, given, expected = TAKEN[name]
    gm = flat(f, *given)
    assert count(gm) == expected
    assert all(n.target not in (aten.mm.default, aten.bmm.default) for n in view.calls(gm))
    results = zip(*(_all(g(*given)) for g in (gm, f)), strict=True)
    wanted = _all(f(*(x.double() for x in given)))
    for (got, eager), exact in zip(results, wanted, strict=True):
        assert (got.dtype, got.shape, got.stride()) == (eager.dtype, eager.shape, eager.stride())
        assert relative_error(got, exact) < 1e-6  # eager rounds to 2e-3


def test_sizes_that_are_symbols() -> None:
    given = draw(24, 16).t(), draw(24, 32)
    gm = flat(returned, *given, mode="symbolic")
    assert count(gm) == 1
    more = draw(40, 16).t(), draw(40, 32)
    torch.testing.assert_close(gm(*more), more[0].float() @ more[1].float())


def to_double(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b).double()


def read_short_too(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    product = torch.mm(a, b)
    return product.float(), product.sin()


def read_through_a_view_too(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    product = torch.mm(a, b)
    return product.t().float(), product.sin()


def by_a_kernel(a: Tensor, b: Tensor) -> Tensor:
    """It would read four bytes in place of two."""
    return torch.mm(a, b).float().exp()


def by_a_kernel_too(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.mm(a, b).float()
    return wide, wide.sum()


def with_a_bias(a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(b[0], a, b).float()


def in_other_memory(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b).t().to(torch.float32, memory_format=torch.contiguous_format)


def spread(a: Tensor, b: Tensor) -> Tensor:
    """The cast has a place for each element."""
    return torch.mm(a, b)[:, None].expand(16, 3, 32).float()


def computed_before(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b).neg().float()


def a_part_by_a_kernel(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    product = torch.mm(a, b)
    return product[:8].float(), product[8:].exp().float()


def a_part_as_it_is(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    product = torch.mm(a, b)
    return product[:8].float(), product[8:]


def parts_of_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Casts pack the columns that they read."""
    product = torch.mm(a, b)
    return product[:, :8].float(), product[:, 8:].float()


DECLINED: dict[str, tuple[Function, list[Tensor]]] = {
    f.__name__: (f, [draw(16, 24), draw(24, 32)])
    for f in (
        to_double, read_short_too, read_through_a_view_too, by_a_kernel, by_a_kernel_too,
        a_part_by_a_kernel, a_part_as_it_is, parts_of_rows, with_a_bias, in_other_memory, spread,
        computed_before,
    )
} | {
    "odd rows": (returned, [draw(17, 24), draw(24, 32)]),
    "odd depth": (returned, [draw(16, 25), draw(25, 32)]),
    "odd columns": (returned, [draw(16, 24), draw(24, 30)]),
    "no rows": (returned, [draw(0, 24), draw(24, 32)]),
    "float32": (returned, [draw(16, 24, dtype=torch.float32), draw(24, 32, dtype=torch.float32)]),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_declined(name: str) -> None:
    f, given = DECLINED[name]
    gm = flat(f, *given)
    assert count(gm) == 0
    for got, eager in zip(_all(gm(*given)), _all(f(*given)), strict=True):
        assert got.stride() == eager.stride()
        torch.testing.assert_close(got, eager, rtol=0, atol=0)


def test_another_device_declined() -> None:
    assert count(flat(returned, draw(16, 24), draw(24, 32), on_gpu=False)) == 0


class Mixed(nn.Module):
    """Weights in float32, multiplied in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            return self.down(F.gelu(self.up(x))).float().square().mean()


def test_gradients_of_float32_weights_are_stored_as_they_are() -> None:
    report = ioc.explain(
        Mixed(), torch.randn(32, 64), device="h100", training=True, compile_kernels=False
    )
    names = [kernel.name for kernel in report.kernels]
    assert names.count("iocompiler.wide_product.default") == 2
    casts = [k for k in report.kernels if k.graph == "backward" and "convert" in k.name]
    assert not [k for k in casts if "f32[64, 128]" in k.layout or "f32[128, 64]" in k.layout]
    assert not report.fallbacks
    (_, other) = [k for k in report.kernels if k.name == "iocompiler.wide_product.default"]
    assert other.layout == "f32[128, 64]"
    assert other.bytes == 2 * (32 * 128 + 32 * 64) + 4 * 128 * 64


def test_gradients() -> None:
    """Of weights: nearer to float64's than eager's, which are rounded to bfloat16."""
    model, x = Mixed(), draw(32, 64, dtype=torch.float32)
    run, records = compiled(model, engine="reference")
    with target.planned_for((9, 0)):
        run(x).backward()
    taken = list(view.calls(records[0].flat["backward"], WIDE_PRODUCT))
    assert len(taken) == 2
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(x).backward()
    eager = [p.grad for p in model.parameters() if p.grad is not None]
    exact = torch.autograd.grad(_plain(model.double(), x.double()), list(model.parameters()))
    for got, theirs, wanted in zip(found, eager, exact, strict=True):
        assert relative_error(got, wanted) <= 1.5 * relative_error(theirs, wanted) + 1e-5


def _plain(model: Mixed, x: Tensor) -> Tensor:
    return model.down(F.gelu(model.up(x))).square().mean()
