"""From logits back to the linear that computes them, through views, casts, scale, soft-cap."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.graph.sizes import equal
from iocompiler.passes.linear_cross_entropy.description import Declined, Head
from iocompiler.passes.linear_cross_entropy.moves import (
    MOVES,
    TRANSPOSES,
    check_move,
    is_cut,
    order_of,
)

aten = torch.ops.aten
COPIES = (aten.contiguous.default, aten.clone.default, aten.alias.default)
_FACTORS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
# what logits may go through
_CAPS = (aten.tanh.default, aten.sigmoid.default)
PATH = (*COPIES, *MOVES, *TRANSPOSES, *_FACTORS, aten.to.dtype, *_CAPS)
_ROWS = "ª"  # a letter that no equation has
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
    cuts: list[Node] = []
    outer, inner, capped, shifted = 1.0, 1.0, False, False
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
        elif is_cut(node, dim):
            moves.append(node)
            cuts.append(node)
        elif node.target in MOVES:
            check_move(node, dim)
            dim = view.tensors(node.args[0])[0].dim() - 1
            moves.append(node)
        elif node.target is aten.to.dtype:
            check_cast(node)
        elif number is not None:
            outer, inner = (outer, inner * number) if capped else (outer * number, inner)
        elif node.target in _CAPS and not capped:
            capped, shifted = True, node.target is aten.sigmoid.default
            if shifted:  # sigmoid(z) = 1/2 + 1/2 tanh(z / 2)
                outer, inner = 0.5 * outer, 0.5
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
        shifted=shifted,
        cuts=tuple(reversed(cuts)),
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
        for first, bias in (node.args, reversed(node.args)):
            inner = _linear(first) if isinstance(first, Node) else None
            if inner is not None and inner.bias is None and isinstance(bias, Node):
                found = _head(node, inner.x, inner.weight, bias, inner.transposed)
                return found and replace(found, also=(inner.node,))
    return None


def _head(node: Node, x: Any, weight: Any, bias: Any, transposed: bool) -> Head | None:
    rows, matrix = (view.tensors(each)[0] for each in (x, weight))
    if matrix.dim() != 2 or rows.dim() < 2 or not matrix.is_floating_point():
        return None
    if rows.dtype != matrix.dtype:
        return None
    if bias is not None and not _is_bias(bias, rows, matrix.shape[1 if transposed else 0]):
        return None
    return Head(node, x, weight, bias, transposed)


def _is_bias(bias: Any, rows: torch.Tensor, columns: Any) -> bool:
    """Whether it is one number for each of the ``columns``, added to all rows alike."""
    value = view.tensors(bias)[0]
    if not 1 <= value.dim() <= rows.dim() or not value.is_floating_point():
        return False
    alike = equal(value.shape[-1], columns) and all(equal(n, 1) for n in value.shape[:-1])
    return alike and value.dtype.itemsize >= rows.dtype.itemsize


def _contracted(node: Node) -> Head | None:
    """``einsum("bsd,vd->bsv", x, weight)``, its operands in either order."""
    equation, operands = node.args[:2]
    # an ellipsis is of rows, or in the weight no letter
    inputs, arrow, result = str(equation).replace(" ", "").replace("...", _ROWS).partition("->")
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


def check_cast(node: Node) -> None:
    old, new = view.tensors(node.args[0])[0], view.tensors(node)[0]  # type: ignore[arg-type]
    if not new.is_floating_point() or new.dtype.itemsize < old.dtype.itemsize:
        raise Declined(f"the logits are rounded to {new.dtype}")
