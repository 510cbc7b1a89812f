"""Gathers at places the graph itself makes: what is a slice, what stays, gradients, any size."""

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
from iocompiler.graph.capture import capture
from iocompiler.graph.findings import Miss, Rewrite, findings
from iocompiler.graph.normalise import normalise
from iocompiler.passes.known_indices import known_indices
from iocompiler.plan.contents import all_steps
from iocompiler.plan.data import AtenStep
from tests.accuracy import compare_with_eager
from tests.compiling import compiler

Captured = Callable[..., GraphModule]
Spelling = Callable[[Tensor, Tensor], Tensor]
aten = torch.ops.aten
GATHERS = {aten.embedding.default, aten.index_select.default, aten.index.Tensor}


def ids() -> Tensor:
    return torch.randint(16, (3, 5))


def table() -> Tensor:
    return torch.randn(16, 4)


def places(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device)


# what is read -> the rows
TAKEN: dict[str, tuple[Spelling, str]] = {
    "positions": (lambda x, w: F.embedding(places(x)[None], w), "rows 0:5, repeated"),
    "after what is cached": (lambda x, w: F.embedding(places(x) + 3, w), "rows 3:8"),
    "one token type": (lambda x, w: F.embedding(torch.zeros_like(x), w), "row 0, repeated"),
    "a given one": (
        lambda x, w: F.embedding(torch.full((2, 3), 7, device=x.device), w),
        "row 7, repeated",
    ),
    "every second, backwards": (
        lambda x, w: F.embedding((places(x) * 2).flip(0), w),
        "rows 0:9:2",
    ),
    "downwards": (lambda x, w: F.embedding(torch.arange(9, 2, -3), w), "rows 3:10:3"),
    "from the last": (lambda x, w: F.embedding(15 - places(x), w), "rows 11:16"),
    "a range of its own": (lambda x, w: F.embedding(torch.arange(2, 15, 4), w), "rows 2:15:4"),
    "a part of a range": (
        lambda x, w: F.embedding(torch.arange(16)[None, -6:-2].expand(3, -1), w),
        "rows 10:14, repeated",
    ),
    "counted": (
        lambda x, w: F.embedding(torch.ones_like(x).cumsum(1) - 1 + 2, w),
        "rows 2:7, repeated",
    ),
    "a grid": (
        lambda x, w: F.embedding(torch.arange(3)[:, None] * 5 + places(x), w),
        "rows 0:15",
    ),
    "a grid, columns first": (
        lambda x, w: F.embedding(torch.arange(12).view(4, 3).t().reshape(3, 2, 2), w),
        "rows 0:12",
    ),
    "a list": (lambda x, w: F.embedding(torch.tensor([4, 5, 6]), w), "rows 4:7"),
    "all of it": (lambda x, w: F.embedding(torch.arange(16), w), "rows 0:16"),
    "short integers": (
        lambda x, w: F.embedding(torch.arange(5, dtype=torch.int32), w),
        "rows 0:5",
    ),
    "no dims": (lambda x, w: F.embedding(torch.full((), 3), w), "row 3"),
    "nothing is trained there": (
        lambda x, w: F.embedding(places(x) + 1, w, padding_idx=0),
        "rows 1:6",
    ),
    "between the rows": (
        lambda x, w: F.embedding(places(x) * 2, w, padding_idx=3),
        "rows 0:9:2",
    ),
    "columns": (lambda x, w: w.index_select(1, torch.arange(1, 4)), "rows 1:4"),
    "one column": (lambda x, w: w.index_select(-1, torch.full((1,), 2)), "row 2, repeated"),
    "brackets": (lambda x, w: w[places(x) + 1], "rows 1:6"),
    "brackets in the middle": (
        lambda x, w: w.view(2, 8, 4)[:, torch.arange(6).view(3, 2)],
        "rows 0:6",
    ),
    "from the end": (lambda x, w: w[torch.arange(-4, 0)], "rows 12:16"),
}

