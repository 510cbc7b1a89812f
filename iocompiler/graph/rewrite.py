"""The one place that edits a graph: every edit keeps the stack traces, the names and the
fake-tensor metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer, Proxy
from torch.utils._pytree import tree_map_only

from iocompiler.graph import view

_OWN_VALUE = ("val", "tensor_meta", "example_value", "unbacked_bindings", "eager_input_vals")


def call(
    gm: GraphModule, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, near: Node
) -> Node:
    """Insert a call before ``near``: its user's line is that of ``near``, its value is computed
    here.
    """
    with gm.graph.inserting_before(near):
        node = gm.graph.call_function(target, args, kwargs)
    _inherit(node, near)
    compute_value(node)
    return node


def substitute(gm: GraphModule, old: Node, build: Callable[..., Any], *arguments: Any) -> Node:
    """Replace ``old`` by what ``build`` returns, and erase what nobody reads any more.

    Args:
        build: a function over aten ops, called with one proxy for each node in ``arguments`` and
            with every other
            argument as it is; returns one value.

    Returns:
        the node now standing where ``old`` stood, with its name.
    """
    new = insert(gm, build, *arguments, near=old)
    return redirect(gm, old, new)


def insert(
    gm: GraphModule,
    build: Callable[..., Any],
    *arguments: Any,
    near: Node,
    values: Sequence[Any] | None = None,
) -> Any:
    """Insert what ``build`` computes before ``near``; returns the node (or tuple of nodes) of its
    result. ``values`` are the fake values of those nodes, where known: computing one takes longer
    than all the rest.
    """
    before = dict.fromkeys(gm.graph.nodes)
    tracer = GraphAppendingTracer(gm.graph)
    with gm.graph.inserting_before(near):
        result = build(*tree_map_only(Node, lambda node: Proxy(node, tracer), arguments))
    result = tree_map_only(Proxy, lambda proxy: proxy.node, result)
    known = {} if values is None else dict(zip(result, values, strict=True))
    added = [node for node in gm.graph.nodes if node not in before]
    for node in added:
        _inherit(node, near)
        if node in known:
            node.meta["val"] = known[node]
        else:
            compute_value(node)
    return result


def add_input(gm: GraphModule, like: Node) -> Node:
    """One more input behind the others, of what ``like`` is in another graph."""
    last = gm.graph.find_nodes(op="placeholder")[-1:]
    root = gm.graph._root
    with gm.graph.inserting_after(last[0]) if last else gm.graph.inserting_after(root):
        node = gm.graph.placeholder(like.name)
    node.meta = dict(like.meta)
    return node


def copy_into(gm: GraphModule, nodes: Sequence[Node], there: dict[Node, Node]) -> None:
    """Copy calls and constants of another graph behind the inputs of ``gm``, in their order.

    Args:
        there: what stands in ``gm`` for nodes of the other graph; what is copied is added.
    """
    near = next(node for node in gm.graph.nodes if node.op != "placeholder")
    for node in nodes:
        with gm.graph.inserting_before(near):
            if node.op == "get_attr":
                name = str(node.target)
                while hasattr(gm, name):
                    name += "_"
                setattr(gm, name, getattr(node.graph.owning_module, str(node.target)))
                made = gm.graph.create_node("get_attr", name)  # no parameter, and no buffer
                made.meta = dict(node.meta)
            else:
                made = gm.graph.node_copy(node, there.__getitem__)
        there[node] = made


def redirect(gm: GraphModule, old: Node, new: Node) -> Node:
    """Let every reader of ``old`` read ``new``; ``new`` takes the name, ``old`` and what only it
    read is erased.
    """
    old.replace_all_uses_with(new)
    name = old.name
    erase(gm, old)
    if new.op == "call_function" and name not in {node.name for node in gm.graph.nodes}:
        new.name = name
    return new


def bypass(gm: GraphModule, node: Node, same: Node) -> None:
    """Let every reader of ``node`` read ``same`` instead, which keeps its own name; erase what
    nobody reads then.
    """
    node.replace_all_uses_with(same)
    erase(gm, node)


def respell(
    node: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> None:
    """Turn a call into another that computes the very same value, in the same shape and strides."""
    node.target = target
    node.args = args
    node.kwargs = kwargs or {}


def delay(nodes: Sequence[Node], after: Node) -> None:
    """Move calls, in their order, behind ``after``, which comes later than they do."""
    for node in nodes:
        after.append(node)
        after = node


def erase(gm: GraphModule, node: Node) -> None:
    """Erase a call nobody reads, and then what only it read; what writes, switches or is an input
    stays.
    """
    waiting = [node]
    while waiting:
        dead = waiting.pop()
        if dead._erased or dead.users or dead.op not in ("call_function", "get_attr"):
            continue
        if dead is not node and (view.mutates(dead) or view.is_switch(dead) or dead.is_impure()):
            continue
        read = dead.all_input_nodes
        gm.graph.erase_node(dead)
        waiting += read


def erase_dead(gm: GraphModule) -> int:
    """Erase every call nobody reads that has no other effect; returns how many."""
    count = len(gm.graph.nodes)
    for node in reversed(list(gm.graph.nodes)):
        effect = bool(view.mutates(node)) or view.is_switch(node) or view.is_random(node)
        plain = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
        if plain and not effect and not node.users and not node.is_impure():
            gm.graph.erase_node(node)
    return count - len(gm.graph.nodes)


def fill_values(gm: GraphModule) -> None:
    """Compute the fake value of every call that has none yet."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            compute_value(node)


def compute_value(node: Node, memory_format: torch.memory_format | None = None) -> None:
    """Run the call on the fake values of its arguments and keep the result in ``meta["val"]``; in
    this order of storage, where a fake value has not that of the operator.
    """
    if node.op != "call_function" or view.is_switch(node):
        return
    args, kwargs = map_arg((node.args, node.kwargs), lambda read: read.meta["val"])
    mode = view.fake_mode(node.graph) or nullcontext()
    plain = torch.no_grad(), torch._C._DisableFuncTorch(), torch._C._DisableAutocast()
    with mode, enable_python_dispatcher(), plain[0], plain[1], plain[2]:
        made = node.target(*args, **kwargs)  # type: ignore[operator]
        told = memory_format is None
        node.meta["val"] = made if told else made.contiguous(memory_format=memory_format)


def _inherit(node: Node, near: Node) -> None:
    for key, item in near.meta.items():
        if key not in _OWN_VALUE:
            node.meta.setdefault(key, item)
