"""`compile` with the Dynamo settings the compiler wants; `explain`, loaded when first called."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo

from iocompiler.backend import Compiler

# what Dynamo needs for fewer graph breaks; in force only inside the calls of what `compile` returns
_SETTINGS: dict[str, Any] = {
    "capture_dynamic_output_shape_ops": True,  # an expert loop with torch.where is one graph
}
# the setting that names the logger calls to skip; older torch has it under the second name
_IGNORED = next(
    name
    for name in ("ignore_logging_functions", "ignore_logger_methods")
    if hasattr(torch._dynamo.config, name)
)
_LOGGERS = ("debug", "info", "warning", "warning_once", "error")


def compile(
    model: Callable[..., Any],
    *,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    **settings: Any,
) -> Callable[..., Any]:
    """``torch.compile(model, backend=Compiler(...))``, with fewer graph breaks.

    Logger calls are skipped instead of breaking the graph, and operators whose output size depends
    on data are captured. The settings hold during the calls of what is returned: other compiled
    functions keep Dynamo's own.

    Args:
        model: a module (a module is returned, sharing its parameters) or a function.
        dynamic, fullgraph: as in torch.compile.
        settings: as in `Compiler`.
    """
    compiled: Any = torch.compile(
        model, backend=Compiler(**settings), dynamic=dynamic, fullgraph=fullgraph
    )
    if isinstance(compiled, torch.nn.Module):
        compiled.forward = _with_settings(compiled.forward)
        return compiled
    return _with_settings(compiled)


def _with_settings(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch({**_SETTINGS, _IGNORED: _loggers()}):
            return function(*args, **kwargs)

    return call


def _loggers() -> set[Any]:
    found: set[Any] = set(getattr(torch._dynamo.config, _IGNORED))
    for name in _LOGGERS:
        if hasattr(logging.Logger, name):
            found.add(getattr(logging.Logger, name))
    return found


def explain(model: Callable[..., Any], *inputs: Any, **settings: Any) -> Any:
    """Plan, emit and compile ``model`` with no GPU present; see
    `iocompiler.report.explain.explain`.
    """
    from iocompiler.report.explain import explain as report

    return report(model, *inputs, **settings)
