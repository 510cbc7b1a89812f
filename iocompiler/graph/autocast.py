"""Autocast spelled out: each cast it makes becomes a node, and the switches go away.

Autocast acts below what is captured: ``linear`` stands in the graph with float32 inputs and a
    bfloat16 result. What an operator's inputs are cast to is found by running it on its fake values
    and watching what is dispatched.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from iocompiler.graph import rewrite, view

aten = torch.ops.aten


def spell_out_autocast(gm: GraphModule) -> int:
    """Make the casts of autocast nodes of the graph.

    Before::

        on = _enter_autocast('cpu', torch.bfloat16, True, None)
        y = aten.linear(x, w)
        _exit_autocast(on)

    After::

        y = aten.linear(aten.to.dtype(x, torch.bfloat16), aten.to.dtype(w, torch.bfloat16))

    An operator whose casts cannot be told (it casts what it computes inside) keeps the switches,
    around it alone. A graph that starts under autocast is put into a region that switches it off.

    Returns:
        the number of operators that were under autocast.
    """
    regions = view.regions(gm)
    switches = [n for n in gm.graph.nodes if n.target in (_enter_autocast, _exit_autocast)]
    inside = [n for n in view.calls(gm) if regions[n].autocast and not view.is_switch(n)]
    speller = _Speller(gm)
    for node in inside:
        speller.spell_out(node, regions[node])
    for switch in reversed(switches):
        gm.graph.erase_node(switch)
    calls = list(view.calls(gm))
    if view.ambient().autocast and calls:
        off = [(device, dtype, False, None) for device, dtype in view.ambient().autocast]
        _surround(gm, calls[0], gm.graph.output_node(), off)
    return len(inside)


@contextmanager
def autocast(dtypes: Mapping[str, torch.dtype | None]) -> Iterator[None]:
    """Autocast to a dtype for each device type named, off where that is None; no cast is cached.

    Unlike torch.autocast it does not mind that there is no such device: fake tensors have none.
    """
    devices = list(dtypes)
    before = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    cached = torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(False)
        for device, dtype in dtypes.items():
            torch.set_autocast_enabled(device, dtype is not None)
            torch.set_autocast_dtype(device, dtype or torch.get_autocast_dtype(device))
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        for device, (enabled, dtype) in zip(devices, before, strict=True):
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


@contextmanager
def region_entered(region: view.Region) -> Iterator[None]:
    """Run under the grad mode and autocast of a region of a graph."""
    dtypes = {**dict.fromkeys(view.AUTOCAST_DEVICES), **dict(region.autocast)}
    with torch.set_grad_enabled(region.grad), autocast(dtypes):
        yield


class _Casts(NamedTuple):
    """What autocast does to a call: a dtype for each tensor argument (None: as it is), and one for
    ``dtype=``.
    """

    inputs: tuple[torch.dtype | None, ...]
    dtype: torch.dtype | None = None


class _Speller:
    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._mode = view.fake_mode(gm.graph) or nullcontext()
        self._known: dict[Any, _Casts | None] = {}
        self._made: dict[Any, Node] = {}
        written = [target for node in gm.graph.nodes for target in view.mutates(node)]
        roots = view.roots(gm) if written else {}
        self._written = {each for target in written for each in roots[target]}
        self._roots = roots

    def spell_out(self, node: Node, region: view.Region) -> None:
        if view.mutates(node) or not (view.tensors(node) and node.all_input_nodes):
            return  # nothing that autocast touches
        casts = self._casts(node, dict(region.autocast))
        if casts is None:
            on = [(device, dtype, True, None) for device, dtype in region.autocast]
            _surround(self._gm, node, node.next, on)
            return
        wanted = iter(casts.inputs)

        def cast(read: Node) -> Node:
            if not isinstance(view.value(read), torch.Tensor):
                return read
            dtype = next(wanted)
            return read if dtype is None else self._cast(read, dtype, node, region)

        args, kwargs = map_arg((node.args, node.kwargs), cast)
        kwargs = {**kwargs, **({"dtype": casts.dtype} if casts.dtype else {})}
        rewrite.respell(node, node.target, args, kwargs)

    def _cast(self, source: Node, dtype: torch.dtype, near: Node, region: view.Region) -> Node:
        key = (source, dtype, region.grad)
        if key not in self._made or self._roots.get(source, frozenset()) & self._written:
            self._made[key] = rewrite.call(self._gm, aten.to.dtype, (source, dtype), {}, near=near)
        return self._made[key]

    def _casts(self, node: Node, dtypes: Mapping[str, torch.dtype]) -> _Casts | None:
        """What autocast does to the call; None where that cannot be told."""
        if not isinstance(node.target, torch._ops.OpOverload):
            plain = not isinstance(node.target, torch._ops.HigherOrderOperator)
            return _Casts((None,) * len(node.all_input_nodes)) if plain else None
        values = map_arg((node.args, node.kwargs), lambda read: read.meta["val"])
        key = (node.target, tuple(dtypes.items()), tuple(map(_kind, tree_leaves(values))))
        if key not in self._known:
            with self._mode, torch.no_grad():
                self._known[key] = _find_casts(node.target, *values, dtypes)
        return self._known[key]


def _find_casts(target: Any, args: Any, kwargs: Any, dtypes: Mapping[str, Any]) -> _Casts | None:
    off = dict.fromkeys(view.AUTOCAST_DEVICES)
    under = _watch(target, args, kwargs, {**off, **dtypes})
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    unchanged = _Casts((None,) * len(tensors))
    plain = _watch(target, args, kwargs, off)
    if plain.same(under) and plain.casts == under.casts:
        return unchanged
    first = dict(under.casts)
    casts = _Casts(tuple(first.get(id(x)) for x in tensors))
    to = {id(x): x.to(d) for x, d in zip(tensors, casts.inputs, strict=True) if d is not None}
    cast = tree_map_only(torch.Tensor, lambda x: to.get(id(x), x), (args, kwargs))
    again = _watch(target, cast[0], cast[1], off)
    if again.same(under, casts=len(under.casts)):
        return casts
    if not any(a.name == "dtype" for a in target._schema.arguments) or kwargs.get("dtype"):
        return None
    wide = _watch(target, args, {**kwargs, "dtype": torch.float32}, off)
    return unchanged._replace(dtype=torch.float32) if wide.same(under) else None


class _Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What a call dispatches and returns; ``casts`` are those of its inputs that come first."""

    def __init__(self, inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._inputs = {id(x) for x in tree_leaves(inputs) if isinstance(x, torch.Tensor)}
        self.casts: list[tuple[int, torch.dtype]] = []
        self.called: list[Any] = []
        self.result: list[Any] = []
        self.failed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "prim":  # questions about a tensor, not work on it
            cast = func is aten._to_copy.default and set(kwargs) == {"dtype"}
            first = len(self.called) == len(self.casts)
            if cast and first and id(args[0]) in self._inputs:
                self.casts.append((id(args[0]), kwargs["dtype"]))
            self.called.append(func)
        return func(*args, **kwargs)

    def same(self, other: _Watched, casts: int = 0) -> bool:
        """True where ``other`` does this and nothing else, after its first ``casts`` calls."""
        if self.failed or other.failed:
            return False
        return self.called == other.called[casts:] and self.result == other.result


def _watch(target: Any, args: Any, kwargs: Any, dtypes: Mapping[str, Any]) -> _Watched:
    watched = _Watched((args, kwargs))
    try:
        with _unlogged(), autocast(dtypes), watched:
            result = target(*args, **kwargs)
    except Exception:  # mixed dtypes without the casts that would make them one
        watched.failed = True
        return watched
    watched.result = [
        (x.dtype, x.device) for x in tree_leaves(result) if isinstance(x, torch.Tensor)
    ]
    return watched


@contextmanager
def _unlogged() -> Iterator[None]:
    """Fake tensors log a call that fails as an error; here it is a question answered no."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def _kind(leaf: Any) -> Any:
    """What of an argument autocast may look at."""
    return (leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else repr(leaf)


def _surround(gm: GraphModule, first: Node, after: Node, regions: list[tuple[Any, ...]]) -> None:
    """Put the nodes from ``first`` up to ``after`` into autocast regions."""
    for region in regions:
        with gm.graph.inserting_before(first):
            enter = gm.graph.call_function(_enter_autocast, region)
        with gm.graph.inserting_before(after):
            leave = gm.graph.call_function(_exit_autocast, (enter,))
        enter.meta["val"] = leave.meta["val"] = None
        after = leave
