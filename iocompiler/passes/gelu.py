"""GELU written by hand, exact or by tanh (Hendrycks and Gimpel, arXiv 1606.08415)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from iocompiler.graph import view
from iocompiler.graph.match import rewrite
from iocompiler.graph.matcher import Match

aten = torch.ops.aten
Spelling = Callable[..., Any]

_A, _SCALE = 0.044715, math.sqrt(2 / math.pi)
_BENDS: tuple[Spelling, ...] = (
    lambda x, a, scale: (x + aten.pow.Tensor_Scalar(x, 3) * a) * scale,
    lambda x, a, scale: (x + x * x * x * a) * scale,
    lambda x, a, scale: x * scale * (x * a * x + 1),
    lambda x, a, scale: x * scale * (x * x * a + 1),
)
_ROOT_HALVES = (math.sqrt(0.5), 1 / math.sqrt(2), 0.70710678118, 0.70710678)


def _by_tanh(bend: Spelling) -> tuple[Spelling, ...]:
    tanh = aten.tanh.default
    return (
        lambda x, a, scale: x * 0.5 * (tanh(bend(x, a, scale)) + 1),
        lambda x, a, scale: x * (tanh(bend(x, a, scale)) + 1) * 0.5,
        lambda x, a, scale: x * ((tanh(bend(x, a, scale)) + 1) * 0.5),
    )


def _by_erf(inner: Spelling) -> tuple[Spelling, ...]:
    erf = aten.erf.default
    return (
        lambda x: x * 0.5 * (erf(inner(x)) + 1),
        lambda x: x * (erf(inner(x)) + 1) * 0.5,
        lambda x: x * ((erf(inner(x)) + 1) * 0.5),
    )


def _times(constant: float) -> Spelling:
    return lambda x: x * constant


def _of_floats(match: Match) -> bool:
    return view.tensors(match["x"])[0].is_floating_point()


def _near(found: Any, value: float) -> bool:
    return isinstance(found, float) and abs(found - value) < 1e-5


@rewrite(
    *(form for bend in _BENDS for form in _by_tanh(bend)),
    where=lambda m: _of_floats(m) and _near(m["a"], _A) and _near(m["scale"], _SCALE),
)
def gelu_by_tanh(x: Any) -> Any:
    """x * 0.5 * (tanh((x + x^3 * 0.044715) * 0.79788) + 1)  -->  gelu(x, approximate="tanh")"""
    return aten.gelu.default(x, approximate="tanh")


@rewrite(
    *_by_erf(lambda x: x / math.sqrt(2)),
    *(form for constant in _ROOT_HALVES for form in _by_erf(_times(constant))),
    where=_of_floats,
)
def gelu_by_erf(x: Any) -> Any:
    """x * 0.5 * (erf(x / 1.41421) + 1)  -->  gelu(x)"""
    return aten.gelu.default(x)
