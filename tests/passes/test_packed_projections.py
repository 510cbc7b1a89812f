"""Gradients of query, key and value of three projections, of which the weights' are one product."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from iocompiler.compilation import Compilation
from iocompiler.convenience import explain
from iocompiler.cost_model.product_order import ProductOrders
from iocompiler.graph import view
from iocompiler.graph.match import graph_pass
from iocompiler.ops import target
from iocompiler.ops.wide_product import WIDE_PRODUCT
from iocompiler.passes.wide_products import wide_products
from iocompiler.pipeline import DEFAULT
from tests.accuracy import relative_error
from tests.passes.test_packed_gradients import (
    FULL,
    GROUPS,
    HEADS,
    WIDTH,
    accurate,
    attend,
    by_heads,
    copies,
    packings,
    trained,
)

aten = torch.ops.aten
NARROW = GROUPS * WIDTH


class Apart(nn.Module):
    """Attention of three projections of [B, S, 16], to these widths, those named with a bias."""

    def __init__(
        self, *widths: int, biases: str = "qkv", part: Callable[[Tensor], Tensor] = by_heads
    ) -> None:
        super().__init__()
        given = zip("qkv", widths or (FULL,) * 3, strict=True)
        self.query, self.key, self.value = (nn.Linear(16, w, x in biases) for x, w in given)
        self.part, self.dropout_p = part, 0.0

    def heads(self, x: Tensor) -> list[Tensor]:
        return [self.part(each(x)) for each in (self.query, self.key, self.value)]

    def forward(self, x: Tensor) -> Tensor:
        return attend(*self.heads(x), self.dropout_p)


class WiderValues(Apart):
    def __init__(self) -> None:
        super().__init__(FULL, FULL, 2 * FULL)

    def heads(self, x: Tensor) -> list[Tensor]:
        return [each(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for each in (self.query, self.key, self.value)]  # fmt: skip


class Flat(Apart):
    """Rows of all sentences in one dim, as matrices."""

    def heads(self, x: Tensor) -> list[Tensor]:
        batch, rows, _ = x.shape
        x = x.reshape(-1, 16)
        return [by_heads(each(x).view(batch, rows, -1)) for each in (self.query, self.key,
                                                                     self.value)]  # fmt: skip


class Behind(Apart):
    """Of what a layer makes, which is also added."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(16), nn.Linear(FULL, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        y: Tensor = x + self.out(super().forward(x))
        return y


class Adapted(Apart):
    """With a product of low rank beside the queries', of the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(16, 4, bias=False), nn.Linear(4, FULL, bias=False)

    def heads(self, x: Tensor) -> list[Tensor]:
        q, k, v = (each(x) for each in (self.query, self.key, self.value))
        return [by_heads(each) for each in (q + self.up(self.down(x)), k, v)]


class Shared(Apart):
    """One weight for queries and keys, whose gradients are added before any product."""

    def __init__(self) -> None:
        super().__init__()
        self.key = self.query


TAKEN: dict[str, tuple[nn.Module, str]] = {
    "plain": (Apart(), "bs|hd:qkv"),
    "no biases": (Apart(biases=""), "bs|hd:qkv"),
    "keys without a bias": (Apart(biases="qv"), "bs|hd:qkv"),
    "grouped heads": (Apart(FULL, NARROW, NARROW), "bs|hd:qkv"),
    "one head of keys": (Apart(FULL, WIDTH, WIDTH), "bs|hd:qkv"),
    "wider values": (WiderValues(), "bs|hd:qkv"),
    "as matrices": (Flat(), "bs|hd:qkv"),
    "behind a norm": (Behind(), "bs|hd:qkv"),
    "an adapter": (Adapted(), "bs|hd:qkv"),
}


def products(records: list[Compilation], rows: int) -> int:
    """The backward's products with a result of so many rows."""
    nodes = [n for each in records for n in view.calls(each.flat["backward"], aten.mm.default)]
    return sum(view.tensors(n)[0].shape[0] == rows for n in nodes)


def patterns(records: list[Compilation]) -> list[str]:
    return [
        each.variant for r in records for each in r.rewrites if each.pattern == "packed_gradients"
    ]


