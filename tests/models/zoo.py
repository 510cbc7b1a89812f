"""The models every engine is tested on, at sizes a CPU runs in milliseconds, and wider for a GPU.

Weights are random and equal for every build; dropout is off unless asked for. Odd sizes on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """Widths shared by all: ``hidden`` is a multiple of the 4 heads; ``batch`` and ``length`` of
    one input."""

    hidden: int
    layers: int
    vocabulary: int
    batch: int
    length: int


TINY = Size(hidden=32, layers=2, vocabulary=51, batch=2, length=9)
MEDIUM = Size(hidden=256, layers=2, vocabulary=1013, batch=3, length=135)
HEADS = 4
LONGEST = 512
CLASSES = 7
PIXELS = 24

Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """``make(size, dropout)`` gives the module, ``draw(size, generator)`` named inputs, on the
    CPU."""

    name: str
    make: Callable[[Size, float], nn.Module]
    draw: Callable[[Size, torch.Generator], dict[str, Tensor]]

    def module(self, size: Size = TINY, dropout: float = 0.0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU
            torch.manual_seed(7)
            return self.make(size, dropout)

    def inputs(self, size: Size = TINY, seed: int = 0) -> dict[str, Tensor]:
        """Floating inputs require a gradient."""
        return self.draw(size, torch.Generator().manual_seed(seed))

    def draws(self, dtype: torch.dtype, size: Size = TINY) -> list[dict[str, Tensor]]:
        """One draw of inputs in float32; four below, where one may be luck (tests/accuracy.py)."""
        return [self.inputs(size, seed) for seed in range(1 if dtype == torch.float32 else 4)]

    def __str__(self) -> str:
        return self.name


def _tokens(size: Size, generator: torch.Generator) -> dict[str, Tensor]:
    shape = (size.batch, size.length)
    ids, labels = (torch.randint(size.vocabulary, shape, generator=generator) for _ in range(2))
    labels[0, :2] = -100  # positions the loss leaves out
    return {"input_ids": ids, "labels": labels}


def _image(size: Size, generator: torch.Generator) -> dict[str, Tensor]:
    pixels = torch.randn(size.batch, 3, PIXELS, PIXELS, generator=generator)
    labels = torch.randint(CLASSES, (size.batch,), generator=generator)
    return {"pixel_values": pixels, "labels": labels}


def _sequence(size: Size, generator: torch.Generator) -> dict[str, Tensor]:
    shape = (size.batch, size.length, size.hidden)
    return {"x": torch.randn(shape, generator=generator).requires_grad_()}


def _bert(attention: str) -> Callable[[Size, float], nn.Module]:
    def make(size: Size, dropout: float) -> nn.Module:
        from transformers import BertConfig, BertForMaskedLM

        config = BertConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=HEADS,
            intermediate_size=2 * size.hidden,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            attn_implementation=attention,
        )
        return BertForMaskedLM(config)

    return make


def _gpt2(attention: str) -> Callable[[Size, float], nn.Module]:
    def make(size: Size, dropout: float) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=size.vocabulary,
            n_embd=size.hidden,
            n_layer=size.layers,
            n_head=HEADS,
            n_positions=LONGEST,
            embd_pdrop=dropout,
            resid_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
            attn_implementation=attention,
        )
        model = GPT2LMHeadModel(config)
        model.loss_type = "ForCausalLM"  # else a logger call breaks the graph
        return model

    return make


def _llama(attention: str) -> Callable[[Size, float], nn.Module]:
    def make(size: Size, dropout: float) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 2,
            intermediate_size=3 * size.hidden,
            max_position_embeddings=LONGEST,
            attention_dropout=dropout,
            use_cache=False,
            attn_implementation=attention,
        )
        return LlamaForCausalLM(config)

    return make


def _vit(attention: str) -> Callable[[Size, float], nn.Module]:
    def make(size: Size, dropout: float) -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=HEADS,
            intermediate_size=2 * size.hidden,
            image_size=PIXELS,
            patch_size=8,
            num_labels=CLASSES,
            # else the first call sets it, and Dynamo compiles again for the second
            problem_type="single_label_classification",
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            attn_implementation=attention,
        )
        return ViTForImageClassification(config)

    return make


def _t5(attention: str, activation: str = "gated-gelu") -> Callable[[Size, float], nn.Module]:
    def make(size: Size, dropout: float) -> nn.Module:
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(
            vocab_size=size.vocabulary,
            d_model=size.hidden,
            d_kv=size.hidden // HEADS,
            d_ff=2 * size.hidden,
            num_layers=size.layers,
            num_heads=HEADS,
            dropout_rate=dropout,
            feed_forward_proj=activation,
            decoder_start_token_id=0,
            use_cache=False,
            attn_implementation=attention,
        )
        return T5ForConditionalGeneration(config)

    return make


def _encoder_layer(size: Size, dropout: float) -> nn.Module:
    return nn.TransformerEncoderLayer(
        size.hidden, HEADS, 2 * size.hidden, dropout, activation="gelu", batch_first=True
    )


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm (running statistics are written in training), a shortcut, a
    head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(3, width, 1, stride=2, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.norms[0](self.first(pixel_values)))
        x = self.norms[1](self.second(x))
        x = F.relu(x + self.norms[2](self.shortcut(pixel_values)))
        logits = self.head(x.mean((2, 3)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class SharedSigns(nn.Module):
    """A ReLU that lets through what the float64 run let through, on the same inputs."""

    def __init__(self, signs: dict[str, Tensor], name: str) -> None:
        super().__init__()
        self.signs, self.name = signs, name

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            self.signs[self.name] = (x > 0).detach()
        return x * self.signs[self.name].to(x.dtype)


def with_signs(module: nn.Module, signs: dict[str, Tensor]) -> nn.Module:
    """``module`` with each of its ReLUs a `SharedSigns`; the float64 run has to come first."""
    for name, inner in list(module.named_modules()):
        for child, activation in inner.named_children():
            if isinstance(activation, nn.ReLU):
                setattr(inner, child, SharedSigns(signs, f"{name}.{child}"))
    return module


class CellLoop(nn.Module):
    """An LSTM cell stepped over the sequence in Python."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = cell = x.new_zeros(x.shape[0], x.shape[2])
        states = []
        for step in x.unbind(1):
            hidden, cell = self.cell(step, (hidden, cell))
            states.append(hidden)
        return torch.stack(states, 1)


