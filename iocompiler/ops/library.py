"""Our operators as torch knows them, and the functions behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY: Any = torch.library.Library("iocompiler", "FRAGMENT")  # type: ignore[no-untyped-call]
_functions: dict[str, Callable[..., Any]] = {}
_firsts: dict[str, Callable[..., Any]] = {}
_launching: set[str] = set()
_replayed: set[str] = set()
_multiplying: set[str] = set()


def define(schema: str, *tags: torch.Tag) -> Any:
    """Declare an operator; returns its overload."""
    _LIBRARY.define(schema, tags=tags)
    return getattr(torch.ops.iocompiler, schema[: schema.index("(")]).default


def implement(
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    first: Callable[..., Any] | None = None,
    launches: bool = False,
    replays: bool = False,
    multiplies: bool = False,
) -> None:
    """What an operator does on any device, and on fake tensors.

    Args:
        first: what makes the first of its results, for less, where nobody reads the others.
        launches: whether ``run`` may launch templates. It must then run on tensors without memory
            too, and keep none of them.
        replays: whether all that it allocates, launches and calls of torch's operators follows from
            its arguments but for what is in memory, and where (`runtime/replayed.py`).
        multiplies: whether it calls `multiply.multiply`. It must then run on tensors without memory
            too.
    """
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"iocompiler::{name}", fake, lib=_LIBRARY)
    _functions[name] = run
    if first is not None:
        _firsts[name] = first
    if launches:
        _launching.add(name)
    if replays:
        _replayed.add(name)
    if multiplies:
        _multiplying.add(name)


def compose(name: str, run: Callable[..., Any]) -> None:
    """What an operator is, in terms of others: it never stands in a flat graph."""
    _LIBRARY.impl(name, run, "CompositeImplicitAutograd")


def differentiate(name: str, backward: Callable[..., Any], setup: Callable[..., Any]) -> None:
    """The gradient of an operator, as `torch.library.register_autograd` takes it."""
    torch.library.register_autograd(
        f"iocompiler::{name}", backward, setup_context=setup, lib=_LIBRARY
    )


def function(name: str, first: bool = False) -> Callable[..., Any]:
    """What an operator does, or what makes its ``first`` result alone, past torch's dispatcher:
    below autograd there is nothing left to choose, and its way through Python takes longer than a
    short kernel runs.
    """
    return (_firsts if first else _functions)[name]


def has_first(name: str) -> bool:
    """Whether the first of an operator's results may be had alone, for less."""
    return name in _firsts


def launches(name: str) -> bool:
    """Whether an operator may launch templates."""
    return name in _launching


def replays(name: str) -> bool:
    """Whether what an operator does is worth watching (`implement`)."""
    return name in _replayed


def multiplies(name: str) -> bool:
    """Whether an operator has products of its own (`implement`)."""
    return name in _multiplying
