"""Attention with a score program in plain aten, some query rows at a time: what runs where the
templates do not, with memory linear in the lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from iocompiler.tile.dropout import kept
from iocompiler.tile.score import ScoreProgram
from iocompiler.tile.score_algebra import derivative
from iocompiler.tile.score_reference import evaluate

_ELEMENTS = 1 << 22
"""So many scores are alive at a time, or one row of each head."""


class Blockwise:
    """One attention: query [B, H, S, D], key [B, G, K, D], value [B, G, K, E], G a divisor of H.

    Accumulation is float32, or float64 for float64 inputs.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        program: ScoreProgram,
        operands: Sequence[Tensor],
        numbers: Sequence[int],
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> None:
        self.wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.query, self.groups = query, key.shape[1]
        spread = query.shape[1] // max(self.groups, 1)
        self.keys, self.values = (
            (x if spread == 1 else x.repeat_interleave(spread, 1)).to(self.wide)
            for x in (key, value)
        )
        self.program, self.operands, self.numbers = program, operands, numbers
        self.dropout_p, self.seed = dropout_p, seed

    def forward(self) -> tuple[Tensor, Tensor]:
        """The output [B, H, S, E] in the inputs' dtype, and log-sum-exp [B, H, S] of each row,
        +inf where no score counts.
        """
        if self.program.empty == "weights":
            return self._weighted()
        rows = self.query.shape[2]
        out = self.query.new_empty((*self.query.shape[:3], self.values.shape[3]))
        lse = self.query.new_empty(self.query.shape[:3], dtype=self.wide)
        empty = {"nan": float("nan"), "zero": 0.0, "uniform": 0.0}[self.program.empty]
        mean = self.values.mean(2, keepdim=True) if self.program.empty == "uniform" else empty
        for part in self._blocks(rows):
            scores = self._scores(part, (self.program.score,), self.program)[0]
            sums = torch.logsumexp(scores, -1)
            nothing = sums == float("-inf")
            lse[:, :, part] = sums.masked_fill(nothing, float("inf"))
            # rows are whole: nothing is lost beside a large negative number
            p = self._dropped(scores.softmax(-1), part)
            found = p @ self.values
            out[:, :, part] = torch.where(nothing.unsqueeze(-1), mean, found).to(out.dtype)
        return out, lse

    def _weighted(self) -> tuple[Tensor, Tensor]:
        """The output where there is no softmax, and nothing of the rows."""
        out = self.query.new_empty((*self.query.shape[:3], self.values.shape[3]))
        for part in self._blocks(self.query.shape[2]):
            weights = self._scores(part, (self.program.score,), self.program)[0]
            out[:, :, part] = (weights @ self.values).to(out.dtype)
        return out, self.query.new_empty((0, *self.query.shape[:3]), dtype=self.wide)

    def backward(
        self, grad: Tensor, lse: Tensor, of_lse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of query, key and value, in their dtypes, from those of the output and of
        lse.
        """
        dq = torch.empty_like(self.query)
        dk, dv = torch.zeros_like(self.keys), torch.zeros_like(self.values)
        product = next(n for n, op in enumerate(self.program.ops) if op.kind == "score")
        widened, slope = derivative(self.program, product)
        wanted = (widened.score,) if slope is None else (widened.score, slope)
        for part, p, ds, slopes in self._gradients(grad, lse, of_lse, widened, wanted):
            g = grad[:, :, part].to(self.wide)
            dv += self._dropped(p, part).transpose(2, 3) @ g
            ds = ds * slopes[0] if slopes else ds
            dq[:, :, part] = (ds @ self.keys).to(dq.dtype)
            dk += ds.transpose(2, 3) @ self.query[:, :, part].to(self.wide)
        if self.program.empty == "uniform":
            through = (grad.to(self.wide) * (lse == float("inf")).unsqueeze(-1)).sum(2, True)
            dv += through / dv.shape[2]
        return dq, self._gathered(dk), self._gathered(dv)

    def operand_gradient(
        self, grad: Tensor, lse: Tensor, of_lse: Tensor | None, which: int
    ) -> Tensor:
        """The gradient of one operand, over all places it is loaded at."""
        operand = self.operands[which]
        total = torch.zeros(operand.shape, dtype=self.wide, device=operand.device)
        for load in self.program.loads(self.program.score):
            op = self.program.ops[load]
            if op.value != which:
                continue
            widened, slope = derivative(self.program, load)
            wanted = [widened.score, *([] if slope is None else [slope]), *op.inputs]
            for _, _, ds, found in self._gradients(grad, lse, of_lse, widened, wanted):
                ds = ds if slope is None else ds * found[0]
                places = found[0 if slope is None else 1 :]
                if places:
                    shaped = tuple(x.expand(ds.shape) for x in places)
                    total.index_put_(shaped, ds, accumulate=True)
                else:
                    total += ds.sum()
        return total.to(operand.dtype)

    def _gradients(
        self,
        grad: Tensor,
        lse: Tensor,
        of_lse: Tensor | None,
        program: ScoreProgram,
        wanted: Sequence[int],
    ) -> Iterator[tuple[slice, Tensor, Tensor, list[Tensor]]]:
        """For each block of rows: its place, probabilities, the gradient of its scores, and the
        wanted values of the program but the first, which is the score.
        """
        for part in self._blocks(self.query.shape[2]):
            scores, *others = self._scores(part, wanted, program)
            if program.empty == "weights":
                yield part, scores, self._of_weights(part, grad), others
                continue
            # rows are whole here: their sums need no rounded log-sum-exp
            nothing = (lse[:, :, part] == float("inf")).unsqueeze(-1)
            p = scores.softmax(-1).masked_fill(nothing, 0.0)
            dp = grad[:, :, part].to(self.wide) @ self.values.transpose(2, 3)
            dp = self._dropped(dp, part)
            delta = (p * dp).sum(-1, keepdim=True)
            if of_lse is not None:
                delta = delta - of_lse[:, :, part].unsqueeze(-1)
            ds = (p * (dp - delta)).masked_fill(p == 0.0, 0.0)
            yield part, p, ds, others

    def _of_weights(self, part: slice, grad: Tensor) -> Tensor:
        """The gradient of the weights that count, where there is no softmax."""
        dp = grad[:, :, part].to(self.wide) @ self.values.transpose(2, 3)
        if self.program.keep is None:
            return dp
        given = (None, self._places(part), self.operands, self.numbers, self.wide)
        (kept,) = evaluate(self.program, [self.program.keep], *given)
        return dp.masked_fill(~kept, 0.0)

    def _scores(
        self, part: slice, wanted: Sequence[int], program: ScoreProgram
    ) -> tuple[Tensor, ...]:
        """The wanted values, the first of which is the score; where it does not count, -inf, or 0
        if scores are weights.
        """
        products = self.query[:, :, part].to(self.wide) @ self.keys.transpose(2, 3)
        given = (products, self._places(part), self.operands, self.numbers, self.wide)
        kept = [] if program.keep is None else [program.keep]
        score, *others = evaluate(program, [*wanted, *kept], *given)
        score = score.expand(products.shape)
        if kept:
            nothing = 0.0 if program.empty == "weights" else float("-inf")
            score = score.masked_fill(~others.pop(), nothing)
        return score, *others

    def _places(self, part: slice) -> dict[str, Tensor]:
        """The indices of some query rows and all keys, integers that broadcast."""
        batch, heads = self.query.shape[:2]
        ranges = {
            "b": (0, batch, (-1, 1, 1, 1)),
            "h": (0, heads, (-1, 1, 1)),
            "i": (part.start, part.stop, (-1, 1)),
            "j": (0, self.keys.shape[2], (-1,)),
        }
        return {
            name: torch.arange(first, last, device=self.query.device).reshape(shape)
            for name, (first, last, shape) in ranges.items()
        }

    def _dropped(self, x: Tensor, part: slice) -> Tensor:
        """What dropout makes of probabilities (and of their gradient) of some rows."""
        if self.seed is None:
            return x
        spared = kept(self.seed, **self._places(part), dropout_p=self.dropout_p)
        return torch.where(spared, x / (1.0 - self.dropout_p), 0.0)

    def _blocks(self, rows: int) -> Iterator[slice]:
        a_row = self.query.shape[0] * self.query.shape[1] * self.keys.shape[2]
        step = max(1, _ELEMENTS // max(a_row, 1))
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))

    def _gathered(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.groups:
            x = x.reshape(x.shape[0], self.groups, -1, *x.shape[2:]).sum(2)
        return x.to(self.query.dtype)
