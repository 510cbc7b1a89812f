"""The program between logits and loss, node by node: what is known of each, and what its rules may
ask.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import view
from iocompiler.graph.sizes import equal, same_sizes
from iocompiler.passes.linear_cross_entropy import distribution as distributions
from iocompiler.passes.linear_cross_entropy.description import Comparison, Distribution, Labels
from iocompiler.passes.linear_cross_entropy.forms import Factor, Form

aten = torch.ops.aten
Rule: TypeAlias = Callable[["Reader", Node], "Form | None"]

# calls after which the elements stand in the same order
ORDERED = (
    aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.default, aten.contiguous.default, aten.clone.default,
    aten.alias.default, aten.select.int,
)  # fmt: skip


class Reader:
    """Forms of the nodes that hang on one head's logits.

    Attributes:
        forms: by node; those of the logits are given.
        labels: of each node that picks a target's logit.
        others: what the logits are compared with, of each node that does.
        divergences: how, of each node that makes the summands.

    Args:
        rules: by operator, tried in turn.
        dependent: everything that hangs on the logits.
        fixed: nodes that have no gradient.
    """

    def __init__(
        self,
        rules: Mapping[Any, Sequence[Rule]],
        forms: Mapping[Node, Form],
        dependent: Collection[Node],
        fixed: Collection[Node],
    ) -> None:
        self._rules = rules
        self.forms = dict(forms)
        self.labels: dict[Node, Labels] = {}
        self.others: dict[Node, Distribution] = {}
        self.divergences: dict[Node, Comparison] = {}
        self._dependent, self._fixed = dependent, fixed

    def read(self, node: Node) -> None:
        """Enter the form of a call, if it is understood."""
        for rule in self._rules.get(node.target, ()):
            if node in self.forms:
                return
            found = rule(self, node)
            if found is not None and all(found.terms.values()):
                self.forms[node] = found

    def form(self, x: Any) -> Form | None:
        return self.forms.get(x) if isinstance(x, Node) else None

    def row_form(self, x: Any) -> Form | None:
        found = self.form(x)
        return found if found is not None and found.dim is None else None

    def other(self, node: Node, x: Any, dim: int, *, logs: bool, at: Node | None = None) -> float:
        """Enter what the logits meet: ``x``, which is to have the shape of ``node``, classes along
        ``dim``.

        Args:
            logs: whether it holds logarithms.
            at: where they meet, if that is not ``node``.

        Returns:
            1, or -1 for its negative; 0 where it is no distribution that does not hang on the
            logits.
        """
        if not isinstance(x, Node) or x in self._dependent or not are_alike(node, x):
            return 0.0
        found = distributions.read(x, dim, logs=logs, fixed=x in self._fixed)
        if found is None:
            return 0.0
        self.others[at or node] = found
        return found.sign

    def factor(self, x: Any, like: Node, kind: Any) -> tuple[float, tuple[Factor, ...]] | None:
        """``x`` as a number or factor of the rows (or the sum) ``like``."""
        if isinstance(x, (int, float)) and not isinstance(x, bool):
            if kind == "over":
                return (1.0 / x, ()) if x else None
            return float(x), ()
        if not isinstance(x, Node) or x in self._dependent or x not in self._fixed:
            return None
        number, x = _without_number(x)
        if number != 1.0:
            beside = self.factor(x, like, kind)
            share = 1.0 / number if kind == "over" else number
            return beside and (beside[0] * share, beside[1])
        value, rows_ = view.value(x), view.tensors(like)[0]
        if not isinstance(value, torch.Tensor):
            return (1.0, (Factor(kind, x),)) if isinstance(value, torch.SymInt) else None
        if value.dim() == 0:
            return 1.0, (Factor(kind, x),)
        if value.dim() > rows_.dim():
            return None
        for size, of_rows in zip(reversed(value.shape), reversed(rows_.shape)):  # noqa: B905
            if not (equal(size, 1) or equal(size, of_rows)):
                return None
        return 1.0, (Factor(kind, x, tuple(rows_.shape)),)


def _without_number(x: Node) -> tuple[float, Node]:
    """``x`` as a product of a Python number and a tensor."""
    if x.target is aten.mul.Tensor and not x.kwargs:
        read, number = x.args
        plain = isinstance(number, (int, float)) and not isinstance(number, bool) and number
        if plain and isinstance(read, Node):
            return float(number), read  # type: ignore[arg-type]
    return 1.0, x


def fixed(gm: GraphModule) -> set[Node]:
    """The nodes into which no gradient flows from anywhere."""
    regions = view.regions(gm)
    found: set[Node] = set()
    for node in gm.graph.nodes:
        value = view.value(node)
        plain = isinstance(value, torch.Tensor) and value.is_floating_point()
        if not plain or node.target is aten.detach.default or not regions[node].grad:
            found.add(node)
        elif node.op == "get_attr":
            constant = getattr(gm, str(node.target), None)
            if isinstance(constant, torch.Tensor) and not constant.requires_grad:
                found.add(node)
        elif node.op == "call_function":
            if all(each in found for each in node.all_input_nodes):
                found.add(node)
        elif not node.meta.get("requires_grad", True):
            found.add(node)
    return found


def base_of(target: Node) -> Node:
    """What a target is a view of, its elements in the same order."""
    while target.target in ORDERED and isinstance(target.args[0], Node):
        if target.target is aten.select.int and not keeps_all(target):
            break
        target = target.args[0]
    return target


def keeps_all(node: Node) -> bool:
    """Whether what ``select`` chooses from is alone in its dim."""
    dim: Any = node.args[1]
    return equal(view.tensors(node.args[0])[0].shape[dim], 1)  # type: ignore[arg-type]


def is_wide(node: Node) -> bool:
    """Whether a matrix is not rounded on the way."""
    read: Any = node.args[0]
    value = view.tensors(node)[0]
    return value.is_floating_point() and value.itemsize >= view.tensors(read)[0].itemsize


def are_alike(node: Node, *others: Any) -> bool:
    """Whether nothing is repeated: all are tensors of the shape of ``node``."""
    shape, found = view.tensors(node)[0].shape, [view.tensors(each) for each in others]
    return all(each and same_sizes(each[0].shape, shape) for each in found)
