"""Score programs for tests, and attention with one written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from iocompiler.tile.dropout import kept
from iocompiler.tile.score import Empty, ScoreProgram
from iocompiler.tile.score_builder import ScoreBuilder
from iocompiler.tile.score_reference import evaluate


@dataclass(frozen=True)
class Case:
    """``make(builder, scaled product)`` gives the new score and what is kept, ``operands`` the
    float64 tensors for (batch, heads, rows, columns).
    """

    make: Callable[[ScoreBuilder, int], tuple[int, int | None]]
    operands: Callable[[int, int, int, int], list[Tensor]] = lambda b, h, s, k: []
    empty: Empty = "nan"

    def program(self, scale: float = 0.3) -> ScoreProgram:
        build = ScoreBuilder()
        score = build.map("mul", build.score(), build.const(scale))
        return build.program(*self.make(build, score), self.empty)


def lower(b: ScoreBuilder) -> int:
    return b.map("le", b.index("j"), b.index("i"))


def window(b: ScoreBuilder, size: int = 20) -> int:
    near = b.map("lt", b.map("sub", b.index("i"), b.index("j")), b.const(size))
    return b.map("and", lower(b), near)


def softcap(b: ScoreBuilder, s: int, tanh: str = "tanh") -> tuple[int, int | None]:
    return b.map("mul", b.map(tanh, b.map("mul", s, b.const(0.5))), b.const(2.0)), lower(b)


def alibi(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    distance = b.cast(b.map("sub", b.index("j"), b.index("i")), "float")
    slope = b.load(0, (b.index("h"),), "float")
    return b.map("add", s, b.map("mul", distance, slope)), lower(b)


def bias(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    places = (b.index("h"), b.index("i"), b.index("j"))
    return b.map("add", s, b.load(0, places, "float")), None


def relative(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    """A table of biases by distance, [H, 400], the distance 0 in its middle."""
    place = b.map("add", b.map("sub", b.index("j"), b.index("i")), b.const(200))
    return b.map("add", s, b.load(0, (b.index("h"), place), "float")), lower(b)


def image(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    """Biases by the row and by the column of an image, 7 wide, that a key lies in."""
    span, (x, h, i, j) = b.const(7), (b.index(name) for name in "bhij")
    of_rows = b.load(0, (x, h, i, b.map("int_trunc_div", j, span)), "float")
    of_columns = b.load(1, (h, i, b.map("int_trunc_mod", j, span)), "float")
    return b.map("add", b.map("add", s, of_rows), of_columns), lower(b)


def _image(b: int, h: int, s: int, k: int) -> list[Tensor]:
    shapes = (b, h, s, -(-k // 7)), (h, s, 7)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def document(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    i, j = (b.load(0, (b.index("b"), b.index(x)), "int") for x in "ij")
    return s, b.map("and", b.map("eq", i, j), lower(b))


def padding(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    return s, b.load(0, (b.index("b"), b.index("j")), "bool")


def sunk(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    """Padding written into the scores: a row of it is uniform over what the mask keeps."""
    kept = b.load(0, (b.index("b"), b.index("j")), "bool")
    return b.map("where", kept, s, b.const(-1e30)), lower(b)


def tile_mask(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    return s, b.load(0, (b.index("i"), b.index("j")), "bool")


def hiding(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    """A bias that hides where it is negative enough."""
    added = b.load(0, (b.index("i"), b.index("j")), "float")
    return b.map("add", s, added), b.map("gt", added, b.const(-9.9e3))


def _hiding(b: int, h: int, s: int, k: int) -> list[Tensor]:
    (kept,) = _block_mask(b, h, s, k)
    return [torch.where(kept, torch.randn(s, k, dtype=torch.float64), float("-inf"))]


def gated(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    """Sigmoid attention with a bias for each head."""
    return b.map("sigmoid", b.map("add", s, b.load(0, (b.index("h"),), "float"))), lower(b)


def rectified(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    """The square of what is positive, of documents."""
    _, kept = document(b, s)
    zero = b.const(0.0)
    positive = b.map("where", b.map("le", s, zero), zero, s)
    return b.map("mul", b.map("mul", positive, positive), b.const(0.125)), kept


def _block_mask(b: int, h: int, s: int, k: int) -> list[Tensor]:
    some = torch.rand(-(-s // 16), -(-k // 16)) > 0.4
    some[:, 0] = True
    return [some.repeat_interleave(16, 0).repeat_interleave(16, 1)[:s, :k]]


def _documents(b: int, h: int, s: int, k: int) -> list[Tensor]:
    return [torch.randint(0, 4, (b, max(s, k))).sort(-1)[0]]


def _padding(b: int, h: int, s: int, k: int) -> list[Tensor]:
    kept = torch.arange(k) < torch.randint(1, k, (b, 1))
    kept[0] = False
    return [kept]


CASES = {
    "full": Case(lambda b, s: (s, None)),
    "causal": Case(lambda b, s: (s, lower(b))),
    "window": Case(lambda b, s: (s, window(b))),
    "softcap": Case(softcap),
    "alibi": Case(alibi, lambda b, h, s, k: [torch.rand(h, dtype=torch.float64)]),
    "bias": Case(bias, lambda b, h, s, k: [torch.randn(h, s, k, dtype=torch.float64)]),
    "relative": Case(relative, lambda b, h, s, k: [torch.randn(h, 400, dtype=torch.float64)]),
    "image": Case(image, _image),
    "document": Case(document, _documents, "zero"),
    "padding": Case(padding, _padding),
    "padding, zero": Case(padding, _padding, "zero"),
    "padding, uniform": Case(padding, _padding, "uniform"),
    "sunk": Case(sunk, _padding),
    "hiding bias": Case(hiding, _hiding),
    "sigmoid": Case(gated, lambda b, h, s, k: [torch.randn(h, dtype=torch.float64)], "weights"),
    "sigmoid of all": Case(lambda b, s: (b.map("sigmoid", s), None), empty="weights"),
    "squared relu": Case(rectified, _documents, "weights"),
    "block mask": Case(tile_mask, _block_mask, "zero"),
}
COARSE_SOFTCAP = Case(partial(softcap, tanh="coarse_tanh"))  # within bfloat16 alone


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    program: ScoreProgram,
    operands: Sequence[Tensor] = (),
    numbers: Sequence[int] = (),
    *,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Every matrix made."""
    drop = {"seed": seed, "dropout_p": dropout_p}
    return reference_rows(q, k, v, program, operands, numbers, **drop)[0]  # type: ignore[arg-type]


