"""One module each, written plainly: what a user has before a library was made for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.layout_cases import Bottleneck


def _heads(x: Tensor, heads: int) -> Tensor:
    """(batch, length, width) as (batch, heads, length, width / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class EncoderLayer(nn.Module):
    """BERT's layer: attention and a GELU MLP, each followed by dropout, residual and layer norm."""

    def __init__(self, width: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(part(x), self.heads) for part in (self.query, self.key, self.value))
        weights = self.dropout((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1))
        mixed = self.out((weights @ v).transpose(1, 2).flatten(2))
        x = self.norms[0](x + self.dropout(mixed))
        normed: Tensor = self.norms[1](x + self.dropout(self.down(F.gelu(self.up(x)))))
        return normed


class LinearCrossEntropy(nn.Module):
    """A language model's head and loss."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x).float(), labels)


class SwiGLU(nn.Module):
    """RMS norm, then down(silu(gate(x)) * up(x)), then the residual."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(
            x.dtype
        )
        out: Tensor = x + self.down(F.silu(self.gate(normed)) * self.up(normed))
        return out


class LinearAttention(nn.Module):
    """Causal linear attention, feature map elu + 1, as tril(Q K^T) V or as a running sum of k
    v^T."""

    def __init__(self, width: int, heads: int, running: bool) -> None:
        super().__init__()
        self.heads, self.running = heads, running
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(part, self.heads) for part in self.project(x).chunk(3, -1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        mixed = self._running(q, k, v) if self.running else self._masked(q, k, v)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def _masked(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT).tril()
        return (scores @ v) / scores.sum(-1, keepdim=True)

    def _running(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(2)
        norm = (q * k.cumsum(2)).sum(-1, keepdim=True)
        return (q.unsqueeze(-2) @ state).squeeze(-2) / norm


class GatedFFTConvolution(nn.Module):
    """A causal convolution as long as the sequence, by FFT in float32, gated on both sides (Hyena's
    inner form)."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(width, length) / length)

    def forward(self, x: Tensor, gate_in: Tensor, gate_out: Tensor) -> Tensor:
        length = x.shape[-1]
        spectrum = torch.fft.rfft((x * gate_in).float(), n=2 * length)
        kernel = torch.fft.rfft(self.filter.float(), n=2 * length)
        mixed = torch.fft.irfft(spectrum * kernel, n=2 * length)[..., :length]
        return mixed.to(x.dtype) * gate_out


class S4DKernel(nn.Module):
    """The convolution kernel of a diagonal state space: K[l] = 2 Re sum_n C_n exp(l dt A_n) (exp(dt
    A_n) - 1) / A_n."""

    def __init__(self, width: int, states: int, length: int) -> None:
        super().__init__()
        self.length = length
        self.log_dt = nn.Parameter(torch.rand(width) * math.log(100) + math.log(1e-3))
        self.c = nn.Parameter(torch.randn(width, states, 2) * 0.5**0.5)
        self.log_real = nn.Parameter(torch.full((width, states), math.log(0.5)))
        self.imaginary = nn.Parameter(math.pi * torch.arange(states).expand(width, states).clone())

    def forward(self, scale: Tensor) -> Tensor:
        dt = (self.log_dt.exp() * scale).unsqueeze(-1)
        a = torch.complex(-self.log_real.exp(), self.imaginary)
        step = a * dt
        c = torch.view_as_complex(self.c) * (step.exp() - 1) / a
        powers = step.unsqueeze(-1) * torch.arange(self.length, device=dt.device)
        return 2 * torch.einsum("hn,hnl->hl", c, powers.exp()).real


class MixtureOfExperts(nn.Module):
    """Top-2 routing and a loop over experts, each a GELU MLP."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
            for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            out = out.index_add(0, token, expert(x[token]) * weights[token, slot].unsqueeze(-1))
        return out


class Butterfly(nn.Module):
    """A product of log2(width) block-diagonal 2 x 2 factors applied to every row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.levels = width.bit_length() - 1
        self.twiddle = nn.Parameter(torch.randn(self.levels, width // 2, 2, 2) * 0.5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows, width = x.shape
        for level in range(self.levels):
            stride = 2**level
            pairs = x.view(rows, width // (2 * stride), 2, stride)
            factor = self.twiddle[level].view(width // (2 * stride), stride, 2, 2)
            x = torch.einsum("gsij,rgjs->rgis", factor, pairs).reshape(rows, width)
        return x


class BlockButterflyAttention(nn.Module):
    """Attention where block i sees block j if i == j or their numbers differ in one bit."""

    def __init__(self, width: int, heads: int, length: int, block: int) -> None:
        super().__init__()
        self.heads = heads
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        number = torch.arange(length) // block
        differ = number[:, None] ^ number[None, :]
        self.register_buffer("mask", (differ & (differ - 1)) == 0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(part, self.heads) for part in self.project(x).chunk(3, -1))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~self.mask, float("-inf")).softmax(-1)
        out: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return out


class Stem(nn.Module):
    """What a ResNet begins with, and the first convolution behind it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return out


Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """A module with the shapes of its inputs: ``make(False)`` at full size, ``make(True)`` small.

    ``integers`` names the inputs that are class numbers, with the number of classes at full size
    and small.
    """

    name: str
    make: Callable[[bool], tuple[nn.Module, Shapes]]
    dtype: torch.dtype = torch.bfloat16
    classes: tuple[int, int] = (0, 0)

    def module(self, quick: bool, device: str, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        with torch.device(device):
            return self.make(quick)[0]

    def inputs(self, quick: bool, device: str, seed: int) -> dict[str, Tensor]:
        """Random inputs in the case's dtype; floating ones want a gradient."""
        generator = torch.Generator(device).manual_seed(seed)
        with torch.device("meta"):
            shapes = self.make(quick)[1]
        found = {}
        for name, shape in shapes.items():
            if name == "labels":
                found[name] = torch.randint(
                    self.classes[quick], shape, generator=generator, device=device
                )
            else:
                drawn = torch.randn(shape, generator=generator, device=device)
                drawn = 1 + 0.1 * drawn if name == "scale" else drawn
                found[name] = drawn.to(self.dtype).requires_grad_()
        return found


def _encoder(quick: bool) -> tuple[nn.Module, Shapes]:
    width, heads = (64, 4) if quick else (1024, 16)
    return EncoderLayer(width, heads), {"x": (2, 32, 64) if quick else (8, 512, 1024)}


def _cross_entropy(quick: bool) -> tuple[nn.Module, Shapes]:
    tokens, width, vocabulary = (64, 32, 128) if quick else (8192, 2048, 128256)
    return LinearCrossEntropy(width, vocabulary), {"x": (tokens, width), "labels": (tokens,)}


def _swiglu(quick: bool) -> tuple[nn.Module, Shapes]:
    tokens, width, hidden = (64, 32, 128) if quick else (8192, 2048, 8192)
    return SwiGLU(width, hidden), {"x": (tokens, width)}


def _linear_attention(running: bool) -> Callable[[bool], tuple[nn.Module, Shapes]]:
    def make(quick: bool) -> tuple[nn.Module, Shapes]:
        width, heads = (64, 4) if quick else (1024, 16)
        batch, length = (2, 32) if quick else (1, 2048) if running else (4, 4096)
        return LinearAttention(width, heads, running), {"x": (batch, length, width)}

    return make


def _fft(quick: bool) -> tuple[nn.Module, Shapes]:
    batch, width, length = (2, 16, 64) if quick else (8, 768, 8192)
    shape = (batch, width, length)
    return GatedFFTConvolution(width, length), {"x": shape, "gate_in": shape, "gate_out": shape}


def _s4d(quick: bool) -> tuple[nn.Module, Shapes]:
    width, states, length = (8, 4, 64) if quick else (768, 64, 8192)
    return S4DKernel(width, states, length), {"scale": (width,)}


def _experts(quick: bool) -> tuple[nn.Module, Shapes]:
    tokens, width, hidden, experts = (64, 32, 64, 4) if quick else (8192, 1024, 4096, 16)
    return MixtureOfExperts(width, hidden, experts), {"x": (tokens, width)}


def _butterfly(quick: bool) -> tuple[nn.Module, Shapes]:
    tokens, width = (32, 64) if quick else (8192, 1024)
    return Butterfly(width), {"x": (tokens, width)}


def _block_butterfly(quick: bool) -> tuple[nn.Module, Shapes]:
    batch, length, width, heads, block = (2, 64, 64, 4, 8) if quick else (4, 4096, 1024, 16, 64)
    return BlockButterflyAttention(width, heads, length, block), {"x": (batch, length, width)}


def _residual(quick: bool) -> tuple[nn.Module, Shapes]:
    width, inner = (32, 16) if quick else (256, 64)
    return Bottleneck(width, inner), {"x": (2, 32, 8, 8) if quick else (64, 256, 56, 56)}


def _stem(quick: bool) -> tuple[nn.Module, Shapes]:
    return Stem(16 if quick else 64), {"x": (2, 3, 32, 32) if quick else (64, 3, 224, 224)}


CASES = (
    Case("encoder layer", _encoder),
    Case("linear + cross-entropy", _cross_entropy, classes=(128256, 128)),
    Case("rms norm + swiglu", _swiglu),
    Case("linear attention, tril", _linear_attention(running=False)),
    Case("linear attention, cumsum", _linear_attention(running=True)),
    Case("gated FFT convolution", _fft),
    Case("S4D kernel", _s4d, dtype=torch.float32),
    Case("mixture of experts", _experts),
    Case("butterfly", _butterfly),
    Case("block butterfly attention", _block_butterfly),
    Case("residual block", _residual),
    Case("stem of a ResNet", _stem),
)
