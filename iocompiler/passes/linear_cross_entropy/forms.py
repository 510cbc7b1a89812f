"""What is computed from logits, row by row, as sums of a few statistics of each row.

    z          a logit of the row                        (a matrix, before its target is picked)
    chosen     the target's logit
    lse        log sum exp of the row
    square     lse^2
    cross      the cross-entropy, with its ignored rows and label smoothing
    q          a probability of the row             (a matrix)
    logp       a log-probability of what the row is compared with                    (a matrix)
    each       what a class adds to the divergence from that                         (a matrix)
    divergence the sum of these

each times numbers and times tensors that do not depend on the logits. What a user writes between
the logits and the loss is then a matter of adding and multiplying such sums, in whatever order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from torch.fx import Node

Statistic: TypeAlias = Literal[
    "z", "chosen", "lse", "square", "cross", "q", "logp", "each", "divergence"
]
Kind: TypeAlias = Literal[
    "times", "over", "where", "unless", "rows", "columns", "kept", "class", "classes"
]


@dataclass(frozen=True)
class Factor:
    """A tensor that each row is multiplied by ("times") or divided by ("over"); a mask outside of
    which it is zero ("where"), or inside of which ("unless").

    Without a node: over the number of rows ("rows"), or of rows not ignored ("kept"), or of
    classes, where that is no number ("columns"). ``node`` is the weight of each class, and the
    factor the weight of the row's target ("class"), or over the sum of those ("classes").

    ``shape``: of the rows where it was met, to which it broadcasts; None for one number.
    """

    kind: Kind
    node: Node | None = None
    shape: tuple[Any, ...] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Term:
    number: float = 1.0
    factors: tuple[Factor, ...] = ()

    def times(self, number: float, *factors: Factor) -> Term:
        return Term(self.number * number, (*self.factors, *factors))


@dataclass(frozen=True)
class Form:
    """The sum, over statistics, of the terms it is multiplied by.

    Attributes:
        reduced: summed over all rows.
        dim: along which the classes of a matrix lie; None for rows.
        outer: what the logits are multiplied by, whose statistics these are; None where there are
            none of them, or divergences alone.
    """

    terms: Mapping[Statistic, tuple[Term, ...]]
    reduced: bool = False
    dim: int | None = None
    outer: float | None = None

    def times(self, number: float, *factors: Factor) -> Form:
        scaled = {s: tuple(t.times(number, *factors) for t in ts) for s, ts in self.terms.items()}
        return replace(self, terms=scaled)

    def agrees(self, other: Form) -> bool:
        """Whether both are of logits that are multiplied by the same."""
        return None in (self.outer, other.outer) or self.outer == other.outer

    def plus(self, other: Form, sign: float = 1.0) -> Form:
        """The sum with a form that agrees."""
        found = dict(self.terms)
        for statistic, terms in other.times(sign).terms.items():
            found[statistic] = _collected((*found.get(statistic, ()), *terms))
        outer = other.outer if self.outer is None else self.outer
        return replace(self, terms={s: ts for s, ts in found.items() if ts}, outer=outer)

    def picked(self) -> Form:
        """The target's element of each row of a matrix."""
        terms: dict[Statistic, tuple[Term, ...]] = {
            s: ts for s, ts in self.terms.items() if s != "z"
        }
        if "z" in self.terms:
            terms["chosen"] = _collected((*terms.get("chosen", ()), *self.terms["z"]))
        return Form(terms, outer=self.outer)

    def is_only(self, statistic: Statistic) -> bool:
        """Whether it is that statistic times a number."""
        return set(self.terms) == {statistic} and all(
            not term.factors for term in self.terms[statistic]
        )

    def product(self, other: Form) -> Form | None:
        """Of two logsumexps; None where it is of anything else."""
        if not all(form.is_only("lse") and not form.reduced for form in (self, other)):
            return None
        if not self.agrees(other):
            return None
        one, two = (sum(term.number for term in form.terms["lse"]) for form in (self, other))
        return Form({"square": (Term(one * two),)}, outer=self.outer)

    def logarithm(self) -> float | None:
        """The number that log-probabilities are multiplied by, where it is a matrix of those."""
        if set(self.terms) != {"z", "lse"}:
            return None
        z, lse = self.terms["z"], self.terms["lse"]
        if len(z) != 1 or z[0].factors or lse != (Term(-z[0].number),):
            return None
        return z[0].number

    def normal(self) -> Form | None:
        """In cross-entropies, squares and divergences alone; None where it is no such sum."""
        lse, chosen = (self.terms.get(s, ()) for s in ("lse", "chosen"))
        rest: dict[Statistic, tuple[Term, ...]] = {
            s: ts for s, ts in self.terms.items() if s in ("cross", "square", "divergence")
        }
        if set(self.terms) - {"lse", "chosen", "cross", "square", "divergence"}:
            return None
        if lse or chosen:
            if "cross" in rest or _sorted(t.times(-1.0) for t in chosen) != _sorted(lse):
                return None
            rest["cross"] = lse
        whole = "cross" in rest or ("divergence" in rest and "square" not in rest)
        return replace(self, terms=rest) if whole else None


def matrix(dim: int, outer: float) -> Form:
    """The logits themselves."""
    return Form({"z": (Term(),)}, dim=dim, outer=outer)


def rows(outer: float | None, **numbers: float) -> Form:
    return Form({s: (Term(n),) for s, n in numbers.items()}, outer=outer)  # type: ignore[misc]


def _collected(terms: Iterable[Term]) -> tuple[Term, ...]:
    """Equal terms as one; those that cancel are gone."""
    numbers: dict[tuple[Factor, ...], float] = {}
    for term in terms:
        numbers[term.factors] = numbers.get(term.factors, 0.0) + term.number
    return tuple(Term(number, factors) for factors, number in numbers.items() if number)


def _sorted(terms: Iterable[Term]) -> list[tuple[float, str]]:
    return sorted((term.number, repr(term.factors)) for term in terms)
