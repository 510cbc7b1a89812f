"""What the operator reads of a head, and of the distribution that logits are compared with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite as edit
from iocompiler.graph import view
from iocompiler.passes.linear_cross_entropy.description import Distribution, Head
from iocompiler.passes.linear_cross_entropy.twins import Twins

aten = torch.ops.aten
_Tensors = tuple[Node, Node | None, Node | None]


def parameters(gm: GraphModule, head: Head, near: Node) -> Head:
    """The head with the weight [V, D] and the bias [V] as the operator reads them, made before
    ``near``: those of the classes that are left where the logits are cut.
    """

    def call(target: Any, *args: Any) -> Node:
        return edit.call(gm, target, args, {}, near=near)

    weight, bias = head.weight, head.bias
    if head.transposed:
        weight = call(aten.transpose.int, weight, 0, 1)
    if bias is not None:
        value, wanted = view.tensors(bias)[0], view.tensors(weight)[0].dtype
        bias = bias if value.dim() == 1 else call(aten.reshape.default, bias, [-1])
        bias = bias if value.dtype == wanted else call(aten.to.dtype, bias, wanted)
    for cut in head.cuts:
        weight = call(aten.slice.Tensor, weight, 0, *cut.args[2:])
        bias = bias and call(aten.slice.Tensor, bias, 0, *cut.args[2:])
    return replace(head, weight=weight, bias=bias, transposed=False, cuts=())


def operands(
    gm: GraphModule, other: Distribution, near: Node
) -> tuple[_Tensors, tuple[str, float, float, bool]]:
    """The ``tensors`` and ``numbers`` of `emit.Other`, made before ``near``."""

    def call(target: Any, *args: Any) -> Node:
        return edit.call(gm, target, args, {}, near=near)

    if other.head is None:
        given, value = other.given, view.tensors(other.given)[0]
        if other.given_dim != value.dim() - 1:
            given = call(aten.movedim.int, given, other.given_dim, -1)
        if value.dim() != 2:
            classes: Any = view.tensors(given)[0].shape[-1]
            if not isinstance(classes, int):
                classes = call(aten.sym_size.int, given, -1)
            given = call(aten.reshape.default, given, [-1, classes])
        return (given, None, None), (other.kind, other.outer, 1.0, False)
    x: Node = Twins(gm, other.head, other.path).rows(other.read, other.dim, near)
    head = parameters(gm, other.head, near)
    weight, bias = head.weight, head.bias
    if other.fixed:
        x, weight = (call(aten.detach.default, each) for each in (x, weight))
        bias = None if bias is None else call(aten.detach.default, bias)
    return (x, weight, bias), ("logits", head.outer, head.inner, head.capped)