def reasons(records: list[Compilation]) -> list[str]:
    return [each.reason for r in records for each in r.misses if each.pattern == "packed_gradients"]


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str) -> None:
    module, packing = TAKEN[name]
    records = accurate(module)
    assert packings(records) == [packing]
    assert copies(records) == []
    parts = (module.query, module.key, module.value)
    widths = [part.out_features for part in parts]  # type: ignore[operator, union-attr]
    assert products(records, sum(widths)) == 1
    others = int(isinstance(module, Adapted))
    assert [products(records, width) for width in widths] == [others] * 3
    assert [text.partition(",")[0] for text in patterns(records)] == [
        "three weights' gradients in one"
    ]


@pytest.mark.parametrize("name", ["plain", "keys without a bias", "grouped heads", "behind a norm"])
def test_symbolic_sizes(name: str) -> None:
    records = accurate(TAKEN[name][0], dynamic=True)
    assert packings(records) == [TAKEN[name][1]]


def test_one_sentence() -> None:
    assert len(packings(accurate(Apart(), rows=(1, 7)))) == 1


def test_one_head_in_all() -> None:
    (packing,) = packings(accurate(Apart(WIDTH, WIDTH, WIDTH)))
    assert packing.endswith("d:qkv")


def test_an_input_without_a_gradient() -> None:
    run, records = trained(copy.deepcopy(TAKEN["plain"][0]))
    run(torch.randn(3, 7, 16)).sum().backward()
    assert packings(records) == ["bs|hd:qkv"]


def test_dropout() -> None:
    """The same bits as with three products."""
    module = Apart()
    module.dropout_p = 0.4
    found = []
    for pipeline in (DEFAULT, DEFAULT.without("packed_gradients")):
        module.zero_grad()
        run, records = trained(module, pipeline=pipeline)
        torch.manual_seed(3)
        x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(5), requires_grad=True)
        run(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in module.parameters())])
        assert packings(records) == ["bs|hd:qkv" if pipeline is DEFAULT else ""]
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def weights(module: Apart) -> list[Tensor]:
    return [each.weight for each in (module.query, module.key, module.value)]


class Mixed(Apart):
    """Weights in float32, multiplied in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


@graph_pass(stage="flat")
def wide_products_as_on_a_gpu(gm: GraphModule) -> int:
    with target.planned_for((9, 0)):
        return wide_products(gm)


def test_autocast() -> None:
    """The one product is stored in float32, nearer to float64 than eager's."""
    module, x = Mixed(), torch.randn(3, 8, 16)
    pipeline = DEFAULT.before("updates", wide_products_as_on_a_gpu).without("wide_products")
    run, records = trained(module, pipeline=pipeline)
    run(x).square().sum().backward()
    assert packings(records) == ["bs|hd:qkv"]
    (wide,) = [n for r in records for n in view.calls(r.flat["backward"], WIDE_PRODUCT)]
    assert view.tensors(wide)[0].shape == (3 * FULL, 16)
    found = [w.grad.clone() for w in weights(module)]  # type: ignore[union-attr]
    module.zero_grad()
    module(x).square().sum().backward()
    exact = copy.deepcopy(module).double()
    exact.zero_grad()
    attend(*exact.heads(x.double())).square().sum().backward()
    for got, eager, wanted in zip(found, weights(module), weights(exact), strict=True):
        assert got.dtype == torch.float32
        allowed = 1.5 * relative_error(eager.grad, wanted.grad)  # type: ignore[arg-type]
        assert relative_error(got, wanted.grad) <= allowed + 1e-5  # type: ignore[arg-type]


# --- what stays as it is


class Crossed(Apart):
    """Keys and values of another input than queries."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.cos()
        return attend(by_heads(self.query(x)), by_heads(self.key(y)), by_heads(self.value(y)))


class Twice(Apart):
    """Queries with a bias for each head, whose gradient is summed of [B, H, S, E]."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(HEADS, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return attend(q + self.bias, k, v)


class Frozen(Apart):
    """No gradient of the keys' weight is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.key.weight.requires_grad_(False)


class Tied(Apart):
    """The same weights in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(FULL, 16)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.out(super().forward(x)))


