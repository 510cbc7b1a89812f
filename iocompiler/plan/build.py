"""From a flat ATen graph to a `Plan`: classify, group, order, and write down the steps."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from iocompiler.cost_model.device import Device
from iocompiler.cost_model.kernel import kernel_seconds
from iocompiler.graph.view import where
from iocompiler.plan.batch import batch
from iocompiler.plan.data import (
    AtenStep,
    ConstantStep,
    KernelStep,
    Plan,
    Ref,
    Step,
    TensorSpec,
    ViewStep,
)
from iocompiler.plan.dataflow import Dataflow
from iocompiler.plan.finish import finish
from iocompiler.plan.found import Symbolic
from iocompiler.plan.group import Group, Grouper
from iocompiler.plan.lowering import Unsupported, constant_values
from iocompiler.plan.order import in_order
from iocompiler.plan.sizes import equal, size_of
from iocompiler.plan.space import stored_into
from iocompiler.plan.unfused import unfused_edges
from iocompiler.plan.views import is_view, storage_owner

aten = torch.ops.aten

_LARGEST_CONSTANT = 1 << 16


def build_plan(gm: GraphModule, device: Device, name: str) -> Plan:
    """Plan a flat, functional ATen graph whose nodes carry fake tensors in ``meta["val"]``.

    ``device`` prices the kernels; ``name`` prefixes kernel names ("forward"). Graph inputs that are
    overwritten have ``copy_`` nodes at the end, as AOTAutograd leaves them.
    """
    return _Builder(gm, device, name).plan()


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


class _Builder:
    def __init__(self, gm: GraphModule, device: Device, name: str):
        self.gm, self.device, self.name = gm, device, name
        self.hints = size_hints(gm)
        self.flow = Dataflow(gm.graph, graph_device(gm), self.hints)
        self.grouper = Grouper(self.flow, lambda p: kernel_seconds(p, device, self.hints))
        self.steps: list[Step] = []
        self.values: dict[Node, str] = {}

    def plan(self) -> Plan:
        groups = self.grouper.run()
        inputs = self._inputs()
        for unit in in_order(self.flow, self.grouper, groups):
            if isinstance(unit, Group):
                self._kernel(unit)
            else:
                self._aten(unit)
        (output,) = (n for n in self.gm.graph.nodes if n.op == "output")
        outputs = tuple(self._argument(a) for a in output.args[0])
        steps = batch(self.steps, self.device, self.hints)
        return Plan(
            tuple(inputs),
            tuple(steps),
            outputs,
            str(self.flow.device),
            unfused_edges(self.flow, self.grouper),
        )

    # --- values

    def _inputs(self) -> list[tuple[str, TensorSpec | None]]:
        inputs: list[tuple[str, TensorSpec | None]] = []
        for node in self.gm.graph.nodes:
            if node.op != "placeholder":
                continue
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                inputs.append((node.name, spec_of(value)))
                self.values[node] = node.name
            elif isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
                inputs.append((value.node.expr.name, None))
            else:
                inputs.append((node.name, None))
        return inputs

    def _value(self, node: Node) -> str:
        """The plan name of a tensor node; a view is made here, once."""
        if node not in self.values:
            if node.target is aten.copy_.default:
                return self._value(node.args[0])  # type: ignore[arg-type]
            if node.op == "get_attr":
                self._constant(node)
            else:
                assert is_view(node), f"{node.name} is read before it is made"
                self.values[node] = self._view(node)
        return self.values[node]

    def _constant(self, node: Node) -> None:
        tensor = node.meta["val"]
        if tensor.numel() > _LARGEST_CONSTANT:
            raise Unsupported(
                f"a constant of {tensor.numel()} elements in the graph; "
                "make it a buffer of the model"
            )
        self.steps.append(ConstantStep(node.name, spec_of(tensor), constant_values(node)))
        self.values[node] = node.name

    def _view(self, node: Node) -> str:
        owner = storage_owner(node)
        base, spec = self._value(owner), spec_of(node.meta["val"])
        whole = spec_of(owner.meta["val"])
        offset = size_of(node.meta["val"].storage_offset()) - size_of(
            owner.meta["val"].storage_offset()
        )
        if spec == whole and equal(offset, 0):
            return base
        self.steps.append(ViewStep(node.name, base, spec, offset))
        return node.name

    def _argument(self, arg: Any) -> Any:
        if isinstance(arg, Node):
            value = arg.meta.get("val")
            if isinstance(value, torch.Tensor):
                return Ref(self._value(arg))
            return self._argument(value)
        if isinstance(arg, torch.SymInt):
            return size_of(arg)
        if isinstance(arg, (torch.SymFloat, torch.SymBool)):
            return arg.node.expr
        if isinstance(arg, (list, tuple)):
            return tuple(self._argument(a) for a in arg)
        if isinstance(arg, slice):
            raise TypeError("a slice as an operator argument")
        return arg

    # --- steps

    def _kernel(self, group: Group) -> None:
        names: list[str] = []
        outputs: dict[str, TensorSpec] = {}
        made = {stored_into(o): o for o in self.grouper.outputs(group.nodes)}
        for node in group.lowered.nodes:
            if node in made and made[node] is node:
                self.values[node] = node.name
                outputs[node.name] = spec_of(node.meta["val"])
            names.append(self._value(node))
        nodes = sorted(group.nodes, key=lambda n: self.flow.order[n])
        step = KernelStep(
            f"{self.name}_{_title(nodes)}",
            group.lowered.program,
            None,  # type: ignore[arg-type]  # chosen by finish
            tuple(names),
            tuple(outputs.items()),
            tuple(n.name for n in nodes),
            tuple(dict.fromkeys(filter(None, map(where, nodes)))),
        )
        self.steps += finish(step, self.device, self.hints, str(self.flow.device))

    def _aten(self, node: Node) -> None:
        args = tuple(self._argument(a) for a in node.args)
        kwargs = tuple((k, self._argument(a)) for k, a in node.kwargs.items())
        outputs, is_tuple = self._results(node)
        self.steps.append(
            AtenStep(
                str(node.target),
                args,
                kwargs,
                outputs,
                is_tuple,
                node.name,
                where(node),
                self.flow.opaque[node],
            )
        )

    def _results(self, node: Node) -> tuple[tuple[tuple[str | None, TensorSpec | None], ...], bool]:
        value = node.meta.get("val")
        if node.target is aten.copy_.default or value is None:
            return ((None, None),), False
        if isinstance(value, torch.Tensor):
            self.values[node] = node.name
            return ((node.name, spec_of(value)),), False
        if isinstance(value, Symbolic):
            return ((_symbol_of(value.node.expr), None),), False
        items: dict[int, Node] = {}
        for user in node.users:
            if user.target is operator.getitem:
                first = items.setdefault(int(user.args[1]), user)  # type: ignore[arg-type]
                self.values[user] = first.name
        return tuple(
            (items[i].name, spec_of(v)) if i in items else (None, None) for i, v in enumerate(value)
        ), True


def _symbol_of(expr: sympy.Basic) -> str | None:
    """The name of the symbol a call finds; None where it is equal to a size known before, and so
    read for nothing. A truth is written ``Eq(u0, 1)``.
    """
    if isinstance(expr, sympy.Eq) and expr.args[1] == 1:
        expr = expr.args[0]
    return str(expr.name) if isinstance(expr, sympy.Symbol) else None


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """Shape, strides, dtype and device of a (fake) tensor."""
    return TensorSpec(
        tuple(size_of(s) for s in tensor.shape),
        tuple(size_of(s) for s in tensor.stride()),
        tensor.dtype,
        str(tensor.device),
    )


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
