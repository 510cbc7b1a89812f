"""A graph as text for dumps: one node a line, the user's line above each group, bytes at the end of
the line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import view

Price = Callable[[Node], Any]
_SHORT = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


def show(gm: GraphModule, price: Price | None = None) -> str:
    """The graph as text, with no path and no address in it.

    Args:
        price: the bytes a call moves, written at the end of its line; None writes none.
    """
    lines: list[str] = []
    group = ""
    for node in gm.graph.nodes:
        at = view.where(node)
        if at and at != group and node.op == "call_function":
            lines.append(f"# {at}  {view.source(node)}")
            group = at
        lines.append("  " + line(node, price))
    return "\n".join(lines) + "\n"


def line(node: Node, price: Price | None = None) -> str:
    """One node: its name, what it computes, the call, its bytes."""
    if node.op == "output":
        return f"return {_text(node.args[0])}"
    shown = describe(view.value(node))
    head = f"{node.name}: {shown}" if shown else node.name
    if node.op == "placeholder":
        return head
    if node.op == "get_attr":
        return f"{head} = self.{node.target}"
    parts = [_text(a) for a in node.args] + [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
    text = f"{head} = {_target(node.target)}({', '.join(parts)})"
    return f"{text}  # {price(node)} B" if price is not None else text


def describe(value: Any) -> str:
    """Dtype and shape, ``f32[8, s0]``; a tuple of them in parentheses; "" where there is none."""
    if isinstance(value, torch.Tensor):
        dtype = _SHORT.get(value.dtype, str(value.dtype).removeprefix("torch."))
        return f"{dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(describe, value))})"
    return f"size {value}" if isinstance(value, torch.SymInt) else ""


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target.namespace}.{target._opname}"
        return name if target._overloadname == "default" else f"{name}.{target._overloadname}"
    return getattr(target, "__name__", str(target))


def _text(argument: Any) -> str:
    match argument:
        case Node():
            return argument.name
        case list():
            return f"[{', '.join(map(_text, argument))}]"
        case tuple():
            return f"({', '.join(map(_text, argument))}{',' * (len(argument) == 1)})"
        case torch.device():
            return str(argument)
        case _:
            return repr(argument)