OUTSIDE = "may lie outside the table, which has"
DECLINED: dict[str, tuple[Spelling, str]] = {
    "beyond the end": (
        lambda x, w: F.embedding(places(x) + 12, w),
        f"rows 12:17 {OUTSIDE} 16",
    ),
    "before the start": (
        lambda x, w: F.embedding(places(x) - 1, w),
        f"rows -1:4 {OUTSIDE} 16",
    ),
    "across the end": (
        lambda x, w: w[torch.arange(-2, 2)],
        f"rows -2:2 {OUTSIDE} 16",
    ),
    "the padding": (
        lambda x, w: F.embedding(places(x), w, padding_idx=2),
        "row 2, which has no gradient, is among rows 0:5",
    ),
    "by frequency": (
        lambda x, w: F.embedding(places(x), w, scale_grad_by_freq=True),
        "the gradient is scaled by how often a row is read",
    ),
    "sparse": (lambda x, w: F.embedding(places(x), w, sparse=True), "the gradient is sparse"),
    "steps that overlap": (
        lambda x, w: F.embedding(places(x)[:, None] + places(x), w),
        "steps of 1 and 1 rows do not lead over each other's",
    ),
    "words": (lambda x, w: F.embedding(x, w), ""),
    "words at known places": (lambda x, w: F.embedding(x[:, torch.arange(3)], w), "one of two"),
    "relative": (
        lambda x, w: F.embedding((places(x)[:, None] - places(x)).abs(), w),
        "",
    ),
    "squares": (lambda x, w: F.embedding(places(x) * places(x) % 16, w), ""),
    "a range in floats": (lambda x, w: F.embedding(torch.arange(0.0, 4.0).long(), w), ""),
    "wrapped bytes": (
        lambda x, w: F.embedding((torch.arange(250, 260).to(torch.uint8) % 16).long(), w),
        "",
    ),
    "tiled": (lambda x, w: F.embedding(places(x).repeat(2), w), ""),
    "a list of any": (lambda x, w: F.embedding(torch.tensor([4, 5, 7]), w), ""),
    "a mask": (lambda x, w: w[:5][torch.ones(5, dtype=torch.bool)], ""),
    "a diagonal": (lambda x, w: w[torch.arange(4), torch.arange(4)], ""),
    "nothing": (lambda x, w: F.embedding(torch.arange(0), w), ""),
    "written": (lambda x, w: F.embedding(places(x).index_fill_(0, x[0, :1] % 5, 3), w), ""),
}


@pytest.mark.parametrize("name", TAKEN)
def test_taken(captured: Captured, name: str) -> None:
    f, rows = TAKEN[name]
    x, w = ids(), table()
    gm = captured(f, x, w)
    normalise(gm)
    expected = f(x, w)
    assert known_indices(gm) == 1
    gm.graph.lint()
    gm.recompile()
    assert [each.variant for each in findings(gm) if isinstance(each, Rewrite)] == [rows]
    assert not GATHERS & {node.target for node in gm.graph.nodes}
    given = {"l_x_": x, "l_w_": w}
    (got,) = gm(*(given[node.name] for node in gm.graph.find_nodes(op="placeholder")))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert got.stride() == expected.stride()
    assert got.untyped_storage().data_ptr() != w.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", DECLINED)
def test_declined(captured: Captured, name: str) -> None:
    f, reason = DECLINED[name]
    gm = _graph_of(f)
    before = [node.target for node in gm.graph.nodes if node.target in GATHERS]
    taken = 1 if reason == "one of two" else 0
    assert known_indices(gm) == taken
    missed = [each.reason for each in findings(gm) if isinstance(each, Miss)]
    assert missed == ([reason] if reason and not taken else [])
    after = [node.target for node in gm.graph.nodes if node.target in GATHERS]
    assert len(after) == len(before) - taken


def _graph_of(f: Spelling) -> GraphModule:
    """The graph of what eager would not run: nothing is executed."""
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(capture(gm, inputs))
        normalise(graphs[0])
        return lambda *args: [torch.zeros(0)]

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.compile(f, backend=backend)(ids(), table())
    return graphs[0]


