"""Unmodified Hugging Face models of many families, attn_implementation="eager": every attention is
taken, in training and in inference, and computes what it did.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.passes.attention_cases import Compiled

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 101,
}
WIDE: dict[str, Any] = {**SMALL, "intermediate_size": 48}
GROUPED: dict[str, Any] = {**WIDE, "num_key_value_heads": 2, "head_dim": 8}
STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WHISPER: dict[str, Any] = {
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
       (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))},
    "vocab_size": 101, "d_model": 32, "num_mel_bins": 8, "max_source_positions": 17,
    "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "dropout": 0.0,
}  # fmt: skip
CLIP: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def ids() -> Tensor:
    return torch.randint(3, 100, (2, 13), generator=torch.Generator().manual_seed(0))


def image(side: int) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Family:
    """Names of the model's class and configuration; its inputs; how many attentions it has."""

    model: str
    config: str
    settings: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]] = lambda: {"input_ids": ids()}
    sites: int = 2
    output: str = "logits"
    skips_layers: bool = False  # in training, by a number drawn on the host: a graph break

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.settings)
        model: nn.Module = getattr(transformers, self.model)(config)
        model.set_attn_implementation("eager")  # type: ignore[operator]
        return model


FAMILIES = {
    "Gemma 3": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**GROUPED, "sliding_window": 5, "use_cache": False},
    ),
    "MPT": Family(
        "MptForCausalLM",
        "MptConfig",
        {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 101, "max_seq_len": 32,
         "use_cache": False},
    ),
    "DeepSeek V3": Family(  # its keys are put together in place, before anything reads them
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**WIDE, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
         "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
         "first_k_dense_replace": 2, "use_cache": False},
    ),
    "Qwen 3": Family("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "use_cache": False}),
    "GPT-J": Family(
        "GPTJForCausalLM",
        "GPTJConfig",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 101,
         "use_cache": False, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
         "bos_token_id": 1, "eos_token_id": 2},
    ),
    "OPT": Family(
        "OPTForCausalLM",
        "OPTConfig",
        {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "use_cache": False, "dropout": 0.0},
        skips_layers=True,
    ),
    "RoBERTa": Family("RobertaForMaskedLM", "RobertaConfig", {**WIDE, **STILL}),
    "DeBERTa v2": Family(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {**WIDE, **STILL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "XLNet": Family(
        "XLNetLMHeadModel",
        "XLNetConfig",
        {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": 101,
         "dropout": 0.0},
    ),
    "DiffLlama": Family(  # a difference of two attentions
        "DiffLlamaForCausalLM",
        "DiffLlamaConfig",
        {**WIDE, "num_key_value_heads": 2, "use_cache": False},
        sites=4,
    ),
    "Whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**WHISPER, "use_cache": False},
        lambda: {"input_features": torch.randn(2, 8, 34), "decoder_input_ids": ids()},
        sites=6,
        skips_layers=True,
    ),
    "Swin": Family(
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
         "window_size": 4, "drop_path_rate": 0.0},
        lambda: {"pixel_values": image(32)},
        sites=4,
    ),
    "CLIP": Family(
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**CLIP, "vocab_size": 101, "eos_token_id": 2},
         "vision_config": {**CLIP, "image_size": 32, "patch_size": 8}},
        lambda: {"input_ids": ids(), "pixel_values": image(32)},
        sites=4,
        output="logits_per_text",
    ),
}  # fmt: skip


class Output(nn.Module):
    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, **inputs: Tensor) -> Any:
        return getattr(self.model(**inputs), self.name)


@pytest.mark.parametrize(
    "train", [pytest.param(False, marks=pytest.mark.slow), True], ids=["inference", "training"]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_attention_is_taken(name: str, train: bool) -> None:
    family = FAMILIES[name]
    module = Output(family.make().train(train and not family.skips_layers), family.output)
    given = family.inputs()
    compiled = Compiled(module)
    results = []
    for run in (module, compiled):
        module.zero_grad()
        with torch.set_grad_enabled(train):
            out = run(**given)
        if train:
            (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
        results.append([out.detach(), *(p.grad for p in module.parameters() if p.grad is not None)])
    expected, found = results
    assert len(compiled.variants) == family.sites, compiled.misses
    assert compiled.misses == []
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max() + 1))
