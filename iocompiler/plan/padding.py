"""Row strides the matrix units like: matmuls with an odd row length get padded rows.

cuBLAS has fast kernels only where rows start at multiples of 16 bytes and extents are multiples of
as much. The intermediate is therefore stored with a longer row stride, whose padding is never read
or written, and the product is done in aligned parts (`ops/aligned_mm.py`). Only what leaves the
graph must lie as the user's program has it: a product goes there through a scratch, unless another
product reads it too; the rest is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._guards import TracingContext
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from iocompiler.cost_model.device import Device
from iocompiler.cost_model.roofline import time
from iocompiler.cost_model.rules import cost
from iocompiler.graph.rewrite import call, erase, redirect
from iocompiler.graph.view import is_contiguous
from iocompiler.ops.aligned_mm import ALIGNED_MM
from iocompiler.plan.build import size_hints
from iocompiler.plan.rules import has_rule
from iocompiler.plan.steps import is_effect
from iocompiler.plan.views import is_view, storage_owner
from iocompiler.tile.index import Size

aten = torch.ops.aten

CONTRACTIONS = frozenset(
    {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
)

# What `ops/aligned_mm.py` can do.
_ALIGNABLE = (aten.mm.default, aten.addmm.default)

# Rows start at multiples of this many bytes: a memory line.
_LINE = 128
_ALIGNED = 16
# Below this many elements a slow matmul is not worth a second layout.
_SMALL = 1 << 22

# where matmuls care
PADDED_DEVICES: tuple[str, ...] = ("cuda",)

# the strides a node had before
_EXACT = "iocompiler_exact_stride"

Strides = tuple[Size, ...]


def settle_strides(gm: GraphModule, name: str, inputs: Sequence[Any], device: Device) -> None:
    """Fix the strides of everything in the flat graph ``name`` before it is planned; ``inputs`` are
    its fake inputs, ``device`` prices it.
    """
    adopt_strides(gm, inputs)
    exact = None if _has_effects(gm) else exact_outputs(name)
    pad_rows(gm, exact, device)


def _has_effects(gm: GraphModule) -> bool:
    """Whether tokens are among its outputs."""
    return any(map(is_effect, gm.graph.nodes))


def pad_rows(gm: GraphModule, exact_outputs: int | None, device: Device) -> int:
    """Give unaligned matmul operands and results padded rows, and odd matmuls aligned parts.

    Args:
        exact_outputs: how many of the graph's first outputs must keep their strides; None: all.
        device: on which aligned parts must be faster, where the result passes through a scratch.

    Returns:
        how many tensors have padded rows.
    """
    padded = 0
    leaving = _leaving(gm, exact_outputs)
    for node in list(gm.graph.nodes):
        if node in leaving and node.target in _ALIGNABLE and not _is_multiplied(node):
            continue
        if _wants_padding(node) and _restride(node, _padded(node.meta["val"])):
            padded += 1
    if padded:
        _copy_exact_outputs(gm, exact_outputs)
    for node in list(gm.graph.nodes):
        if _is_odd(node):
            _align(gm, node, device)
    return padded


def _is_odd(node: Node) -> bool:
    """Whether a large matmul has an extent that keeps the library from its fast kernels."""
    if node.target not in _ALIGNABLE:
        return False
    a, b = (arg.meta["val"] for arg in node.args[-2:])  # type: ignore[union-attr]
    value = node.meta["val"]
    if not _is_half_there(value):
        return False
    extents = [e for e in (*a.shape, b.shape[1]) if isinstance(e, int)]
    odd = any(e * value.element_size() % _ALIGNED for e in extents)
    bias = node.args[0].meta["val"] if len(node.args) == 3 else None  # type: ignore[union-attr]
    plain = not node.kwargs and (bias is None or bias.dim() == 1)
    return odd and plain and any(_is_large(x) for x in (a, b, value))


def _align(gm: GraphModule, node: Node, device: Device) -> None:
    value = node.meta["val"]
    bias = node.args[0] if node.target is aten.addmm.default else None
    arguments = (*node.args[-2:], bias, value.stride(0))
    new = call(gm, ALIGNED_MM, arguments, {}, near=node)
    hints = size_hints(gm)
    aligned, plain = (time(cost(each), device, value.dtype, hints) for each in (new, node))
    if cost(new).staged_bytes and aligned > plain:
        erase(gm, new)
    else:
        redirect(gm, node, new)


def adopt_strides(gm: GraphModule, inputs: Sequence[Any]) -> None:
    """Take over the strides the inputs really have: a forward graph may have saved tensors with
    padded rows.
    """
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node, value in zip(placeholders, inputs, strict=False):
        have = node.meta.get("val")
        if not isinstance(have, torch.Tensor) or not isinstance(value, torch.Tensor):
            continue
        if have.stride() != value.stride():
            _restride(node, tuple(value.stride()))


def report_strides(gm: GraphModule) -> None:
    """Tell AOTAutograd the strides of the outputs: the backward graph is compiled for them.

    Where the first outputs are tokens, which AOTAutograd does not count here, nothing is told, and
    all outputs have the strides that it expects.
    """
    context = TracingContext.try_get()
    if context is None or context.output_strides is None or _has_effects(gm):
        return
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    for arg in output.args[0]:
        value = arg.meta.get("val") if isinstance(arg, Node) else None
        strides = tuple(value.stride()) if isinstance(value, torch.Tensor) else ()
        told = strides and not free_unbacked_symbols(strides)  # AOTAutograd asks for their numbers
        context.output_strides.append(strides if told else None)


def exact_outputs(name: str) -> int | None:
    """How many outputs of the graph ``name`` the user's program sees; the rest are saved for the
    backward. None: all of them.
    """
    context = TracingContext.try_get()
    if name != "forward" or context is None:
        return None
    return getattr(context.fw_metadata, "num_forward", None)


# --- which


def _wants_padding(node: Node) -> bool:
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or is_view(node):
        return False
    if not _is_half_there(value):
        return False
    if not _unaligned(value):
        return False
    if node.target in CONTRACTIONS:
        return True
    return has_rule(node) and _is_multiplied(node)


def _is_half_there(value: torch.Tensor) -> bool:
    """Whether a tensor is of a half precision, on a device where matmuls care."""
    half = value.dtype in (torch.bfloat16, torch.float16)
    return half and value.device.type in PADDED_DEVICES


def _unaligned(value: torch.Tensor) -> bool:
    """Whether rows are contiguous, many, and of a known length that is no multiple of 16 bytes."""
    if value.dim() < 2 or not isinstance(value.shape[-1], int):
        return False
    width = value.shape[-1]
    return (
        value.stride(-1) == 1
        and isinstance(value.stride(-2), int)
        and value.stride(-2) == width
        and width * value.element_size() % _ALIGNED != 0
        and not free_unbacked_symbols(value.stride())  # which the backward could not be told
        and _is_large(value)
        and is_contiguous(value)
    )


def _is_large(value: torch.Tensor) -> bool:
    """By the sizes at hand where they vary: a choice of speed alone, which needs no guard."""
    count: Any = value.numel()
    if isinstance(count, torch.SymInt):
        count = count.node.hint if count.node.has_hint() else _SMALL
    return bool(count >= _SMALL)


def _leaving(gm: GraphModule, exact: int | None) -> frozenset[Node]:
    """What the first outputs lie in, which the user's program sees."""
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    return frozenset(storage_owner(arg) for arg in output.args[0][:exact] if isinstance(arg, Node))


