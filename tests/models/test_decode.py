"""Hugging Face's models, token by token, with the caches they come with: logits, the caches
themselves, and how often something is compiled.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch

from iocompiler.compilation import Compilation
from tests.compiling import compiler

transformers = pytest.importorskip("transformers")

STEPS, PROMPT, LENGTH, WINDOW = 14, 4, 32, 12
SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


def gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def mistral() -> Any:
    """Its window is full after some tokens."""
    config = transformers.MistralConfig(**SMALL, sliding_window=WINDOW)
    return transformers.MistralForCausalLM(config)


def decoded(model: Any, forward: Any, kind: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The logits of each step, in float64, and the keys and values that are left."""
    torch.manual_seed(1)
    ids = torch.randint(3, 64, (2, PROMPT + STEPS))
    static = kind == "static"
    cache: Any = (
        transformers.StaticCache(model.config, LENGTH)
        if static
        else transformers.DynamicCache(config=model.config)
    )
    mask = torch.ones(2, PROMPT + STEPS, dtype=torch.long)
    mask[0, :2] = 0  # padded on the left
    logits = []
    with torch.no_grad():
        # its name from transformers 5.24 on, and before
        named = (
            "cache" if "cache" in signature(type(model).forward).parameters else "past_key_values"
        )
        given = {named: cache}
        model(input_ids=ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], **given)
        for at in range(PROMPT, PROMPT + STEPS):
            seen = mask if static else mask[:, : at + 1].contiguous()
            out = forward(input_ids=ids[:, at : at + 1], attention_mask=seen, **given)
            logits.append(out.logits.double())
    left = [x.double() for layer in cache.layers for x in (layer.keys, layer.values)]
    return torch.stack(logits), left


@pytest.mark.parametrize(
    ("make", "kind", "graphs", "updates"),
    [
        (llama, "static", 1, 4),
        (gpt2, "static", 1, 4),
        (mistral, "static", 3, 4),  # of a number as it is, as a symbol, and when the window is full
        (llama, "dynamic", 2, 0),  # of a length as it is, and as a symbol
        (gpt2, "dynamic", 2, 0),
    ],
)
def test_decode(make: Any, kind: str, graphs: int, updates: int) -> None:
    torch.manual_seed(0)
    model = make().eval()
    records: list[Compilation] = []
    found, left = decoded(model, compiler(records)(model.forward), kind)
    model.double()
    expected, there = decoded(model, model.forward, kind)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(left, there, rtol=1e-4, atol=1e-5)
    assert len(records) == graphs
    names = [each.pattern for each in records[0].rewrites]
    assert (names.count("updates"), names.count("attention")) == (updates, 2)
    assert not [each for record in records for each in record.fallbacks]
