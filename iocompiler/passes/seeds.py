"""The seeds of a graph's dropouts, drawn together."""

from __future__ import annotations

import itertools
from typing import cast

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.match import graph_pass
from iocompiler.ops.random import SEEDS, UNIFORM

aten = torch.ops.aten

_PLACE = {aten.select.int: 2, UNIFORM: 1}
"""The argument by which a reader says which seed it reads."""


@graph_pass(respells=True)
def seeds_together(gm: GraphModule) -> int:
    """One call draws all seeds of a device: each takes the host as long as several launches.

    Before::

        a = iocompiler.seeds(1, device); x = aten.select.int(a, 0, 0); ...
        b = iocompiler.seeds(2, device); y = iocompiler.uniform(b, 1, shape)

    After::

        seeds = iocompiler.seeds(3, device)
        x = aten.select.int(seeds, 0, 0); ...
        y = iocompiler.uniform(seeds, 2, shape)

    Left alone: seeds with any other reader.
    """
    draws: dict[torch.device, list[Node]] = {}
    for node in view.calls(gm, SEEDS):
        if all(user.target in _PLACE for user in node.users):
            draws.setdefault(node.args[1], []).append(node)  # type: ignore[arg-type]
    several = {device: nodes for device, nodes in draws.items() if len(nodes) > 1}
    for device, nodes in several.items():
        *firsts, count = itertools.accumulate((cast(int, n.args[0]) for n in nodes), initial=0)
        together = rewrite.call(gm, SEEDS, (count, device), {}, near=nodes[0])
        for node, first in zip(nodes, firsts, strict=True):
            for reader in list(node.users):
                _read(gm, reader, together, first)
            rewrite.erase(gm, node)  # what draws is not erased for being unread alone
    return sum(map(len, several.values()))


def _read(gm: GraphModule, reader: Node, seeds: Node, first: int) -> None:
    """The same reader, of seeds that begin at ``first``."""
    arguments = list(reader.args)
    place = _PLACE[reader.target]
    arguments[0], arguments[place] = seeds, arguments[place] + first  # type: ignore[operator]
    made = rewrite.call(gm, reader.target, tuple(arguments), {}, near=reader)
    rewrite.redirect(gm, reader, made)
