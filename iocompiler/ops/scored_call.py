"""The arguments of `iocompiler::scored_attention` and of its backward, as their schemas name them,
and what runs them: our templates, or aten, block by block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import make_contiguous_strides_for
from torch._subclasses.fake_tensor import FakeTensor

from iocompiler.ops.attempt import template_or
from iocompiler.ops.attention_choice import MEMORY
from iocompiler.ops.column_sums import ColumnSums
from iocompiler.ops.scored_blockwise import Blockwise
from iocompiler.tile.score import parsed

GIVEN = (
    "Tensor query, Tensor key, Tensor value, Tensor[] operands, SymInt[] numbers, str program, "
    "str kernel, str layout, Tensor? seed, float dropout_p, Tensor? classes, Tensor[] tables"
)
SAVED = "Tensor grad, Tensor out, Tensor logsumexp, Tensor? grad_logsumexp"
LOG2_E = math.log2(math.e)


class Call(NamedTuple):
    """The arguments of an attention, as the schemas name them."""

    query: Tensor
    key: Tensor
    value: Tensor
    operands: Sequence[Tensor]
    numbers: Sequence[int]
    program: str
    kernel: str
    layout: str
    seed: Tensor | None
    dropout_p: float
    classes: Tensor | None
    tables: Sequence[Tensor]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Of query, key and value."""
        return self.query.shape, self.key.shape, self.value.shape

    @property
    def is_empty(self) -> bool:
        return not self.query.numel() or not self.key.numel()

    def output(self) -> Tensor:
        return _empty(self.query, (*self.query.shape[:3], self.value.shape[3]), self.layout[3])

    def logsumexp(self) -> tuple[tuple[Any, ...], torch.dtype]:
        """Its shape and dtype."""
        planes = parsed(self.program).planes
        wide = torch.float64 if self.query.dtype == torch.float64 else torch.float32
        return (planes, *self.query.shape[:3]), wide

    def gradients(self) -> tuple[Tensor, ...]:
        """Memory for the gradients of query, key and value."""
        given = zip(self.inputs, self.layout, strict=False)
        return tuple(_empty(x, x.shape, order) for x, order in given)

    def problem(self) -> Any:
        return templates().Problem(
            *(self.query, self.key, self.value, parsed(self.program)),
            *(tuple(self.operands), tuple(self.numbers)),
            dropout_p=self.dropout_p,
            seed=self.seed,
            known=self.classes,
            tables=tuple(self.tables),
        )

    def blockwise(self) -> Blockwise:
        return Blockwise(
            *(self.query, self.key, self.value, parsed(self.program)),
            *(self.operands, self.numbers, self.dropout_p, self.seed),
        )

    def differentiate(
        self, saved: Saved, results: Sequence[Tensor], columns: ColumnSums | None = None
    ) -> None:
        """Write the gradients of query, key and value to ``results``, of any strides, and the sums
        down their columns, where wanted.
        """
        if self.is_empty:
            for x in (*results, *(() if columns is None else columns.parts)):
                x.zero_()
        elif self.kernel == "template":
            given = (*saved.of_template(), results, columns)
            template_or(
                "the gradient of an attention",
                lambda: templates().backward(self.problem(), *given),
                lambda: self._differentiate(saved, results, columns),
            )
        else:
            self._differentiate(saved, results, columns)

    def _differentiate(
        self, saved: Saved, results: Sequence[Tensor], columns: ColumnSums | None
    ) -> None:
        """Block by block."""
        found = self.blockwise().backward(*saved.of_blocks(self.kernel))
        for x, y in zip(results, found, strict=True):
            x.copy_(y)
        if columns is not None:
            columns.take(results)


class Saved(NamedTuple):
    """What a backward is given beside the arguments, as the schemas name it."""

    grad: Tensor
    out: Tensor
    logsumexp: Tensor
    grad_logsumexp: Tensor | None

    def of_template(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The last by the sum of the planes, [B, H, S], contiguous."""
        given = self.grad_logsumexp
        return *self[:3], None if given is None else given[0].contiguous()

    def of_blocks(self, kernel: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """The output's gradient, the log-sum-exp to the base of e, [B, H, S], and its gradient."""
        given = self.grad_logsumexp
        if not len(self.logsumexp):
            return self.grad, self.logsumexp.sum(0), None
        if kernel != "template":
            return self.grad, self.logsumexp[0], None if given is None else given[0]
        slope = None if given is None else given[0] * LOG2_E
        return self.grad, self.logsumexp.sum(0) / LOG2_E, slope


def parted(given: Sequence[Any]) -> tuple[Saved, Call]:
    """The arguments of a backward."""
    count = len(Saved._fields)
    return Saved(*given[:count]), Call(*given[count:])


@functools.cache
def templates() -> Any:
    # not before a template runs: it imports Triton
    from iocompiler.runtime import attention

    return attention


def _empty(like: Tensor, shape: Sequence[Any], order: str) -> Tensor:
    """Memory for a [B, H, S, D] tensor in one of the orders of `attention_choice.MEMORY`."""
    if isinstance(like, FakeTensor):  # sizes may be symbols
        return like.new_empty_strided(shape, _strides(shape, order))
    return like.new_empty_strided(shape, _known_strides(tuple(shape), order))


def _strides(shape: Sequence[Any], order: str) -> tuple[Any, ...]:
    dims = MEMORY[order]
    inner = make_contiguous_strides_for([shape[d] for d in dims])
    return tuple(inner[dims.index(d)] for d in range(len(dims)))


_known_strides = functools.lru_cache(maxsize=1024)(_strides)
