"""Reading the program between the logits and the loss: a rule for each operator that is understood.

Rows keep their order through all of it: an operator that moves, drops or repeats rows ends what is
understood.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from iocompiler.graph import view
from iocompiler.passes.linear_cross_entropy import loss as losses
from iocompiler.passes.linear_cross_entropy.description import Labels
from iocompiler.passes.linear_cross_entropy.forms import Factor, Form, Term, rows

aten = torch.ops.aten
Rule: TypeAlias = Callable[["Reader", Node], "Form | None"]


class Reader:
    """Forms of the nodes that hang on one head's logits.

    Attributes:
        forms: by node; those of the logits are given.
        labels: of each node that picks a target's logit.
        dependent: everything that hangs on the logits.
        fixed: whether a node has no gradient.
    """

    def __init__(
        self,
        forms: Mapping[Node, Form],
        dependent: Collection[Node],
        fixed: Callable[[Node], bool],
    ) -> None:
        self.forms = dict(forms)
        self.labels: dict[Node, Labels] = {}
        self._dependent, self._fixed = dependent, fixed

    def read(self, node: Node) -> None:
        """Enter the form of a call, if it is understood."""
        rule = _RULES.get(node.target)
        if rule is not None and node not in self.forms:
            found = rule(self, node)
            if found is not None and all(found.terms.values()):
                self.forms[node] = found

    def form(self, x: Any) -> Form | None:
        return self.forms.get(x) if isinstance(x, Node) else None

    def row_form(self, x: Any) -> Form | None:
        found = self.form(x)
        return found if found is not None and found.dim is None else None

    def factor(self, x: Any, like: Node, kind: Any) -> tuple[float, tuple[Factor, ...]] | None:
        """``x`` as a number or factor of the rows (or the sum) ``like``."""
        if isinstance(x, (int, float)) and not isinstance(x, bool):
            if kind == "over":
                return (1.0 / x, ()) if x else None
            return float(x), ()
        if not isinstance(x, Node) or x in self._dependent or not self._fixed(x):
            return None
        value, rows_ = view.value(x), view.tensors(like)[0]
        if not isinstance(value, torch.Tensor):
            return (1.0, (Factor(kind, x),)) if isinstance(value, torch.SymInt) else None
        if value.dim() == 0:
            return 1.0, (Factor(kind, x),)
        if value.dim() > rows_.dim():
            return None
        for size, of_rows in zip(reversed(value.shape), reversed(rows_.shape)):  # noqa: B905
            if not (_same(size, 1) or _same(size, of_rows)):
                return None
        return 1.0, (Factor(kind, x, tuple(rows_.shape)),)


def is_fixed(node: Node, regions: Mapping[Node, view.Region], known: dict[Node, bool]) -> bool:
    """Whether no gradient flows into a node from anywhere."""
    if node not in known:
        value = view.value(node)
        plain = isinstance(value, torch.Tensor) and value.is_floating_point()
        if not plain or node.target is aten.detach.default or not regions[node].grad:
            known[node] = True
        elif node.op == "get_attr":
            constant = getattr(node.graph.owning_module, str(node.target), None)
            known[node] = isinstance(constant, torch.Tensor) and not constant.requires_grad
        elif node.op == "call_function":
            known[node] = all(is_fixed(each, regions, known) for each in node.all_input_nodes)
        else:
            known[node] = not node.meta.get("requires_grad", True)
    return known[node]


def base_of(target: Node) -> Node:
    """What a target is a view of, its elements in the same order."""
    while target.target in _ORDERED and isinstance(target.args[0], Node):
        if target.target is aten.select.int and not _keeps_all(target):
            break
        target = target.args[0]
    return target


# statistics of the logits


def _log_softmax(reader: Reader, node: Node) -> Form | None:
    form = reader.form(node.args[0])
    if form is None or form.terms != _LOGITS or not _is_wide(node):
        return None
    dim: Any = node.args[1]
    if dim % view.tensors(node)[0].dim() != form.dim:
        return None
    return form.plus(rows(lse=-1.0))


def _logsumexp(reader: Reader, node: Node) -> Form | None:
    form = reader.form(node.args[0])
    if form is None or form.terms != _LOGITS:
        return None
    dims: Any = node.args[1]
    rank = view.tensors(node.args[0])[0].dim()  # type: ignore[arg-type]
    return rows(lse=1.0) if [d % rank for d in dims] == [form.dim] else None


def _gather(reader: Reader, node: Node) -> Form | None:
    source, dim, index = node.args[:3]
    if node.target is aten.take_along_dim.default:
        dim, index = index, dim
    form = reader.form(source)
    if form is None or form.dim is None or not isinstance(index, Node) or dim is None:
        return None
    whole, picked = (view.tensors(each)[0] for each in (source, index))  # type: ignore[arg-type]
    if int(dim) % whole.dim() != form.dim or picked.dim() != whole.dim():  # type: ignore[arg-type]
        return None
    expected = [1 if d == form.dim else size for d, size in enumerate(whole.shape)]
    if not _same_shape(picked.shape, expected) or picked.dtype != torch.int64:
        return None
    reader.labels[node] = Labels(base_of(index))
    return form.picked()


def _index(reader: Reader, node: Node) -> Form | None:
    """``logits[arange(rows), target]``."""
    form = reader.form(node.args[0])
    indices: Any = node.args[1]
    if form is None or form.dim != 1 or len(indices) != 2 or None in indices:
        return None
    counted, target = indices
    whole = view.tensors(node.args[0])[0]  # type: ignore[arg-type]
    values = [view.tensors(each)[0] for each in indices]
    if whole.dim() != 2 or any(v.dim() != 1 or v.dtype != torch.int64 for v in values):
        return None
    if counted.target is not aten.arange.default or not _same(values[0].shape[0], whole.shape[0]):
        return None
    if not _same(values[1].shape[0], whole.shape[0]):
        return None
    reader.labels[node] = Labels(base_of(target), wrapped=True)
    return form.picked()


def _loss(reader: Reader, node: Node) -> Form | None:
    given = losses.arguments(node)
    form = reader.form(given["self"])
    expected = {"z"} if node.target is aten.cross_entropy_loss.default else {"z", "lse"}
    if form is None or set(form.terms) != expected or form.dim != losses.class_dim(given["self"]):
        return None
    if form.terms["z"] != (Term(),) or form.terms.get("lse", (Term(-1.0),)) != (Term(-1.0),):
        return None
    reader.labels[node] = losses.labels(given)
    reduction, weight = given["reduction"], given["weight"]
    found = rows(cross=1.0)
    if weight is not None:
        found = found.times(1.0, Factor("class", weight))
    if reduction == losses.MEAN:
        found = found.times(1.0, Factor("kept") if weight is None else Factor("classes", weight))
    return Form(found.terms, reduced=reduction != losses.NONE)


# arithmetic on them


def _added(sign: float) -> Rule:
    def rule(reader: Reader, node: Node) -> Form | None:
        first, second = (reader.form(x) for x in node.args[:2])
        if first is None or second is None or node.kwargs or first.reduced != second.reduced:
            return None
        if first.dim is None and second.dim is None:
            return first.plus(second, sign) if _are_alike(node, *node.args[:2]) else None
        if first.dim is None or second.dim is not None or not _is_wide(node):
            return None
        # a number each row, beside the row's logits
        whole, row = (view.tensors(each)[0].shape for each in node.args[:2])  # type: ignore[arg-type]
        expected = [1 if d == first.dim else size for d, size in enumerate(whole)]
        return first.plus(second, sign) if _same_shape(row, expected) else None

    return rule


def _multiplied(reader: Reader, node: Node) -> Form | None:
    first, second = node.args[:2]
    one, two = reader.row_form(first), reader.row_form(second)
    if one is not None and two is not None:
        return one.product(two) if _are_alike(node, first, second) else None
    form, other, of = one, second, first
    if form is None:
        form, other, of = two, first, second
    return _scaled(reader, node, form, other, of, "times")


def _divided(reader: Reader, node: Node) -> Form | None:
    first, second = node.args[:2]
    return _scaled(reader, node, reader.row_form(first), second, first, "over")


def _scaled(
    reader: Reader, node: Node, form: Form | None, other: Any, of: Any, kind: Any
) -> Form | None:
    if form is None or node.kwargs or not _are_alike(node, of):
        return None
    found = reader.factor(other, of, kind)
    return form.times(found[0], *found[1]) if found is not None else None


def _negated(reader: Reader, node: Node) -> Form | None:
    form = reader.row_form(node.args[0])
    return form.times(-1.0) if form is not None else None


def _squared(reader: Reader, node: Node) -> Form | None:
    form = reader.row_form(node.args[0])
    return form.product(form) if form is not None else None


def _power(reader: Reader, node: Node) -> Form | None:
    return _squared(reader, node) if node.args[1] == 2 else None


def _masked(reader: Reader, node: Node) -> Form | None:
    """``masked_fill(rows, mask, 0)``, ``where(mask, rows, 0)``."""
    if node.target is aten.masked_fill.Scalar:
        inside, mask, outside = node.args
        kind = "unless"
    else:
        mask, inside, outside = node.args
        kind = "where"
    form = reader.row_form(inside)
    if form is None or form.reduced or not _is_nothing(outside):
        return None
    if view.tensors(mask)[0].dtype != torch.bool:  # type: ignore[arg-type]
        return None
    return _scaled(reader, node, form, mask, inside, kind)


def _is_nothing(x: Any) -> bool:
    if not isinstance(x, Node):
        return isinstance(x, (int, float)) and not x
    if x.target is aten.scalar_tensor.default:
        return bool(x.args[0] == 0)
    return x.target in (aten.zeros_like.default, aten.zeros.default)


def _kept(reader: Reader, node: Node) -> Form | None:
    """Rows in another shape, or another dtype; a matrix whose classes stay last."""
    form = reader.form(node.args[0])
    if form is None or not view.tensors(node)[0].is_floating_point():
        return None
    if form.dim is not None:
        old, new = view.tensors(node.args[0])[0], view.tensors(node)[0]  # type: ignore[arg-type]
        last = form.dim == old.dim() - 1 and _same(old.shape[-1], new.shape[-1])
        taken = last and node.target in _REGROUPED and _is_wide(node)
        return replace(form, dim=new.dim() - 1) if taken else None
    return form if node.target is not aten.select.int or _keeps_all(node) else None


def _keeps_all(node: Node) -> bool:
    """Whether what ``select`` chooses from is alone in its dim."""
    dim: Any = node.args[1]
    return _same(view.tensors(node.args[0])[0].shape[dim], 1)  # type: ignore[arg-type]


def _summed(reader: Reader, node: Node) -> Form | None:
    form = reader.row_form(node.args[0])
    if form is None or form.reduced or not view.tensors(node)[0].is_floating_point():
        return None
    if node.target in (aten.sum.dim_IntList, aten.mean.dim):
        rank, dims = view.tensors(node.args[0])[0].dim(), node.args[1]  # type: ignore[arg-type]
        if len({d % rank for d in dims or range(rank)}) != rank:  # type: ignore[operator, union-attr]
            return None
    means = node.target in (aten.mean.default, aten.mean.dim)
    total = form.times(1.0, Factor("rows")) if means else form
    return Form(total.terms, reduced=True)


def _is_wide(node: Node) -> bool:
    """Whether a matrix is not rounded on the way."""
    read: Any = node.args[0]
    value = view.tensors(node)[0]
    return value.is_floating_point() and value.itemsize >= view.tensors(read)[0].itemsize


def _are_alike(node: Node, *others: Any) -> bool:
    """Whether nothing is repeated: all have the shape of ``node``."""
    shape = view.tensors(node)[0].shape
    return all(_same_shape(view.tensors(each)[0].shape, shape) for each in others)


def is_picked(matrix: Node) -> bool:
    """Whether something chooses an element of each row of a matrix."""
    for user in matrix.users:
        if user.target in (*losses.TARGETS, *PICKING):
            return True
        if user.target in (*_ORDERED, aten.to.dtype) and is_picked(user):
            return True
    return False


def _same(a: Any, b: Any) -> bool:
    return bool(statically_known_true(a == b))


def _same_shape(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))


PICKING = (aten.gather.default, aten.take_along_dim.default, aten.index.Tensor)
_ORDERED = (
    aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.default, aten.contiguous.default, aten.clone.default,
    aten.alias.default, aten.select.int,
)  # fmt: skip
_REGROUPED = (
    aten.reshape.default, aten.flatten.using_ints, aten.contiguous.default, aten.clone.default,
    aten.alias.default, aten.to.dtype,
)  # fmt: skip
_LOGITS = {"z": (Term(),)}
_RULES: dict[Any, Rule] = {
    **dict.fromkeys((*_ORDERED, aten.to.dtype), _kept),
    **dict.fromkeys(losses.TARGETS, _loss),
    **dict.fromkeys(
        (aten.sum.default, aten.mean.default, aten.sum.dim_IntList, aten.mean.dim), _summed
    ),
    **dict.fromkeys((aten.gather.default, aten.take_along_dim.default), _gather),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _multiplied),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _divided),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.where.ScalarOther, aten.where.self), _masked),
    aten.log_softmax.int: _log_softmax,
    aten.logsumexp.default: _logsumexp,
    aten.index.Tensor: _index,
    aten.add.Tensor: _added(1.0),
    aten.sub.Tensor: _added(-1.0),
    aten.neg.default: _negated,
    aten.square.default: _squared,
    aten.pow.Tensor_Scalar: _power,
}
