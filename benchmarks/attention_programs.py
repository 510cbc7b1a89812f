"""Our score programs, for a sweep over tiles of the template alone: (score, mask) of the product of
query and key, one function a kind.
"""

from __future__ import annotations

from iocompiler.tile.score_builder import ScoreBuilder


def _lower(b: ScoreBuilder) -> int:
    return b.map("le", b.index("j"), b.index("i"))


def unmasked(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    return s, None


def causal(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    return s, _lower(b)


def alibi(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    distance = b.cast(b.map("sub", b.index("j"), b.index("i")), "float")
    slope = b.load(0, (b.index("h"),), "float")
    return b.map("add", s, b.map("mul", slope, distance)), _lower(b)


def softcap(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    capped = b.map("coarse_tanh", b.map("mul", s, b.const(1 / 20.0)))
    return b.map("mul", capped, b.const(20.0)), _lower(b)


def window(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    near = b.map("lt", b.map("sub", b.index("i"), b.index("j")), b.const(512))
    return s, b.map("and", _lower(b), near)


def relative(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    place = b.map("add", b.map("sub", b.index("j"), b.index("i")), b.number(0))
    return b.map("add", s, b.load(0, (b.index("h"), place), "float")), _lower(b)


def sigmoid(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    return b.map("sigmoid", s), _lower(b)


def document(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    i, j = (b.load(0, (b.index("b"), b.index(x)), "int") for x in "ij")
    return s, b.map("and", b.map("eq", i, j), _lower(b))


def mask(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    return s, b.load(0, (b.index("i"), b.index("j")), "bool")


def cached(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    return s, b.map("le", b.index("j"), b.load(0, (b.index("i"),), "int"))
