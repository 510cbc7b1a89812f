"""How a program says which class of each row it means: rules for what picks an element a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.graph.sizes import equal, same_sizes
from iocompiler.passes.linear_cross_entropy.description import Labels
from iocompiler.passes.linear_cross_entropy.forms import Form
from iocompiler.passes.linear_cross_entropy.reader import (
    ORDERED,
    Reader,
    Rule,
    are_alike,
    base_of,
)

aten = torch.ops.aten
PICKING = (aten.gather.default, aten.take_along_dim.default, aten.index.Tensor)
_FILLED = {"z", "lse"}


def _matrix(reader: Reader, source: Any) -> Form | None:
    """Of a matrix that has not been picked from."""
    form = reader.form(source)
    return form if form is not None and form.dim is not None and not form.is_picked else None


def _gather(reader: Reader, node: Node) -> Form | None:
    source, dim, index = node.args[:3]
    if node.target is aten.take_along_dim.default:
        dim, index = index, dim
    form = _matrix(reader, source)
    if form is None or not isinstance(index, Node) or dim is None:
        return None
    whole, picked = (view.tensors(each)[0] for each in (source, index))  # type: ignore[arg-type]
    if int(dim) % whole.dim() != form.dim or picked.dim() != whole.dim():  # type: ignore[arg-type]
        return None
    expected = [1 if d == form.dim else size for d, size in enumerate(whole.shape)]
    if not same_sizes(picked.shape, expected) or picked.dtype != torch.int64:
        return None
    reader.labels[node] = Labels(base_of(index))
    return form.picked()


def _index(reader: Reader, node: Node) -> Form | None:
    """``logits[arange(rows), target]``, and of several dims of rows."""
    indices: Any
    source, indices, *_ = node.args
    form, whole = _matrix(reader, source), view.tensors(source)[0]  # type: ignore[arg-type]
    if form is None or form.dim != whole.dim() - 1 or len(indices) != whole.dim():
        return None
    *counted, target = indices
    rows_ = whole.shape[:-1]
    value = None if target is None else view.tensors(target)[0]
    if value is None or value.dtype != torch.int64 or not same_sizes(value.shape, rows_):
        return None
    if not all(_counts(each, rows_, dim) for dim, each in enumerate(counted)):
        return None
    reader.labels[node] = Labels(base_of(target), wrapped=True)
    return form.picked()


def _counts(index: Any, rows_: Sequence[Any], dim: int) -> bool:
    """Whether an index, repeated to the shape of the rows, is the place along ``dim``."""
    if not isinstance(index, Node):
        return False
    shape = view.tensors(index)[0].shape
    wanted = [size if d == dim else 1 for d, size in enumerate(rows_)]
    new = len(wanted) - len(shape)
    if new < 0 or new > dim or not same_sizes(shape, wanted[new:]):
        return False
    while index.target in ORDERED and index.target is not aten.select.int:
        index = index.args[0]
    return _is_arange(index, rows_[dim])


def _is_arange(node: Node, size: Any) -> bool:
    """Whether it is 0, 1, 2 ... of int64, ``size`` numbers."""
    value = view.tensors(node)[0]
    if value.dtype != torch.int64 or value.dim() != 1 or not equal(value.shape[0], size):
        return False
    if node.target is aten.arange.default:
        return True
    if node.target in (aten.arange.start, aten.arange.start_step):
        start, _, step = (*node.args, 1)[:3]
        return isinstance(start, int) and start == 0 and isinstance(step, int) and step == 1
    if node.target is aten.lift_fresh_copy.default:  # of numbers in the program
        held = getattr(node.graph.owning_module, str(node.args[0].target), None)  # type: ignore[union-attr]
        counted = torch.arange(value.shape[0]) if isinstance(value.shape[0], int) else None
        plain = type(held) is torch.Tensor and counted is not None
        return plain and torch.equal(held.cpu(), counted)  # type: ignore[union-attr]
    return False


def one_hot(node: Any, dim: int) -> Node | None:
    """The classes of which ``node`` is the one-hot matrix, in any dtype, along ``dim``."""
    while isinstance(node, Node) and node.target in (aten.to.dtype, aten.reshape.default):
        read: Any = node.args[0]
        old, new = view.tensors(read)[0], view.tensors(node)[0]
        if not old.dim() or not equal(old.shape[-1], new.shape[-1]):
            return None
        node = read
    if not isinstance(node, Node) or node.target is not aten.one_hot.default:
        return None
    of: Any = node.args[0]
    return base_of(of) if dim == view.tensors(node)[0].dim() - 1 else None


def _one_hot(reader: Reader, node: Node) -> Form | None:
    """A matrix times a one-hot one."""
    if node.kwargs:
        return None
    for source, other in (node.args[:2], reversed(node.args[:2])):
        form = _matrix(reader, source)
        if form is None or set(form.terms) - _FILLED or not are_alike(node, source, other):
            continue
        target = one_hot(other, form.dim)  # type: ignore[arg-type]
        if target is not None:
            reader.labels[node] = Labels(target)
            return form.picked(form.dim)
    return None


RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.gather.default, aten.take_along_dim.default), _gather),
    aten.index.Tensor: _index,
    aten.mul.Tensor: _one_hot,
}
