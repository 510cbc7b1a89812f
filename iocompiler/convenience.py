"""`compile` with the Dynamo settings the compiler wants; `explain`, loaded when first called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from iocompiler.backend import Compiler
from iocompiler.dynamo_settings import with_settings


def compile(
    model: Callable[..., Any],
    *,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    **settings: Any,
) -> Callable[..., Any]:
    """``torch.compile(model, backend=Compiler(...))``, with fewer graph breaks.

    Logger calls are skipped instead of breaking the graph, and operators whose output size depends
    on data are captured. The settings hold while Dynamo compiles a call of what is returned: all
    else keeps Dynamo's own.

    Args:
        model: a module (a module is returned, sharing its parameters) or a function.
        dynamic, fullgraph: as in torch.compile.
        settings: as in `Compiler`.
    """
    compiled: Any = torch.compile(
        model, backend=Compiler(**settings), dynamic=dynamic, fullgraph=fullgraph
    )
    if isinstance(compiled, torch.nn.Module):
        compiled.forward = with_settings(compiled.forward)
        return compiled
    return with_settings(compiled)


def explain(model: Callable[..., Any], *inputs: Any, **settings: Any) -> Any:
    """Plan, emit and compile ``model`` with no GPU present; see
    `iocompiler.report.explain.explain`.
    """
    from iocompiler.report.explain import explain as report

    return report(model, *inputs, **settings)
