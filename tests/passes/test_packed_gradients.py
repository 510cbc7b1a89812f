"""Gradients of query, key and value that are written where their projection's gradient lies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.convenience import explain
from iocompiler.ops.packed_gradients import PACKED
from iocompiler.ops.scored_attention import BACKWARD, FORWARD
from iocompiler.ops.summed_gradients import PACKED_SUMMED, SUMMED
from iocompiler.pipeline import DEFAULT
from tests.accuracy import assert_as_accurate_as_eager
from tests.ops.score_programs import CASES

HEADS, GROUPS, WIDTH = 4, 2, 8
FULL = HEADS * WIDTH
Heads = tuple[Tensor, Tensor, Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    """A program, with a library for no part of it; [B, S, H * E]."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v)) if groups > 1 else (k, v)
    scores = (torch.tanh(q @ k.mT / 30.0) * 30.0).softmax(-1)
    return (F.dropout(scores, dropout_p) @ v).transpose(1, 2).flatten(2)


class Projected(nn.Module):
    """Attention of what ``part`` makes of a projection to so many columns."""

    def __init__(
        self, part: Callable[[Tensor], Heads], columns: int = 3 * FULL, dropout_p: float = 0.0
    ) -> None:
        super().__init__()
        self.project, self.part, self.dropout_p = nn.Linear(16, columns), part, dropout_p

    def forward(self, x: Tensor) -> Tensor:
        return attend(*self.part(self.project(x)), self.dropout_p)


def by_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, WIDTH)).transpose(1, 2)


def split(x: Tensor) -> Any:
    return map(by_heads, x.split(FULL, 2))


def chunk(x: Tensor) -> Any:
    return map(by_heads, x.chunk(3, -1))


def another_order(x: Tensor) -> Any:
    v, q, k = map(by_heads, x.chunk(3, -1))
    return q, k, v


def unbind(x: Tensor) -> Any:
    batch, rows, _ = x.shape
    return x.reshape(batch, rows, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)


def copied(x: Tensor) -> Any:
    """As `nn.MultiheadAttention` has them, of [S, B, 3 * H * D]: one copy, [3, S, B, H * D]."""
    rows, batch, _ = x.shape
    x = x.unflatten(-1, (3, FULL)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    each = (y.view(rows, batch * HEADS, WIDTH).transpose(0, 1) for y in (x[0], x[1], x[2]))
    return [y.view(batch, HEADS, rows, WIDTH) for y in each]


def turned(x: Tensor) -> Any:
    return copied(x.transpose(0, 1))


class RowsFirst(Projected):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1))


def sliced(x: Tensor) -> Any:
    return map(by_heads, (x[..., :FULL], x[..., FULL : 2 * FULL], x[..., 2 * FULL :]))


def grouped(x: Tensor) -> Any:
    return map(by_heads, x.split([FULL, GROUPS * WIDTH, GROUPS * WIDTH], -1))


def one_group(x: Tensor) -> Any:
    return map(by_heads, x.split([FULL, WIDTH, WIDTH], -1))


def one_group_of_heads(x: Tensor) -> Any:
    """All heads split as such, the last two of which are of keys and values."""
    return by_heads(x).split([HEADS, 1, 1], 1)


def each_head(x: Tensor) -> Any:
    """Side by side in each head."""
    return x.unflatten(-1, (HEADS, 3 * WIDTH)).transpose(1, 2).chunk(3, -1)


def wider_values(x: Tensor) -> Any:
    q, k, v = x.split([FULL, FULL, 2 * FULL], -1)
    return by_heads(q), by_heads(k), v.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def split_twice(x: Tensor) -> Any:
    q, others = x.split([FULL, 2 * FULL], -1)
    return map(by_heads, (q, *others.chunk(2, -1)))


TAKEN: dict[str, tuple[Projected, str]] = {
    "split": (Projected(split), "bs|hd:qkv"),
    "chunk": (Projected(chunk), "bs|hd:qkv"),
    "another order": (Projected(another_order), "bs|hd:vqk"),
    "unbind": (Projected(unbind), "bs|hd:qkv"),
    "rows first": (RowsFirst(copied), "sb|hd:qkv"),
    "rows first behind the projection": (Projected(turned), "bs|hd:qkv"),
    "sliced": (Projected(sliced), "bs|hd:qkv"),
    "grouped": (Projected(grouped, FULL + 2 * GROUPS * WIDTH), "bs|hd:qkv"),
    "one group": (Projected(one_group, FULL + 2 * WIDTH), "bs|hd:qkv"),
    "one group of heads": (Projected(one_group_of_heads, FULL + 2 * WIDTH), "bs|hd:qkv"),
    "each head": (Projected(each_head), "bsh|d:qkv"),
    "wider values": (Projected(wider_values, 4 * FULL), "bs|hd:qkv"),
    "split twice": (Projected(split_twice), "bs|hd:qkv"),
}


