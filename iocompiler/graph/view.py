"""Reading an FX graph: nodes, their values, the user's lines, grad-mode and autocast regions,
mutation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import PurePath
from typing import Any, NamedTuple

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from iocompiler.graph.sizes import equal

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_TORCH = os.path.dirname(torch.__file__) + os.sep
_ENTER, _EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
AUTOCAST_DEVICES = ("cpu", "cuda")
_SWITCHES = (torch._C._set_grad_enabled, _ENTER, _EXIT)

# in eval mode these return their input itself: no schema says so, nor does what is traced
_MAY_RETURN_INPUT = (
    torch.ops.aten.dropout.default,
    torch.ops.aten.feature_dropout.default,
    torch.ops.aten.alpha_dropout.default,
    torch.ops.aten.feature_alpha_dropout.default,
)


def calls(gm: GraphModule, *targets: Any) -> Iterator[Node]:
    """The call nodes of the graph in order; with ``targets``, those that call one of them."""
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and (not targets or node.target in targets):
            yield node


def results(gm: GraphModule) -> dict[str, int]:
    """The nodes that a graph returns, by name, each with its position among the outputs."""
    (output,) = gm.graph.find_nodes(op="output")
    return {node.name: at for at, node in enumerate(output.args[0]) if isinstance(node, Node)}


def value(node: Node) -> Any:
    """What the node computes, as fake tensors and sizes; None where it is not known."""
    return node.meta.get("val")


def tensors(node: Node) -> list[torch.Tensor]:
    """The (fake) tensors the node computes, in order."""
    found = value(node)
    if isinstance(found, torch.Tensor):
        return [found]  # what nearly every node computes
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]


def copied(gm: GraphModule) -> GraphModule:
    """A flat graph of equal nodes, which may be edited; tensors and values are shared."""
    graph = Graph()
    results = graph.graph_copy(gm.graph, {})
    (output,) = gm.graph.find_nodes(op="output")
    graph.output(results).meta = dict(output.meta)
    other = GraphModule(gm, graph)
    other.meta = dict(gm.meta)
    return other


def fake_mode(graph: Graph) -> FakeTensorMode | None:
    """The mode of the graph's fake values; None where it has none."""
    fakes = (t for node in graph.nodes for t in tensors(node) if isinstance(t, FakeTensor))
    return next((fake.fake_mode for fake in fakes), None)


def where(node: Node) -> str:
    """The user's line as "model.py:88": the innermost frame outside of torch; "" where it is not
    known.
    """
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not frame[0].startswith(_TORCH)]
    return f"{PurePath(own[-1][0]).name}:{own[-1][1]}" if own else ""


def source(node: Node) -> str:
    """The text of the user's line, stripped; "" where it is not known."""
    lines = (node.meta.get("stack_trace") or "").rstrip().split("\n")
    text = ""
    for number, line in enumerate(lines[:-1]):
        frame = _FRAME.search(line)
        if frame and not frame[1].startswith(_TORCH):
            text = lines[number + 1].strip()
    return text


def higher_order(node: Node) -> str:
    """The name of the higher-order operator the node calls, or "": they come to exist only when
    torch imports them.
    """
    return node.target.name() if isinstance(node.target, HigherOrderOperator) else ""  # type: ignore[no-untyped-call]


def is_switch(node: Node) -> bool:
    """True for the nodes that switch grad mode or autocast on or off."""
    return node.op == "call_function" and node.target in _SWITCHES


def is_view(node: Node) -> bool:
    """True where an output of the operator may be its input's storage seen differently: where its
    schema says so, and where it is (``atleast_3d``, ``einsum`` that only transposes), though its
    schema does not.
    """
    return _is_told(node) or is_untold_view(node)


