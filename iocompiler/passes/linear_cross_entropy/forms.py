"""What is computed from logits, row by row, as sums of a few statistics of each row.

    z          a logit of the row                        (a matrix, before its target is picked)
    chosen     the target's logit; in a matrix, at the target's class, with zeros at all others
    average    the mean of the row's logits
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

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from torch.fx import Node

Statistic: TypeAlias = Literal[
    "z", "chosen", "average", "lse", "square", "cross", "q", "logp", "each", "divergence"
]
Kind: TypeAlias = Literal[
    "times", "over", "where", "unless", "rows", "columns", "kept", "class", "classes"
]


_ROUNDING = 1e-12  # of Python numbers, which add up to 1 or to 0


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

    @property
    def key(self) -> frozenset[tuple[Factor, int]]:
        """What it is multiplied by beside its number, in any order: equal for those that add up."""
        return frozenset(Counter(self.factors).items())

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
        smoothing: in normal form, the label smoothing that was written as a sum.
    """

    terms: Mapping[Statistic, tuple[Term, ...]]
    reduced: bool = False
    dim: int | None = None
    outer: float | None = None
    smoothing: float = 0.0

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

    def picked(self, dim: int | None = None) -> Form:
        """The target's element of each row of a matrix; or, along ``dim``, the matrix of these and
        zeros.
        """
        terms: dict[Statistic, tuple[Term, ...]] = {
            s: ts for s, ts in self.terms.items() if s != "z"
        }
        if "z" in self.terms:
            terms["chosen"] = _collected((*terms.get("chosen", ()), *self.terms["z"]))
        return Form(terms, dim=dim, outer=self.outer)

    @property
    def is_picked(self) -> bool:
        """Whether it is a matrix with zeros at all classes but the target's."""
        return self.dim is not None and "chosen" in self.terms

    def over_classes(self, classes: Any, *, means: bool) -> Form | None:
        """The sum over the ``classes``, or their mean, of a matrix of logits, and of numbers beside
        them, or of a picked one; None of another, and where a number of classes is needed that
        varies.
        """
        if self.is_picked:
            found, number = replace(self, dim=None), 1 / classes if means else 1.0
        elif "z" in self.terms and not set(self.terms) - {"z", "lse"}:
            terms: dict[Statistic, tuple[Term, ...]] = {
                "average" if s == "z" else s: ts for s, ts in self.terms.items()
            }
            found, number = replace(self, terms=terms, dim=None), 1 if means else classes
        else:
            return None
        return found.times(float(number)) if isinstance(number, (int, float)) else None

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
        lse, chosen, average = (self.terms.get(s, ()) for s in ("lse", "chosen", "average"))
        known = ("cross", "square", "divergence")
        rest: dict[Statistic, tuple[Term, ...]] = {
            s: ts for s, ts in self.terms.items() if s in known
        }
        if set(self.terms) - {"lse", "chosen", "average", *known}:
            return None
        smoothing = 0.0
        if lse or chosen or average:
            share = None if "cross" in rest else _smoothing(lse, chosen, average)
            if share is None:
                return None
            rest["cross"], smoothing = lse, share
        whole = "cross" in rest or ("divergence" in rest and "square" not in rest)
        return replace(self, terms=rest, smoothing=smoothing) if whole else None


def _smoothing(
    lse: Iterable[Term], chosen: Iterable[Term], average: Iterable[Term]
) -> float | None:
    """What of a label goes to all classes alike, where ``lse`` less its share of the target's logit
    and of the average is a sum of cross-entropies; None where it is none.
    """
    wholes, targets, averages = ({t.key: t.number for t in each} for each in (lse, chosen, average))
    if not targets or not wholes.keys() >= targets.keys() | averages.keys():
        return None
    shares = [-averages.get(key, 0.0) / number for key, number in wholes.items()]
    if not 0.0 <= shares[0] <= 1.0:
        return None
    for share, (key, number) in zip(shares, wholes.items(), strict=True):
        rest = number * (1.0 - share) + targets.get(key, 0.0)
        if abs(rest) > _ROUNDING * abs(number) or abs(share - shares[0]) > _ROUNDING:
            return None
    return shares[0]


def matrix(dim: int, outer: float) -> Form:
    """The logits themselves."""
    return Form({"z": (Term(),)}, dim=dim, outer=outer)


def rows(outer: float | None, **numbers: float) -> Form:
    return Form({s: (Term(n),) for s, n in numbers.items()}, outer=outer)  # type: ignore[misc]


def _collected(terms: Iterable[Term]) -> tuple[Term, ...]:
    """Equal terms as one; those that cancel are gone."""
    found: dict[frozenset[tuple[Factor, int]], Term] = {}
    for term in terms:
        before = found.get(term.key, replace(term, number=0.0))
        found[term.key] = replace(before, number=before.number + term.number)
    return tuple(term for term in found.values() if term.number)
