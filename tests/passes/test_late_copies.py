"""Copies that are made where a reader needs them: what is taken, what is declined, the results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.convenience import explain
from iocompiler.graph import view
from iocompiler.graph.findings import Rewrite, findings
from iocompiler.graph.normalise import normalise
from iocompiler.ops import target
from iocompiler.passes.attention import attention
from iocompiler.passes.late_copies import late_copies
from iocompiler.pipeline import DEFAULT, Pipeline
from tests.accuracy import assert_as_accurate_as_eager

Captured = Callable[..., GraphModule]
aten = torch.ops.aten
COPIES = (aten.contiguous.default, aten.clone.default)
B, S, D = 3, 6, 16


def rewritten(gm: GraphModule, *more: Any) -> int:
    """How many layers read their rows where they lie."""
    with target.planned_for((9, 0)):
        Pipeline(normalise, late_copies, *more).run(gm)
    found = (each for each in findings(gm) if isinstance(each, Rewrite))
    return sum(each.pattern == "late_copies" for each in found)


def rows(*shape: int) -> Tensor:
    return torch.randn(shape or (B, S, D))


def products(gm: GraphModule) -> list[Any]:
    """Whether linear layers and products with a matrix are given dense rows."""
    nodes = view.calls(gm, aten.linear.default, aten.matmul.default)
    return [view.is_contiguous(view.value(n.args[0])) for n in nodes]


TAKEN: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "pointwise": (
        lambda x, w, b: F.linear(x.transpose(0, 1), w, b).cos(),
        (rows(), rows(40, D), rows(40)),
    ),
    "no bias": (lambda x, w: F.linear(x.transpose(0, 1), w).cos(), (rows(), rows(8, D))),
    "a matrix": (lambda x, w: (x.transpose(0, 1) @ w).cos(), (rows(), rows(D, 40))),
    "a copy of the user's": (
        lambda x, w: F.linear(x.transpose(0, 1).contiguous(), w).cos(), (rows(), rows(40, D)),
    ),
    "heads": (
        lambda x, w: F.layer_norm(F.linear(x.transpose(1, 2), w), (D,)),
        (rows(2, 4, 5, D), rows(D, D)),
    ),
    "three turns": (
        lambda x, w: F.linear(x.permute(2, 0, 1, 3), w).softmax(-1),
        (rows(2, 3, 4, D), rows(9, D)),
    ),
    "through views": (
        lambda x, w: F.linear(x.transpose(0, 1), w).unflatten(-1, (2, 20)).select(2, 1).sin(),
        (rows(), rows(40, D)),
    ),
    "to a product that is no wider": (
        lambda x, w, y: F.linear(x.transpose(0, 1), w) @ y,
        (rows(), rows(D, D), rows(S, D, 5)),
    ),
    "a copy of what is behind": (
        lambda x, w: F.linear(x.transpose(0, 1), w).transpose(0, 2).contiguous(),
        (rows(), rows(40, D)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_rows_in_another_order(captured: Captured, name: str) -> None:
    f, given = TAKEN[name]
    gm = captured(f, *given)
    assert rewritten(gm) == 1
    assert products(gm)[0]
    (got,), expected = gm(*given), f(*given)
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got, expected)


def wide_product(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.linear(x.transpose(0, 1), w) @ y


def shared_copy(x: Tensor, w: Tensor) -> Tensor:
    y = x.transpose(0, 1).contiguous()
    return F.linear(y, w).cos() + y.sum()


def windows(x: Tensor, w: Tensor) -> Tensor:
    """Attention in windows of an image, as Swin's: query, key and value read the same copy."""
    parts = x.view(2, 2, 4, 2, 4, D).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 16, D)
    q, k, v = (
        F.linear(parts, each).view(-1, 16, 2, 8).transpose(1, 2) for each in (w, w + 1, w - 1)
    )
    return (q @ k.mT).softmax(-1) @ v


def written(x: Tensor, w: Tensor) -> Tensor:
    y = x.transpose(0, 1).contiguous()
    x.mul_(2.0)
    return F.linear(y, w).cos()


DECLINED: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "a result": (lambda x, w: F.linear(x.transpose(0, 1), w), (rows(), rows(8, D))),
    "a view that is a result": (
        lambda x, w: F.linear(x.transpose(0, 1), w).unflatten(-1, (2, 4)),
        (rows(), rows(8, D)),
    ),
    "to a wide product": (wide_product, (rows(), rows(40, D), rows(S, 40, 5))),
    "a copy that others read": (shared_copy, (rows(), rows(8, D))),
    "a copy that others read, for products": (windows, (rows(2, 8, 8, D), rows(D, D))),
    "written in place": (written, (rows(), rows(8, D))),
    "columns": (lambda x, w: F.linear(x.transpose(1, 2), w).cos(), (rows(), rows(8, S))),
    "dense as it is": (lambda x, w: F.linear(x, w).cos(), (rows(), rows(8, D))),
    "dense by turning": (
        lambda x, w: F.linear(x.transpose(0, 1), w).cos(),
        (rows().transpose(0, 1), rows(8, D)),
    ),
    "one row": (lambda x, w: F.linear(x.transpose(0, 1), w).cos(), (rows(1, S, D), rows(8, D))),
    "a part of the rows": (
        lambda x, w: F.linear(x[:, :3].transpose(0, 1), w).cos(), (rows(), rows(8, D)),
    ),
    "nothing": (lambda x, w: F.linear(x.transpose(0, 1), w).cos(), (rows(0, S, D), rows(8, D))),
    "matrices": (lambda x, w: (x.transpose(0, 1) @ w).cos(), (rows(), rows(S, D, 8))),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_declined(captured: Captured, name: str) -> None:
    f, given = DECLINED[name]
    gm = captured(f, *given)
    assert rewritten(gm) == 0
    ours, theirs = ([x.clone() for x in given] for _ in range(2))
    torch.testing.assert_close(gm(*ours)[0], f(*theirs))