def _is_told(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and _shows(node.target)


def is_untold_view(node: Node) -> bool:
    """True for a view by its storage alone: what its input is replaced by must have that storage
    too.
    """
    if not isinstance(node.target, OpOverload) or _is_told(node) or mutates(node):
        return False
    return is_shared(node)


def is_shared(node: Node) -> bool:
    """True where what the call returns lies in the memory of what it reads, by its fake values."""
    made = _storages(node)
    return bool(made) and any(made & _storages(read) for read in node.all_input_nodes)


def owner(node: Node) -> Node:
    """What a chain of views begins with."""
    while node.op == "call_function" and is_view(node):
        node = node.all_input_nodes[0]
    return node


def _storages(node: Node) -> set[int]:
    return {t.untyped_storage()._cdata for t in tensors(node) if t.layout is torch.strided}


def shown(node: Node) -> tuple[list[Node], list[Node]]:
    """The views of what a call made, each behind what it is a view of, and what else reads it or
    them.
    """
    views: list[Node] = []
    others: list[Node] = []
    waiting = [node]
    while waiting:
        source = waiting.pop(0)
        for user in source.users:
            shows = is_view(user) and user.all_input_nodes == [source] == [user.args[0]]
            (views if shows else others).append(user)
            waiting += [user] if shows else []
    return views, others


def is_contiguous(tensor: torch.Tensor) -> bool:
    """True where row-major strides are certain for every value of the sizes; adds no guard."""
    expected: Any = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not equal(size, 1) and not equal(stride, expected):
            return False
        expected = expected * size
    return True


def spelled_out(node: Node) -> list[Any]:
    """The arguments of a call in the order of its schema, defaults filled in."""
    if not isinstance(node.target, OpOverload):
        return [*node.args, *node.kwargs.values()]
    values: list[Any] = []
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            values.append(node.args[position])
        else:
            values.append(node.kwargs.get(argument.name, argument.default_value))
    return values


def named(node: Node) -> dict[str, Any]:
    """The arguments of a call of an operator by the names in its schema, defaults filled in."""
    assert isinstance(node.target, OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    return dict(zip(names, spelled_out(node), strict=True))


def mutates(node: Node) -> tuple[Node, ...]:
    """The nodes whose tensors this call writes into."""
    if not isinstance(node.target, OpOverload):
        of_the_users = higher_order(node) == "triton_kernel_wrapper_mutation"
        return tuple(node.all_input_nodes) if of_the_users else ()  # a kernel: any of them
    written: list[Node] = []
    for position, name in _overwrites(node.target):
        given = node.args[position] if position < len(node.args) else node.kwargs.get(name)
        written += [leaf for leaf in tree_leaves(given) if isinstance(leaf, Node)]
    return tuple(written)


def changes_metadata(node: Node) -> bool:
    """True for a call that changes its argument's shape, strides or grad history in place."""
    return isinstance(node.target, OpOverload) and torch.Tag.inplace_view in node.target.tags


def is_random(node: Node) -> bool:
    """True where two calls with equal inputs may differ."""
    return isinstance(node.target, OpOverload) and (
        torch.Tag.nondeterministic_seeded in node.target.tags
    )


def finds_sizes(node: Node) -> bool:
    """Whether a call returns sizes or numbers that are not known before it runs (of what a mask
    keeps), for which torch has made symbols.
    """
    return bool(node.meta.get("unbacked_bindings"))


class Region(NamedTuple):
    """What a node runs under: grad mode, and the dtype of each device type autocast is on for."""

    grad: bool
    autocast: tuple[tuple[str, torch.dtype], ...] = ()


def ambient() -> Region:
    """The region a graph starts in: Dynamo compiles it under the modes it was called in."""
    on = [device for device in AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]
    return Region(torch.is_grad_enabled(), tuple((d, torch.get_autocast_dtype(d)) for d in on))


def regions(gm: GraphModule) -> dict[Node, Region]:
    """What each node runs under, by the switches that stand before it."""
    now = ambient()
    outer: list[Region] = []
    found: dict[Node, Region] = {}
    for node in gm.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            now = now._replace(grad=bool(node.args[0]))
        elif node.target is _ENTER:
            outer.append(now)
            now = now._replace(autocast=_entered(now.autocast, *node.args[:3]))
        elif node.target is _EXIT:
            now = now._replace(autocast=outer.pop().autocast)
        found[node] = now
    return found


def _entered(
    before: tuple[tuple[str, torch.dtype], ...], device: Any, dtype: Any, enabled: Any
) -> tuple[tuple[str, torch.dtype], ...]:
    others = [pair for pair in before if pair[0] != device]
    mine = [(device, dtype or torch.get_autocast_dtype(device))] if enabled else []
    return tuple(sorted(others + mine, key=lambda pair: pair[0]))


def checkpoints(gm: GraphModule) -> list[tuple[Node, GraphModule]]:
    """The checkpointed regions that may be entered: calls with the graph inside, one call a graph.

    A region with a context function of its own (selective checkpointing) is none: its policy knows
    the operators it was written for.
    """
    found: list[tuple[Node, GraphModule]] = []
    for node in calls(gm, torch.ops.higher_order.tag_activation_checkpoint):
        body = node.args[0]
        inner = getattr(gm, str(body.target), None) if isinstance(body, Node) else None
        alone = isinstance(body, Node) and len(body.users) == 1
        if alone and isinstance(inner, GraphModule) and "_checkpoint_context_fn" not in inner.meta:
            found.append((node, inner))
    return found


def roots(gm: GraphModule) -> dict[Node, frozenset[Node]]:
    """For each node, those whose storage its tensors may share: itself where it makes new ones."""
    found: dict[Node, frozenset[Node]] = {}
    for node in gm.graph.nodes:
        found[node] = roots_of(node, found)
    return found


def roots_of(node: Node, found: Mapping[Node, frozenset[Node]]) -> frozenset[Node]:
    """`roots` of one node, from those of its inputs."""
    # what is no plain operator (a submodule, a getitem) may return any of its inputs
    opaque = node.op == "call_function" and not isinstance(node.target, OpOverload)
    if opaque or is_view(node):
        shared = [found[i] for i in node.all_input_nodes]
        return frozenset().union({node} if opaque else (), *shared)
    # what writes returns what it has written, not what that was computed from
    changed = [found[i] for i in mutates(node)]
    return frozenset().union(*changed) if changed else frozenset({node})


def written(gm: GraphModule, roots: Mapping[Node, frozenset[Node]]) -> frozenset[Node]:
    """The storages that the graph writes into somewhere, as `roots` gives them."""
    targets = (target for node in gm.graph.nodes for target in mutates(node))
    return frozenset().union(*(roots[target] for target in targets))


@cache
def _shows(operator: OpOverload) -> bool:
    """Whether its schema, or what is known of it, says that it may return its input's storage."""
    told = (argument.alias_info for argument in operator._schema.arguments)
    return operator in _MAY_RETURN_INPUT or any(a is not None and not a.is_write for a in told)


@cache
def _overwrites(operator: OpOverload) -> tuple[tuple[int, str], ...]:
    """Place and name of the arguments it writes into."""
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(operator._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
