"""Functions whose decompositions are tried out: name, function, and a maker of inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Case = tuple[Callable[..., Any], Callable[[], list[Any]]]


def leaf(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return (torch.randn(*shape) * scale + shift).requires_grad_()


def plain(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _one(function: Callable[[Tensor], Any], *shape: int, **how: float) -> Case:
    return function, lambda: [leaf(*(shape or (5, 7, 13)), **how)]


def _labels(*shape: int, classes: int = 13) -> Tensor:
    labels = torch.randint(0, classes, shape)
    labels.view(-1)[::3] = -100
    return labels


def _entropy(*shape: int, weight: bool = False, **keywords: Any) -> Case:
    target = (shape[0], *shape[2:])

    def make() -> list[Any]:
        extra = [torch.rand(shape[1])] if weight else []
        return [leaf(*shape), _labels(*target, classes=shape[1]), *extra]

    def function(x: Tensor, y: Tensor, w: Tensor | None = None) -> Tensor:
        return F.cross_entropy(x, y, w, **keywords)

    return function, make


def _loss(function: Callable[..., Any], **keywords: Any) -> Case:
    return lambda x, y: function(x, y, **keywords), lambda: [leaf(9, 11), leaf(9, 11)]


def _unit(function: Callable[..., Any], **keywords: Any) -> Case:
    return (
        lambda x, y: function(x.sigmoid(), y, **keywords),
        lambda: [leaf(9, 11), torch.rand(9, 11)],
    )


POINTWISE: dict[str, Case] = {
    "gelu": _one(F.gelu),
    "gelu tanh": _one(lambda x: F.gelu(x, approximate="tanh")),
    "silu": _one(F.silu),
    "mish": _one(F.mish),
    "hardswish": _one(F.hardswish, scale=4),
    "hardsigmoid": _one(F.hardsigmoid, scale=4),
    "hardtanh": _one(F.hardtanh),
    "relu6": _one(F.relu6, scale=5),
    "elu": _one(lambda x: F.elu(x, 0.7)),
    "selu": _one(F.selu),
    "celu": _one(F.celu),
    "leaky_relu": _one(F.leaky_relu),
    "softplus": _one(F.softplus, scale=9),
    "logsigmoid": _one(F.logsigmoid, scale=5),
    "softshrink": _one(F.softshrink),
    "hardshrink": _one(F.hardshrink),
    "threshold": _one(lambda x: F.threshold(x, 0.1, 20.0)),
    "softsign": _one(F.softsign),
    "tanhshrink": _one(F.tanhshrink),
    "glu": _one(lambda x: F.glu(x, 0), 6, 5),
    "prelu": (F.prelu, lambda: [leaf(3, 5, 4), leaf(5)]),
    "addcmul": (
        lambda a, b, c: torch.addcmul(a, b, c, value=0.3),
        lambda: [leaf(4, 5), leaf(5), leaf(4, 1)],
    ),
    "addcdiv": (
        lambda a, b, c: torch.addcdiv(a, b, c, value=-2),
        lambda: [leaf(4, 5), leaf(4, 5), leaf(4, 5, shift=9)],
    ),
    "lerp": (lambda a, b: torch.lerp(a, b, 0.7), lambda: [leaf(9, 3), leaf(9, 3)]),
    "lerp tensor": (torch.lerp, lambda: [leaf(9, 3), leaf(9, 3), leaf(9, 3)]),
    "clamp": _one(lambda x: x.clamp(-0.5, 0.7)),
    "clamp_min": _one(lambda x: x.clamp_min(0.1)),
    "clamp_max": _one(lambda x: x.clamp_max(0.1)),
    "clamp tensor": (lambda x, a, b: x.clamp(a, b), lambda: [leaf(5, 6), leaf(6), leaf(5, 1)]),
    "rsub": _one(lambda x: 3 - x),
    "square": _one(torch.square),
    "logaddexp": (torch.logaddexp, lambda: [leaf(5, 6), leaf(5, 6)]),
    "xlogy": (lambda x, y: torch.xlogy(x, y.exp()), lambda: [leaf(5, 6), leaf(5, 6)]),
    "nan_to_num": _one(lambda x: (x.log() / x.relu()).nan_to_num(1, 2, 3)),
    "masked_fill": (
        lambda x, m: x.masked_fill(m, float("-inf")).exp(),
        lambda: [leaf(6, 7), plain(7) > 0],
    ),
    "tril": _one(lambda x: x.tril(-1)),
    "triu": _one(lambda x: x.triu(1)),
    "sigmoid, tanh": _one(lambda x: torch.sigmoid(x) * torch.tanh(x)),
    "logit": _one(lambda x: torch.logit(x.sigmoid(), 1e-3)),
    "sinc": _one(torch.sinc),
    "hypot-like": (lambda x, y: torch.sqrt(x * x + y * y), lambda: [leaf(8, 3), leaf(3)]),
    "deg2rad": _one(torch.deg2rad),
    "cast": _one(lambda x: x.to(torch.bfloat16).float() + x.to(torch.float64).float()),
}

REDUCING: dict[str, Case] = {
    "var": _one(lambda x: x.var(-1)),
    "var, mean 100": _one(lambda x: x.var(-1), 8, 512, shift=100),
    "var of all": _one(lambda x: x.var(correction=0)),
    "std": _one(lambda x: x.std((0, 2), keepdim=True)),
    "var_mean": _one(lambda x: torch.var_mean(x, 1)),
    "std_mean": _one(lambda x: torch.std_mean(x, 1, correction=2)),
    "logsumexp": _one(lambda x: torch.logsumexp(x, (0, 2))),
    "norm 2": _one(lambda x: torch.linalg.vector_norm(x, dim=-1)),
    "norm 1": _one(lambda x: x.norm(1)),
    "norm 3": _one(lambda x: x.norm(3, dim=0)),
    "norm inf": _one(lambda x: torch.linalg.vector_norm(x, float("inf"), dim=1)),
    "mean": _one(lambda x: x.mean((0, 1))),
    "prod": _one(lambda x: x.prod(1)),
    "amax": _one(lambda x: x.amax((0, 2))),
    "cumsum": _one(lambda x: x.cumsum(1)),
    "softmax": _one(lambda x: x.softmax(-1), scale=3),
    "softmax 0": _one(lambda x: x.softmax(0), scale=3),
    "log_softmax": _one(lambda x: x.log_softmax(1), scale=3),
    "softmax in float32": _one(lambda x: F.softmax(x, -1, dtype=torch.float32)),
    "normalize": _one(lambda x: F.normalize(x, dim=1)),
    "cosine_similarity": (F.cosine_similarity, lambda: [leaf(6, 17), leaf(6, 17)]),
    "renorm": _one(lambda x: torch.renorm(x, 2, 0, 1.5)),
    "sum of squares": _one(lambda x: x.square().sum((0, 2))),
}

NORMS: dict[str, Case] = {
    "layer_norm": (
        lambda x, w, b: F.layer_norm(x, (17,), w, b),
        lambda: [leaf(3, 5, 17, shift=2), leaf(17), leaf(17)],
    ),
    "layer_norm, mean 100": (
        lambda x, w, b: F.layer_norm(x, (512,), w, b),
        lambda: [leaf(8, 512, shift=100), leaf(512), leaf(512)],
    ),
    "layer_norm 2d": (
        lambda x, w: F.layer_norm(x, (5, 17), w),
        lambda: [leaf(3, 5, 17), leaf(5, 17)],
    ),
    "layer_norm plain": _one(lambda x: F.layer_norm(x, (13,))),
    "group_norm": (
        lambda x, w, b: F.group_norm(x, 3, w, b),
        lambda: [leaf(2, 6, 5, 3), leaf(6), leaf(6)],
    ),
    "rms_norm": (lambda x, w: F.rms_norm(x, (17,), w, 1e-6), lambda: [leaf(5, 17), leaf(17)]),
    "rms_norm by hand": (
        lambda x, w: (
            (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
            * w
        ),
        lambda: [leaf(5, 17), leaf(17)],
    ),
    "batch_norm": (
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        lambda: [leaf(4, 6, 5, 3, shift=3), leaf(6), leaf(6)],
    ),
    "batch_norm eval": (
        lambda x, w, b, m, v: F.batch_norm(x, m, v.exp(), w, b),
        lambda: [leaf(4, 6, 5), leaf(6), leaf(6), plain(6), plain(6)],
    ),
    "instance_norm": (
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
        lambda: [leaf(2, 6, 5, 3), leaf(6), leaf(6)],
    ),
}

LOSSES: dict[str, Case] = {
    "cross_entropy": _entropy(9, 13),
    "cross_entropy weight": _entropy(9, 13, weight=True),
    "cross_entropy smooth": _entropy(9, 13, label_smoothing=0.1),
    "cross_entropy smooth, weight": _entropy(9, 13, weight=True, label_smoothing=0.3),
    "cross_entropy sum": _entropy(9, 13, weight=True, reduction="sum"),
    "cross_entropy none": _entropy(9, 13, weight=True, reduction="none"),
    "cross_entropy ignore 2": _entropy(9, 13, ignore_index=-100),
    "cross_entropy 2d": _entropy(2, 5, 3, 4, weight=True),
    "cross_entropy 1d": _entropy(2, 5, 3),
    "cross_entropy probabilities": (
        lambda x, y: F.cross_entropy(x, y.softmax(-1), label_smoothing=0.1),
        lambda: [leaf(9, 13), leaf(9, 13)],
    ),
    "cross_entropy one": (
        F.cross_entropy,
        lambda: [leaf(13), torch.tensor(4)],
    ),
    "cross_entropy large": (
        F.cross_entropy,
        lambda: [leaf(700, 50), torch.randint(0, 50, (700,))],
    ),
    "mse": _loss(F.mse_loss),
    "mse none": _loss(F.mse_loss, reduction="none"),
    "l1": _loss(F.l1_loss),
    "smooth_l1": _loss(F.smooth_l1_loss, beta=0.5),
    "huber": _loss(F.huber_loss, delta=0.7),
    "kl_div": _loss(lambda x, y: F.kl_div(x, y.softmax(-1), reduction="batchmean")),
    "kl_div log": _loss(lambda x, y: F.kl_div(x, y, log_target=True, reduction="sum")),
    "bce": _unit(F.binary_cross_entropy),
    "bce logits": (
        lambda x, y, w: F.binary_cross_entropy_with_logits(x, y, pos_weight=w),
        lambda: [leaf(9, 11, scale=4), torch.rand(9, 11), torch.rand(11)],
    ),
    "soft_margin": _loss(lambda x, y: F.soft_margin_loss(x, y.detach().sign())),
    "poisson": _loss(lambda x, y: F.poisson_nll_loss(x, y.exp())),
    "gaussian": (
        lambda x, y, v: F.gaussian_nll_loss(x, y, v.exp()),
        lambda: [leaf(9, 3), leaf(9, 3), leaf(9, 3)],
    ),
}

INDEXING: dict[str, Case] = {
    "gather": (
        lambda x, i: x.gather(1, i),
        lambda: [leaf(5, 7), torch.randint(0, 7, (5, 1))],
    ),
    "gather many": (
        lambda x, i: x.gather(1, i),
        lambda: [leaf(5, 7), torch.randint(0, 7, (5, 4))],
    ),
    "gather middle": (
        lambda x, i: x.gather(-2, i),
        lambda: [leaf(5, 7, 3), torch.randint(0, 7, (5, 1, 3))],
    ),
    "scatter value": (
        lambda x, i: x.scatter(1, i, 2.5),
        lambda: [leaf(5, 7), torch.randint(0, 7, (5, 1))],
    ),
    "scatter many": (
        lambda x, i: x.scatter(1, i, 2.5),
        lambda: [leaf(5, 7), torch.randint(0, 7, (5, 2))],
    ),
    "scatter narrow": (
        lambda x, i: x.scatter(1, i, 2.5),
        lambda: [leaf(5, 7), torch.randint(0, 7, (3, 1))],
    ),
    "scatter src": (
        lambda x, i, s: x.scatter(0, i, s),
        lambda: [leaf(5, 7), torch.randint(0, 5, (1, 7)), leaf(1, 7)],
    ),
    "scatter from larger": (
        lambda x, i, s: x.scatter(0, i, s),
        lambda: [plain(5, 7), torch.randint(0, 5, (1, 7)), plain(3, 7)],
    ),
    "scatter_add": (
        lambda x, i, s: x.scatter_add(1, i, s),
        lambda: [leaf(5, 7), torch.randint(0, 7, (5, 1)), leaf(5, 1)],
    ),
    "one_hot": (
        lambda x, i: F.one_hot(i, 7) * x,
        lambda: [leaf(5, 7), torch.randint(0, 7, (5,))],
    ),
    "embedding": (
        lambda w, i: F.embedding(i, w, padding_idx=2),
        lambda: [leaf(9, 4), torch.randint(0, 9, (3, 5))],
    ),
    "index_select": (
        lambda x, i: x.index_select(1, i),
        lambda: [leaf(5, 7), torch.randint(0, 7, (4,))],
    ),
    "index": (lambda x, i: x[i, :, i], lambda: [leaf(5, 7, 5), torch.randint(0, 5, (4,))]),
    "roll": _one(lambda x: x.roll((2, -3), (0, 1))),
    "roll flat": _one(lambda x: x.roll(11)),
    "roll over": _one(lambda x: x.roll(29, 2)),
    "roll none": _one(lambda x: x.roll(14, 1)),
    "flip": _one(lambda x: x.flip((0, 2))),
    "split": _one(lambda x: [2 * part for part in x.split(3, 1)]),
    "split sizes": _one(lambda x: x.split([1, 0, 6], 1)),
    "chunk": _one(lambda x: x.chunk(4, -1)),
    "unbind": _one(lambda x: x.unbind(1)),
    "stack": _one(lambda x: torch.stack([x, x * 2], 1)),
    "repeat": _one(lambda x: x.repeat(2, 1, 3), 2, 3),
    "expand": _one(lambda x: x.expand(4, 3, 5), 3, 1),
    "repeat_interleave": _one(lambda x: x.repeat_interleave(3, 1)),
    "pad": _one(lambda x: F.pad(x, (1, -2, 0, 3), value=0.5)),
    "pad circular": _one(lambda x: F.pad(x, (2, 1), mode="circular")),
    "pad reflect": _one(lambda x: F.pad(x, (2, 1), mode="reflect")),
    "pad replicate": _one(lambda x: F.pad(x, (2, 1), mode="replicate")),
    "select, slice": _one(lambda x: x[1, 2:5] * x[:2, ::3, 1].sum()),
    "diagonal": _one(lambda x: torch.diagonal(x, 1, 0, 2)),
    "unfold": _one(lambda x: x.unfold(2, 4, 3)),
    "take_along_dim": (
        lambda x, i: torch.take_along_dim(x, i, 1),
        lambda: [leaf(5, 7), torch.randint(0, 7, (5, 1))],
    ),
    "pixel_shuffle": _one(lambda x: F.pixel_shuffle(x, 2), 2, 8, 3, 5),
    "upsample nearest": _one(lambda x: F.interpolate(x, scale_factor=2), 2, 3, 4, 5),
}

CONTRACTING: dict[str, Case] = {
    "addmm": (
        lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2),
        lambda: [leaf(7), leaf(5, 3), leaf(3, 7)],
    ),
    "baddbmm": (
        lambda c, a, b: torch.baddbmm(c, a, b, beta=0.5, alpha=2),
        lambda: [leaf(2, 1, 7), leaf(2, 5, 3), leaf(2, 3, 7)],
    ),
    "addmv": (
        lambda c, a, b: torch.addmv(c, a, b, beta=0.5, alpha=2),
        lambda: [leaf(5), leaf(5, 300), leaf(300)],
    ),
    "mv": (torch.mv, lambda: [leaf(5, 300), leaf(300)]),
    "dot": (torch.dot, lambda: [leaf(300), leaf(300)]),
    "addr": (torch.addr, lambda: [leaf(5, 7), leaf(5), leaf(7)]),
    "outer": (torch.outer, lambda: [leaf(5), leaf(7)]),
    "einsum": (
        lambda a, b: torch.einsum("bik,bkj->bij", a, b),
        lambda: [leaf(2, 5, 3), leaf(2, 3, 7)],
    ),
    "conv2d": (
        lambda x, w, b: F.conv2d(x, w, b, padding=1),
        lambda: [leaf(2, 3, 6, 5), leaf(4, 3, 3, 3), leaf(4)],
    ),
    "max_pool2d": _one(lambda x: F.max_pool2d(x, 2), 2, 3, 6, 4),
    "avg_pool2d": _one(lambda x: F.avg_pool2d(x, 2), 2, 3, 6, 4),
    "adaptive_avg_pool2d": _one(lambda x: F.adaptive_avg_pool2d(x, 1), 2, 3, 6, 4),
}

CASES: dict[str, Case] = POINTWISE | REDUCING | NORMS | LOSSES | INDEXING | CONTRACTING