class Buffers(nn.Module):
    """Positions and token types as BERT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(16, 4)
        self.types = nn.Embedding(2, 4)
        self.register_buffer("places", torch.arange(16)[None], persistent=False)
        self.register_buffer("zeros", torch.zeros(1, 16, dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        at = self.places[:, : x.shape[1]]  # type: ignore[index]
        kind = self.zeros.expand(x.shape[0], -1).gather(1, at.expand(x.shape[0], -1))  # type: ignore[operator]
        y: Tensor = self.positions(at) + self.types(kind)
        return y


def test_what_a_buffer_holds_is_not_known(captured: Captured) -> None:
    gm = captured(Buffers(), ids())
    assert known_indices(gm) == 0
    reasons = [each.reason for each in findings(gm) if isinstance(each, Miss)]
    assert len(reasons) == 2
    assert all(reason.endswith("its values are not known when compiling") for reason in reasons)
    assert "l_self_buffers_places_:" in reasons[0]
    assert "l_self_buffers_places_, l_self_buffers_zeros_:" in reasons[1]


class Embedded(nn.Module):
    """A sequence with learned positions (a part of the table), one type, and a grid of columns."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(64, 6)
        self.types = nn.Embedding(3, 6)
        self.grid = nn.Embedding(16, 6)
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(2, x.shape[1] + 2, device=x.device).unsqueeze(0)
        kind = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
        rows, columns = torch.arange(3, device=x.device), torch.arange(4, device=x.device)
        y = x + self.positions(at) + self.types(kind)
        grid = self.grid(rows[:, None] * 4 + columns).tanh().mean((0, 1))
        return torch.relu(y * self.scale) + grid


@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.bfloat16, False), (torch.float32, True)])
def test_gradients(dtype: torch.dtype, dynamic: bool) -> None:
    records: list[Compilation] = []
    compiled = compiler(records, dynamic=dynamic)
    given = {"x": torch.randn(3, 7, 6, requires_grad=True)}
    for each in compare_with_eager(
        Embedded, given, compiled, dtype=dtype, device="cpu", train=True
    ):
        assert each.ok, each
    found = [each for each in records[0].rewrites if each.pattern == "known_indices"]
    assert len(found) == 3
    steps = [s for plan in records[0].plans.values() for s in all_steps(plan)]
    assert not [s for s in steps if isinstance(s, AtenStep)]  # nothing but kernels


def test_every_length_the_table_has_is_one_graph() -> None:
    """The range is guarded on: what lies outside is compiled again, and raises as eager does."""
    records: list[Compilation] = []
    module = nn.Embedding(12, 4)

    def f(x: Tensor) -> Tensor:
        y: Tensor = module(torch.arange(x.shape[0])) * x[:, None]
        return y

    compiled = torch.compile(
        f, backend=Compiler(engine="reference", on_compiled=records.append), dynamic=True
    )
    for length in (5, 9, 12):
        x = torch.randn(length)
        torch.testing.assert_close(compiled(x), f(x))
    assert len(records) == 1
    with pytest.raises(IndexError):
        compiled(torch.randn(13))
    assert [each.reason for each in records[1].misses] == [f"rows 0:s77 {OUTSIDE} 12"]


def test_a_table_that_is_renormed_is_read_after_that() -> None:
    def module() -> nn.Module:
        torch.manual_seed(1)
        return nn.Embedding(12, 4, max_norm=0.5)

    ours, theirs = module(), module()

    def f(m: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: m(torch.arange(2, 7)) * x[:, None]

    x = torch.randn(5)
    ours_run = torch.compile(f(ours), backend=Compiler(engine="reference", strict=True))
    torch.testing.assert_close(ours_run(x), f(theirs)(x))
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_what_is_returned_is_no_view_of_the_table() -> None:
    w = torch.randn(12, 4)
    compiled = torch.compile(
        lambda w: F.embedding(torch.arange(12), w), backend=Compiler(engine="reference")
    )
    y = compiled(w)
    y.zero_()
    assert bool(w.abs().sum() > 0)
