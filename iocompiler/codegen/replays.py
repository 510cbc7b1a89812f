"""Calls of our operators that a module may do again without them (`runtime/replayed.py`)."""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from iocompiler.codegen.pytext import tuple_text
from iocompiler.ops import library
from iocompiler.plan.data import Argument, AtenStep, Ref, TensorSpec


def replayed(step: AtenStep) -> str:
    """The name of the operator of ours that a step calls, if that may be done again; else ""."""
    namespace, name, *_ = step.target.split(".")
    return name if namespace == "iocompiler" and library.replays(name) and not step.kwargs else ""


def form_of(
    step: AtenStep, specs: Mapping[str, TensorSpec | None], names: Mapping[str, str]
) -> tuple[str, str]:
    """All of a call but memory, and the numbers that this depends on: a tuple, as text.

    Args:
        specs: of the plan's values; None for a number.
        names: their variables.
    """
    numbers: set[str] = set()

    def form(argument: Argument) -> str:
        if isinstance(argument, (list, tuple)):
            return f"[{', '.join(map(form, argument))}]"
        if isinstance(argument, Ref):
            spec = specs[argument.name]
            if spec is None:
                numbers.add(names[argument.name])
                return names[argument.name]
            for size in (*spec.shape, *spec.stride):
                numbers.update(map(str, sympy.sympify(size).free_symbols))
            return repr(spec)
        if isinstance(argument, sympy.Basic):
            numbers.update(map(str, argument.free_symbols))
        return repr(argument)

    text = f"{step.target} {form(step.args)}"
    return text, tuple_text(tuple(map(sympy.Symbol, sorted(numbers))))
