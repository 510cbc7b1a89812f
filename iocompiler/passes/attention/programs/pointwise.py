"""Operators that are applied to the score itself."""

from __future__ import annotations

import torch

from iocompiler.passes.attention.reading.description import Declined
from iocompiler.tile.score_builder import ScoreBuilder


def on_score(
    build: ScoreBuilder, name: str, score: int, arguments: tuple[object, ...], dtype: torch.dtype
) -> int:
    """An operator applied to the score, whose result the user's program rounds to ``dtype``."""
    numbers = [float(x) for x in arguments if isinstance(x, (int, float))]
    if name == "tanh" and dtype == torch.bfloat16:
        return build.map("coarse_tanh", score)
    if name in ("tanh", "neg", "sigmoid", "exp", "abs") and not arguments:
        return build.map(name, score)
    if name == "relu":
        return _bounded(build, "le", score, 0.0)
    if name == "square" or (name == "pow" and numbers == [2.0]):
        return build.map("mul", score, score)
    if name == "add" and len(numbers) == 1:
        return build.map("add", score, build.const(numbers[0]))
    beyond = {"clamp_min": "lt", "clamp_max": "gt"}
    if name in beyond and len(numbers) == 1:
        return _bounded(build, beyond[name], score, numbers[0])
    if name == "clamp" and arguments:
        low, high = (*arguments, None)[:2]
        for bound, fn in ((low, "lt"), (high, "gt")):
            if isinstance(bound, (int, float)):
                score = _bounded(build, fn, score, float(bound))
            elif bound is not None:
                raise Declined("a clamp of the scores by what is not known before")
        return score
    raise Declined(f"{name} on the scores, with arguments that are not understood")


def _bounded(build: ScoreBuilder, beyond: str, score: int, bound: float) -> int:
    """The score, or the bound where it lies beyond that: no gradient flows there, and all of it
    elsewhere, as of torch's; NaN stays.
    """
    limit = build.const(bound)
    return build.map("where", build.map(beyond, score, limit), limit, score)