def trained(module: nn.Module, **options: Any) -> tuple[Callable[..., Any], list[Compilation]]:
    """The module compiled for the reference engine, and its records."""
    records: list[Compilation] = []
    given = {"engine": "reference", "strict": True, "cache": False}
    dynamic = options.pop("dynamic", None)
    backend = Compiler(**given, on_compiled=records.append, **options)
    torch._dynamo.reset()
    return torch.compile(module, backend=backend, dynamic=dynamic), records


def packings(records: list[Compilation]) -> list[str]:
    """Those of the backward's attentions; "" for one with gradients apart."""
    nodes = [n for each in records for n in each.flat["backward"].graph.nodes]
    places = {PACKED: -1, PACKED_SUMMED: -2, BACKWARD: None, SUMMED: None}
    return [
        "" if (place := places[n.target]) is None else str(n.args[place])
        for n in nodes
        if n.target in places
    ]


def copies(records: list[Compilation]) -> list[str]:
    """What is left of putting gradients together."""
    nodes = [n for each in records for n in each.flat["backward"].graph.nodes]
    return [n.name for n in nodes if any(s in str(n.target) for s in ("cat", "scatter", "zeros"))]


def accurate(
    module: nn.Module, dynamic: bool | None = None, rows: tuple[int, int] = (3, 7)
) -> list[Compilation]:
    made: list[list[Compilation]] = []

    def compiled(each: nn.Module) -> Callable[..., Any]:
        run, records = trained(each, dynamic=dynamic)
        made.append(records)
        return run

    given = {"x": torch.randn(*rows, 16, requires_grad=True)}
    assert_as_accurate_as_eager(
        lambda: module, given, compiled, dtype=torch.float32, device="cpu", train=True
    )  # fmt: skip
    return made[-1]


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str) -> None:
    module, packing = TAKEN[name]
    records = accurate(module)
    assert packings(records) == [packing]
    assert copies(records) == []


@pytest.mark.parametrize("name", ["split", "unbind", "rows first", "grouped", "each head"])
def test_symbolic_sizes(name: str) -> None:
    module, packing = TAKEN[name]
    records = accurate(module, dynamic=True)
    assert packings(records) == [packing]
    assert copies(records) == []


@pytest.mark.parametrize("name", ["split", "unbind", "rows first", "grouped", "one group"])
def test_a_batch_of_one(name: str) -> None:
    """Its heads are the batch of the attention."""
    records = accurate(TAKEN[name][0], rows=(1, 7))
    assert len(packings(records)) == 1
    assert copies(records) == []


@pytest.mark.parametrize("name", ["split", "rows first", "wider values"])
def test_dropout(name: str) -> None:
    """The same bits as with gradients that are put together."""
    module = copy.deepcopy(TAKEN[name][0])
    module.dropout_p = 0.4
    found = []
    for pipeline in (DEFAULT, DEFAULT.without("packed_gradients")):
        module.zero_grad()
        run, records = trained(module, pipeline=pipeline)
        torch.manual_seed(3)
        x = torch.randn(3, 7, 16, requires_grad=True)
        run(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in module.parameters())])
        assert packings(records) == [TAKEN[name][1] if pipeline is DEFAULT else ""]
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Projected(split), Projected(unbind)
        self.between = nn.Linear(FULL, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))  # type: ignore[no-any-return]


def test_of_several_layers() -> None:
    records = accurate(Layers())
    assert packings(records) == ["bs|hd:qkv"] * 2


# --- what stays as it is


class Turned(Projected):
    """Queries and keys are turned by a pointwise function on the way."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split(self.project(x))
        return attend(q * q.cos(), k.sin(), v)


class Twice(Projected):
    """The values are read once more."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split(self.project(x))
        return attend(q, k, v) + v.transpose(1, 2).flatten(2)


class Gated(Projected):
    """One projection for a gate as well."""

    def forward(self, x: Tensor) -> Tensor:
        *heads, gate = self.project(x).chunk(4, -1)
        return attend(*map(by_heads, heads)) * gate


class Shared(Projected):
    """One projection for two attentions."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, *others = map(by_heads, self.project(x).chunk(6, -1))
        return attend(q, k, v) + attend(*others)


class Crossed(Projected):
    """The values of one attention are the queries of the other."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(by_heads, self.project(x).chunk(3, -1))
        return attend(q, k, v) * attend(v, q, k)


class Apart(Projected):
    """Values of their own."""

    def __init__(self) -> None:
        super().__init__(split, 2 * FULL)
        self.values = nn.Linear(16, FULL)

    def forward(self, x: Tensor) -> Tensor:
        return attend(*map(by_heads, (*self.project(x).chunk(2, -1), self.values(x))))


