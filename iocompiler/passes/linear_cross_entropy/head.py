"""From logits back to the linear that computes them, through views, casts, scale, soft-cap."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.graph.sizes import equal
from iocompiler.passes.linear_cross_entropy.description import Declined, Head

aten = torch.ops.aten
COPIES = (aten.contiguous.default, aten.clone.default, aten.alias.default)
RESHAPES = (aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)
MOVES = (*RESHAPES, aten.slice.Tensor, aten.select.int)
TRANSPOSES = (aten.transpose.int, aten.permute.default)
_FACTORS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
# what logits may go through
PATH = (*COPIES, *MOVES, *TRANSPOSES, *_FACTORS, aten.to.dtype, aten.tanh.default)
_NEAR = 4  # this far behind an operator that is not understood, a linear makes it a near miss


def read(node: Node, dim: int, *through: Any) -> Head | None:
    """The head whose logits ``node`` computes, classes along ``dim``; None where there is none.

    Args:
        through: what may stand between, and changes nothing.

    Raises:
        Declined: there is one, but something stands between that is not understood.
    """
    path: list[Node] = []
    moves: list[Node] = []
    outer, inner, capped = 1.0, 1.0, False
    while True:
        head = _linear(node)
        if head is not None:
            break
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
            return None
        number = factor(node)
        if node.target in TRANSPOSES:
            dim = order_of(node)[dim]
            moves.append(node)
        elif node.target in MOVES:
            check_move(node, dim)
            dim = view.tensors(node.args[0])[0].dim() - 1
            moves.append(node)
        elif node.target is aten.to.dtype:
            check_cast(node)
        elif number is not None:
            outer, inner = (outer, inner * number) if capped else (outer * number, inner)
        elif node.target is aten.tanh.default and not capped:
            capped = True
        elif node.target not in (*COPIES, *through):
            if linear_near(node):
                raise Declined(f"{node.target} between the head and the loss")
            return None
        path.append(node)
        node = node.args[0]
    if dim != view.tensors(head.node)[0].dim() - 1:
        raise Declined("the loss's classes are not the head's columns")
    return replace(
        head,
        path=tuple(reversed(path)),
        views=tuple(reversed(moves)),
        outer=outer,
        inner=inner,
        capped=capped,
    )


def rows(calls: Iterable[Node]) -> tuple[Any, ...]:
    """Which rows of a head's logits ``calls`` choose, one after the other, and in what order: equal
    for those that choose the same.
    """
    return tuple(
        (node.target, node.args[1:], tuple(map(str, view.tensors(node.args[0])[0].shape)))  # type: ignore[arg-type]
        for node in calls
        if node.target in (*MOVES, *TRANSPOSES) and node.target not in RESHAPES
    )


def _linear(node: Node) -> Head | None:
    if node.target is aten.linear.default:
        x, weight, *rest = node.args
        return _head(node, x, weight, rest[0] if rest else None, False)
    if node.target in (aten.mm.default, aten.matmul.default):
        left, right = node.args
        return _head(node, left, right, None, True)
    if node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = node.args
        return _head(node, x, weight, bias, True)
    if node.target is aten.einsum.default:
        return _contracted(node)
    if node.target is aten.add.Tensor and not node.kwargs:
        first, bias = node.args
        inner = _linear(first) if isinstance(first, Node) else None
        if inner is not None and inner.bias is None and isinstance(bias, Node):
            found = _head(node, inner.x, inner.weight, bias, inner.transposed)
            return found and replace(found, also=(inner.node,))
    return None


def _head(node: Node, x: Any, weight: Any, bias: Any, transposed: bool) -> Head | None:
    values = [view.tensors(each)[0] for each in (x, weight, bias) if each is not None]
    if values[1].dim() != 2 or values[0].dim() < 2 or not values[1].is_floating_point():
        return None
    if len({value.dtype for value in values}) > 1:
        return None
    columns = values[1].shape[1 if transposed else 0]
    if bias is not None and (values[2].dim() != 1 or not equal(values[2].shape[0], columns)):
        return None
    return Head(node, x, weight, bias, transposed)


def _contracted(node: Node) -> Head | None:
    """``einsum("bsd,vd->bsv", x, weight)``, its operands in either order."""
    equation, operands = node.args[:2]
    inputs, arrow, result = str(equation).replace(" ", "").partition("->")
    letters = inputs.split(",")
    if not arrow or len(letters) != 2 or len(operands) != 2 or not equation.replace(" ", ""):  # type: ignore[arg-type, union-attr]
        return None
    for (mine, x), (theirs, weight) in (
        zip(letters, operands, strict=True),  # type: ignore[arg-type]
        zip(reversed(letters), reversed(operands), strict=True),  # type: ignore[arg-type]
    ):
        rows, summed, classes = mine[:-1], mine[-1:], result[-1:]
        plain = all(each.isalpha() and len(set(each)) == len(each) for each in (mine, theirs))
        if plain and result == rows + classes and sorted(theirs) == sorted(summed + classes):
            return _head(node, x, weight, None, theirs == summed + classes)
    return None


def linear_near(node: Node, far: int = _NEAR) -> bool:
    """Whether a linear is at most ``far`` calls behind."""
    if _linear(node) is not None:
        return True
    reads = node.all_input_nodes if node.op == "call_function" and far else []
    return any(linear_near(each, far - 1) for each in reads)


def factor(node: Node) -> float | None:
    """What a call multiplies by, where that is a number."""
    if node.target not in _FACTORS:
        return None
    number = node.args[1]
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not number:
        return None
    if node.kwargs:
        return None
    multiplies = node.target in (aten.mul.Tensor, aten.mul.Scalar)
    return float(number) if multiplies else 1.0 / float(number)


def order_of(node: Node) -> list[int]:
    """For each dim of a transposition's result, the dim it was."""
    rank = view.tensors(node)[0].dim()
    order = list(range(rank))
    arguments: Any = node.args
    if node.target is aten.permute.default:
        return [d % rank for d in arguments[1]]
    one, other = (d % rank for d in arguments[1:3])
    order[one], order[other] = order[other], order[one]
    return order


def check_move(node: Node, dim: int) -> None:
    old, new = view.tensors(node.args[0])[0], view.tensors(node)[0]  # type: ignore[arg-type]
    if not old.dim() or dim != new.dim() - 1 or not equal(old.shape[-1], new.shape[-1]):
        raise Declined(f"{node.target} splits or cuts the classes")
    arguments: Any = node.args
    if node.target not in RESHAPES:
        which = arguments[1] if len(arguments) > 1 else 0
        if which % old.dim() == old.dim() - 1:
            raise Declined(f"{node.target} splits or cuts the classes")


def check_cast(node: Node) -> None:
    old, new = view.tensors(node.args[0])[0], view.tensors(node)[0]  # type: ignore[arg-type]
    if not new.is_floating_point() or new.dtype.itemsize < old.dtype.itemsize:
        raise Declined(f"the logits are rounded to {new.dtype}")
