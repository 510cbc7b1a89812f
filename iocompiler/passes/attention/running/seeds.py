"""Seeds of the dropouts inside attention: one of a graph's draw for each."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite as edit
from iocompiler.graph import view
from iocompiler.ops.random import SEEDS
from iocompiler.passes.attention.dims.arrange import Arranger

aten = torch.ops.aten


def drawn(arranger: Arranger, device: torch.device) -> Node:
    """One int64 from the device's generator."""
    return arranger.call(aten.select.int, arranger.call(SEEDS, 1, device), 0, 0)


def share(gm: GraphModule) -> None:
    """Let one call draw all seeds of a device.

    Before::

        a = aten.select.int(iocompiler.seeds(1, device), 0, 0); ...
        b = aten.select.int(iocompiler.seeds(1, device), 0, 0)

    After::

        seeds = iocompiler.seeds(2, device)
        a = aten.select.int(seeds, 0, 0); ...; b = aten.select.int(seeds, 0, 1)
    """
    by_device: dict[torch.device, list[Node]] = {}
    for node in view.calls(gm, SEEDS):
        if node.args[0] != 1 or [user.target for user in node.users] != [aten.select.int]:
            continue  # not of `drawn`
        by_device.setdefault(node.args[1], []).append(node)  # type: ignore[arg-type]
    for device, nodes in by_device.items():
        if len(nodes) < 2:
            continue
        seeds = edit.call(gm, SEEDS, (len(nodes), device), {}, near=nodes[0])
        for which, node in enumerate(nodes):
            (reader,) = node.users
            made = edit.call(gm, aten.select.int, (seeds, 0, which), {}, near=reader)
            edit.redirect(gm, reader, made)
            edit.erase(gm, node)  # what draws is not erased for being unread alone
