"""Gradients of biases that are summed where an attention's gradients are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from iocompiler.convenience import explain
from iocompiler.graph import view
from iocompiler.ops.packed_gradients import PACKED, Packing
from iocompiler.ops.scored_attention import BACKWARD
from iocompiler.ops.summed_gradients import PACKED_SUMMED, SUMMED
from iocompiler.passes.summed_gradients import summed_gradients
from iocompiler.pipeline import Pipeline
from tests.ops.score_programs import CASES, heads

aten = torch.ops.aten
Summed = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
MADE = (BACKWARD, PACKED, SUMMED, PACKED_SUMMED)


def traced(
    summed: Summed,
    program: str = "causal",
    shape: tuple[int, ...] = (2, 4, 4, 70, 70, 16, 16),
    packing: str = "",
    kernel: str = "template",
    mode: str = "fake",
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[GraphModule, list[Tensor]]:
    """A backward of an attention and what ``summed`` makes of its gradients, after the pass, and
    what it takes.
    """
    torch.manual_seed(0)
    case = CASES[program]
    given = [x.to(dtype) for x in heads(*shape)]
    operands = list(case.operands(*(shape[n] for n in (0, 1, 3, 4))))
    out = torch.randn(*given[0].shape[:3], shape[6]).to(dtype)
    lse = torch.full((case.program(0.3).planes, *out.shape[:3]), 4.0)
    inputs = [torch.randn_like(out), out, lse, *given]

    def run(grad: Tensor, out: Tensor, lse: Tensor, *heads: Tensor) -> Any:
        operator = PACKED if packing else BACKWARD
        known = {"grad": grad, "out": out, "logsumexp": lse, "operands": operands, "numbers": []}
        known |= dict(zip(("query", "key", "value"), heads, strict=True))
        known |= {"program": case.program(0.3).key, "kernel": kernel, "layout": "ssss"}
        known |= {"dropout_p": 0.0, "tables": [], "packing": packing}
        gradients = operator(*(known.get(each.name) for each in operator._schema.arguments))
        return (gradients, summed((gradients,) if packing else gradients))

    gm = make_fx(run, tracing_mode=mode, _allow_non_fake_inputs=True)(*inputs)
    Pipeline(summed_gradients).run(gm)
    return gm, inputs


def made(gm: GraphModule) -> list[Any]:
    return [n.target for n in gm.graph.nodes if n.target in MADE]


def on_aten(gm: GraphModule, inputs: list[Tensor]) -> Any:
    """What the graph computes where no template runs."""
    for node in view.calls(gm, *MADE):
        node.args = tuple("blockwise" if a == "template" else a for a in node.args)
    gm.recompile()
    return gm(*inputs)


def columns(x: Tensor) -> Tensor:
    """As the backward of a linear layer has them: [B * S, H * D]."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