class MLP(nn.Module):
    """Two linear layers around a GELU, dropout, residual and layer norm."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))
        return out


class Broken(nn.Module):
    """Two MLPs with a graph break between them: two graphs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = MLP(width, 0.0), MLP(width, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        out: Tensor = self.second(x)
        return out


_ATTENDING = (
    ("bert", _bert, _tokens),
    ("gpt2", _gpt2, _tokens),
    ("llama", _llama, _tokens),
    ("vit", _vit, _image),
    ("t5", _t5, _tokens),
)
# T5 1.1, in PLAIN and SDPA, has a gated GELU. The first T5 has a ReLU: in bfloat16 one value beside
# zero that flips makes errors that are luck, so `T5_RELU` stands apart (`with_signs`).
T5_RELU = Case("t5-relu", _t5("eager", "relu"), _tokens)
PLAIN = tuple(Case(f"{name}-eager", make("eager"), draw) for name, make, draw in _ATTENDING)
SDPA = tuple(Case(f"{name}-sdpa", make("sdpa"), draw) for name, make, draw in _ATTENDING)
LAYERS = (
    Case("encoder-layer", _encoder_layer, lambda size, rng: {"src": _sequence(size, rng)["x"]}),
    Case("residual-block", lambda size, dropout: ResidualBlock(size.hidden), _image),
    Case("cell-loop", lambda size, dropout: CellLoop(size.hidden), _sequence),
    Case("mlp", lambda size, dropout: MLP(size.hidden, dropout), _sequence),
    Case("graph-break", lambda size, dropout: Broken(size.hidden), _sequence),
)
CASES = {case.name: case for case in (*PLAIN, *SDPA, *LAYERS)}
