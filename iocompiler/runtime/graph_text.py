"""A flat graph as the text of a Python function, and back: what runs on aten in another process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule
from torch.fx.graph_module import _format_import_block
from torch.package.importer import sys_importer

from iocompiler.errors import NotCacheable


def graph_text(flat: GraphModule) -> str:
    """The graph as a module with one function; `NotCacheable` where it holds tensors or graphs."""
    if flat.graph.find_nodes(op="get_attr"):
        raise NotCacheable(cause="its backward holds constants")
    code = flat.graph.python_code("self")
    return f"{_format_import_block(code.globals, sys_importer)}\n{code.src}"


def graph_of(text: str) -> Callable[[list[Any]], Any]:
    """What runs the text of `graph_text`, called with one list of inputs, which it empties."""
    namespace: dict[str, Any] = {}
    exec(compile(text, "<flat graph>", "exec"), namespace)
    forward = namespace["forward"]

    def run(args: list[Any]) -> Any:
        taken = tuple(args)
        args.clear()
        return forward(None, *taken)

    return run
