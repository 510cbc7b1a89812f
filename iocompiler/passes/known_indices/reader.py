"""Reading index expressions: which integer tensors of a graph are affine."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import view
from iocompiler.graph.sizes import known
from iocompiler.passes.known_indices.affine import Affine
from iocompiler.passes.known_indices.rules import RULES

_LARGEST_CONSTANT = 1 << 16


class Reader:
    """The affine integer tensors of one graph, found as they are asked for."""

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._roots = view.roots(gm)
        self._written = view.written(gm, self._roots)
        self._found: dict[Node, Affine | None] = {}

    def read(self, node: Any) -> Affine | None:
        """What the elements are; None where that is not known, or they change."""
        if not isinstance(node, Node) or not isinstance(view.value(node), torch.Tensor):
            return None
        if node not in self._found:
            self._found[node] = None if self._roots[node] & self._written else self._read(node)
        return self._found[node]

    def _read(self, node: Node) -> Affine | None:
        if node.op == "get_attr":
            found = _fitted(getattr(self._gm, str(node.target), None))
        else:
            rule = RULES.get(node.target) if node.op == "call_function" else None
            found = rule(self.read, node, integers(node)) if rule is not None else None
        return found if found is not None and _held_exactly(found, view.value(node)) else None


def integers(node: Node) -> list[Any]:
    """The arguments of a call in the order of its schema; a size's node as its value."""

    def plain(argument: Any) -> Any:
        if isinstance(argument, Node) and isinstance(view.value(argument), (int, torch.SymInt)):
            return view.value(argument)
        return argument

    return [
        [plain(a) for a in argument] if isinstance(argument, (list, tuple)) else plain(argument)
        for argument in view.spelled_out(node)
    ]


def _held_exactly(found: Affine, tensor: torch.Tensor) -> bool:
    """Whether the dtype holds every element."""
    if tensor.dtype == torch.int64:
        return True
    if tensor.dtype == torch.int32:
        return found.fits_int32()
    one_bit = found.is_constant and known(found.const >= 0) and known(found.const <= 1)
    return tensor.dtype == torch.bool and one_bit


def _fitted(tensor: Any) -> Affine | None:
    """A constant of the graph whose elements happen to be affine."""
    if not isinstance(tensor, torch.Tensor) or tensor.is_floating_point() or tensor.is_complex():
        return None
    if not 0 < tensor.numel() <= _LARGEST_CONSTANT or type(tensor) is not torch.Tensor:
        return None
    values: torch.Tensor = tensor.to(device="cpu", dtype=torch.int64)
    first = int(values[(0,) * values.dim()])
    steps = tuple(
        int(values.select(d, 1)[(0,) * (values.dim() - 1)]) - first if size > 1 else 0
        for d, size in enumerate(values.shape)
    )
    made = torch.tensor(first)
    for d, step in enumerate(steps):
        places = torch.arange(values.shape[d]) * step
        made = made + places.reshape([-1 if e == d else 1 for e in range(values.dim())])
    exact = torch.equal(made.expand(values.shape), values)
    return Affine(first, steps, tuple(values.shape)) if exact else None
