"""One operator call as the rules see it, whether it comes from an FX node or from a plan's step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.fx import Node

from iocompiler.cost_model.cost import spec_of
from iocompiler.plan.data import AtenStep, Ref, TensorSpec


@dataclass(frozen=True)
class Operand:
    """A tensor argument: its name tells two arguments that are one tensor from two equal ones."""

    name: str
    spec: TensorSpec


@dataclass(frozen=True)
class Call:
    """``target`` is the operator's qualified name ("aten.mm.default"), `Operand`s stand for tensors
    in the arguments, ``outputs`` are the specs of its results (None for one nobody reads)."""

    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[TensorSpec | None, ...]

    @property
    def name(self) -> str:
        """The operator without its overload: "aten.mm"."""
        return self.target.rpartition(".")[0] if self.target.count(".") > 1 else self.target

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The distinct tensors read, in order."""
        found = {o.name: o for o in _operands((self.args, tuple(self.kwargs.values())))}
        return tuple(found.values())

    @property
    def results(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for spec in self.outputs if spec is not None)

    @property
    def mutated(self) -> tuple[Operand, ...]:
        """The tensors the call writes into, as the operator's schema declares."""
        found: dict[str, Operand] = {}
        for position, argument in enumerate(
            getattr(getattr(resolve(self.target), "_schema", None), "arguments", ())
        ):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = self.kwargs.get(
                    argument.name, self.args[position] if position < len(self.args) else None
                )
                found |= {o.name: o for o in _operands(given)}
        return tuple(found.values())

    def argument(self, name: str, default: Any = None) -> Any:
        """The argument the operator's schema calls ``name``, or its default there, or
        ``default``."""
        if name in self.kwargs:
            return self.kwargs[name]
        for position, (known, fallback) in enumerate(_schema(self.target)):
            if known == name:
                return self.args[position] if position < len(self.args) else fallback
        return default


def _operands(value: Any) -> Iterator[Operand]:
    if isinstance(value, Operand):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _operands(item)


def resolve(target: str) -> Any:
    """The operator behind a qualified name, or None where no such operator is loaded."""
    found: Any = torch.ops
    for part in target.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            return None
    return found


@lru_cache(maxsize=1024)
def _schema(target: str) -> tuple[tuple[str, Any], ...]:
    operator = resolve(target)
    schema = getattr(operator, "_schema", None)
    if schema is None:
        return ()
    return tuple(
        (a.name, a.default_value if a.has_default_value() else None) for a in schema.arguments
    )


def is_pointwise(target: str) -> bool:
    """Whether PyTorch tags the operator as pointwise."""
    return torch.Tag.pointwise in getattr(resolve(target), "tags", ())


def call_of_node(node: Node) -> Call:
    """The call an FX node makes; ``node.meta["val"]`` holds the fake tensors."""
    return Call(
        _target(node.target),
        tuple(_from_fx(a) for a in node.args),
        {k: _from_fx(v) for k, v in node.kwargs.items()},
        _specs(node.meta.get("val")),
    )


def _target(target: Any) -> str:
    return (
        str(target)
        if isinstance(target, torch._ops.OpOverload)
        else getattr(target, "__name__", str(target))
    )


def _from_fx(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_from_fx(item) for item in value)
    if not isinstance(value, Node):
        return value
    known = value.meta.get("val")
    if isinstance(known, torch.Tensor):
        return Operand(value.name, spec_of(known))
    if isinstance(known, (tuple, list)):
        return tuple(
            Operand(f"{value.name}.{i}", spec_of(t)) for i, t in enumerate(known) if _is_tensor(t)
        )
    return known


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _specs(value: Any) -> tuple[TensorSpec | None, ...]:
    if isinstance(value, torch.Tensor):
        return (spec_of(value),)
    if isinstance(value, (tuple, list)):
        return tuple(spec_of(v) if isinstance(v, torch.Tensor) else None for v in value)
    return ()


def call_of_step(step: AtenStep, specs: Mapping[str, TensorSpec]) -> Call:
    """The call a plan's step makes; ``specs`` knows the values that stand before it."""
    return Call(
        step.target,
        tuple(_from_plan(a, specs) for a in step.args),
        {k: _from_plan(v, specs) for k, v in step.kwargs},
        tuple(spec for _, spec in step.outputs),
    )


def _from_plan(value: Any, specs: Mapping[str, TensorSpec]) -> Any:
    if isinstance(value, Ref):
        return Operand(value.name, specs[value.name]) if value.name in specs else value
    if isinstance(value, (tuple, list)):
        return tuple(_from_plan(item, specs) for item in value)
    return value
