"""Hugging Face models as they are: every attention is taken, and outputs and gradients stay as
accurate as eager's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.accuracy import assert_as_accurate_as_eager
from tests.passes.attention_cases import Compiled

transformers = pytest.importorskip("transformers")

SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
STILL: dict[str, Any] = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
GROUPED: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
SITES = {
    "bert": ["full"],
    "gpt2": ["causal"],
    "llama": ["gqa+causal"],
    "vit": ["full"],
    "t5": ["bias", "causal+bias", "full"],
}


def _ids() -> Tensor:
    return torch.randint(0, 101, (2, 13), generator=torch.Generator().manual_seed(0))


def _model(name: str, attention: str, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    kind: dict[str, Any] = {"attn_implementation": attention}
    if name == "bert":
        quiet = dict.fromkeys(QUIET, dropout)
        return transformers.BertForMaskedLM(
            transformers.BertConfig(vocab_size=101, **SIZE, **quiet, **kind)
        )
    if name == "gpt2":
        drop = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), dropout)
        config = transformers.GPT2Config(
            vocab_size=101,
            n_embd=32,
            n_layer=1,
            n_head=4,
            n_positions=32,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
            **drop,
            **kind,
        )
        return transformers.GPT2LMHeadModel(config)
    if name == "llama":
        config = transformers.LlamaConfig(
            vocab_size=101, num_key_value_heads=2, use_cache=False, **SIZE, **kind
        )
        return transformers.LlamaForCausalLM(config)
    if name == "vit":
        return transformers.ViTForImageClassification(
            transformers.ViTConfig(image_size=32, patch_size=8, **SIZE, **kind)
        )
    config = transformers.T5Config(
        vocab_size=101,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        dropout_rate=dropout,
        decoder_start_token_id=0,
        use_cache=False,
        **kind,
    )
    return transformers.T5ForConditionalGeneration(config)


class Outputs(nn.Module):
    """The model, its outputs reduced to the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs).logits


def _inputs(name: str) -> dict[str, Tensor]:
    if name == "vit":
        return {
            "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        }
    return (
        {"input_ids": _ids(), "decoder_input_ids": _ids()}
        if name == "t5"
        else {"input_ids": _ids()}
    )


def _check(name: str, attention: str, dtype: torch.dtype, dynamic: bool | None = None) -> None:
    made: list[Compiled] = []

    def compile_(module: nn.Module) -> Compiled:
        made.append(Compiled(module, dynamic=dynamic))
        return made[0]

    assert_as_accurate_as_eager(
        lambda: Outputs(_model(name, attention)), _inputs(name), compile_, dtype=dtype
    )
    assert made[0].variants == SITES[name], made[0].misses
    assert made[0].misses == []


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", SITES)
def test_every_attention_is_taken(name: str, attention: str) -> None:
    _check(name, attention, torch.float32)


@pytest.mark.parametrize("name", SITES)
def test_in_bfloat16(name: str) -> None:
    _check(name, "eager", torch.bfloat16)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_with_lengths_that_change(name: str) -> None:
    model = _model(name, "eager").eval()
    compiled = Compiled(Outputs(model), dynamic=True)
    for batch, length in ((6, 13), (3, 21), (5, 9)):
        ids = torch.randint(0, 101, (batch, length))
        with torch.no_grad():
            torch.testing.assert_close(
                compiled(input_ids=ids), model(input_ids=ids).logits, atol=1e-5, rtol=1e-4
            )
    assert len(compiled.graphs) == 1
    assert compiled.variants == SITES[name]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_is_a_mask(attention: str) -> None:
    model = _model("llama", attention)
    inputs = {**_inputs("llama"), "attention_mask": torch.ones(2, 13, dtype=torch.int64)}
    inputs["attention_mask"][1, :4] = 0
    compiled = Compiled(Outputs(model))
    torch.testing.assert_close(
        compiled(**inputs)[0], model(**inputs).logits[0], atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        compiled(**inputs)[1, 4:], model(**inputs).logits[1, 4:], atol=1e-5, rtol=1e-4
    )
    assert compiled.variants == ["gqa+mask" if attention == "eager" else "gqa+causal+mask"]


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_dropout_goes_with_it(name: str) -> None:
    model = _model(name, "eager", dropout=0.1)
    compiled = Compiled(Outputs(model))
    out = compiled(**_inputs(name))
    out.sum().backward()
    assert compiled.variants == [
        f"{variant}+dropout".removeprefix("full+") for variant in SITES[name]
    ]
    lengths = [
        node.meta["val"].shape[-2:] for node in compiled.graphs[0].graph.nodes if _is_random(node)
    ]
    assert (13, 13) not in lengths


SMALL: dict[str, Any] = {"vocab_size": 101, "use_cache": False}
CAUSAL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bloom": (
        lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, **SMALL, **STILL)
        ),
        "causal+bias",
    ),
    "falcon": (
        lambda: transformers.FalconForCausalLM(
            transformers.FalconConfig(**GROUPED, **SMALL, **STILL, alibi=True)
        ),
        "gqa+causal+bias",
    ),
    "mistral": (
        lambda: transformers.MistralForCausalLM(
            transformers.MistralConfig(**SIZE, **SMALL, num_key_value_heads=2, sliding_window=4)
        ),
        "gqa+mask",
    ),
    "gpt_neox": (
        lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZE, **SMALL)),
        "causal",
    ),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_other_spellings_of_models(name: str) -> None:
    make, variant = CAUSAL[name]
    torch.manual_seed(0)
    model = make().eval()
    model.set_attn_implementation("eager")
    compiled = Compiled(Outputs(model))
    out, expected = compiled(input_ids=_ids()), model(input_ids=_ids()).logits
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert compiled.variants == [variant], compiled.misses


