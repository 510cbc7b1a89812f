"""From a flat ATen graph to a `Plan`: classify, group, order, and write down the steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.cost_model.device import Device
from iocompiler.cost_model.kernel import kernel_seconds
from iocompiler.graph.view import higher_order, where
from iocompiler.plan.batch import batch
from iocompiler.plan.data import KernelStep, Plan, Region, TensorSpec, ViewStep
from iocompiler.plan.dataflow import Dataflow
from iocompiler.plan.early import early
from iocompiler.plan.elements import by_address
from iocompiler.plan.finish import finish
from iocompiler.plan.folds import most_held
from iocompiler.plan.group import Accept, Group, Grouper, faster
from iocompiler.plan.order import in_order
from iocompiler.plan.overwriting import stored_into
from iocompiler.plan.region import CALLS_ONLY, listed, plain_region, returns, sizes_are_given
from iocompiler.plan.seen import as_seen
from iocompiler.plan.sizes import equal, size_of
from iocompiler.plan.steps import Steps, spec_of
from iocompiler.plan.unfused import unfused_edges
from iocompiler.plan.views import is_view, storage_owner


def build_plan(gm: GraphModule, device: Device, name: str, accept: Accept = faster) -> Plan:
    """Plan a flat, functional ATen graph whose nodes carry fake tensors in ``meta["val"]``.

    ``device`` prices the kernels; ``name`` prefixes kernel names ("forward"); ``accept`` decides
    what is grouped of what can be. Graph inputs that are overwritten have ``copy_`` nodes at the
    end, as AOTAutograd leaves them.
    """
    return _Builder(gm, device, name, graph_device(gm), accept).plan()


def graph_device(gm: GraphModule) -> torch.device:
    """The accelerator the graph computes on; the CPU where there is none."""
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            return value.device
    return torch.device("cpu")


def size_hints(gm: GraphModule) -> dict[str, int]:
    """The example value of every size symbol."""
    hints: dict[str, int] = {}
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        sizes: Iterable[Any] = value.shape if isinstance(value, torch.Tensor) else [value]
        for size in sizes:
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and size.node.has_hint():
                hints[size.node.expr.name] = int(size.node.hint)
    return hints


class _Builder(Steps):
    def __init__(
        self, gm: GraphModule, device: Device, name: str, place: torch.device, accept: Accept
    ):
        super().__init__(gm)
        self.device, self.name, self.accept = device, name, accept
        self.hints = size_hints(gm)
        self._elements: set[str] = set()
        self.flow = Dataflow(gm.graph, place, self.hints)
        self.grouper = Grouper(self.flow, lambda p: kernel_seconds(p, device, self.hints), accept)

    def plan(self) -> Plan:
        groups = self.grouper.run()
        inputs = self.inputs()
        for unit in in_order(self.flow, self.grouper, groups):
            if isinstance(unit, Group):
                self._kernel(unit)
            else:
                self.call(unit, self.flow.opaque[unit])
        (output,) = (n for n in self.gm.graph.nodes if n.op == "output")
        outputs = tuple(self.argument(a, output) for a in listed(output.args[0]))
        steps = batch(self.steps, self.device, self.hints, most_held(inputs, self.hints))
        steps, outputs = as_seen(steps, outputs)
        steps = early(steps, inputs, outputs, self.hints)
        return Plan(
            tuple(inputs),
            tuple(steps),
            outputs,
            str(self.flow.device),
            unfused_edges(self.flow, self.grouper),
        )

    def made_elsewhere(self, node: Node) -> str:
        """A view is made where it is first read."""
        assert is_view(node), f"{node.name} is read before it is made"
        owner = storage_owner(node)
        base, spec = self.value(owner), spec_of(node.meta["val"])
        whole = spec_of(owner.meta["val"])
        offset = size_of(node.meta["val"].storage_offset()) - size_of(
            owner.meta["val"].storage_offset()
        )
        if spec == whole and equal(offset, 0):
            return base
        self.steps.append(ViewStep(node.name, base, spec, offset))
        return node.name

    def region(self, node: Node, inner: GraphModule, caller: Node) -> Region:
        """Planned as a graph of its own where the operator only calls it, else call by call."""
        name = str(node.target)
        if higher_order(caller) in CALLS_ONLY and sizes_are_given(inner):
            try:
                prefix = f"{self.name}_{name}"
                builder = _Builder(inner, self.device, prefix, self.flow.device, self.accept)
                return Region(name, builder.plan(), returns(inner))
            except Exception as error:  # whatever stands in the way of kernels, calls remain
                self.notes.append(f"{name} without kernels: {error}")
        return plain_region(name, inner, self.flow.device)

    # --- steps

    def _kernel(self, group: Group) -> None:
        names: list[str] = []
        outputs: dict[str, TensorSpec] = {}
        made = {stored_into(o): o for o in self.grouper.outputs(group.nodes)}
        for node in group.lowered.nodes:
            if node in made and made[node] is node:
                self.values[node] = node.name
                outputs[node.name] = spec_of(node.meta["val"])
            names.append(self.value(node))
        nodes = sorted(group.nodes, key=lambda n: self.flow.order[n])
        program, arguments = by_address(group.lowered.own())
        behind = {
            b.name: (name, node)
            for b, name, node in zip(
                group.lowered.program.buffers, names, group.lowered.nodes, strict=True
            )
        }
        step = KernelStep(
            f"{self.name}_{_title(nodes)}",
            program,
            None,  # type: ignore[arg-type]  # chosen by finish
            tuple(self._element(*behind[a.buffer], a.offset) for a in arguments),
            tuple(outputs.items()),
            tuple(n.name for n in nodes),
            tuple(dict.fromkeys(filter(None, map(where, nodes)))),
        )
        self.steps += finish(step, self.device, self.hints, str(self.flow.device))

    def _element(self, name: str, node: Node, offset: int) -> str:
        """The value that begins so many elements behind another."""
        if offset == 0:
            return name
        found = f"{name}_at_{offset}"
        if found not in self._elements:
            self._elements.add(found)
            spec = spec_of(node.meta["val"])
            self.steps.append(ViewStep(found, name, replace(spec, shape=(), stride=()), offset))
        return found


_DULL = {
    "clone",
    "_to_copy",
    "convert_element_type",
    "copy_",
    "full",
    "where",
    "mul",
    "add",
    "sub",
    "div",
    "neg",
}


def _title(nodes: list[Node], most: int = 4) -> str:
    """A short name from the operators that say most about a kernel: ``amax_exp_sum``."""
    names = [str(n.target).split(".")[1] if "." in str(n.target) else n.name for n in nodes]
    telling = list(dict.fromkeys(n for n in names if n not in _DULL)) or list(dict.fromkeys(names))
    return "_".join(n.strip("_") for n in telling[:most])


__all__ = ["Mapping", "build_plan", "graph_device", "size_hints", "spec_of"]