def reference_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    program: ScoreProgram,
    operands: Sequence[Tensor] = (),
    numbers: Sequence[int] = (),
    *,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of each row, which is of no meaning without softmax."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2)
    shapes = {"b": (-1, 1, 1, 1), "h": (-1, 1, 1), "i": (-1, 1), "j": (-1,)}
    places = {
        name: torch.arange(n, device=q.device).reshape(shape)
        for (name, shape), n in zip(shapes.items(), scores.shape, strict=True)
    }
    wanted = [program.score] if program.keep is None else [program.score, program.keep]
    found = evaluate(program, wanted, scores, places, operands, numbers, q.dtype)
    score = found[0]
    if program.empty == "weights":
        weights = score.expand(scores.shape)
        weights = weights if program.keep is None else weights.masked_fill(~found[1], 0.0)
        return weights @ v, score.new_zeros(scores.shape[:3])
    if program.keep is not None:
        lowest = max(-1e30, torch.finfo(score.dtype).min)
        fill = lowest if program.empty == "uniform" else float("-inf")
        score = score.masked_fill(~found[1], fill)
    weights = score.softmax(-1)
    if program.empty == "zero" and program.keep is not None:
        weights = weights.masked_fill(~found[1].any(-1, keepdim=True), 0.0)
    if seed is not None:
        spared = kept(seed, **places, dropout_p=dropout_p)
        weights = weights.masked_fill(~spared, 0.0) / (1.0 - dropout_p)
    return weights @ v, score.logsumexp(-1)


def heads(
    batch: int, heads: int, groups: int, rows: int, columns: int, width: int, value_width: int = 0
) -> list[Tensor]:
    """Query and value in [B, S, H, D] memory order, key in [B, H, S, D]; float64."""
    make = torch.Generator().manual_seed(0)
    shapes = (
        (batch, rows, heads, width),
        (batch, groups, columns, width),
        (batch, columns, groups, value_width or width),
    )
    q, k, v = (torch.randn(shape, dtype=torch.float64, generator=make) for shape in shapes)
    return [q.transpose(1, 2), k, v.transpose(1, 2)]