def test_on_a_cpu_nothing_changes(captured: Captured) -> None:
    gm = captured(*TAKEN["pointwise"][:1], *TAKEN["pointwise"][1])
    assert late_copies(gm) == 0


def pieces(x: Tensor) -> Tensor:
    q, k, v = x.unflatten(-1, (3, D)).permute(2, 0, 1, 3).contiguous()
    return (q * 2) @ k.mT @ v


def whole(x: Tensor) -> Tensor:
    y = x.unflatten(-1, (3, D)).permute(2, 0, 1, 3).contiguous()
    return y.select(0, 0).cos() + y.sum()


def copy_of_a_copy(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().unflatten(-1, (3, D)).permute(2, 1, 0, 3).contiguous()


@pytest.mark.parametrize(
    ("f", "before", "after"), [(pieces, 1, 1), (whole, 1, 1), (copy_of_a_copy, 2, 1)]
)
def test_copies_read_through_views(captured: Captured, f: Any, before: int, after: int) -> None:
    """Pieces are copied each where they are read, but for products; of copies of copies the last
    one is made.
    """
    x = rows(B, S, 3 * D)
    gm = captured(f, x)
    assert len(list(view.calls(gm, *COPIES))) == before
    rewritten(gm)
    assert len(list(view.calls(gm, *COPIES))) == after
    got, expected = gm(x)[0], f(x)
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got, expected)


class Attends(nn.Module):
    """Over what it is given, or from there over something else."""

    def __init__(self, crossed: bool = False, **options: Any) -> None:
        super().__init__()
        self.crossed, self.weights = crossed, bool(options.pop("weights", False))
        self.attention = nn.MultiheadAttention(D, 2, **{"batch_first": True, **options})

    def forward(self, x: Tensor) -> Tensor:
        other = x[:, :4].cos() if self.crossed else x
        out, weights = self.attention(x, other, other, need_weights=self.weights)
        return out if weights is None else out + weights.sum()  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(D, 2, 32, 0.0, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


LAYERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "encoder layer": (lambda: Layer(batch_first=True), 2),
    "rows first": (Layer, 0),
    "with weights": (lambda: Attends(weights=True), 1),
    "crossed": (lambda: Attends(crossed=True), 3),
    "no bias": (lambda: Attends(bias=False), 2),
}


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        *(("encoder layer", None), ("with weights", None), ("crossed", None)),
        *(pytest.param(name, None, marks=pytest.mark.slow) for name in ("rows first", "no bias")),
        *(
            pytest.param(name, True, marks=pytest.mark.slow)
            for name in ("encoder layer", "crossed")
        ),
    ],
)
def test_layers_of_torch(name: str, dynamic: bool | None) -> None:
    make, sites = LAYERS[name]
    records: list[Compilation] = []
    given = {"x": torch.randn(B, S, D, requires_grad=True)}

    def compiled(module: nn.Module) -> Any:
        # attention would run its kernels
        pipeline = DEFAULT.without("attention")
        backend = Compiler(pipeline, engine="reference", strict=True, on_compiled=records.append)
        return torch.compile(module, backend=backend, dynamic=dynamic)

    def seeded() -> nn.Module:
        torch.manual_seed(0)
        return make()

    with target.planned_for((9, 0)):
        assert_as_accurate_as_eager(
            seeded, given, compiled, dtype=torch.float32, device="cpu", train=True
        )
        module = seeded()
        assert compiled(module)(given["x"]).stride() == module(given["x"]).stride()
    found = [each for each in records[0].rewrites if each.pattern == "late_copies"]
    assert len(found) == sites


def where_attention_reads(gm: GraphModule) -> list[bool]:
    """Whether query, key and value are what a linear layer has written, as it lies."""
    (call,) = view.calls(gm, torch.ops.iocompiler.attention_forward.default)
    written = {view.value(n).untyped_storage()._cdata for n in view.calls(gm, aten.linear.default)}
    return [view.value(o).untyped_storage()._cdata in written for o in call.args[:3]]  # type: ignore[arg-type]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["encoder layer", "crossed", "rows first"])
def test_attention_reads_what_was_copied(captured: Captured, name: str, dynamic: bool) -> None:
    gm = captured(LAYERS[name][0](), rows(), dynamic=dynamic)
    rewritten(gm, attention)
    assert where_attention_reads(gm) == [True] * 3


@pytest.mark.parametrize("dynamic", [False, True])
def test_rows_that_are_not_aligned_are_copied(captured: Captured, dynamic: bool) -> None:
    """Heads of three elements each."""
    module = nn.TransformerEncoderLayer(12, 4, 8, 0.0, batch_first=True)
    gm = captured(module, rows(B, S, 12), dynamic=dynamic)
    rewritten(gm, attention)
    assert where_attention_reads(gm) == [False] * 3


def test_no_copies_are_left_of_an_encoder_layer() -> None:
    module = nn.TransformerEncoderLayer(256, 4, 512, batch_first=True).bfloat16()
    x = torch.empty(8, 64, 256, dtype=torch.bfloat16)
    report = explain(module, x, device="h100", training=True, compile_kernels=False)
    assert sum(each.kept for each in report.copies) == 0
    assert not [k.name for k in report.kernels if "clone" in k.name]