def biases(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(columns(x).sum(0, keepdim=True).view(-1) for x in gradients)


def by_rows_first(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.permute(2, 0, 1, 3).flatten(2).sum((0, 1)) for x in gradients)


def by_heads(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """[H, D], as of a weight of three dims, in the order of memory and in float32."""
    return tuple(aten.sum.dim_IntList(x, [0, 2], False) for x in gradients)


def of_keys(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (columns(gradients[1]).sum(0), gradients[0].cos())


TAKEN: dict[str, dict[str, Any]] = {
    "a linear layer's": {"summed": biases},
    "rows first": {"summed": by_rows_first},
    "by heads": {"summed": by_heads},
    "of one": {"summed": of_keys},
    "float32": {"summed": biases, "dtype": torch.float32},
    "groups, other lengths and widths": {
        "summed": biases, "program": "alibi", "shape": (2, 4, 2, 33, 70, 16, 24),
    },
    "a batch of one": {"summed": biases, "shape": (1, 4, 4, 70, 70, 16, 16)},
    "one head": {"summed": biases, "shape": (3, 1, 1, 70, 70, 16, 16)},
    "no softmax": {"summed": biases, "program": "squared relu"},
    "symbolic sizes": {"summed": biases, "mode": "symbolic"},
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str) -> None:
    gm, inputs = traced(**TAKEN[name])
    assert made(gm) == [SUMMED]
    gradients, sums = on_aten(gm, inputs)
    for one, other in zip(sums, TAKEN[name]["summed"](gradients), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        near = 1e-5 if other.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(one, other, rtol=near, atol=near)


PACKED_SUMS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "batches first": ("bs|hd:qkv", lambda x: x.flatten(0, 1).sum(0, keepdim=True)),
    "rows first": ("sb|hd:vqk", lambda x: x.sum((0, 1))),
    "heads between": ("bsh|d:qkv", lambda x: x.flatten(2).flatten(0, 1).sum(0)),
}


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("name", PACKED_SUMS)
def test_of_one_tensor(name: str, mode: str) -> None:
    packing, total = PACKED_SUMS[name]
    given = {"packing": packing, "mode": mode, "dtype": torch.float32}
    gm, inputs = traced(lambda packed: (total(packed[0]),), **given)
    assert made(gm) == [PACKED_SUMMED]
    packed, (sums,) = on_aten(gm, inputs)
    torch.testing.assert_close(sums, total(packed), rtol=1e-5, atol=1e-5)
    slices = Packing.parsed(packing).layout(tuple(x.shape for x in inputs[3:])).slices(packed)
    apart = on_aten(traced(lambda _: (), dtype=torch.float32)[0], inputs)[0]
    for one, other in zip(slices, apart, strict=True):
        torch.testing.assert_close(one, other)


def by_parts(packed: Tensor) -> tuple[Tensor, ...]:
    """As three layers have them, each of its columns of [B * S, 3 * H * D]."""
    matrix = packed.flatten(0, 1)
    return tuple(matrix[:, n : n + 64].sum(0, keepdim=True).view(-1) for n in (0, 64, 128))


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_of_columns_of_one_tensor(mode: str) -> None:
    given = {"packing": "bs|hd:qkv", "mode": mode, "dtype": torch.float32}
    gm, inputs = traced(lambda packed: by_parts(packed[0]), **given)
    assert made(gm) == [PACKED_SUMMED]
    packed, sums = on_aten(gm, inputs)
    for one, other in zip(sums, by_parts(packed), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


PARTS_DECLINED: dict[str, Summed] = {
    "every second column": lambda packed: (packed[0].flatten(0, 1)[:, ::2].sum(0),),
    "columns of columns": lambda packed: (packed[0].flatten(0, 1)[:, 8:][:, 8:].sum(0),),
    "some rows": lambda packed: (packed[0].flatten(0, 1)[1:, :64].sum(0),),
    "heads of a tensor of heads": lambda packed: (
        packed[0].unflatten(2, (12, 16)).flatten(0, 1)[:, 4:8].sum(0),
    ),
    "columns summed": lambda packed: (packed[0].flatten(0, 1)[:, :64].sum(1),),
}


@pytest.mark.parametrize("name", PARTS_DECLINED)
def test_parts_of_one_tensor_declined(name: str) -> None:
    given = {"packing": "bs|hd:qkv", "dtype": torch.float32}
    gm, inputs = traced(PARTS_DECLINED[name], **given)
    assert made(gm) == [PACKED]
    packed, (found,) = on_aten(gm, inputs)
    torch.testing.assert_close(found, PARTS_DECLINED[name]((packed,))[0])


def test_nothing_to_sum() -> None:
    """Rows are a symbol: none is as good as many."""
    gm, inputs = traced(biases, mode="symbolic", dtype=torch.float32)
    assert made(gm) == [SUMMED]
    nothing = [x.narrow(x.dim() - 1 if x is inputs[2] else 2, 0, 0) for x in inputs]
    assert not any(x.any() for x in on_aten(gm, nothing)[1])


DECLINED: dict[str, dict[str, Any]] = {
    "over rows alone": {"summed": lambda given: (given[0].sum(2),)},
    "over batches and heads": {"summed": lambda given: (given[0].sum((0, 1)),)},
    "over all": {"summed": lambda given: (given[0].sum((0, 1, 2, 3)),)},
    "turned": {"summed": lambda given: (given[0].transpose(1, 3).sum((0, 2)),)},
    "of a part": {"summed": lambda given: (columns(given[0])[1:].sum(0),)},
    "computed with": {"summed": lambda given: (columns(given[0] * 2).sum(0),)},
    "in another dtype": {"summed": lambda given: (columns(given[0]).sum(0, dtype=torch.double),)},
    "nobody sums": {"summed": lambda given: (given[0] + 1,)},
    "few rows": {"summed": biases, "shape": (2, 4, 4, 4, 70, 16, 16)},
    "rows that are a mean": {"summed": biases, "program": "padding, uniform"},
    "no template": {"summed": biases, "kernel": "blockwise"},
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined(name: str) -> None:
    assert made(traced(**DECLINED[name])[0]) == [BACKWARD]


class Attention(nn.Module):
    def __init__(self, together: bool) -> None:
        super().__init__()
        sizes = [768] if together else [256] * 3
        self.parts = nn.ModuleList(nn.Linear(256, size) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        parts = [part(x) for part in self.parts]
        found = parts if len(parts) == 3 else parts[0].chunk(3, -1)
        q, k, v = (y.unflatten(-1, (4, 64)).transpose(1, 2) for y in found)
        return (torch.tanh(q @ k.mT / 30.0) * 30.0).softmax(-1) @ v


@pytest.mark.parametrize("together", [False, True])
def test_gradients_are_not_read_again(together: bool) -> None:
    x = torch.empty(4, 512, 256, dtype=torch.bfloat16)
    model = Attention(together).bfloat16()
    report = explain(model, x, device="h100", training=True, compile_kernels=False)
    own = 3 * x.numel() * x.itemsize
    backward = [k for k in report.kernels if k.graph == "backward"]
    assert any(k.name.endswith("_summed.default") for k in backward)
    assert sum(k.bytes for k in backward if k.generated) < own / 2
