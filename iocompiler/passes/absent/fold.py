"""A backward graph for the tangents that come: the others and all that hangs on them go."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.sizes import same_sizes
from iocompiler.passes.absent.rules import NOTHING, verdict
from iocompiler.passes.absent.sizes import Sizes

aten = torch.ops.aten
prims = torch.ops.prims


def fold(flat: GraphModule, positions: Collection[int]) -> None:
    """Take the inputs at ``positions`` out of a functional graph, as if they were zero.

    Before, without input 1::

        def forward(w, tangents_1, tangents_2):
            grad = tangents_1 + tangents_2 * w; return grad, tangents_1.sum()

    After::

        def forward(w, tangents_2):
            return tangents_2 * w, full([], 0)

    An operator that needs one of them all the same reads a constant, as does a result. Sizes that
    are symbols must be known from the other inputs (`symbols_within`).
    """
    inputs = flat.graph.find_nodes(op="placeholder")
    absent = dict.fromkeys(inputs[at] for at in positions)
    _Fold(flat, absent).run()


class _Fold:
    def __init__(self, flat: GraphModule, absent: dict[Node, None]) -> None:
        self._flat, self._absent = flat, absent
        self._inputs = list(absent)
        self._sizes = Sizes(flat, absent)

    def run(self) -> None:
        for node in list(self._flat.graph.nodes):
            if node.op == "call_function" and any(n in self._absent for n in node.all_input_nodes):
                self._step(node)
        for node in reversed(self._absent):
            self._fill(node)
        self._flat.graph.eliminate_dead_code(lambda node: not _is_dead(node))
        for node in self._inputs:
            self._flat.graph.erase_node(node)
        self._flat.recompile()

    def _step(self, node: Node) -> None:
        if isinstance(view.value(node), torch.SymInt):
            size = self._sizes.node(view.value(node), node)
            node.replace_all_uses_with(size)
            return
        if not all(self._sizes.known(s) for t in view.tensors(node) for s in t.shape):
            return
        found = verdict(node, self._absent)
        if found is NOTHING:
            self._absent[node] = None
        elif isinstance(found, Node):
            same = self._fitted(found, node)
            if same is not None:
                rewrite.bypass(self._flat, node, same)

    def _fitted(self, same: Node, node: Node) -> Node | None:
        """``same`` in the shape, dtype and strides of ``node``; None where strides can't be had."""
        wanted = view.tensors(node)[0]
        made = same

        def now() -> torch.Tensor:
            return view.tensors(made)[0]

        if now().dtype != wanted.dtype:
            made = self._call(prims.convert_element_type.default, (made, wanted.dtype), node)
        if not same_sizes(now().shape, wanted.shape):
            shape = self._sizes.shape(wanted, node)
            made = self._call(aten.expand.default, (made, shape), node)
        if not same_sizes(now().stride(), wanted.stride()):
            if not view.is_contiguous(wanted):
                return None
            dense = {"memory_format": torch.contiguous_format}
            made = self._call(aten.clone.default, (made,), node, dense)
        return made

    def _fill(self, node: Node) -> None:
        """Constants for those who read what is absent and are not absent themselves."""
        readers = [user for user in node.users if user not in self._absent]
        for reader in readers:
            value = view.value(node)
            if not isinstance(value, torch.Tensor):
                continue  # several results: whoever reads one of them is absent
            zeros = self._call(
                aten.full.default,
                (self._sizes.shape(value, reader), 0),
                reader,
                {"dtype": value.dtype, "device": value.device, "pin_memory": False},
            )
            reader.replace_input_with(node, zeros)

    def _call(self, target: Any, arguments: tuple[Any, ...], near: Node, named: Any = None) -> Node:
        return rewrite.call(self._flat, target, arguments, named or {}, near=near)


def _is_dead(node: Node) -> bool:
    """Whether a call that nobody reads may go."""
    if node.op != "call_function":
        return node.op == "get_attr"
    effect = bool(view.mutates(node)) or view.is_switch(node) or view.is_random(node)
    return not effect and not node.is_impure()
