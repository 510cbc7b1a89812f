"""From one statistic of logits to the whole of what is computed from them: the last node that
everything goes through.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import view
from iocompiler.passes.linear_cross_entropy import arithmetic, statistics
from iocompiler.passes.linear_cross_entropy import head as heads
from iocompiler.passes.linear_cross_entropy import loss as losses
from iocompiler.passes.linear_cross_entropy.description import Declined, Head, Labels
from iocompiler.passes.linear_cross_entropy.emit import united
from iocompiler.passes.linear_cross_entropy.forms import Form, matrix
from iocompiler.passes.linear_cross_entropy.reader import Reader, base_of, is_fixed
from iocompiler.passes.linear_cross_entropy.statistics import is_picked

aten = torch.ops.aten
_RULES = {**statistics.RULES, **arithmetic.RULES}
STATISTICS = (aten.log_softmax.int, aten.logsumexp.default)


@dataclass(frozen=True)
class Found:
    """A head and what its logits come to.

    Attributes:
        logits: the node whose rows count, classes along ``dim``.
        path: all calls that logits go through, in the graph's order.
        form: in normal form, of the node ``end``.
        region: the calls that fall away, in the graph's order, ``end`` last.
        kept: whether the program returns the logits too: calls that lead there stay.
    """

    head: Head
    logits: Node
    dim: int
    path: tuple[Node, ...]
    labels: Labels
    form: Form
    end: Node
    region: tuple[Node, ...]
    kept: bool = False

    def read(self) -> Iterator[Node]:
        """What the operator is to read."""
        yield from (n for n in (self.head.x, self.head.weight, self.head.bias) if n is not None)
        yield self.labels.target
        for terms in self.form.terms.values():
            yield from (f.node for t in terms for f in t.factors if f.node is not None)


def find(gm: GraphModule, statistic: Node, seen: set[Node]) -> Iterator[Found]:
    """What the logits that ``statistic`` reads come to, the most first, each without some of the
    last steps of the one before; nothing where there is no head, or no loss.

    Args:
        seen: statistics of the same logits are added.

    Raises:
        Declined: there is a head and nearly a loss.
    """
    logits: Any = statistic.args[0]
    try:
        dim = _class_dim(statistic)
        main = heads.read(logits, dim) if dim is not None else None
        if statistic.target in losses.TARGETS and main is not None:
            losses.labels(losses.arguments(statistic))
    except Declined:
        if statistic.target in losses.TARGETS and not heads.linear_near(logits):
            return
        if statistic.target in STATISTICS and not is_picked(statistic):
            return
        raise
    if main is not None and dim is not None:
        yield from _Search(gm, main, logits, dim, seen).run()


def _class_dim(statistic: Node) -> int | None:
    logits: Any = statistic.args[0]
    rank = view.tensors(logits)[0].dim()
    if not rank:
        return None
    if statistic.target is aten.cross_entropy_loss.default:
        return losses.class_dim(logits)
    if statistic.target is aten.log_softmax.int:
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

    def run(self) -> Iterator[Found]:
        reader = self._read()
        ends = [n for n, form in reader.forms.items() if form.dim is None]
        path, none = tuple(self._path), True
        for end in sorted(ends, key=lambda n: self._order[n], reverse=True):
            form, region = reader.forms[end].normal(), self._region(end)
            kept = self._is_returned(region, end)
            if form is None or not self._is_closed(region, end, reader, kept):
                continue
            none = False
            labels = united([reader.labels[n] for n in region if n in reader.labels], base_of)
            given = (self._main, self._logits, self._dim, path, labels, form, end, tuple(region))
            yield Found(*given, bool(kept))
        if none and any(n.target is aten.kl_div.default for n in self._dependent):
            raise Declined("a divergence between distributions: the logits stay whole")
        if none and (reader.labels or any(is_picked(n) for n in self._dependent)):
            self._why(reader)
            raise Declined("what is computed of the logits is no sum of cross-entropies")

    def _read(self) -> Reader:
        """The forms of everything that hangs on the logits."""
        forms = {}
        for node in self._dependent:
            found = self._logits_of(node)
            if found is not None and _signature(found[0]) == _signature(self._main):
                forms[node] = matrix(found[1])
        regions, known = view.regions(self._gm), dict[Node, bool]()
        reader = Reader(_RULES, forms, self._dependent, lambda n: is_fixed(n, regions, known))
        for node in self._dependent:
            if node.op == "call_function":
                reader.read(node)
        return reader

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

    def _is_closed(
        self, region: Collection[Node], end: Node, reader: Reader, kept: Collection[Node]
    ) -> bool:
        known = {*self._path, *reader.forms, *self._main.also, self._main.node}
        inside = set(region)
        if not inside <= known:
            return False
        return all(self._is_inside(user, inside, node) or user in kept
                   for node in region if node is not end for user in node.users)  # fmt: skip

    def _is_inside(self, user: Node, inside: Collection[Node], node: Node) -> bool:
        if user in inside:
            return True
        logits = node in self._path or node is self._main.node or node in self._main.also
        return logits and user.target is aten.sym_size.int

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


def _signature(head: Head) -> tuple[Any, ...]:
    """What two logits must have in common to have the same rows."""
    moves = tuple(node for node in head.views if node.target not in heads.RESHAPES)
    return (head.outer, head.inner, head.capped, moves)
