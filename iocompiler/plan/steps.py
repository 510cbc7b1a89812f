"""What every plan is written with: names for the values of a graph, arguments, plain calls."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule, Node

from iocompiler.errors import CannotPlan
from iocompiler.graph.view import higher_order, where
from iocompiler.plan.data import AtenStep, ConstantStep, Ref, Region, Step, TensorSpec
from iocompiler.plan.found import Symbolic
from iocompiler.plan.lowering import Unsupported, constant_values
from iocompiler.plan.overwriting import overwritten
from iocompiler.plan.sizes import size_of

aten = torch.ops.aten

_LARGEST_CONSTANT = 1 << 16

Path = tuple[int | str, ...]
Output = tuple[str | None, TensorSpec | None]


class Steps:
    """The steps of one graph as they are written down, and the names of what they make."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.steps: list[Step] = []
        self.values: dict[Node, str] = {}
        self.notes: list[str] = []  # for the reason of the call that is being written

    def region(self, node: Node, inner: GraphModule, caller: Node) -> Region:
        """The function behind a ``get_attr`` node, for the higher-order ``caller``."""
        raise NotImplementedError

    def made_elsewhere(self, node: Node) -> str:
        """The name of a value that no step so far has made."""
        raise NotImplementedError

    # --- values

    def inputs(self) -> list[tuple[str, TensorSpec | None]]:
        """Name and spec of each placeholder; a size goes by the name of its symbol."""
        inputs: list[tuple[str, TensorSpec | None]] = []
        for node in self.gm.graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                # a token is none at run time
                inputs.append((node.name, None if _is_token(node) else spec_of(value)))
                self.values[node] = node.name
            elif isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
                inputs.append((value.node.expr.name, None))
            else:
                inputs.append((node.name, None))
        return inputs

    def value(self, node: Node) -> str:
        """The plan name of a tensor node."""
        if node not in self.values:
            target = overwritten(node)
            if target is not None:
                return self.value(target)
            if node.op == "get_attr":
                self.constant(node)
            else:
                self.values[node] = self.made_elsewhere(node)
        return self.values[node]

    def constant(self, node: Node) -> None:
        """A step that makes the tensor behind a ``get_attr`` node."""
        tensor = node.meta["val"]
        if tensor.numel() > _LARGEST_CONSTANT:
            raise Unsupported(
                f"a constant of {tensor.numel()} elements in the graph; "
                "make it a buffer of the model"
            )
        self.steps.append(ConstantStep(node.name, spec_of(tensor), constant_values(node)))
        self.values[node] = node.name

    def argument(self, arg: Any, caller: Node) -> Any:
        """An argument of ``caller`` (the output node, too) as a plan has it."""
        if isinstance(arg, Node):
            inner = submodule(arg)
            if inner is not None:
                return self.region(arg, inner, caller)
            value = arg.meta.get("val")
            if isinstance(value, torch.Tensor) or arg in self.values:
                return Ref(self.value(arg))
            return self.argument(value, caller)
        if isinstance(arg, torch.SymInt):
            return size_of(arg)
        if isinstance(arg, (torch.SymFloat, torch.SymBool)):
            return arg.node.expr
        if isinstance(arg, (list, tuple)):
            return tuple(self.argument(a, caller) for a in arg)
        if isinstance(arg, dict):
            return {key: self.argument(a, caller) for key, a in arg.items()}
        if isinstance(arg, slice):
            raise TypeError("a slice as an operator argument")
        return arg

    # --- plain calls

    def call(self, node: Node, reason: str) -> None:
        """A step that calls the operator of ``node``."""
        target, args, skipped = node.target, node.args, 0
        if is_effect(node):
            # the token only says what runs before what, which the plan's order says from here on
            target, args, skipped = args[1], args[2:], 1  # type: ignore[assignment]
        given = tuple(self.argument(a, node) for a in args)
        named = tuple((k, self.argument(a, node)) for k, a in node.kwargs.items())
        outputs, paths = self._results(node, skipped)
        single = paths == [()]
        plain = single or all(path == (i,) for i, path in enumerate(paths))
        self.steps.append(
            AtenStep(
                target_name(target),
                given,
                named,
                tuple(outputs),
                not single,
                node.name,
                where(node),
                "; ".join([reason, *self.notes]),
                () if plain else tuple(paths),
            )
        )
        self.notes.clear()

    def spec(self, value: Any) -> TensorSpec | None:
        """What is promised of a result."""
        return spec_of(value) if isinstance(value, torch.Tensor) else None

    def _results(self, node: Node, skipped: int) -> tuple[list[Output], list[Path]]:
        """Names and specs of the results, and where in what the call returns each one lies."""
        value = node.meta.get("val")
        if value is None and node.users:
            raise CannotPlan(operator=f"{node.target}, whose result is not known,")
        if skipped:
            return self._behind_token(node, value)
        if overwritten(node) is not None or value is None:
            return [(None, None)], [()]
        if isinstance(value, Symbolic):
            return [(_symbol_of(value.node.expr), None)], [()]
        if isinstance(value, torch.Tensor):
            return [(self._named([node]), self.spec(value))], [()]
        named = {path: self._named(items) for path, items in _items(node).items()}
        rows = {**dict.fromkeys(named), **dict(_leaves(value))}
        if any(user.target is not operator.getitem for user in node.users):
            rows[()], named[()] = None, self._named([node])  # somebody takes all of them
        return [(named.get(path), self.spec(v)) for path, v in rows.items()], list(rows)

    def _behind_token(self, node: Node, value: Any) -> tuple[list[Output], list[Path]]:
        """As `_results`, of a call that returns a token before what its operator returns."""
        rest, named = value[1:], _items(node)
        for item in named.pop((0,), []):
            self.values[item] = self.value(node.args[0])  # type: ignore[arg-type]
        operator_ = node.args[1]
        returns = getattr(getattr(operator_, "_schema", None), "returns", rest)
        single = len(returns) == 1
        outputs: list[Output] = []
        paths: list[Path] = []
        for (first, *deeper), v in _leaves(rest):
            path = (int(first) + 1, *deeper)
            found = named.get(path)
            outputs.append((self._named(found) if found else None, self.spec(v)))
            paths.append(tuple(deeper) if single else (first, *deeper))
        return (outputs, paths) if outputs else ([(None, None)], [()])

    def _named(self, items: list[Node]) -> str:
        for item in items:
            self.values[item] = items[0].name
        return items[0].name


