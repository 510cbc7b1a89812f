"""A model's double without data: fake tensors for real ones, so that explaining touches nothing of
the user's.

The double keeps the devices of the original. Where that is the CPU, the planned graphs are moved to
"cuda" afterwards (`Retarget`): a build of torch without CUDA cannot run autograd over tensors that
claim to be there.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from iocompiler.graph.held import stand_for
from iocompiler.graph.match import Stage

Memo = dict[int, Any]
# what chooses as many as a mask keeps
_CHOOSING = (torch.ops.aten.nonzero.default, torch.ops.aten.index.Tensor)


class Doubles(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Of a running program, a single number drawn from [0, 1) is 0.5 to what branches on it: a
    layer that may be left out is, if that is the likelier; a mask keeps all that it could. All else
    has no value.
    """

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, HigherOrderOperator):  # they ask for the very class
            return func.python_key_table[FakeTensorMode](self, *args, **(kwargs or {}))
        traced = torch._guards.TracingContext.try_get() is not None
        if func in _CHOOSING and not traced:
            func, args = _keeping_all(func, args)
        made: Any = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten.rand.default and not traced and made.numel() == 1:
            made.constant = torch.full(made.shape, 0.5, dtype=made.dtype)
        return made


def _keeping_all(func: Any, args: Any) -> tuple[Any, Any]:
    """A call of ``_CHOOSING`` as one whose result has a size: that of all there could be."""
    x, *rest = args
    if func is torch.ops.aten.nonzero.default:
        sizes = (x.numel(), x.dim())
        return torch.ops.aten.new_empty.default, (x.new_empty((), dtype=torch.int64), sizes)
    indices: list[Any] = []
    for each in rest[0]:
        masks = each is not None and each.dtype in (torch.bool, torch.uint8)
        places = each.new_empty((each.numel(),), dtype=torch.int64) if masks else each
        indices += [places] * each.dim() if masks else [places]
    return func, (x, indices)


def double(model: Callable[..., Any], mode: FakeTensorMode) -> Callable[..., Any]:
    """A copy of a module, bound method or function whose tensors are fake; the original is not
    changed. They hold what it does, to who asks for it (`graph/held.py`).

    Of a function, what it closes over, its defaults and the modules and tensors among its globals
    are doubled.
    """
    memo: Memo = {}
    original = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    with FakeCopyMode(mode):
        made = (
            _doubled_function(original, memo)
            if _is_function(original)
            else _doubled(original, memo)
        )
    for each in memo.get(id(memo), ()):  # what `copy` keeps alive: all that was copied
        if isinstance(each, torch.Tensor) and not isinstance(each, FakeTensor):
            stand_for(memo[id(each)], each)
    return made


def _is_function(value: Any) -> TypeGuard[types.FunctionType]:
    return isinstance(value, types.FunctionType)


def _doubled(value: Any, memo: Memo) -> Any:
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, _doubled(value.__self__, memo))
    return copy.deepcopy(value, memo)


def _doubled_function(function: types.FunctionType, memo: Memo) -> types.FunctionType:
    names = set(function.__code__.co_names)
    replaced = {
        name: _doubled(value, memo)
        for name, value in function.__globals__.items()
        if name in names and isinstance(value, (torch.nn.Module, torch.Tensor))
    }
    closure = tuple(
        types.CellType(_doubled_cell(cell.cell_contents, memo))
        for cell in function.__closure__ or ()
    )
    result = types.FunctionType(
        function.__code__,
        {**function.__globals__, **replaced} if replaced else function.__globals__,
        function.__name__,
        _doubled(function.__defaults__, memo),
        closure or None,
    )
    result.__kwdefaults__ = _doubled(function.__kwdefaults__, memo)
    return result


def _doubled_cell(value: Any, memo: Memo) -> Any:
    if _is_function(value):
        return _doubled_function(value, memo)
    held = isinstance(value, torch.nn.Module) or any(
        isinstance(x, torch.Tensor) for x in tree_leaves(value)
    )
    return _doubled(value, memo) if held else value


def double_inputs(values: Any, mode: FakeTensorMode) -> Any:
    """A structure of inputs with fake tensors for real ones; everything else is handed through."""

    def faked(value: Any) -> Any:
        if isinstance(value, FakeTensor):  # of a mode of the user's
            with mode:
                return torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device=value.device
                )
        if isinstance(value, torch.Tensor):
            return mode.from_tensor(value, static_shapes=True)
        return value

    return tree_map(faked, values)


@dataclass(frozen=True)
class Retarget:
    """Tensors on the CPU --> the same on ``device``, in what is known of a flat graph's values.

    Only the values' metadata changes, which is what planning reads: the graph itself still runs on
    fakes of the CPU. A graph with tensors on an accelerator is left alone.
    """

    device: str = "cuda"
    name: str = "retarget"
    stage: Stage = "flat"
    respells: bool = True

    def __call__(self, gm: GraphModule) -> int:
        values = [node.meta.get("val") for node in gm.graph.nodes]
        if any(x.device.type == "cuda" for x in tree_leaves(values) if isinstance(x, torch.Tensor)):
            return 0
        graphs = [each.graph for each in gm.modules() if isinstance(each, GraphModule)]
        for node in (node for graph in graphs for node in graph.nodes):
            if "val" in node.meta:
                node.meta["val"] = tree_map(self._moved, node.meta["val"])
        return 0

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, FakeTensor):
            return value
        with value.fake_mode, torch.no_grad():
            moved = value.detach()  # same shape, strides, offset and storage
        moved.fake_device = torch.device(self.device, 0)  # type: ignore[attr-defined]
        return moved