class Part(Projected):
    """Columns that nobody reads get zeros."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(x)
        return attend(*map(by_heads, (y[..., :FULL], y[..., FULL : 2 * FULL], y[..., -FULL:])))


def every_third(x: Tensor) -> Any:
    """Elements of the three in turn."""
    return map(by_heads, x.unflatten(-1, (FULL, 3)).unbind(-1))


def odd_rows(x: Tensor) -> Any:
    """Of 108 bytes."""
    return (y.unflatten(-1, (3, 3)).transpose(1, 2) for y in x.chunk(3, -1))


DECLINED: dict[str, nn.Module] = {
    "computed with on the way": Turned(split),
    "read twice": Twice(split),
    "with a gate": Gated(split, 4 * FULL),
    "two attentions": Shared(split, 6 * FULL),
    "two attentions of the same": Crossed(split),
    "values of their own": Apart(),
    "columns nobody reads": Part(split, 4 * FULL),
    "element by element": Projected(every_third),
    "odd rows": Projected(odd_rows, 27),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined(name: str) -> None:
    assert set(packings(accurate(DECLINED[name]))) == {""}


# --- as planned for a GPU


class Library(Projected):
    def forward(self, x: Tensor) -> Tensor:
        heads = self.part(self.project(x))
        return F.scaled_dot_product_attention(*heads, dropout_p=self.dropout_p, is_causal=True)


class Multihead(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


def wide(x: Tensor) -> Any:
    return (y.unflatten(-1, (2, 64)).transpose(1, 2) for y in x.chunk(3, -1))


def kernels(module: nn.Module, width: int) -> list[str]:
    """Those of the backward, as planned for an H100."""
    x = torch.randn(2, 64, width)
    report = explain(module.bfloat16(), x.bfloat16(), device="h100", training=True,
                     compile_kernels=False)  # fmt: skip
    return [each.name for each in report.kernels if each.graph == "backward"]


@pytest.mark.parametrize("module", [Library, Multihead])
def test_nothing_is_put_together_on_a_gpu(module: type[nn.Module]) -> None:
    """With dropout, for which our template is faster than the library."""
    if module is Library:
        found = kernels(Library(wide, 3 * 128, dropout_p=0.1), 16)
    else:
        found = kernels(Multihead(128, 2, dropout=0.1, batch_first=True), 128)
    assert PACKED.name() in " ".join(found).replace(".", "::")
    assert not any(word in name for name in found for word in ("cat", "clone", "scatter")), found


def test_a_library_allocates_its_own() -> None:
    found = kernels(Library(wide, 3 * 128), 16)
    assert "iocompiler.attention_backward" in " ".join(found)
    assert any("cat" in name for name in found), found


# --- the operator


@pytest.mark.parametrize("packing", ["bs|hd:qkv", "sb|hd:vqk", "bsh|d:kvq", "|bhsd:qkv"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_values(packing: str, dropout_p: float) -> None:
    """The gradients apart, each where the packing says."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 5, 8) for _ in range(3))
    seed = torch.tensor(7) if dropout_p else None
    program = CASES["alibi"].program()
    given = (q, k, v, list(CASES["alibi"].operands(2, 4, 5, 5)), [], program.key)
    setting = ("blockwise", "ssss", seed, dropout_p, None, [])
    given = (torch.randn(q.shape), *FORWARD(*given, *setting), None, *given, *setting)
    apart = dict(zip("qkv", BACKWARD(*given), strict=True))
    front, back = packing[:-4].split("|")
    parts = [
        apart[part].permute(["bhsd".index(x) for x in front + back]).flatten(len(front))
        for part in packing[-3:]
    ]
    found = PACKED(*given, packing)
    assert found.is_contiguous()
    torch.testing.assert_close(found, torch.cat(parts, -1), rtol=0, atol=0)
    torch.library.opcheck(PACKED, (*given, packing), test_utils=("test_schema", "test_faketensor"))


def test_no_tokens() -> None:
    q = torch.randn(2, 4, 0, 8)
    given = (q, q, q, [], [], CASES["full"].program().key, "blockwise", "ssss", None, 0.0, None, [])
    found = PACKED(q, *FORWARD(*given), None, *given, "bs|hd:qkv")
    assert found.shape == (2, 0, 96)
    k = torch.randn(2, 2, 3, 8)
    given = (q, k, k, [], [], CASES["full"].program().key, "blockwise", "ssss", None, 0.0, None, [])
    found = PACKED(q, *FORWARD(*given), None, *given, "b|shd:qkv")
    assert torch.equal(found, torch.zeros(2, 96))
