"""Which blocks a mask leaves, asked once for all attentions that have it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import iocompiler as ioc
from iocompiler.report.ledger import Report

WIDTH, HEADS = 128, 2


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.back = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, kept: Tensor, slope: float) -> Tensor:
        split = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = split[0] @ split[1].mT * WIDTH**-0.5
        place = torch.arange(x.shape[1], device=x.device)
        scores = scores + slope * (place - place[:, None]).to(x.dtype)
        out = scores.masked_fill(~kept, float("-inf")).softmax(-1) @ split[2]
        return x + self.back(out.transpose(1, 2).flatten(2))


class Packed(nn.Module):
    """Documents side by side in a row; one mask for all layers, with a slope of each layer's."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            kept = (ids[:, None, :, None] == ids[:, None, None, :]).tril()
            x = layer(x, kept, 0.5 / (1 + number))
        return x.square().mean()


def explained(module: nn.Module, *inputs: Tensor, training: bool = True) -> Report:
    return ioc.explain(module.bfloat16(), *inputs, device="h100", training=training)


def asked(report: Report) -> list[str]:
    """In which graphs."""
    return [k.graph for k in report.kernels if "attention_classes" in k.name]


def attentions(report: Report) -> int:
    return sum("scored_attention" in k.name for k in report.kernels)


@pytest.mark.parametrize("training", [True, False])
def test_layers_with_one_mask_ask_once(training: bool) -> None:
    x = torch.randn(2, 192, WIDTH, dtype=torch.bfloat16)
    ids = torch.randint(3, (2, 192)).sort(-1)[0]
    report = explained(Packed(), x, ids, training=training)
    assert asked(report) == ["forward" if training else "inference"]
    assert attentions(report) == (6 if training else 3)
    (kernel,) = [k for k in report.kernels if "attention_classes" in k.name]
    assert [t.name for t in kernel.templates] == ["classify_blocks"]
    lists = [k for k in report.kernels if "attention_table" in k.name]
    assert {t.name for k in lists for t in k.templates} == {"list_blocks", "order_rows"}
    assert len(lists) == (2 if training else 1)  # the forward's and dq's are one
    assert not {t.name for k in report.kernels if "scored" in k.name for t in k.templates} & {
        "list_blocks"
    }


def attend(q: Tensor, kept: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, q, q, attn_mask=kept)


@pytest.mark.parametrize("length", [16, 17])
def test_few_queries_are_not_asked_for(length: int) -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, ids: Tensor) -> Tensor:
            kept = ids[:, None, :length, None] == ids[:, None, None, :]
            return F.scaled_dot_product_attention(q, k, k, attn_mask=kept)

    q, k = (torch.randn(2, 2, n, 64, dtype=torch.bfloat16) for n in (length, 192))
    ids = torch.randint(3, (2, 192)).sort(-1)[0]
    report = explained(Model(), q, k, ids, training=False)
    assert attentions(report) == 1
    assert len(asked(report)) == (length > 16)


def test_masks_of_positions_are_proved_not_asked() -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            place = torch.arange(q.shape[2], device=q.device)
            apart = place[:, None] - place
            return attend(q, (apart >= 0) & (apart < 40))

    report = explained(Model(), torch.randn(2, 2, 192, 64, dtype=torch.bfloat16), training=False)
    assert attentions(report) == 1
    assert asked(report) == []
