"""Hugging Face models whose caller keeps only the loss: the logits fall away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiling import compiled
from tests.passes.test_linear_cross_entropy import PIPELINE

transformers = pytest.importorskip("transformers")
V = 99


def gpt2() -> nn.Module:
    sizes: dict[str, Any] = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32}
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends, vocab_size=V))
    model.loss_type = "ForCausalLM"  # else a log message breaks the graph
    return model  # type: ignore[no-any-return]


def _small() -> dict[str, Any]:
    return {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": V,
    }  # fmt: skip


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**_small(), num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**_small()))  # type: ignore[no-any-return]


class LossOnly(nn.Module):
    """A training step's view of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Any:
        return self.model(input_ids=tokens, labels=tokens).loss


@pytest.mark.parametrize("make", [gpt2, llama, bert])
def test_the_loss_alone_is_taken(make: Callable[[], nn.Module]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, tokens = LossOnly(make().eval()), torch.randint(0, V, (2, 12))
    run, records = compiled(model, PIPELINE)
    mine, theirs = run(tokens), model(tokens)
    torch.testing.assert_close(mine, theirs)
    leaves = list(model.parameters())
    pairs = (torch.autograd.grad(loss, leaves, allow_unused=True) for loss in (mine, theirs))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)
    found = [r for record in records for r in record.rewrites]
    assert [r.pattern for r in found].count("linear_cross_entropy") == 1


@pytest.mark.parametrize("make", [gpt2, llama, bert])
def test_returned_logits_are_kept(make: Callable[[], nn.Module]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, tokens = make().eval(), torch.randint(0, V, (2, 12))
    run, records = compiled(model, PIPELINE)
    mine, theirs = (f(input_ids=tokens, labels=tokens) for f in (run, model))
    torch.testing.assert_close((mine.loss, mine.logits), (theirs.loss, theirs.logits))
    leaves = list(model.parameters())
    pairs = (torch.autograd.grad(x.loss, leaves, allow_unused=True) for x in (mine, theirs))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)
    found = [r for record in records for r in record.rewrites]
    (rewrite,) = (r for r in found if r.pattern == "linear_cross_entropy")
    assert "logits kept" in rewrite.variant


class Distilled(nn.Module):
    """A training step of a student: its labels, and what a teacher says of the same tokens."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        found = self.student(input_ids=tokens, labels=tokens)
        with torch.no_grad():
            taught = self.teacher(input_ids=tokens).logits
        each = F.kl_div(
            F.log_softmax(found.logits / 2, -1), F.softmax(taught / 2, -1), reduction="none"
        ).sum(-1)
        loss: Tensor = 0.5 * found.loss + 0.5 * 4 * (each * mask).sum() / mask.sum()
        return loss


def test_distillation_from_another_architecture() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Distilled(gpt2().eval(), llama().eval())
    tokens, mask = torch.randint(0, V, (2, 12)), (torch.rand(2, 12) > 0.3).float()
    run, records = compiled(model, PIPELINE)
    mine, theirs = run(tokens, mask), model(tokens, mask)
    torch.testing.assert_close(mine, theirs)
    leaves = list(model.student.parameters())
    pairs = (torch.autograd.grad(loss, leaves, allow_unused=True) for loss in (mine, theirs))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)
    found = [r for record in records for r in record.rewrites]
    (rewrite,) = (r for r in found if r.pattern == "linear_cross_entropy")
    assert rewrite.variant == "mean, KL, another head, cross-entropy"
