"""One spelling for each meaning, so that recognisers need know only one."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.autocast import spell_out_autocast
from iocompiler.graph.early_casts import cast_early
from iocompiler.graph.functional import make_functional
from iocompiler.graph.match import graph_pass
from iocompiler.graph.sizes import equal, same_sizes
from iocompiler.graph.snapshots import snapshots

aten = torch.ops.aten

# other names of the same operator
_NAMES = {
    "view": "reshape",
    "_unsafe_view": "reshape",
    "multiply": "mul",
    "subtract": "sub",
    "divide": "div",
    "true_divide": "div",
    "negative": "neg",
    "absolute": "abs",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "greater": "gt",
    "less": "lt",
    "greater_equal": "ge",
    "less_equal": "le",
    "not_equal": "ne",
    "special_expm1": "expm1",
    "special_exp2": "exp2",
    "special_expit": "sigmoid",
    "special_log1p": "log1p",
    "special_softmax": "softmax",
    "special_log_softmax": "log_softmax",
    "special_logsumexp": "logsumexp",
}


def _synonyms() -> dict[Any, Any]:
    """Each overload of a synonym to the overload of the one name whose arguments are as many, of
    the same types.
    """
    found: dict[Any, Any] = {}
    for synonym, name in _NAMES.items():
        old, new = getattr(aten, synonym), getattr(aten, name)
        targets = [getattr(new, overload) for overload in new.overloads()]
        for overload in old.overloads():
            mine = getattr(old, overload)
            alike = [target for target in targets if _types(target) == _types(mine)]
            found.update((mine, target) for target in alike[:1])
    return found


def _types(operator: torch._ops.OpOverload) -> list[tuple[str, bool]]:
    return [(str(a.type), a.kwarg_only) for a in operator._schema.arguments]


_SYNONYMS = _synonyms()
_CONVERSIONS = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
)


@graph_pass(respells=True)
def normalise(gm: GraphModule) -> int:
    """Spell every operator the one way recognisers know; in-place operators on temporaries become
    functional.

    Before::

        a = aten.view.default(x, [8, 64]); b = aten.t.default(w); c = aten.contiguous.default(a)
        d = aten.relu_.default(c); e = aten.type_as.default(d, x)

    After::

        a = aten.reshape.default(x, [8, 64]); b = aten.transpose.int(w, 0, 1)
        d = aten.relu.default(a); e = aten.to.dtype(d, torch.bfloat16)
    """
    changed = spell_out_autocast(gm) + make_functional(gm)
    for node in view.calls(gm):
        changed += _respell(gm, node)
    return changed + snapshots(gm) + cast_early(gm) + rewrite.erase_dead(gm)


def _respell(gm: GraphModule, node: Node) -> int:
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(
        view.value(node), torch.Tensor
    ):
        return 0
    before = (node.target, node.args, node.kwargs)
    if node.target in _SYNONYMS:
        rewrite.respell(node, _SYNONYMS[node.target], node.args, node.kwargs)
    _shape(node)
    _transposition(node)
    _narrowed(node)
    _conversion(node)
    _concatenation(node)
    _defaults(node)
    same = _same_as(gm, node)
    if same is not None:
        rewrite.bypass(gm, node, same)
        return 1
    return int(before != (node.target, node.args, node.kwargs))


def _shape(node: Node) -> None:
    """flatten, unflatten, reshape_as, view_as, expand_as: the shape itself, where it is static."""
    shape = view.tensors(node)[0].shape
    if not all(isinstance(size, int) for size in shape):
        return
    reshapes = (
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.reshape_as.default,
        aten.view_as.default,
    )
    if node.target in reshapes:
        rewrite.respell(node, aten.reshape.default, (node.args[0], list(shape)))
    elif node.target is aten.expand_as.default:
        rewrite.respell(node, aten.expand.default, (node.args[0], list(shape)))


def _transposition(node: Node) -> None:
    """t, mT, numpy_T: a transposition of two dims, named by numbers."""
    if node.target not in (aten.t.default, aten.mT.default, aten.numpy_T.default):
        return
    rank = view.tensors(node)[0].dim()
    if rank == 2 or (rank > 2 and node.target is aten.mT.default):
        rewrite.respell(node, aten.transpose.int, (node.args[0], rank - 2, rank - 1))


def _narrowed(node: Node) -> None:
    """narrow: a slice, where its ends are numbers."""
    if node.target is not aten.narrow.default:
        return
    read, dim, start, length = node.args
    if isinstance(start, int) and isinstance(length, int) and start >= 0:
        rewrite.respell(node, aten.slice.Tensor, (read, dim, start, start + length))


def _conversion(node: Node) -> None:
    """Every conversion that changes nothing but the dtype is ``aten.to.dtype(x, dtype)``."""
    if node.target not in (*_CONVERSIONS, aten._to_copy.default) or not isinstance(
        node.args[0], Node
    ):
        return
    old, new = view.tensors(node.args[0])[0], view.tensors(node)[0]
    options = node.kwargs.get("memory_format"), node.kwargs.get("copy")
    copies = node.target is aten._to_copy.default or any(options) or True in node.args[1:]
    if old.device != new.device or (copies and old.dtype == new.dtype) or any(options):
        return
    rewrite.respell(node, aten.to.dtype, (node.args[0], new.dtype))


def _concatenation(node: Node) -> None:
    """A concatenation of one tensor lays it out anew."""
    kept = _kept_part(node) if node.target is aten.cat.default else None
    if kept is None or view.is_contiguous(view.tensors(kept)[0]):
        return
    if view.is_contiguous(view.tensors(node)[0]):
        order = {"memory_format": torch.contiguous_format}
        rewrite.respell(node, aten.clone.default, (kept,), order)


def _defaults(node: Node) -> None:
    """Positional arguments by position, keyword-only ones by name, defaults at the end left out."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    schema = node.target._schema.arguments
    values = view.spelled_out(node)
    positional = [
        value for argument, value in zip(schema, values, strict=True) if not argument.kwarg_only
    ]
    while positional and _is_default(schema[len(positional) - 1], positional[-1]):
        positional.pop()
    named = {
        argument.name: value
        for argument, value in zip(schema, values, strict=True)
        if argument.kwarg_only and not _is_default(argument, value)
    }
    rewrite.respell(node, node.target, tuple(positional), named)