class Turned(Apart):
    """Queries and keys are turned by a pointwise function on the way."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return attend(q * q.cos(), k.sin(), v)


class ByColumns(nn.Module):
    """Weights [in, out], whose gradients would be slices of columns."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.randn(16, FULL) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return attend(*(by_heads(x @ part) for part in self.parts))


class OtherRows(Apart):
    """The rows of a matrix are batch and row to queries, row and batch to keys."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x.flatten(0, 1)) for each in (self.query, self.key, self.value))
        q, v = (y.view(*x.shape[:2], HEADS, WIDTH).transpose(1, 2) for y in (q, v))
        k = k.view(x.shape[1], x.shape[0], HEADS, WIDTH).permute(1, 2, 0, 3)
        return attend(q, k, v)


def in_heads_last(x: Tensor) -> Tensor:
    return x.unflatten(-1, (WIDTH, -1)).permute(0, 3, 1, 2)


DECLINED: dict[str, tuple[nn.Module, str]] = {
    "another input": (Crossed(), "query, key and value are projected from different inputs"),
    "read by more": (Twice(), "a gradient is read by more than products and sums down its columns"),
    "other rows": (OtherRows(), "their rows lie in different orders"),
    "odd rows": (Apart(9, 9, 9, part=lambda x: x.unflatten(-1, (3, 3)).transpose(1, 2)),
                 "rows of [9, 9, 9] elements do not begin at whole vectors"),
    "weights of two layers": (
        Tied(), "a weight's gradient is added to another's, which the library does by itself",
    ),
    "a frozen weight": (Frozen(), ""),
    "a weight of two": (Shared(), ""),
    "computed with on the way": (Turned(), ""),
    "weights by columns": (ByColumns(), ""),
    "heads inside": (Apart(part=in_heads_last), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_declined(name: str) -> None:
    module, reason = DECLINED[name]
    records = accurate(module)
    assert set(packings(records)) == {""}
    assert set(reasons(records)) == ({reason} if reason else set())


def test_three_that_are_cheaper_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = lambda orders, _: 1e-6 * orders.shapes[0][0] ** 2
    monkeypatch.setattr(ProductOrders, "seconds", seconds)
    records = accurate(Apart())
    assert packings(records) == [""]
    reason = "the weights' gradients take 3.07e+03 us apart, in one 9.22e+03 us"
    assert reasons(records) == [reason]


# --- as planned for a GPU


class Layer(nn.Module):
    def __init__(self, dropout_p: float) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(3))
        self.norm, self.dropout_p = nn.LayerNorm(1024), dropout_p

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v = (p(x).unflatten(-1, (16, 64)).transpose(1, 2) for p in self.parts)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout_p)
        return x + y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("device", ["h100", "h200"])
def test_fewer_bytes_and_launches(device: str) -> None:
    """Of BERT-large's: the input is read once in place of three times, and nothing is copied."""
    x = torch.empty(8, 512, 1024, dtype=torch.bfloat16)
    found = [
        explain(Layer(0.1).bfloat16(), x, device=device, training=True, compile_kernels=False,
                pipeline=pipeline)
        for pipeline in (DEFAULT, DEFAULT.without("packed_gradients"))
    ]  # fmt: skip
    ours, apart = found
    assert apart.bytes_moved - ours.bytes_moved == pytest.approx(
        2 * x.numel() * x.itemsize, rel=1e-2
    )
    assert len(apart.kernels) - len(ours.kernels) == 2
    assert ours.time_us < apart.time_us
    assert not any(word in k.name for k in ours.kernels for word in ("clone", "copy", "cat"))
    assert any("packed_summed" in k.name for k in ours.kernels)
    assert [each.pattern for each in ours.rewrites].count("packed_gradients") == 1


def test_a_library_allocates_its_own() -> None:
    x = torch.empty(8, 512, 1024, dtype=torch.bfloat16)
    report = explain(Layer(0.0).bfloat16(), x, device="h100", training=True, compile_kernels=False)
    assert any("iocompiler.attention_backward" in k.name for k in report.kernels)
    assert not any(each.pattern == "packed_gradients" for each in report.rewrites)