def is_effect(node: Node) -> bool:
    """Whether the node is an operator called in order with other effects, by a token."""
    return higher_order(node) == "with_effects"


def _is_token(node: Node) -> bool:
    return any(is_effect(user) and user.args[0] is node for user in node.users)


def submodule(node: Node) -> GraphModule | None:
    """The graph behind a ``get_attr`` node; None where a tensor is."""
    if node.op != "get_attr":
        return None
    found: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found if isinstance(found, GraphModule) else None


def target_name(target: Any) -> str:
    """The qualified name of an operator ("aten.mm.default", "higher_order.cond").

    Raises:
        CannotPlan: it is no operator.
    """
    if isinstance(target, OpOverload):
        return str(target)
    if isinstance(target, HigherOrderOperator):
        return f"higher_order.{target.name()}"  # type: ignore[no-untyped-call]
    raise CannotPlan(operator=getattr(target, "__name__", str(target)))


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """Shape, strides, dtype and device of a (fake) tensor."""
    return TensorSpec(
        tuple(size_of(s) for s in tensor.shape),
        tuple(size_of(s) for s in tensor.stride()),
        tensor.dtype,
        str(tensor.device),
    )


def _items(node: Node, path: Path = ()) -> dict[Path, list[Node]]:
    """The ``getitem`` nodes that take results out, one inside the other, by where they lie."""
    found: dict[Path, list[Node]] = {}
    for user in node.users:
        if user.target is operator.getitem:
            here = (*path, user.args[1])
            deeper = _items(user, here)  # type: ignore[arg-type]
            if deeper:
                found.update(deeper)
            else:
                found.setdefault(here, []).append(user)  # type: ignore[arg-type]
    return found


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Everything that is no container, and where it lies."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, (tuple, list)):
        for position, item in enumerate(value):
            yield from _leaves(item, (*path, position))
    else:
        yield path, value


def _symbol_of(expr: sympy.Basic) -> str | None:
    """The name of the symbol a call finds; None where it is equal to a size known before, and so
    read for nothing. A truth is written ``Eq(u0, 1)``.
    """
    if isinstance(expr, sympy.Eq) and expr.args[1] == 1:
        expr = expr.args[0]
    return str(expr.name) if isinstance(expr, sympy.Symbol) else None