def _is_default(argument: torch.Argument, value: Any) -> bool:
    if not argument.has_default_value() or isinstance(value, Node):
        return False
    default = argument.default_value
    return type(value) is type(default) and bool(value == default)


def _same_as(gm: GraphModule, node: Node) -> Node | None:
    """The node whose value this one is again: of an alias, a copy that changes no stride, a sum
    with 0 ...
    """
    same = _kept_part(node) if node.target is aten.cat.default else (*node.args, None)[0]
    if not isinstance(same, Node) or not isinstance(view.value(same), torch.Tensor):
        return None
    if same.op != "call_function" and any(user.op == "output" for user in node.users):
        return None  # the caller gets a view of the input, not the input
    if node.target is aten.detach_.default:
        return same if same.target is aten.lift_fresh_copy.default else None
    if any(view.changes_metadata(user) for user in (*node.users, *same.users)):
        return None  # two names of one storage, one of which gets another shape
    return same if _does_nothing(gm, node, same) else None


def _does_nothing(gm: GraphModule, node: Node, same: Node) -> bool:
    old, new = view.tensors(same)[0], view.tensors(node)[0]
    rest: Any = node.args[1:]
    if node.target is aten.contiguous.default:
        return not rest and not node.kwargs and view.is_contiguous(old)
    if node.target is aten.to.dtype:
        return old.dtype == new.dtype and len(rest) == 1 and not node.kwargs
    if node.target in (aten.reshape.default, aten.expand.default):
        return same_sizes(old.shape, new.shape)
    if node.target is aten.slice.Tensor:
        _, start, end, step = view.spelled_out(node)[1:]
        whole = end is None or (isinstance(end, int) and end >= sys.maxsize)
        return whole and start in (None, 0) and bool(step == 1)
    if node.target is aten.dropout.default:
        return bool(rest[0] == 0 or rest[1] is False)
    if node.target in (aten.add.Tensor, aten.cat.default):
        # these are copies: as good as their input only where neither is ever written
        nothing = (
            view.is_contiguous(old)
            if node.target is aten.cat.default
            else rest[0] == 0 and old.dtype == new.dtype == torch.int64
        )
        return nothing and not _written(gm, node, same)
    return node.target is aten.alias.default


def _kept_part(node: Node) -> Any:
    """The one tensor of a concatenation whose others are empty."""
    parts, dim = view.spelled_out(node)
    kept = [part for part in parts if not _adds_nothing(view.tensors(part)[0], dim)]
    alike = len(kept) == 1 and view.tensors(kept[0])[0].dtype == view.tensors(node)[0].dtype
    return kept[0] if alike else None


def _adds_nothing(x: torch.Tensor, dim: int) -> bool:
    """Whether a part of a concatenation has no elements; empty vectors fit tensors of any rank."""
    return equal(x.shape[0 if x.dim() == 1 else dim], 0)


def _written(gm: GraphModule, node: Node, same: Node) -> bool:
    roots = view.roots(gm)
    storages = roots[node].union(*(roots[read] for read in node.all_input_nodes))
    return bool(view.written(gm, roots) & storages) or _is_given_away(gm, node, same, roots)


def _is_given_away(
    gm: GraphModule, copy: Node, same: Node, roots: Mapping[Node, frozenset[Node]]
) -> bool:
    """Whether the caller gets the copy, and has something else of the memory of what is copied."""
    if not any(user.op == "output" for user in copy.users):
        return False
    (output,) = gm.graph.find_nodes(op="output")
    made = all(isinstance(root.target, torch._ops.OpOverload) for root in roots[same])
    others = (node for node in output.all_input_nodes if node is not copy)
    return not made or any(roots[node] & roots[same] for node in others)
