"""Which tensors still pass through memory between two kernels, and why."""

from __future__ import annotations

from iocompiler.plan.data import Unfused
from iocompiler.plan.dataflow import Dataflow
from iocompiler.plan.group import Grouper


def unfused_edges(flow: Dataflow, grouper: Grouper) -> tuple[Unfused, ...]:
    """One row for each (tensor, reader) in different kernels, largest tensors first, equal ones in
    the order of the graph.
    """
    edges: list[Unfused] = []
    in_order = flow.order.__getitem__  # readers and leaves are sets
    for leaf in sorted((n for n in flow.readers if n.op != "placeholder"), key=in_order):
        source = flow.item_source(leaf)
        for reader in sorted(flow.readers[leaf], key=in_order):
            if grouper.home.get(source) == grouper.home[reader]:
                continue
            reason = grouper.rejected.get((leaf, reader))
            if reason is None and source in flow.opaque:
                reason = f"{leaf.name} comes from a call: {flow.opaque[source]}"
            if reason is None and reader in flow.opaque:
                reason = f"{reader.name} is a call: {flow.opaque[reader]}"
            if reason is None:
                reason = f"too little shared: {flow.nbytes(leaf)} bytes"
            edges.append(Unfused(leaf.name, reader.name, flow.nbytes(leaf), reason))
    return tuple(sorted(edges, key=lambda e: -int(e.bytes)))
