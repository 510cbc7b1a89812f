"""The memory-bound kernels, each written as a user writes it, on ``rows`` x ``width``
activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DROPOUT = 0.1
HEAD = 128

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Kernel:
    """A function of named tensors; ``backward`` times its gradient instead.

    ``shapes(rows, width)`` are its inputs; those named in ``fixed`` need no gradient. ``replay``,
    for what is random, computes the expected outputs from wide inputs and the outputs observed (the
    dropout mask is read off them).
    """

    name: str
    function: Callable[..., object]
    shapes: Callable[[int, int], dict[str, tuple[int, ...]]]
    backward: bool = False
    fixed: tuple[str, ...] = ()
    replay: Callable[[Tensors, Tensors], dict[str, Tensor]] | None = None

    def inputs(
        self, rows: int, width: int, device: str, dtype: torch.dtype, seed: int
    ) -> dict[str, Tensor]:
        """Random inputs; weights around one, everything else around zero."""
        generator = torch.Generator(device).manual_seed(seed)
        found = {}
        for name, shape in self.shapes(rows, width).items():
            drawn = torch.randn(shape, generator=generator, device=device)
            drawn = 1 + 0.1 * drawn if name == "weight" else drawn
            found[name] = drawn.to(dtype).requires_grad_(self.backward and name not in self.fixed)
        return found


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return weight * scaled.to(x.dtype)


def softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


def log_softmax(x: Tensor) -> Tensor:
    return x.log_softmax(-1)


def bias_gelu_dropout(x: Tensor, bias: Tensor) -> Tensor:
    return F.dropout(F.gelu(x + bias), DROPOUT, True)


def residual_dropout_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The block of a pre-norm transformer: the new residual stream, and its norm for the next
    layer."""
    stream = residual + F.dropout(x, DROPOUT, True)
    return stream, F.layer_norm(stream, stream.shape[-1:], weight, bias)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of (batch, length, heads, 128) queries and keys, laid out as attention wants
    them."""
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    return q * cos + _rotated(q) * sin, k * cos + _rotated(k) * sin


def _rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def _replay_bias_gelu_dropout(inputs: Tensors, seen: Tensors) -> dict[str, Tensor]:
    keep = seen["out"] != 0
    _require_rate(keep)
    return {"out": F.gelu(inputs["x"] + inputs["bias"]) * keep / (1 - DROPOUT)}


def _replay_residual_dropout_norm(inputs: Tensors, seen: Tensors) -> dict[str, Tensor]:
    kept = inputs["residual"] + inputs["x"] / (1 - DROPOUT)
    keep = (seen["0"] - kept).abs() < (seen["0"] - inputs["residual"]).abs()
    _require_rate(keep)
    stream = torch.where(keep, kept, inputs["residual"])
    norm = F.layer_norm(stream, stream.shape[-1:], inputs["weight"], inputs["bias"])
    return {"0": stream, "1": norm}


def _require_rate(keep: Tensor) -> None:
    """The share kept must be 1 - p within five standard deviations, and 0.02 for elements too small
    to tell."""
    rate = keep.double().mean().item()
    allowed = 0.02 + 5 * (DROPOUT * (1 - DROPOUT) / keep.numel()) ** 0.5
    if abs(rate - (1 - DROPOUT)) > allowed:
        raise AssertionError(f"dropout kept {rate:.4f} of the elements, not {1 - DROPOUT}")


def _affine(rows: int, width: int) -> dict[str, tuple[int, ...]]:
    return {"x": (rows, width), "weight": (width,), "bias": (width,)}


def _scaled(rows: int, width: int) -> dict[str, tuple[int, ...]]:
    return {"x": (rows, width), "weight": (width,)}


def _plain(rows: int, width: int) -> dict[str, tuple[int, ...]]:
    return {"x": (rows, width)}


def _biased(rows: int, width: int) -> dict[str, tuple[int, ...]]:
    return {"x": (rows, width), "bias": (width,)}


def _residual(rows: int, width: int) -> dict[str, tuple[int, ...]]:
    return {"x": (rows, width), "residual": (rows, width), "weight": (width,), "bias": (width,)}


def _rope_shapes(rows: int, width: int) -> dict[str, tuple[int, ...]]:
    """Four sequences; q and k together are rows x width."""
    length = rows // 4
    heads = max(1, width // (2 * HEAD))
    both = (4, length, heads, HEAD)
    return {"q": both, "k": both, "cos": (length, HEAD), "sin": (length, HEAD)}


KERNELS = (
    Kernel("layer_norm", layer_norm, _affine),
    Kernel("layer_norm backward", layer_norm, _affine, backward=True),
    Kernel("rms_norm", rms_norm, _scaled),
    Kernel("rms_norm backward", rms_norm, _scaled, backward=True),
    Kernel("softmax", softmax, _plain),
    Kernel("softmax backward", softmax, _plain, backward=True),
    Kernel("log_softmax", log_softmax, _plain),
    Kernel("log_softmax backward", log_softmax, _plain, backward=True),
    Kernel("bias_gelu_dropout", bias_gelu_dropout, _biased, replay=_replay_bias_gelu_dropout),
    Kernel(
        "residual_dropout_norm",
        residual_dropout_norm,
        _residual,
        replay=_replay_residual_dropout_norm,
    ),
    Kernel("rope", rope, _rope_shapes, fixed=("cos", "sin")),
)