def _is_multiplied(node: Node) -> bool:
    return any(user.target in CONTRACTIONS for user in _readers(node))


def _readers(node: Node) -> Iterator[Node]:
    for user in node.users:
        if is_view(user):
            yield from _readers(user)
        else:
            yield user


def _padded(value: torch.Tensor) -> Strides:
    elements = _LINE // value.element_size()
    row = -(-value.shape[-1] // elements) * elements
    strides: list[Size] = [1, row]
    for size in reversed(value.shape[1:-1]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


# --- how


def _restride(node: Node, strides: Strides) -> bool:
    """Give a node other strides, and the views of it theirs; all or nothing."""
    old: dict[Node, Any] = {node: node.meta["val"]}
    value = node.meta["val"]
    with value.fake_mode:
        node.meta["val"] = torch.empty_strided(
            value.shape, strides, dtype=value.dtype, device=value.device
        )
        try:
            _refresh_views(node, old)
        except (RuntimeError, ValueError):
            for changed, before in old.items():
                changed.meta["val"] = before
            return False
    for changed, before in old.items():
        changed.meta.setdefault(_EXACT, tuple(before.stride()))
    return True


def _refresh_views(node: Node, old: dict[Node, Any]) -> None:
    for user in node.users:
        if not is_view(user):
            continue
        old[user] = user.meta["val"]
        args = [_value(a) for a in user.args]
        user.meta["val"] = user.target(*args, **user.kwargs)  # type: ignore[operator]
        _refresh_views(user, old)


def _value(arg: Any) -> Any:
    if isinstance(arg, Node):
        return arg.meta["val"]
    if isinstance(arg, (list, tuple)):
        return [_value(a) for a in arg]
    return arg


def _copy_exact_outputs(gm: GraphModule, exact: int | None) -> None:
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    outputs = list(output.args[0])
    count = len(outputs) if exact is None else exact
    for place, arg in enumerate(outputs[:count]):
        if not isinstance(arg, Node) or not isinstance(arg.meta.get("val"), torch.Tensor):
            continue
        if _EXACT in arg.meta and storage_owner(arg).op == "call_function":
            copy = call(gm, aten.clone.default, (arg,), {}, near=output)
            value = arg.meta["val"]
            with value.fake_mode:
                copy.meta["val"] = torch.empty_strided(
                    value.shape, arg.meta[_EXACT], dtype=value.dtype, device=value.device
                )
            outputs[place] = copy
    output.args = (tuple(outputs),)
