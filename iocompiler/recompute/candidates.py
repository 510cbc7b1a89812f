"""Ways to partition a training step, from keeping what is dear to computing nearly all of it again.

    forward    x -> a -> b -> | -> c -> d -> | -> e -> loss          | a boundary: little is alive
    kept       by default: what a minimum cut keeps, and no contraction runs twice
    selective  contractions that make many bytes in little time run again
    segments   what is alive at the boundaries, and nothing in between: each segment of the forward
               runs again just before its backward

Computing all of it again would not help: its end, where the backward begins, needs everything
before it. So the last segment never runs again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import getitem

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from iocompiler.cost_model.cost import nbytes, spec_of, value_of
from iocompiler.cost_model.device import Device
from iocompiler.cost_model.roofline import time
from iocompiler.cost_model.rules import cost
from iocompiler.graph import view
from iocompiler.ops.partition import runs_again
from iocompiler.tf32 import rounded

# into how many segments the forward is cut
SEGMENTS = (4, 16)
# of the finest segments, how many of the first run again, of this many
_QUARTERS = 4
# dear operators are allowed to run again by the bytes they make in a second, in this many groups
_SELECTIONS = 3
_NAMESPACES = ("aten", "prims", "iocompiler")
_VARIES = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


@dataclass(frozen=True)
class Candidate:
    """One way to partition: names of nodes of the joint graph.

    Attributes:
        name: "default", "light", "selective 1/3", "segments 4", "segments 16, first 2/4".
        again: what may run again though it is dear.
        keep: what must not.
        relaxed: also what is cheap runs again where that saves memory, however far from its use.
    """

    name: str
    again: frozenset[str] = frozenset()
    keep: frozenset[str] = frozenset()
    relaxed: bool = True


def candidates(
    joint: GraphModule, forward_outputs: int, device: Device, hints: Mapping[str, int]
) -> tuple[Candidate, ...]:
    """The ways to partition a joint graph, the default first.

    Args:
        forward_outputs: how many of the graph's first outputs are the forward's.
        device: prices what would run again.
    """
    forward = _Forward(joint, forward_outputs, hints)
    found = [Candidate("default", relaxed=False), Candidate("light")]
    found += _selective(forward, device)
    cuts = {count: forward.boundaries(count) for count in SEGMENTS}
    found += [forward.segmented(f"segments {count}", cuts[count]) for count in SEGMENTS]
    finest = cuts[SEGMENTS[-1]]
    for part in range(1, _QUARTERS):
        first = finest[: len(finest) * part // _QUARTERS]
        name = f"segments {SEGMENTS[-1]}, first {part}/{_QUARTERS}"
        found.append(forward.segmented(name, first))
    distinct = {(each.again, each.keep, each.relaxed): each for each in reversed(found)}
    return tuple(reversed(distinct.values()))


def _selective(forward: _Forward, device: Device) -> Iterator[Candidate]:
    """The dear operators that make most bytes in a second, first a part of them, then more."""
    rate: dict[Node, float] = {}
    for node in forward.dear:
        dtype = view.tensors(node)[0].dtype
        seconds = time(cost(node), device, dtype, forward.hints, rounded(str(node.target)))
        rate[node] = forward.bytes(node) / seconds
    ordered = sorted(rate, key=lambda node: -rate[node])
    total = sum(map(forward.bytes, ordered))
    for part in range(1, _SELECTIONS):
        again, made, least = set[Node](), 0.0, 0.0
        for node in ordered:
            # equal operators of equal layers are taken together
            if made * _SELECTIONS >= total * part and rate[node] < 0.99 * least:
                break
            again.add(node)
            made, least = made + forward.bytes(node), rate[node]
        name = f"selective {part}/{_SELECTIONS}"
        yield Candidate(name, frozenset(node.name for node in again))


class _Forward:
    """The nodes of a joint graph that its forward outputs need, in order.

    Attributes:
        dear: the operators that do not run again by default and may.
    """

    def __init__(self, joint: GraphModule, outputs: int, hints: Mapping[str, int]) -> None:
        self.hints = hints
        self.nodes = _needed(joint, outputs)
        self._place = {node: at for at, node in enumerate(self.nodes)}
        changed = _changed_inputs(joint)
        self.dear = [n for n in self.nodes if _may_run_again(n) and not changed & _read(n)]

    def bytes(self, node: Node) -> float:
        """Of what the node makes; of a view, and of one result taken out of several, nothing."""
        if node.op != "call_function" or _hands_on(node):
            return 0.0
        return sum(value_of(nbytes(spec_of(t)), self.hints) for t in view.tensors(node))

    def boundaries(self, segments: int) -> list[int]:
        """Positions between segments that make about equally many bytes, where least is alive; a
        segment ends before the node at its boundary.
        """
        before = list(accumulate(map(self.bytes, self.nodes), initial=0.0))
        share, alive = before[-1] / segments, self._alive()
        found: list[int] = []
        for number in range(1, segments):
            window = [
                at
                for at in range(1, len(self.nodes))
                if abs(before[at] - number * share) <= share / 2 and alive[at]
            ]
            found += [min(window, key=lambda at: (alive[at], -at))] if window else []
        return sorted(set(found))

    def _alive(self) -> list[float]:
        """Before each node, the bytes that nodes before it made and later ones of the forward
        read.
        """
        change = [0.0] * (len(self.nodes) + 1)
        for node in self.nodes:
            if node.op == "call_function" and self.bytes(node):
                change[self._place[node] + 1] += self.bytes(node)
                change[self._last_read(node) + 1] -= self.bytes(node)
        alive, now = [], 0.0
        for each in change[:-1]:
            now += each
            alive.append(now)
        return alive

    def _last_read(self, node: Node) -> int:
        last = self._place[node]
        for user in node.users:
            if user in self._place:
                read = self._last_read(user) if _hands_on(user) else self._place[user]
                last = max(last, read)
        return last

    def segmented(self, name: str, boundaries: Sequence[int]) -> Candidate:
        """What lies before the last boundary runs again, but for what is alive at one."""
        end = boundaries[-1] if boundaries else 0
        keep = {
            node.name
            for node in self.nodes[:end]
            if self.bytes(node)
            and any(self._place[node] < at <= self._last_read(node) for at in boundaries)
        }
        again = {n.name for n in self.dear if self._place[n] < end} - keep
        return Candidate(name, frozenset(again), frozenset(keep))


def _needed(joint: GraphModule, outputs: int) -> list[Node]:
    """What the first outputs need, in the order of the graph."""
    (output,) = joint.graph.find_nodes(op="output")
    waiting = [node for node in output.args[0][:outputs] if isinstance(node, Node)]
    needed: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    return [node for node in joint.graph.nodes if node in needed]


def _hands_on(node: Node) -> bool:
    return node.target is getitem or view.is_view(node)


def _may_run_again(node: Node) -> bool:
    """Whether the node is an operator that gives the same each time, and not one that runs again
    anyhow.
    """
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace not in _NAMESPACES:
        return False
    if node.meta.get("recompute") is not None or view.is_view(node) or view.mutates(node):
        return False
    if any(tag in target.tags for tag in _VARIES) or not view.tensors(node):
        return False
    return not _draws(node) and not runs_again(node)


def _draws(node: Node) -> bool:
    """Whether the node draws random numbers; an attention without dropout only might have."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    if view.is_random(node) and "dropout_p" in names:
        return bool(view.spelled_out(node)[names.index("dropout_p")] != 0)
    return view.is_random(node)


def _changed_inputs(joint: GraphModule) -> set[Node]:
    """The inputs that hold something else when the backward runs."""
    return {view.owner(node) for each in joint.graph.nodes for node in view.mutates(each)}


def _read(node: Node) -> set[Node]:
    return set(map(view.owner, node.all_input_nodes))
