"""From one statistic of logits to the whole of what is computed from them: the last node that
everything goes through.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import view
from iocompiler.passes.linear_cross_entropy import arithmetic, divergence, moves, picks, statistics
from iocompiler.passes.linear_cross_entropy import head as heads
from iocompiler.passes.linear_cross_entropy import loss as losses
from iocompiler.passes.linear_cross_entropy.description import (
    Comparison,
    Declined,
    Distribution,
    Head,
    Labels,
)
from iocompiler.passes.linear_cross_entropy.divergence import is_compared
from iocompiler.passes.linear_cross_entropy.emit import united
from iocompiler.passes.linear_cross_entropy.forms import Form, matrix
from iocompiler.passes.linear_cross_entropy.reader import Reader, Rule, base_of, fixed
from iocompiler.passes.linear_cross_entropy.statistics import is_picked

aten = torch.ops.aten
STATISTICS = (aten.log_softmax.int, aten.logsumexp.default, aten.softmax.int)
# parts of a loss that are read too: each has its logits made again
_MOST_SHOWN = 2
_RULES: dict[Any, tuple[Rule, ...]] = defaultdict(tuple)
for _rules in (statistics.RULES, picks.RULES, arithmetic.RULES):
    for _target, _rule in _rules.items():
        _RULES[_target] += (_rule,)
for _target, _more in divergence.RULES.items():
    _RULES[_target] += _more


@dataclass(frozen=True)
class Found:
    """A head and what its logits come to.

    Attributes:
        logits: the node whose rows count, classes along ``dim``.
        path: all calls that logits go through, in the graph's order.
        form: in normal form, of the node ``end``.
        region: the calls that fall away, in the graph's order, ``end`` last.
        kept: whether the program returns the logits too: calls that lead there stay.
        other, comparison: what they are compared with, and how.
        beside: the calls of the other's head, which fall away too, in the graph's order.
        shown: parts of it that the program reads too (to write them in a log), in the graph's
            order.
    """

    head: Head
    logits: Node
    dim: int
    path: tuple[Node, ...]
    labels: Labels | None
    form: Form
    end: Node
    region: tuple[Node, ...]
    kept: bool = False
    other: Distribution | None = None
    comparison: Comparison | None = None
    beside: tuple[Node, ...] = ()
    shown: tuple[Found, ...] = ()

    def read(self) -> Iterator[Node]:
        """What the operator is to read."""
        heads_ = [self.head, self.other.head if self.other is not None else None]
        for head in (each for each in heads_ if each is not None):
            yield from (n for n in (head.x, head.weight, head.bias) if n is not None)
        if self.other is not None and self.other.head is None:
            yield self.other.given
        if self.labels is not None:
            yield self.labels.target
        for terms in self.form.terms.values():
            yield from (f.node for t in terms for f in t.factors if f.node is not None)


def find(gm: GraphModule, statistic: Node, seen: set[Node], compared: set[Node]) -> Iterator[Found]:
    """What the logits that ``statistic`` reads come to, the most first, each without some of the
    last steps of the one before; nothing where there is no head, or no loss.

    Args:
        seen: statistics of the same logits are added.
        compared: those of the other logits that these are compared with.

    Raises:
        Declined: there is a head and nearly a loss.
    """
    logits: Any = statistic.args[0]
    try:
        dim = _class_dim(statistic)
        main = heads.read(logits, dim) if dim is not None else None
        if statistic.target in losses.TARGETS and main is not None:
            given = losses.arguments(statistic)
            if not losses.is_soft(given):
                losses.labels(given)
    except Declined:
        if statistic.target in losses.TARGETS and not heads.linear_near(logits):
            return
        if statistic.target in STATISTICS and not _is_read(statistic):
            return
        raise
    if main is not None and dim is not None:
        search = _Search(gm, main, logits, dim, seen)
        try:
            yield from search.run()
        finally:
            compared |= search.others()


def _is_read(statistic: Node) -> bool:
    """Whether a loss may be made of it."""
    return is_picked(statistic) or is_compared(statistic)


def _class_dim(statistic: Node) -> int | None:
    logits: Any = statistic.args[0]
    rank = view.tensors(logits)[0].dim()
    if not rank:
        return None
    if statistic.target is aten.cross_entropy_loss.default:
        return losses.class_dim(logits)
    if statistic.target in (aten.log_softmax.int, aten.softmax.int):
        dim: Any = statistic.args[1]
        wanted = {
            losses.class_dim(statistic) for u in statistic.users if u.target in losses.TARGETS
        }
        if wanted - {dim % rank}:
            raise Declined("the log-softmax is over another dim than the classes")
        return int(dim) % rank
    if statistic.target is aten.logsumexp.default:
        dims: Any = statistic.args[1]
        return dims[0] % rank if len(dims) == 1 else None
    return None  # the loss of a log-softmax: found from there


class _Search:
    def __init__(
        self, gm: GraphModule, main: Head, logits: Node, dim: int, seen: set[Node]
    ) -> None:
        self._gm, self._main, self._logits, self._dim = gm, main, logits, dim
        self._path: dict[Node, None] = {}
        self._dependent: dict[Node, None] = dict.fromkeys((*main.also, main.node))
        self._order = {node: place for place, node in enumerate(gm.graph.nodes)}
        for node in gm.graph.nodes:
            if node.target is aten.sym_size.int:
                continue  # no value of the logits
            if any(read in self._dependent for read in node.all_input_nodes):
                self._dependent[node] = None
                if node.target in (*losses.TARGETS, *STATISTICS):
                    seen.add(node)
        self._reader = self._new_reader()

    def others(self) -> set[Node]:
        """The calls between other heads, with which the logits are compared, and these."""
        return {node for other in self._reader.others.values() for node in other.path}

    def run(self) -> Iterator[Found]:
        reader = self._reader
        for node in self._dependent:
            if node.op == "call_function":
                reader.read(node)
        ends = [n for n, form in reader.forms.items() if form.dim is None]
        none = True
        for most in (0, _MOST_SHOWN):
            for end in sorted(ends, key=lambda n: self._order[n], reverse=True):
                form, region = reader.forms[end].normal(), self._region(end)
                kept = self._is_returned(region, end)
                shown = self._shown(region, end, reader, kept) if form is not None else None
                if shown is None or len(shown) > most:
                    continue
                none = False
                if kept and shown:
                    raise Declined("the logits are returned, and parts of the loss beside them")
                found = self._found(reader, end, region)
                parts = [self._found(reader, n, self._region(n), found.labels) for n in shown]
                yield replace(found, kept=bool(kept), shown=tuple(parts))
            if not none:
                break
        compared = [n for n in self._dependent if n.target is aten.kl_div.default]
        if none and any(n not in reader.forms for n in compared):
            raise Declined("a divergence between distributions: the logits stay whole")
        near = bool(reader.labels or reader.divergences or compared)
        if none and (near or any(is_picked(n) for n in self._dependent)):
            self._why(reader)
            raise Declined(
                "what is computed of the logits is no sum of cross-entropies and divergences"
            )

    def _found(
        self, reader: Reader, end: Node, region: list[Node], labels: Labels | None = None
    ) -> Found:
        """What ``end``, with its normal form, comes to.

        Args:
            labels: those of the whole that it is part of.
        """
        form = _part(reader.forms[end])
        assert form is not None
        if "cross" in form.terms:
            labels = united([reader.labels[n] for n in region if n in reader.labels], base_of)
            if form.smoothing:
                labels = replace(labels, smoothing=form.smoothing)
        elif "square" not in form.terms:
            labels = None
        main = self._main if form.outer is None else replace(self._main, outer=form.outer)
        given = (main, self._logits, self._dim, tuple(self._path), labels, form, end, tuple(region))
        return Found(*given, False, *self._compared(region, reader))

    def _new_reader(self) -> Reader:
        """For everything that hangs on the logits; it knows these."""
        forms = {}
        for node in self._dependent:
            found = self._logits_of(node)
            if found is not None and _signature(found[0]) == _signature(self._main):
                forms[node] = matrix(found[1], found[0].outer)
        return Reader(_RULES, forms, self._dependent, fixed(self._gm))

    def _compared(
        self, region: Collection[Node], reader: Reader
    ) -> tuple[Distribution | None, Comparison | None, tuple[Node, ...]]:
        """What is compared with the logits in a region, how, and the calls that fall away with it.

        Raises:
            Declined: there are several, or it is a head's whose logits cannot fall away.
        """
        others = [reader.others[n] for n in region if n in reader.others]
        how = [reader.divergences[n] for n in region if n in reader.divergences]
        if not others:
            return None, None, ()
        if any(each.key != others[0].key for each in others) or len({*how}) != 1:
            raise Declined("the logits are compared with several distributions, or in several ways")
        other, head = others[0], others[0].head
        if head is None:
            return other, how[0], ()
        inside = {*head.also, head.node, *(node for each in others for node in each.path)}
        for node in inside:
            for user in node.users:
                if user in inside or user in region or user.target is aten.sym_size.int:
                    continue
                if other.fixed:  # they are whole anyway
                    return replace(other, head=None, path=()), how[0], ()
                raise Declined("what they are compared with is used elsewhere, and is learned")
        return other, how[0], tuple(sorted(inside, key=lambda n: self._order[n]))

    def _logits_of(self, node: Node) -> tuple[Head, int] | None:
        """Of a call that the logits themselves go through: the head read from it, and along which
        dim the classes lie.
        """
        if node is not self._main.node:
            read = node.args[0] if node.args else None
            before = isinstance(read, Node) and (read is self._main.node or read in self._path)
            if not before or node.target not in heads.PATH:
                return None
        for dim in reversed(range(view.tensors(node)[0].dim())):
            try:
                found = heads.read(node, dim)
            except Declined:
                continue
            if found is not None and found.node is self._main.node:
                if node is not self._main.node:
                    self._path[node] = None
                return found, dim
        return None

    def _region(self, end: Node) -> list[Node]:
        """What ``end`` is computed by, from the head on."""
        found, waiting = {end}, [end]
        while waiting:
            for read in waiting.pop().all_input_nodes:
                if read in self._dependent and read not in found:
                    found.add(read)
                    waiting.append(read)
        return sorted(found, key=lambda n: self._order[n])

    def _shown(
        self, region: Collection[Node], end: Node, reader: Reader, kept: Collection[Node]
    ) -> list[Node] | None:
        """What is read of the region elsewhere, beside ``end``, where each is a loss by itself;
        None where something else is.
        """
        known = {*self._path, *reader.forms, *self._main.also, self._main.node}
        inside = set(region)
        if not inside <= known:
            return None
        found = [
            node for node in region
            if node is not end
            and not all(self._is_inside(u, inside, node, kept) for u in node.users)
        ]  # fmt: skip
        forms = [reader.forms.get(node) for node in found]
        alone = all(f is not None and f.dim is None and _part(f) is not None for f in forms)
        return found if alone else None

    def _is_inside(
        self, user: Node, inside: Collection[Node], node: Node, kept: Collection[Node] = ()
    ) -> bool:
        if user in inside:
            return True
        logits = node in self._path or node is self._main.node or node in self._main.also
        return logits and (user.target is aten.sym_size.int or user in kept)

    def _is_returned(self, region: Collection[Node], end: Node) -> Collection[Node]:
        """The readers of the logits by which the program returns them, and does nothing else with
        them; none where one comes before ``end``, or reads what is no logits.
        """
        found: dict[Node, None] = {}
        waiting = [n for n in region if n is self._main.node or n in self._path]
        while waiting:
            for user in waiting.pop().users:
                if user in region or user in found or user.target is aten.sym_size.int:
                    continue
                goes_on = user.target in heads.PATH and self._order[user] > self._order[end]
                if user.op != "output" and not goes_on:
                    return ()
                found[user] = None
                waiting += [user] if goes_on else []
        return found

    def _why(self, reader: Reader) -> None:
        """Name the first reader of the logits that is not understood."""
        known = {*self._path, *reader.forms, *self._main.also, self._main.node}
        for node in sorted(known, key=lambda n: self._order[n]):
            form = reader.forms.get(node)
            if form is not None and form.dim is None:
                continue
            for user in node.users:
                if not self._is_inside(user, known, node):
                    kind = "returned" if user.op == "output" else "used"
                    place = view.where(node) or node.name
                    raise Declined(f"the logits are {kind} elsewhere: {place}")


def _part(form: Form) -> Form | None:
    """The normal form of a loss, or of a part of one."""
    if set(form.terms) == {"square"}:
        return form
    return form.normal()


def _signature(head: Head) -> tuple[Any, ...]:
    """What two logits must have in common to have the same rows, but for what multiplies them."""
    return (head.inner, head.capped, head.shifted, moves.rows(head.views))
