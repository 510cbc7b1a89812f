"""Two labels a value, prices where they differ: the cheapest labelling, exactly.

Each value is False or True. A price may hang on one label of one value, and on a copy: a value
that is wanted under the label it does not have is copied once for all who want it so. Such prices
are the capacities of a network, values labelled False on the side of its source, and a minimum
cut is the cheapest labelling of all: every price is paid by two neighbours that differ, and none
by two that agree, which is what makes two labels solvable in polynomial time where three are
NP-hard (D. M. Greig, B. T. Porteous, A. H. Seheult, "Exact maximum a posteriori estimation for
binary images", 1989; V. Kolmogorov, R. Zabih, "What energy functions can be minimized via graph
cuts?", 2004). A copy is a node of the network of its own: it is on the side of the label it is
made in if it is made.

Prices are whole numbers, so that the cut is exact.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Value: TypeAlias = Hashable
Labels: TypeAlias = Mapping[Value, bool]


@dataclass(frozen=True)
class Copy:
    """``source`` under the other label, ``label``, for ``price``, once for all readers that have
    that label. A reader that has a number of its own pays it to do without; None: it cannot.
    """

    source: Value
    label: bool
    price: int
    readers: tuple[tuple[Value, int | None], ...]

    def paid(self, labels: Labels) -> int:
        """The least that these labels cost here."""
        if labels[self.source] == self.label:
            return 0
        alone = [without for reader, without in self.readers if labels[reader] == self.label]
        rest = [without for without in alone if without is not None]
        return min(self.price, sum(rest)) if len(rest) == len(alone) else self.price


@dataclass
class Labelling:
    """The values and what they cost.

    Attributes:
        fixed: the values whose label is given.
        charges: what a value pays under one label.
        copies: what is paid where a source and its readers differ.
    """

    fixed: dict[Value, bool] = field(default_factory=dict)
    charges: dict[tuple[Value, bool], int] = field(default_factory=dict)
    copies: list[Copy] = field(default_factory=list)

    def charge(self, value: Value, label: bool, price: int) -> None:
        """Have ``value`` pay ``price``, at least 0, more under ``label``."""
        self.charges[value, label] = self.charges.get((value, label), 0) + price

    def price(self, labels: Labels) -> int:
        """What a labelling costs."""
        charged = sum(
            price for (value, label), price in self.charges.items() if labels[value] == label
        )
        return charged + sum(copy.paid(labels) for copy in self.copies)

    def cheapest(self) -> dict[Value, bool]:
        """The labels that cost least, of every value that is spoken of."""
        # not before there is something to solve: it takes longer to import than to run
        import networkx

        network: Any = networkx.DiGraph()
        network.add_nodes_from([*_SIDES, *(("value", value) for value in self._values())])
        for start, end, price in self._edges():
            _add(network, start, end, price)
        _, (low, _) = networkx.minimum_cut(network, *_SIDES)
        return {value: ("value", value) not in low for value in self._values()}

    def _values(self) -> Iterator[Value]:
        yield from self.fixed
        yield from (value for value, _ in self.charges)
        for copy in self.copies:
            yield copy.source
            yield from (reader for reader, _ in copy.readers)

    def _edges(self) -> Iterator[tuple[Any, Any, int | None]]:
        """From, to, and what it costs that the first is False and the second True; None: it cannot
        be.
        """
        for value, label in self.fixed.items():
            yield _side(("value", value), label, None)
        for (value, label), price in self.charges.items():
            yield _side(("value", value), not label, price)
        for number, copy in enumerate(self.copies):
            made = ("copy", number)
            yield _turned(("value", copy.source), made, copy.price, copy.label)
            for reader, without in copy.readers:
                yield _turned(made, ("value", reader), without, copy.label)


_FALSE, _TRUE = _SIDES = (("side", False), ("side", True))


def _side(value: Any, label: bool, price: int | None) -> tuple[Any, Any, int | None]:
    """What ``value`` pays for not having ``label``."""
    return (value, _TRUE, price) if label else (_FALSE, value, price)


def _turned(start: Any, end: Any, price: int | None, label: bool) -> tuple[Any, Any, int | None]:
    return (start, end, price) if label else (end, start, price)


def _add(network: Any, start: Any, end: Any, price: int | None) -> None:
    """Parallel edges are one; one without a capacity is infinite."""
    known = network.get_edge_data(start, end)
    if price is None or (known is not None and "capacity" not in known):
        network.add_edge(start, end)
        if known is not None:
            known.pop("capacity", None)
    else:
        network.add_edge(start, end, capacity=price + (known["capacity"] if known else 0))
