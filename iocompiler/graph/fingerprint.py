"""A Dynamo graph as canonical text: graphs with equal text, under equal settings, compile to the
same.

Names of nodes and symbols are replaced by numbers in order of appearance, lines of the user are
left out. What the text could not tell apart is refused: operators and functions that are not
torch's own, submodules, tensor subclasses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch._guards import TracingContext
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.fx.node import _get_qualified_name

from iocompiler.errors import NotCacheable
from iocompiler.graph.held import held

_NAMESPACES = ("aten", "prims", "prim", "iocompiler")
_MODULES = ("torch", "operator", "_operator", "math", "builtins")
_PLAIN = (int, float, complex, bool, str, bytes, type(None), type(...))
_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def fingerprint(gm: GraphModule, example_inputs: Sequence[Any]) -> str:
    """The text of ``gm`` and of what it is compiled for.

    Args:
        gm: Dynamo's graph, with fake tensors and sizes in ``meta["example_value"]``.
        example_inputs: the real tensors and the sizes it is compiled with, one a placeholder.

    Raises:
        NotCacheable: the text would not tell the graph from another one; the error says why.
    """
    return _Writer(gm).text(example_inputs)


def tensor_bytes(x: torch.Tensor) -> bytes:
    """The elements of a dense tensor, row-major."""
    flat = x.detach().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes())


def shape_environment() -> ShapeEnv | None:
    """That of the graph being compiled; None outside of Dynamo."""
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    return mode.shape_env if mode is not None else None


class _Writer:
    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._nodes: dict[Node, int] = {}
        self._symbols: dict[sympy.Symbol, sympy.Symbol] = {}
        self._shapes = shape_environment()

    def text(self, example_inputs: Sequence[Any]) -> str:
        for node in self._gm.graph.nodes:
            if isinstance(node.target, HigherOrderOperator):
                raise NotCacheable(cause=f"it calls the higher-order operator {node.target}")
        inputs = iter(example_inputs)
        lines = []
        for node in self._gm.graph.nodes:
            shown = self._input(node, inputs) if node.op == "placeholder" else self._call(node)
            self._nodes[node] = len(self._nodes)
            lines.append(f"%{self._nodes[node]} = {shown}")
        lines += _sharing(example_inputs)
        if self._symbols:
            lines += self._facts()
        return "\n".join(lines) + "\n"

    def _input(self, node: Node, inputs: Any) -> str:
        fake, real = node.meta.get("example_value"), next(inputs)
        source = getattr(node, "_dynamo_source", None)
        kind = getattr(source, "guard_source", "")
        origin = str(kind() if callable(kind) else kind)
        if isinstance(real, torch.Tensor):
            return f"tensor {self._tensor(fake, real)} {origin} {held(node) or ''}"
        if isinstance(real, (torch.SymInt, int)) and not isinstance(real, bool):
            return f"size {self._size(real if fake is None else fake)}"
        raise NotCacheable(cause=f"an input is a {type(real).__name__}")

    def _tensor(self, fake: Any, real: torch.Tensor) -> str:
        refuse_unusual(real)
        if not isinstance(fake, FakeTensor):
            raise NotCacheable(cause="the sizes of an input are not known")
        marks = (real.requires_grad, real.is_leaf, real.is_inference(), type(real).__name__)
        static = getattr(real, "_dynamo_static_input_type", None)
        sizes = [self._sizes(s) for s in (fake.shape, fake.stride(), (fake.storage_offset(),))]
        return f"{real.dtype} {real.device} {' '.join(sizes)} {marks} {static}"

    def _sizes(self, sizes: Sequence[Any]) -> str:
        return f"[{', '.join(self._size(size) for size in sizes)}]"

    def _size(self, size: Any) -> str:
        return self._expression(size.node.expr) if isinstance(size, torch.SymInt) else repr(size)

    def _expression(self, expression: Any) -> str:
        if isinstance(expression, sympy.Basic):
            for symbol in sorted(expression.free_symbols, key=str):
                if symbol not in self._symbols:
                    self._symbols[symbol] = sympy.Symbol(f"s{len(self._symbols)}", integer=True)
            expression = expression.xreplace(self._symbols)
        return str(expression)

    def _facts(self) -> list[str]:
        """What is known of the sizes: their ranges, and the guards Dynamo has laid on them."""
        if self._shapes is None:
            raise NotCacheable(cause="nothing is known about its symbolic sizes")
        guards = sorted(self._expression(guard.expr) for guard in self._shapes.guards)
        bounds = [
            f"{name} in {self._shapes.bound_sympy(symbol)}"
            for symbol, name in self._symbols.items()
        ]
        return bounds + guards

    def _call(self, node: Node) -> str:
        if self._shapes is not None and free_unbacked_symbols(_leaves(node)):
            raise NotCacheable(cause=f"{node.target}: a size depends on data")
        if node.op == "get_attr":
            return f"constant {self._constant(str(node.target))}"
        if node.op == "call_module":
            raise NotCacheable(cause=f"it calls the submodule {node.target}")
        target = _target(node.target) if node.op == "call_function" else str(node.target)
        return f"{node.op} {target} {self._value(node.args)} {self._value(dict(node.kwargs))}"

    def _constant(self, name: str) -> str:
        found: Any = self._gm
        for part in name.split("."):
            found = getattr(found, part)
        if not isinstance(found, torch.Tensor):
            raise NotCacheable(cause=f"it has the submodule {name}")
        refuse_unusual(found)
        digest = hashlib.sha256(tensor_bytes(found)).hexdigest()
        shape = (tuple(found.shape), found.stride(), found.requires_grad)
        return f"{found.dtype} {found.device} {shape} {digest}"

    def _value(self, value: Any) -> str:
        if isinstance(value, Node):
            return f"%{self._nodes[value]}"
        if isinstance(value, torch.SymInt):
            return self._size(value)
        if isinstance(value, (tuple, list)):
            inner = ", ".join(map(self._value, value))
            return f"[{inner}]" if isinstance(value, list) else f"({inner})"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{key}: {self._value(value[key])}' for key in value)}}}"
        if isinstance(value, slice):
            return f"slice{self._value((value.start, value.stop, value.step))}"
        if type(value) in _PLAIN:
            return repr(value)
        if isinstance(value, _TORCH):
            return str(value)
        raise NotCacheable(cause=f"an argument is a {type(value).__name__}")


def _leaves(node: Node) -> Any:
    value = node.meta.get("example_value")
    known = (torch.Tensor, torch.SymInt, tuple, list)
    return [value] if isinstance(value, known[:2]) else value if isinstance(value, known) else []


def _target(target: Any) -> str:
    """The name of what is called, where the name says all there is to know."""
    if target is getattr:  # of a tensor: ``x.T``
        return "getattr"
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        name = str(target)
        known = name.split(".")[0] in _NAMESPACES
    else:
        name = _get_qualified_name(target)
        known = name.split(".")[0] in _MODULES
    if not known:
        raise NotCacheable(cause=f"it calls {name}, which is not torch's own")
    return name


def refuse_unusual(x: torch.Tensor) -> None:
    """Raise `NotCacheable` for what is no plain dense tensor."""
    if isinstance(x, FakeTensor):
        raise NotCacheable(cause="an input is not real")
    if type(x) not in _TENSORS or torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise NotCacheable(cause=f"an input is a {type(x).__name__}")
    if x.layout is not torch.strided or x.is_quantized or x.is_conj() or x.is_neg():
        raise NotCacheable(cause="an input is not a plain dense tensor")


def _sharing(example_inputs: Sequence[Any]) -> list[str]:
    """Which inputs are one tensor, or lie in one storage."""
    lines = []
    tensors = [(i, x) for i, x in enumerate(example_inputs) if isinstance(x, torch.Tensor)]
    for what, identity in (("one tensor", id), ("one storage", _storage)):
        groups: dict[int, list[int]] = {}
        for position, tensor in tensors:
            groups.setdefault(identity(tensor), []).append(position)
        lines += [f"{what} {group}" for group in groups.values() if len(group) > 1]
    return lines


def _storage(x: torch.Tensor) -> int:
    return int(x.untyped_storage()._cdata)
