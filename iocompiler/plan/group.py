"""Grouping: which kernel nodes are computed together, greedy by bytes, accepted by modeled time.

Every kernel node starts as a kernel of its own. Pairs that share a tensor are tried in the order of
the bytes they share; a pair is merged when the union has no cycle through other kernels, lowers to
one program and is modeled faster than the two (`faster`; another `Accept` gives other legal plans).
What is not merged keeps the reason.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from iocompiler.plan.dataflow import Dataflow
from iocompiler.plan.lower import Lowered
from iocompiler.plan.lowering import Unsupported
from iocompiler.plan.overwriting import overwritten
from iocompiler.plan.sizes import value_at
from iocompiler.tile.flat import flat_program
from iocompiler.tile.index import Size, product
from iocompiler.tile.program import TileProgram

aten = torch.ops.aten

Price = Callable[[TileProgram], float]

# A kernel this large no longer compiles quickly and spills; two kernels are better.
_MOST_OPERATIONS = 400
_MOST_BUFFERS = 60
# Bytes a kernel moves in about the time a launch takes.
_SMALL_KERNEL = 1 << 20


@dataclass
class Group:
    """Nodes computed by one kernel, its program and its modeled time in seconds."""

    number: int
    nodes: frozenset[Node]
    lowered: Lowered
    seconds: float


Accept = Callable[[Group, Group, Group], bool]
"""Whether two groups become the third, which can be lowered and makes no cycle."""


def faster(a: Group, b: Group, together: Group) -> bool:
    """The one kernel is modeled no slower than the two."""
    return together.seconds <= a.seconds + b.seconds


@dataclass
class Grouper:
    """Merges the kernel nodes of a graph; ``rejected`` keeps why two groups' nodes stayed apart."""

    flow: Dataflow
    price: Price
    accept: Accept = faster
    groups: dict[int, Group] = field(default_factory=dict)
    home: dict[Node, int] = field(default_factory=dict)
    rejected: dict[tuple[Node, Node], str] = field(default_factory=dict)
    _above: dict[int, int] = field(default_factory=dict)
    _queue: list[tuple[int, int, int]] = field(default_factory=list)
    _prices: dict[int, float] = field(default_factory=dict)

    def run(self) -> list[Group]:
        """Every group, in a legal order of execution among themselves."""
        self._start()
        while self._queue:
            _, a, b = heapq.heappop(self._queue)
            if a in self.groups and b in self.groups:
                self._try_merge(self.groups[a], self.groups[b])
        self._merge_small()
        self._merge_siblings()
        return sorted(self.groups.values(), key=lambda g: g.number)

    def _merge_small(self) -> None:
        """Pointwise kernels that are little more than a launch, in pairs of equal size: they need
        not share a tensor. Equal flat ones are left for `batch`, which takes any sizes.
        """
        flat = {n: flat_program(g.lowered.program) for n, g in self.groups.items()}
        families = Counter(found[0] for found in flat.values() if found is not None)
        sizes: dict[int, list[int]] = {}
        for number, group in sorted(self.groups.items()):
            program = group.lowered.program
            moved = sum(self.flow.nbytes(n) for n in self._touched(group))
            found = flat[number]
            alone = found is None or families[found[0]] == 1
            if alone and not program.reduced and moved <= _SMALL_KERNEL:
                points = value_at(product([a.size for a in program.parallel]), self.flow.hints)
                sizes.setdefault(points, []).append(number)
        self._merge_each(sizes.values())

    def _merge_siblings(self) -> None:
        """Equal reductions of the several results of one call (the gradients of query, key and
        value, say), which share no tensor but are there at once.
        """
        families: dict[tuple[Node, Size, Size], list[int]] = {}
        for number, group in sorted(self.groups.items()):
            program = group.lowered.program
            across, down = (
                product([a.size for a in axes]) for axes in (program.parallel, program.reduced)
            )
            calls = {self.flow.item_source(leaf) for leaf in self._touched(group) - group.nodes}
            if program.reduced and len(calls) == 1 and calls <= self.flow.opaque.keys():
                families.setdefault((calls.pop(), across, down), []).append(number)
        self._merge_each(families.values())

    def _merge_each(self, lists: Iterable[list[int]]) -> None:
        for numbers in lists:
            for a, b in itertools.pairwise(numbers):
                # a merged pair has the number of its later half: it meets the next one
                if a in self.groups and b in self.groups:
                    self._try_merge(self.groups[a], self.groups[b])

    # --- the first groups and their order

    def _start(self) -> None:
        """One group a node. An opaque call's never merges: it is there for cycles through it."""
        ordered = sorted([*self.flow.kernel, *self.flow.opaque], key=lambda n: self.flow.order[n])
        for number, node in enumerate(ordered):
            self.home[node] = number
        for node in ordered:
            number = self.home[node]
            above = 0
            for leaf in self._before(node):
                producer = self.home.get(self.flow.item_source(leaf))
                if producer is not None and producer != number:
                    above |= self._above[producer] | (1 << producer)
            self._above[number] = above
            if node in self.flow.kernel:
                lowered = self.flow.singles[node]
                self.groups[number] = Group(
                    number, frozenset({node}), lowered, self._seconds(lowered.program)
                )
        for pair in self._shared():
            self._propose(*pair)

    def _before(self, node: Node) -> Iterable[Node]:
        """What runs before ``node``: makers of what it reads, other readers of what it writes, the
        call it must not overtake.
        """
        yield from self.flow.leaves[node]
        if node in self.flow.before:
            yield self.flow.before[node]
        target = overwritten(node)
        if target is not None:
            yield from (r for r in self.flow.readers.get(target, ()) if r is not node)

    def _shared(self) -> Iterable[tuple[int, int]]:
        seen: set[tuple[int, int]] = set()
        for leaf, readers in self.flow.readers.items():
            touching = [self.home[n] for n in readers]
            if leaf in self.home:
                touching.append(self.home[leaf])
            touching = sorted(t for t in set(touching) if t in self.groups)
            if self.flow.nbytes(leaf) < 4096 and len(touching) > 8:
                continue  # a small tensor read everywhere is no reason to merge
            for i, a in enumerate(touching):
                for b in touching[i + 1 :]:
                    if (a, b) not in seen:
                        seen.add((a, b))
                        yield a, b

    def _propose(self, a: int, b: int) -> None:
        shared = self._touched(self.groups[a]) & self._touched(self.groups[b])
        saved = sum(self.flow.nbytes(n) for n in shared)
        heapq.heappush(self._queue, (-saved, min(a, b), max(a, b)))

    def _touched(self, group: Group) -> set[Node]:
        touched: set[Node] = set(group.nodes)
        for node in group.nodes:
            touched |= self.flow.leaves[node]
        return touched

    # --- merging

    def _try_merge(self, a: Group, b: Group) -> None:
        reason = self._why_not(a, b)
        if reason is None:
            nodes = a.nodes | b.nodes
            lowered = self._lower(nodes)
            if isinstance(lowered, str):
                reason = lowered
            else:
                seconds = self._seconds(lowered.program)
                together = Group(max(a.number, b.number), nodes, lowered, seconds)
                if self.accept(a, b, together):
                    self._merge(a, b, together)
                    return
                apart = f"{a.seconds * 1e6:.1f} + {b.seconds * 1e6:.1f}"
                reason = f"together {seconds * 1e6:.1f} us, apart {apart} us"
        for x in a.nodes:
            for y in self._neighbours(x) & b.nodes:
                first, second = sorted((x, y), key=lambda n: self.flow.order[n])
                self.rejected[first, second] = reason

    def above(self, number: int) -> int:
        """Bit mask of the groups that run before this one."""
        return self._above[number]

    def _neighbours(self, node: Node) -> set[Node]:
        return self.flow.readers.get(node, set()) | set(self.flow.leaves[node])

    def _why_not(self, a: Group, b: Group) -> str | None:
        pair = (1 << a.number) | (1 << b.number)
        for first, second in ((a, b), (b, a)):
            # a third kernel between the two, above one of them and below the other
            between = self._above[second.number] & ~pair
            while between:
                low = between & -between
                number = low.bit_length() - 1
                if self._above[number] >> first.number & 1:
                    return "another kernel stands between the two"
                between ^= low
        return None

    def _merge(self, a: Group, b: Group, merged: Group) -> None:
        old = (1 << a.number) | (1 << b.number)
        kept = 1 << merged.number
        above = (self._above[a.number] | self._above[b.number]) & ~old
        del self.groups[a.number], self.groups[b.number]
        dropped = a.number if merged.number == b.number else b.number
        del self._above[dropped]
        self._above[merged.number] = above
        for number, mask in self._above.items():
            if number != merged.number and mask & old:
                self._above[number] = (mask & ~old) | kept | above
        self.groups[merged.number] = merged
        for node in merged.nodes:
            self.home[node] = merged.number
        for other in self._adjacent(merged):
            self._propose(merged.number, other)

    def _adjacent(self, group: Group) -> set[int]:
        found: set[int] = set()
        for tensor in self._touched(group):
            if self.flow.nbytes(tensor) < 4096 and len(self.flow.readers.get(tensor, ())) > 8:
                continue
            near = self.flow.readers.get(tensor, set()) | {tensor}
            found |= {self.home[n] for n in near if n in self.home}
        return {n for n in found if n in self.groups and n != group.number}

    # --- lowering a candidate

    def outputs(self, nodes: frozenset[Node]) -> tuple[Node, ...]:
        """The nodes of a group that others read, or that leave the graph, in graph order."""
        kept = [
            n
            for n in nodes
            if n in self.flow.outputs
            or overwritten(n) is not None
            or any(r not in nodes for r in self.flow.readers.get(n, ()))
        ]
        return tuple(sorted(kept, key=lambda n: self.flow.order[n]))

    def _lower(self, nodes: frozenset[Node]) -> Lowered | str:
        try:
            lowered = self.flow.memo.lower(nodes, self.flow.virtual, self.outputs(nodes))
        except Unsupported as error:
            return str(error)
        if len(lowered.program.ops) > _MOST_OPERATIONS:
            return f"{len(lowered.program.ops)} operations in one kernel"
        if len(lowered.program.buffers) > _MOST_BUFFERS:
            return f"{len(lowered.program.buffers)} tensors in one kernel"
        return lowered

    def _seconds(self, program: TileProgram) -> float:
        """What the program costs. Equal kernels have one program, which lives as long as `memo`."""
        found = self._prices.get(id(program))
        if found is None:
            found = self._prices[id(program)] = self.price(program)
        return found
