# ruff: noqa: E501  # a table of texts
"""What a random program is made of: each function proposes a line over the values there are.

A proposal is tried on real tensors and dropped where eager refuses it, so none of them has to be
careful. What jumps (comparisons, rounding, positions) is asked only of *exact* values: there
rounding decides nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.fuzz.program import ATTENTION


@dataclass(frozen=True)
class Value:
    """A value of the program under way. ``exact``: the same in every float dtype."""

    name: str
    tensor: Tensor
    exact: bool

    @property
    def floating(self) -> bool:
        return self.tensor.is_floating_point()


@dataclass(frozen=True)
class Proposal:
    """The text of a step, what it reads, and whether its result is exact (a view, a comparison)."""

    text: str
    reads: tuple[Value, ...]
    exact: bool = False


Kind = Callable[[random.Random, Sequence[Value]], Proposal | None]

_SMOOTH = (
    "{0}.sin()", "{0}.cos()", "{0}.tanh()", "{0}.sigmoid()", "-{0}", "{0}.abs()", "{0}.relu()",
    "F.gelu({0})", "F.gelu({0}, approximate='tanh')", "F.silu({0})", "{0}.abs().add(0.1).sqrt()",
    "{0}.abs().add(0.5).rsqrt()", "{0}.abs().log1p()", "torch.erf({0})", "{0}.square()",
    "1 / ({0}.abs() + 0.5)", "F.softplus({0})", "F.leaky_relu({0}, 0.1)", "F.elu({0})",
    "{0}.clamp(-1, 1)", "{0}.clamp(min=-0.5)", "{0}.clamp(-3, 3).exp()", "{0}.clamp(-3, 3).expm1()",
    "{0} * 2 + 1", "{0} - 0.5", "3 - {0}", "{0} / 3", "{0} ** 2", "{0} ** 3", "2.0 / ({0}.abs() + 1)",
    "F.hardswish({0})", "F.hardsigmoid({0})", "F.mish({0})", "F.logsigmoid({0})", "F.relu6({0})",
    "torch.addcmul({0}, {0}, {0}, value=0.5)", "{0}.atan()", "{0}.clamp(-2, 2).sinh()",
    "torch.nan_to_num({0})", "torch.special.erfc({0})", "torch.asinh({0})", "{0}.clone()",
    "{0}.contiguous()", "{0}.detach() + {0}", "F.softsign({0})", "F.tanhshrink({0})",
    "torch.where({0} > 0, {0}, {0} * 0.5)", "F.celu({0})", "F.selu({0})", "torch.lerp({0}, {0} * 2, 0.3)",
    "{0}.abs().add(0.5) ** 1.5", "{0}.abs().add(0.5) ** -0.5", "torch.exp2({0}.clamp(-3, 3))",
    "{0}.abs().add(0.1).log()", "{0}.abs().add(0.1).log2()", "torch.sinc({0})", "{0}.double()",
    "torch.xlogy({0}, {0}.abs() + 0.1)", "torch.logit({0}.sigmoid().clamp(0.1, 0.9))",
)  # fmt: skip
# the sign of a NaN is nobody's: it is made a number before its sign is asked
_JUMPS = (
    "{0}.round()", "{0}.floor()", "{0}.ceil()", "{0}.trunc()", "{0}.sign()", "{0} > 0", "{0} <= 0.5",
    "{0}.frac()", "{0} % 2", "{0} // 0.75", "torch.fmod({0}, 1.5)", "{0}.isnan()", "{0} == 1",
    "{0} % -1.5", "torch.floor_divide({0}, 0.3)", "torch.signbit({0}.nan_to_num())", "{0}.logical_not()",
    "{0} // 2", "{0} // -3", "torch.remainder(2.5, {0}.abs() + 1)", "torch.heaviside({0}, {0})",
    "torch.div({0}, 0.7, rounding_mode='trunc')", "torch.div({0}, -0.7, rounding_mode='floor')",
)  # fmt: skip
_WHOLE = (
    "-{0}", "~{0}", "{0}.abs()", "{0} * 3", "{0} + 2", "{0} // 3", "{0} % 3", "{0} / 2", "{0} // -2",
    "{0} % -2", "{0} ** 2", "{0} & 3", "{0} | 4", "{0} ^ 5", "{0} << 1", "{0} >> 1", "{0} == 1",
    "{0}.clamp(1, 3)", "{0}.to(float32)", "{0}.bool()", "{0}.sign()", "{0} > 2", "{0}.logical_not()",
    "{0}.to(uint8)", "{0}.to(int32)", "{0} * 1.5", "{0} + 0.5", "{0}.to(float64)", "2 - {0}",
    "torch.fmod({0}, 3)", "{0} * True", "~({0} > 1)", "{0}.to(bool)", "{0}.to(float16)", "{0} ** 3",
    "torch.where({0} > 1, {0}, 7)", "{0}.square()", "{0}.sqrt()", "2 ** {0}", "{0}.masked_fill({0} > 1, 9)",
)  # fmt: skip
_PAIRS = (
    "{0} + {1}", "{0} - {1}", "{0} * {1}", "{0} / ({1}.abs() + 0.5)", "torch.maximum({0}, {1})",
    "torch.minimum({0}, {1})", "torch.where({2}, {0}, {1})", "torch.atan2({0}, {1}.abs() + 0.5)",
    "torch.add({0}, {1}, alpha=2)", "torch.hypot({0}, {1}.abs() + 0.1)", "torch.sub({0}, {1}, alpha=3)",
    "torch.lerp({0}, {1}, 0.25)", "F.smooth_l1_loss({0}, {1})", "F.mse_loss({0}, {1})",
    "torch.logaddexp({0}, {1})", "F.huber_loss({0}, {1})", "F.l1_loss({0}, {1}, reduction='none')",
    "torch.rsub({0}, {1})", "torch.addcdiv({0}, {0}, {1}.abs() + 1)", "torch.clamp({0}, max={1})",
    "torch.xlogy({0}, {1}.abs() + 0.1)", "torch.copysign({0}, {1}.nan_to_num())", "torch.cdist({0}, {1})",
    "torch.outer({0}.flatten(), {1}.flatten())", "F.cosine_similarity({0}, {1}, dim=-1)",
)  # fmt: skip
_EXACT_PAIRS = (
    "{0} < {1}", "{0} >= {1}", "{0} == {1}", "{0} != {1}", "({0} > 0) & ({1} > 0)",
    "({0} > 0) | ({1} > 1)", "({0} > 0) ^ ({1} > 0)", "torch.maximum({0}, {1})", "{0} % ({1}.abs() + 1)",
    "torch.fmod({0}, {1}.abs() + 1)", "{0} // ({1}.abs() + 1)", "{0} // (-{1}.abs() - 1)",
    "torch.logical_xor({0}, {1})", "{0} % (-{1}.abs() - 1)", "torch.eq({0}, {1}).sum()",
)  # fmt: skip
_WHOLE_PAIRS = (
    "{0} + {1}", "{0} - {1}", "{0} * {1}", "{0} & {1}", "{0} | {1}", "{0} ^ {1}", "{0} / ({1} + 1)",
    "{0} // ({1} + 1)", "{0} % ({1} + 1)", "torch.where({2}, {0}, {1})", "torch.gcd({0}, {1})",
)  # fmt: skip
_FOLDS = (
    "{0}.sum({d}, keepdim={k})", "{0}.mean({d}, keepdim={k})", "{0}.amax({d}, keepdim={k})",
    "{0}.amin({d}, keepdim={k})", "{0}.var({d}, keepdim={k})", "{0}.std({d}, keepdim={k}, correction=0)",
    "torch.logsumexp({0}, {d}, keepdim={k})", "torch.linalg.vector_norm({0}, dim={d}, keepdim={k})",
    "{0}.sum({d}, keepdim={k}, dtype=float32)", "torch.var_mean({0}, {d}, keepdim={k})[{i}]",
    "torch.linalg.vector_norm({0}, 1, {d}, keepdim={k})", "{0}.nansum({d}, keepdim={k})",
)  # fmt: skip
_FOLDS_ALL = ("{0}.sum()", "{0}.mean()", "{0}.max()", "{0}.min()", "{0}.clamp(-1, 1).prod()",
              "{0}.var()", "{0}.norm()")  # fmt: skip
_ALONG = (
    "{0}.softmax({d})", "F.log_softmax({0}, {d})", "{0}.cumsum({d})", "{0}.tanh().cumprod({d})",
    "{0}.clamp(-1, 1).prod({d})", "{0}.max({d})[0]", "F.normalize({0}, dim={d})", "F.softmin({0}, {d})",
    "torch.logcumsumexp({0}.clamp(-4, 4), {d})", "{0}.diff(dim={d})", "F.glu(torch.cat([{0}, {0}], {d}), {d})",
    "{0}.softmax({d}, dtype=float32)", "{0}.min({d}, keepdim=True)[0]", "{0} - {0}.mean({d}, keepdim=True)",
    "{0} / (1e-3 + {0}.std({d}, keepdim=True, correction=0))", "{0}.aminmax(dim={d})[{i}]",
    "{0}.flip({d}).cumsum({d})", "torch.renorm({0}, 2, {d}, 1.5)", "{0}.cumsum({d}).sum({d})",
)  # fmt: skip
_EXACT_ALONG = (
    "{0}.argmax({d})", "{0}.argmin({d}, keepdim=True)", "{0}.sort({d})[0]", "({0} > 0).any({d})",
    "({0} > 0).all({d})", "({0} > 0).sum({d})", "{0}.cummax({d})[0]", "({0} > 0).cumsum({d})",
    "{0}.topk(1, {d})[0]", "{0}.count_nonzero({d})", "{0}.amax({d})", "{0}.median({d})[0]",
    "torch.unique_consecutive({0} > 0, dim={d}).any()", "{0}.kthvalue(1, {d})[0]",
)  # fmt: skip
_VIEWS = (
    "{0}.permute({p})", "{0}.unsqueeze({u})", "{0}.squeeze()", "{0}.flatten()", "{0}.t()",
    "{0}.transpose({d}, {e})", "{0}.select({d}, {c})", "{0}.narrow({d}, {c}, 1)", "{0}.flip({d})",
    "{0}.roll({c}, {d})", "{0}.unfold({d}, 2, 1)", "{0}.movedim({d}, {e})", "{0}.diagonal()",
    "{0}.repeat_interleave(2, {d})", "{0}.unbind({d})[{c}]", "{0}.chunk(2, {d})[{i}]",
    "{0}.split({m}, {d})[{i}]", "{0}[..., ::2]", "{0}[1:]", "{0}[:, 1:]", "{0}[None]", "{0}[..., -1]",
    "{0}.squeeze({d})", "{0}.tile(2)", "torch.rot90({0})", "{0}.expand({m}, *{0}.shape)", "{0}.view(-1)",
    "{0}.unsqueeze({d}).repeat_interleave({m}, {d})", "{0}.transpose({d}, {e}).contiguous()",
    "{0}[..., None].expand(*{0}.shape, {m})", "{0}.unflatten({d}, (1, -1))", "{0}.flatten({d})",
    "{0}.reshape(*{0}.shape[1:], -1)", "{0}.reshape(2, -1)", "{0}.unflatten({d}, (2, -1))",
    "{0}.reshape(-1, 3)", "{0}.reshape(-1, *{0}.shape[2:])", "{0}[..., {c}:{m}:2]", "{0}.mT",
    "{0}.tril()", "{0}.triu(1)", "{0}.view(*{0}.shape[:1], -1)", "torch.atleast_3d({0})",
    "{0}.as_strided({0}.shape, {0}.stride())", "{0}.broadcast_to(2, *{0}.shape)", "{0}.swapaxes({d}, {e})",
)  # fmt: skip
_PADS = (
    "F.pad({0}, ({c}, {m}))", "F.pad({0}, (1, -1))", "F.pad({0}, (0, 0, 1, {c}), value=0.5)",
    "F.pad({0}[None], (1, 1), mode='reflect')", "F.pad({0}[None], ({c}, 1), mode='replicate')",
    "F.pad({0}, (0, {c}, {c}, 0), value=-1.0)", "F.pad({0}[None], (1, 0), mode='circular')",
    "torch.cat([{0}, {0}], {d})", "torch.cat([{0}, {0} * 2, {0}], {d})", "torch.stack([{0}, {0} + 1], {u})",
    "F.pad({0}, (-1, {m}))", "torch.constant_pad_nd({0}, ({c}, 0, 0, 1), 2)",
)  # fmt: skip
_JOINS = ("torch.cat([{0}, {1}], {d})", "torch.stack([{0}, {1}], {u})", "torch.cat([{1}, {0}])",
          "torch.hstack([{0}, {1}])", "torch.vstack([{0}, {1}])",
          "torch.slice_scatter({0}, {1}[:1], 0, 0, 1)", "torch.select_scatter({0}, {1}[0], 0, 0)")  # fmt: skip
_PRODUCTS = (
    "{0} @ {1}", "{0} @ {1}.mT", "{0}.mT @ {1}", "F.linear({0}, {1})", "torch.matmul({0}, {1}.transpose(0, 1))",
    "torch.einsum('...i,...i->...', {0}, {1})", ATTENTION, "{0} @ {0}.mT",
    "torch.addmm({0}.sum(), {0}, {1}.t())", "torch.bmm({0}, {1}.mT)", "torch.outer({0}, {1})",
    "torch.baddbmm({0}.sum((1, 2), keepdim=True), {0}, {1}.mT, alpha=0.5)", "torch.kron({0}, {1})",
    "torch.tensordot({0}, {1}, dims=1)", "F.bilinear({0}, {0}, torch.ones(2, {0}.shape[-1], {0}.shape[-1], dtype={0}.dtype, device={0}.device))",
    "F.scaled_dot_product_attention({0}[None], {1}[None], {1}[None])", "torch.dot({0}, {1})",
)  # fmt: skip
_NORMS = (
    "F.layer_norm({0}, {0}.shape[-1:])", "F.layer_norm({0}, {0}.shape[-2:])", "F.rms_norm({0}, {0}.shape[-1:], eps=1e-3)",
    "F.group_norm({0}, 1)", "F.batch_norm({0}, None, None, training=True)", "F.instance_norm({0})",
    "F.layer_norm({0}, {0}.shape[-1:], {0}.new_full({0}.shape[-1:], 1.5))", "F.local_response_norm({0}, 2)",
    "F.avg_pool1d({0}[None], 2)", "F.max_pool1d({0}[None], 2)", "F.adaptive_avg_pool1d({0}[None], 2)",
    "F.interpolate({0}[None, None].flatten(2), scale_factor=2)", "F.adaptive_avg_pool2d({0}[None], 1)",
)  # fmt: skip
_INDEXED = (
    "{0}[{1}]", "{0}.index_select({d}, {1}.flatten())", "F.embedding({1}, {0})", "{0}[:, {1}]",
    "{0}[{1}, {1}]", "{0}.take({1})", "{0}.index_fill({d}, {1}.flatten(), 2)", "F.one_hot({1}, 5).to({0}.dtype)",
    "{0}.index_add({d}, {1}.flatten(), {0}.index_select({d}, {1}.flatten()))", "{0}[..., {1}]",
    "{0}.scatter_add(0, {1}.flatten()[:1], {0}[:1])", "torch.take_along_dim({0}, {1}.reshape(-1, *[1] * ({0}.dim() - 1)), 0)",
    "{0}.gather({d}, torch.zeros_like({0}, dtype=int64))", "{0}.index_put(({1},), {0}[{1}] * 2, accumulate=True)",
    "{0}.index_put(({1}.flatten()[:1],), {0}[0])", "{0}.scatter({d}, torch.zeros_like({0}, dtype=int64).narrow({d}, 0, 1), 1.5)",
    "{0}[{1} % {0}.shape[0]]", "{0}[-1 - {1}]", "F.embedding_bag({1}.reshape(1, -1), {0})", "{0}[{1} == 0]",
    "F.embedding({1} % {0}.shape[0], {0})", "{0}[{1} % {0}.shape[0]].sum(0)", "{0}.index_copy(0, {1}.flatten()[:1], {0}[:1] * 3)",
    "{0}.gather(-1, {1}.flatten()[:1].expand(*{0}.shape[:-1], 1))", "F.cross_entropy({0}.reshape({1}.numel(), -1), {1}.flatten())",
    "F.nll_loss({0}.reshape({1}.numel(), -1), {1}.flatten())", "torch.bincount({1}.flatten())[0] * {0}",
)  # fmt: skip
_MASKED = (
    "{0}.masked_fill({2}, -1.5)", "torch.where({2}, {0}, 0.5)", "{0} * {2}", "{0}.masked_fill(~{2}, 0)",
    "torch.where({2}, {0}, {0} * 2)", "{0}.masked_scatter({2}, {0} * 2)", "torch.where({2}, 1.0, {0})",
)  # fmt: skip
_CASTS = ("{0}.to(float32)", "{0}.to(bfloat16)", "{0}.to(float16)", "{0}.to(float64)",
          "{0}.to(float32) * 2", "{0}.to(bfloat16).to(float32)")  # fmt: skip
_WRITES = (
    "{0}.add_({1})", "{0}.mul_({1})", "{0}.copy_({1})", "{0}.zero_()", "{0}.add_(1)", "{0}.relu_()",
    "{0}.mul_(0.5)", "{0}[0].add_({1})", "{0}[..., 0].copy_({1})", "{0}.clamp_(-1, 1)", "{0}.fill_(2)",
    "{0}[1:].mul_(2)", "{0}.t().add_(1)", "{0}.view(-1)[0].zero_()", "{0}[..., ::2].sub_({1})",
    "{0}.neg_()", "{0}.addcmul_({1}, {1})", "{0}.masked_fill_({2}, 3)", "{0}.transpose(0, -1).mul_({1})",
    "{0}.index_add_(0, torch.zeros(1, dtype=int64, device={0}.device), {0}[:1] * 2)", "{0}.tanh_()",
    "{0}.diagonal().fill_(1)", "{0}.lerp_({1}, 0.5)", "{0}.exp_()",
)  # fmt: skip
_MADE = (
    "torch.arange({0}.shape[{d}], device={0}.device) * 2", "torch.zeros_like({0})", "torch.ones({0}.shape, device={0}.device)",
    "{0}.new_full((2, {m}), 1.5)", "torch.full_like({0}, 3)", "torch.eye({m}, device={0}.device)",
    "torch.arange({m}, device={0}.device)[:, None] <= torch.arange({m}, device={0}.device)", "torch.linspace(0, 1, {m}, device={0}.device)",
    "torch.tensor([1.0, 2.0, 0.5], device={0}.device)", "torch.tensor(1.5, device={0}.device)",
)  # fmt: skip
# of what is exact else
_ROUNDED = ("{0} / ({1} + 1)", "{0}.sqrt()", "{0}.to(float32).mean()",
            "torch.linspace(0, 1, {m}, device={0}.device)")  # fmt: skip


def _filled(rng: random.Random, text: str, value: Value) -> str:
    """The text with its small numbers chosen: dims, positions, sizes; operands stay open."""
    rank = max(1, value.tensor.dim())
    dims = sorted(rng.sample(range(rank), rng.randint(1, rank)))
    numbers = {
        "p": ", ".join(map(str, rng.sample(range(value.tensor.dim()), value.tensor.dim()))),
        "u": rng.randint(0, value.tensor.dim()),
        "e": rng.randrange(rank),
        "c": rng.randint(0, 2),
        "m": rng.randint(1, 4),
        "i": rng.randint(0, 1),
        "k": rng.random() < 0.4,
    }
    dim: object = rng.choice((rng.randrange(rank), -1))
    if text in _FOLDS:
        dim = dims if len(dims) > 1 else dims[0]
    for key, number in (*numbers.items(), ("d", dim)):
        text = text.replace("{" + key + "}", str(number))
    return text


def _one(texts: Sequence[str], wanted: Callable[[Value], bool], exact: bool = False) -> Kind:
    def kind(rng: random.Random, values: Sequence[Value]) -> Proposal | None:
        found = [v for v in values if wanted(v)]
        if not found:
            return None
        value = _recent(rng, found)
        text = rng.choice(texts)
        still = exact and value.exact and text not in _ROUNDED
        return Proposal(_filled(rng, text, value), (value,), still)

    return kind


def _several(
    texts: Sequence[str], wanted: Callable[[Value], bool], other: Callable[[Value], bool],
    exact: bool = False,
) -> Kind:  # fmt: skip
    def kind(rng: random.Random, values: Sequence[Value]) -> Proposal | None:
        first, second = ([v for v in values if w(v)] for w in (wanted, other))
        masks = [v for v in values if v.tensor.dtype == torch.bool]
        text = rng.choice(texts)
        if not first or not second or ("{2}" in text and not masks):
            return None
        a = _recent(rng, first)
        b = rng.choice([v for v in second if _fits(a, v)] or second)
        mask = rng.choice(masks) if masks else a
        reads = (a, b, mask)[: 3 if "{2}" in text else 2]
        still = exact and a.exact and b.exact and text not in _ROUNDED
        return Proposal(_filled(rng, text, a), reads, still)

    return kind


def _recent(rng: random.Random, values: Sequence[Value]) -> Value:
    """The later ones more often: programs then have chains as well as width."""
    return values[max(rng.randrange(len(values)), rng.randrange(len(values)))]


def _fits(a: Value, b: Value) -> bool:
    try:
        torch.broadcast_shapes(a.tensor.shape, b.tensor.shape)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return False
    return True


def _floating(v: Value) -> bool:
    return v.floating


def _whole(v: Value) -> bool:
    return not v.floating


def _exact(v: Value) -> bool:
    return v.exact


def _index(v: Value) -> bool:
    return v.tensor.dtype == torch.int64 and v.tensor.numel() > 0


def _any(v: Value) -> bool:
    return True


def _free(v: Value) -> bool:
    """What may be written in place: whatever autograd does not hold as a leaf."""
    return not v.tensor.is_leaf or not v.tensor.requires_grad


KINDS: tuple[tuple[int, Kind], ...] = (
    (20, _one(_SMOOTH, _floating)),
    (4, _one(_JUMPS, lambda v: v.exact and v.floating, exact=True)),
    (6, _one(_WHOLE, _whole, exact=True)),
    (16, _several(_PAIRS, _floating, _floating)),
    (3, _several(("{0} + {1}", "{0} * {1}", "{1} - {0}"), _floating, _whole)),
    (4, _several(_EXACT_PAIRS, _exact, _exact, exact=True)),
    (3, _several(_WHOLE_PAIRS, _whole, _whole, exact=True)),
    (10, _one(_FOLDS, _floating)),
    (2, _one(_FOLDS_ALL, _floating)),
    (2, _one(("{0}.sum()", "{0}.any()", "{0}.sum({d})", "{0}.prod({d})", "{0}.cumsum({d})",
              "{0}.amax({d})", "{0}.to(float32).mean()"), _whole, exact=True)),
    (9, _one(_ALONG, _floating)),
    (3, _one(_EXACT_ALONG, _exact, exact=True)),
    (18, _one(_VIEWS, _any, exact=True)),
    (6, _one(_PADS, _any, exact=True)),
    (5, _several(_JOINS, _any, _any, exact=True)),
    (7, _several(_PRODUCTS, _floating, _floating)),
    (6, _one(_NORMS, _floating)),
    (7, _several(_INDEXED, _floating, _index)),
    (3, _several(_MASKED, _floating, _floating)),
    (5, _one(_CASTS, _floating)),
    (4, _several(_WRITES, _free, _any)),
    (2, _one(_MADE, _any, exact=True)),
)  # fmt: skip
