"""Runs the table of decompositions eagerly, on real values, and remembers which operators were
left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iocompiler.ops.decompositions import table


class Decomposing(TorchDispatchMode):
    """Every operator the table knows runs as its decomposition; ``left`` counts the others."""

    def __init__(self) -> None:
        super().__init__()
        self.table = table()
        self.left: Counter[Any] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        rule = self.table.get(func)
        if rule is not None:
            with self:
                result = rule(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        self.left[func] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Outcome:
    values: list[Tensor]
    gradients: list[Tensor]
    left: Counter[Any]


def outcome(function: Callable[..., Any], inputs: Sequence[Any], decomposed: bool) -> Outcome:
    """Results and, for floating inputs that want one, gradients under fixed random cotangents."""
    mode = Decomposing()
    leaves = [x for x in tree_leaves(list(inputs)) if isinstance(x, Tensor) and x.requires_grad]
    if decomposed:
        with mode:
            return Outcome(*_run(function, inputs, leaves), mode.left)
    return Outcome(*_run(function, inputs, leaves), mode.left)


def _run(
    function: Callable[..., Any], inputs: Sequence[Any], leaves: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    outputs = [x for x in tree_leaves(function(*inputs)) if isinstance(x, Tensor)]
    wanted = [out for out in outputs if out.requires_grad]
    gradients: list[Tensor] = []
    if wanted and leaves:
        generator = torch.Generator().manual_seed(7)
        cotangents = [
            torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype) for out in wanted
        ]
        found = torch.autograd.grad(wanted, leaves, cotangents, allow_unused=True)
        gradients = [g for g in found if g is not None]
    return [out.detach() for out in outputs], gradients


def in_dtype(inputs: Sequence[Any], dtype: torch.dtype, wide: bool = False) -> list[Any]:
    """Floating inputs rounded to ``dtype`` (and widened again for the reference), as new leaves."""

    def fed(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        rounded = x.detach().to(dtype)
        rounded = rounded.double() if wide else rounded.clone()
        return rounded.requires_grad_(x.requires_grad)

    return [fed(x) for x in inputs]