def test_a_softcap_is_a_program() -> None:
    config = transformers.Gemma2Config(**SIZE, **SMALL, num_key_value_heads=2, head_dim=8)
    model = transformers.Gemma2ForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    compiled = Compiled(Outputs(model))
    torch.testing.assert_close(compiled(input_ids=_ids()), model(input_ids=_ids()).logits)
    assert compiled.variants == ["program+gqa+mask+score"] * config.num_hidden_layers


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(need_weights: bool) -> None:
    module = nn.MultiheadAttention(32, 4, batch_first=True)

    def run(x: Tensor) -> Tensor:
        return module(x, x, x, need_weights=need_weights)[0]

    compiled, x = Compiled(run), torch.randn(2, 13, 32)
    torch.testing.assert_close(compiled(x), run(x))
    assert compiled.variants == ["full"]


def test_multihead_attention_that_returns_its_weights() -> None:
    module = nn.MultiheadAttention(32, 4, batch_first=True)
    compiled, x = Compiled(lambda x: module(x, x, x)), torch.randn(2, 13, 32)
    torch.testing.assert_close(compiled(x), module(x, x, x))
    assert compiled.variants == ["full+weights"]


@pytest.mark.parametrize("layer", [0, 1], ids=["sliding", "full"])
def test_gpt_oss_has_a_sink(layer: int) -> None:
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    kind = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6, "vocab_size": 101}
    size = {**SIZE, "num_hidden_layers": 2, "num_local_experts": 2}
    config = transformers.GptOssConfig(**size, **kind, attn_implementation="eager")

    def made() -> nn.Module:
        torch.manual_seed(0)
        module = gpt_oss.GptOssAttention(config, layer)
        for each in module.parameters():
            nn.init.normal_(each, std=0.2)
        return module

    place = torch.arange(13)
    near = place[None, :] > place[:, None] - (6 if made().sliding_window else 13)
    keep = (place[None, :] <= place[:, None]) & near
    angles = gpt_oss.GptOssRotaryEmbedding(config)(torch.randn(2, 13, 32), place[None])
    compiled: list[Compiled] = []

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = made()

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.where(keep, 0.0, torch.finfo(torch.float32).min).to(x.dtype)[None, None]
            return self.attention(x, tuple(each.to(x.dtype) for each in angles), mask)[0]

    def compile_(module: nn.Module) -> Compiled:
        compiled.append(Compiled(module))
        return compiled[0]

    inputs = {"x": torch.randn(2, 13, 32).requires_grad_()}
    assert_as_accurate_as_eager(Layer, inputs, compile_, dtype=torch.float32)
    assert compiled[0].variants[0].startswith("program+gqa+mask")
    assert compiled[0].variants[0].endswith("+sink")


def _is_random(node: torch.fx.Node) -> bool:
    return node.target is torch.ops.aten.dropout.default


@pytest.mark.parametrize("name", SITES)
def test_no_matrix_of_scores_is_left(name: str) -> None:
    compiled = Compiled(Outputs(_model(name, "eager")))
    compiled(**_inputs(name))
    length = 17 if name == "vit" else 13
    for node in compiled.graphs[0].graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.shape[-2:] == (length, length) and value.dim() == 4:
            assert name == "t5"  # its learned bias is a matrix
