"""Hugging Face models whose positions are told to attention each in its own way: taken, as accurate
as eager with all gradients, and with no matrix where their biases are less than one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iocompiler.ops.scored_attention import FORWARD
from iocompiler.passes.attention.running import choice
from tests.accuracy import assert_as_accurate_as_eager
from tests.passes.attention_cases import Compiled

transformers = pytest.importorskip("transformers")

SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
SHORT: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 4}
WORDS: dict[str, Any] = {"vocab_size": 101, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGE: dict[str, Any] = {"image_size": 16, "patch_size": 4}
LENGTH = 13


def gpt() -> nn.Module:
    still = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    config = transformers.OpenAIGPTConfig(**SHORT, **still, n_positions=32, vocab_size=101)
    return transformers.OpenAIGPTLMHeadModel(config)


def gpt_neo() -> nn.Module:
    config = transformers.GPTNeoConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        window_size=4,
        use_cache=False,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=32,
        **WORDS,
    )
    return transformers.GPTNeoForCausalLM(config)


def mpt() -> nn.Module:
    size = {"d_model": 48, "n_layers": 1, "n_heads": 6, "max_seq_len": 32, "use_cache": False}
    return transformers.MptForCausalLM(transformers.MptConfig(**size, vocab_size=101))


def deberta() -> nn.Module:
    kind = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    config = transformers.DebertaV2Config(**SIZE, **STILL, **kind, vocab_size=101)
    return transformers.DebertaV2ForMaskedLM(config)


def xlnet() -> nn.Module:
    size = {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 64, "dropout": 0.0}
    return transformers.XLNetLMHeadModel(transformers.XLNetConfig(**size, vocab_size=101))


def beit() -> nn.Module:
    config = transformers.BeitConfig(**SIZE, **STILL, **IMAGE, use_relative_position_bias=True)
    return transformers.BeitModel(config)


def vitdet() -> nn.Module:
    size = {n: x for n, x in SIZE.items() if n != "intermediate_size"}
    kind = {"use_relative_position_embeddings": True, "window_block_indices": [0]}
    size |= {"num_hidden_layers": 2, "window_size": 3, "pretrain_image_size": 16}
    return transformers.VitDetModel(transformers.VitDetConfig(**size, **IMAGE, **kind))


def sam() -> nn.Module:
    sam = pytest.importorskip("transformers.models.sam.modeling_sam")
    size = {n: x for n, x in SIZE.items() if n != "intermediate_size"} | {"num_hidden_layers": 2}
    kind = {"mlp_dim": 64, "output_channels": 16, "global_attn_indexes": [1], "window_size": 3}
    return sam.SamVisionModel(transformers.SamVisionConfig(**size, **IMAGE, **kind))


MODELS: dict[Callable[[], nn.Module], list[str]] = {
    gpt: ["causal"],
    gpt_neo: ["causal", "program"],  # behind it what a version of transformers masks by
    mpt: ["causal+bias"],
    deberta: ["bias"],
    xlnet: ["bias"],
    beit: ["bias"],
    vitdet: ["bias", "bias"],
    sam: ["bias", "bias"],
}


class First(nn.Module):
    """The model, its outputs reduced to the first one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)[0]


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    model.set_attn_implementation("eager")  # type: ignore[operator]
    for name, each in model.named_parameters():
        if "rel_pos" in name or "relative_position" in name:
            nn.init.normal_(each, std=0.5)  # else zero
    return First(model)


def inputs(make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if make in (beit, vitdet, sam):
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return {"input_ids": torch.randint(3, 101, (2, LENGTH), generator=generator)}


def checked(make: Callable[[], nn.Module], dtype: torch.dtype) -> Compiled:
    found: list[Compiled] = []

    def compile_(module: nn.Module) -> Compiled:
        found.append(Compiled(module))
        return found[0]

    assert_as_accurate_as_eager(lambda: made(make), inputs(make), compile_, dtype=dtype)
    assert found[0].misses == []
    return found[0]


@pytest.mark.parametrize("make", MODELS)
def test_every_attention_is_taken(make: Callable[[], nn.Module]) -> None:
    found, expected = checked(make, torch.float32).variants, MODELS[make]
    assert len(found) == len(expected)
    assert all(map(str.startswith, found, expected)), found


@pytest.mark.parametrize("make", [gpt, gpt_neo, mpt, vitdet, sam])
def test_a_program_reads_no_matrix(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "wanted", lambda call, found: True)
    compiled = checked(make, torch.float32)
    assert len(compiled.variants) == len(MODELS[make])
    assert all(each.startswith("program") for each in compiled.variants)
    calls = [n for g in compiled.graphs for n in g.graph.nodes if n.target is FORWARD]
    for call in calls:
        rows, columns = (call.args[n].meta["val"].shape[2] for n in (0, 1))
        shapes = [each.meta["val"].shape for each in call.args[3]]
        assert all(tuple(shape[-2:]) != (rows, columns) for shape in shapes)
