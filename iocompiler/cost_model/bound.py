"""The least a graph can move and the least time it can take, whatever the fusion.

Bytes: every input and every output crosses to or from device memory once. A contraction of m x k by
k x n on a machine with room for S operands on the chip moves at least ``2 m n k / sqrt(S)`` of them
(J.-W. Hong, H. T. Kung, "I/O complexity: the red-blue pebble game", STOC 1981, in the sharp form of
T. M. Smith, B. Lowery, J. Langou, R. A. van de Geijn, "A tight I/O lower bound for matrix
multiplication", 2017, arXiv 1702.02017, less the S operands that are there at the start and the
end). Where that is more than its operands and its result together, the excess is forced traffic,
and is added.

S is everything on the chip: the registers and shared memory of all SMs *and* L2. Bytes here are
those of device memory, and a hit in L2 is not one; leaving L2 out would give a "bound" that a
kernel with good L2 locality beats. The price is that the bound is rarely reached. Convolutions and
attention add no excess: the first reuse their input beyond a matmul's, the second can make its
middle operand again instead of moving it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from iocompiler.cost_model.call import call_of_node
from iocompiler.cost_model.cost import Contraction, Cost, greatest, nbytes, spec_of, value_of
from iocompiler.cost_model.device import Device
from iocompiler.cost_model.families import elements_read, free
from iocompiler.cost_model.roofline import TRANSCENDENTAL_FLOPS
from iocompiler.cost_model.rules import cost, rule_for
from iocompiler.tile.index import Size, product


@dataclass(frozen=True)
class Bound:
    """The least bytes of device memory traffic, and the work that has to be done."""

    bytes: Size
    work: Cost

    def time(
        self, device: Device, hints: Mapping[str, int] | None = None, tf32: bool = False
    ) -> float:
        """Seconds: the longest of the bytes at full bandwidth and each kind of arithmetic at its
        full rate."""
        contracting = sum(
            value_of(c.flops, hints) / device.matmul_rate(c.dtype, tf32)
            for c in self.work.contractions
        )
        vector = value_of(self.work.vector_flops, hints)
        vector += TRANSCENDENTAL_FLOPS * value_of(self.work.transcendentals, hints)
        return max(
            value_of(self.bytes, hints) / device.memory_rate,
            contracting,
            vector / device.vector_flops,
        )


def contraction_excess(contraction: Contraction, device: Device) -> Size:
    """Bytes a contraction is forced to move beyond its operands and result; 0 for nearly all that
    fit a GPU's L2."""
    if contraction.kind != "matmul":
        return 0
    itemsize = contraction.dtype.itemsize
    room = device.on_chip_bytes // itemsize
    batch, m, n, k = contraction.batch, contraction.m, contraction.n, contraction.k
    forced = 2 * product([m, n, k]) / math.sqrt(room) - 2 * room
    beyond = greatest(0, _whole(batch * (forced - (m * k + k * n + m * n))))
    return beyond * itemsize


def _whole(size: Size | float) -> Size:
    return int(size) if isinstance(size, (int, float)) else size


def lower_bound(crossing: Iterable[Size], costs: Iterable[Cost], device: Device) -> Bound:
    """The bound of a graph from the bytes of each input and output, and what its operations
    cost."""
    work = sum((Cost(0, 0, c.flops, c.transcendentals, c.contractions) for c in costs), Cost())
    excess: Size = sum((contraction_excess(c, device) for c in work.contractions), 0)
    return Bound(sum(crossing, 0) + excess, work)


def bound(gm: GraphModule, device: Device) -> Bound:
    """The bound of a flat FX graph whose nodes carry fake tensors in ``meta["val"]``.

    Inputs nobody computes with and inputs handed on do not count, an output handed out twice counts
    once, and of a table only rows are picked from, at most what is picked counts.
    """
    nodes = list(gm.graph.nodes)
    read = [_bytes_read(n) for n in nodes if n.op == "placeholder"]
    written = [_bytes_of(n) for n in nodes[-1].all_input_nodes if n.op != "placeholder"]
    return lower_bound(read + written, (cost(n) for n in nodes), device)


def _bytes_of(node: Node) -> Size:
    value = node.meta.get("val")
    return nbytes(spec_of(value)) if isinstance(value, torch.Tensor) else 0


def _bytes_read(node: Node) -> Size:
    """The most any one reader needs of a tensor, be it through a view."""
    value = node.meta.get("val")
    most: Size = 0
    if not isinstance(value, torch.Tensor):
        return most
    for user in node.users:
        if user.op != "call_function":
            continue
        call = call_of_node(user)
        if rule_for(call.target, call.name) is free:
            most = greatest(most, _bytes_read(user))
        else:
            counts = [count for o, count in elements_read(call) if o.name == node.name]
            most = greatest(most, sum(counts, 0) * value.dtype.itemsize)
    return most
