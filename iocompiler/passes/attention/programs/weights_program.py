"""The score program of weights that no softmax makes. A score that a mask hides is followed through
every step to what it weighs: where that is zero, the mask is structure.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from iocompiler.passes.attention.programs.program import Extraction, Mask
from iocompiler.passes.attention.reading.description import Inverse, Pointwise, Scale
from iocompiler.tile.score import Empty


class WeightsExtraction(Extraction):
    """`masks` say what hidden scores are at each step."""

    def _pointwise(self, step: Pointwise) -> None:
        values = [_applied(step, mask.value) for mask in self.masks]
        # s + m for a large negative m is no one number, but where all such come to zero
        if any(mask.added and value != 0.0 for mask, value in zip(self.masks, values, strict=True)):
            self._settle()
        else:
            pairs = zip(self.masks, values, strict=True)
            self.masks = [replace(mask, value=value, added=False) for mask, value in pairs]
        self._apply(step)

    def _scale(self, step: Scale) -> None:
        keeps = None if isinstance(step.factor, Inverse) else self._zero_or_one(step)
        if keeps is not None:
            self.masks.append(Mask(keeps, 0.0, False))
        else:
            super()._scale(step)

    def _zero_or_one(self, step: Scale) -> int | None:
        """The condition under which a factor is 1, where it is 0 otherwise."""
        if not step.dims:
            return None
        value = self._value(step.factor, step.dims)
        op = self.build.ops[value]
        if op.kind == "cast" and self.build.type(op.inputs[0]) == "bool":
            return op.inputs[0]
        if self.build.type(value) == "bool":
            return value
        if op.kind != "map" or op.fn != "where":
            return None
        branches = [self.build.literal(each) for each in op.inputs[1:]]
        if branches == [1, 0]:
            return op.inputs[0]
        return self.build.map("logical_not", op.inputs[0]) if branches == [0, 1] else None

    def _mask(self, mask: Mask) -> None:
        if self.build.literal(mask.keeps) is not True:
            self.masks.append(mask)

    def _settles(self, literal: float | None) -> bool:
        hidden = any(mask.value != 0.0 for mask in self.masks)
        return hidden and super()._settles(literal)

    def _kept(self) -> tuple[int | None, Empty]:
        if any(mask.value != 0.0 for mask in self.masks):
            self._settle()
        return (self._all(self.masks) if self.masks else None), "weights"


def _applied(step: Pointwise, value: float) -> float:
    """What becomes of a number, in float32 as in the kernels."""
    arguments: tuple[Any, ...] = step.arguments
    if any(isinstance(each, Node) for each in arguments):
        return float("nan")  # nothing is proved
    with torch.no_grad():
        return float(step.target(torch.tensor(value, dtype=torch.float32), *arguments))
