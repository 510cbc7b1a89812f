"""The four models, at the sizes the tables are made with and at sizes for a CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Model:
    """``build(attention, quick)`` gives the module; ``sizes`` and ``quick_sizes`` say what a batch
    is."""

    name: str
    build: Callable[[str, bool], nn.Module]
    sizes: Sizes
    quick_sizes: Sizes
    vocabulary: int = 0

    def module(self, attention: str, quick: bool, device: str, seed: int = 0) -> nn.Module:
        """Random weights, the same for the same seed, in float32 on ``device``."""
        from transformers.utils import logging

        logging.set_verbosity_error()  # special tokens outside the small vocabularies are no news
        torch.manual_seed(seed)
        with torch.device(device):
            return self.build(attention, quick)

    def inputs(self, quick: bool, device: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        """One random batch, with labels."""
        sizes = self.quick_sizes if quick else self.sizes
        generator = torch.Generator(device).manual_seed(seed)

        def integers(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=generator, device=device)

        batch = sizes["batch"]
        if "pixels" in sizes:
            shape = (batch, 3, sizes["pixels"], sizes["pixels"])
            pixels = torch.randn(shape, generator=generator, device=device)
            return {"pixel_values": pixels.to(dtype), "labels": integers(2, batch)}
        high = 128 if quick else self.vocabulary
        ids, labels = (integers(high, batch, sizes["length"]) for _ in range(2))
        return {"input_ids": ids, "labels": labels}


class Classifier(nn.Module):
    """Cross-entropy on float logits around an image classifier."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(pixel_values).logits
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


_QUICK = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}


def _bert(attention: str, quick: bool) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    large = {
        "hidden_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
    config = BertConfig(
        **(_QUICK | {"vocab_size": 128} if quick else large), attn_implementation=attention
    )
    return BertForMaskedLM(config)


def _gpt2(attention: str, quick: bool) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
    if quick:
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 128}
    model = GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False, attn_implementation=attention))
    model.loss_type = "ForCausalLM"  # else a logger call breaks the graph between head and loss
    return model


def _llama(attention: str, quick: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    large = {
        "hidden_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    }
    small = _QUICK | {"num_key_value_heads": 2, "vocab_size": 128}
    config = LlamaConfig(
        **(small if quick else large), use_cache=False, attn_implementation=attention
    )
    return LlamaForCausalLM(config)


def _vit(attention: str, quick: bool) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    large = {
        "hidden_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
    small = _QUICK | {"image_size": 32, "patch_size": 8}
    config = ViTConfig(**(small if quick else large), attn_implementation=attention)
    return Classifier(ViTForImageClassification(config))


MODELS = {
    model.name: model
    for model in (
        Model("bert", _bert, {"batch": 16, "length": 512}, {"batch": 2, "length": 32}, 30522),
        Model("gpt2", _gpt2, {"batch": 8, "length": 1024}, {"batch": 2, "length": 32}, 50257),
        Model("llama", _llama, {"batch": 2, "length": 4096}, {"batch": 2, "length": 32}, 128256),
        Model("vit", _vit, {"batch": 64, "pixels": 224}, {"batch": 2, "pixels": 32}),
    )
}


def without_dropout(module: nn.Module) -> nn.Module:
    """The same module with every dropout probability zero, functional attention dropout
    included."""
    for part in module.modules():
        for name in (
            "p",
            "dropout",
            "dropout_prob",
            "attention_dropout",
            "attention_probs_dropout_prob",
        ):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    return module
