"""`explain`: the walk of the backend over a model's double, for a device that need not be here."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from iocompiler.compilation import Compilation
from iocompiler.convenience import compile as compiled
from iocompiler.cost_model.device import Device
from iocompiler.cost_model.device import device as device_named
from iocompiler.errors import (
    BudgetWarning,
    CannotExplain,
    FallbackWarning,
    IOCompilerError,
    cause_of,
)
from iocompiler.ops.target import planned_for
from iocompiler.pipeline import DEFAULT, Pipeline
from iocompiler.plan.build import size_hints
from iocompiler.plan.data import Plan
from iocompiler.report.build import Part, build_report
from iocompiler.report.copies import copied
from iocompiler.report.fakes import Doubles, Retarget, double, double_inputs
from iocompiler.report.kernels import Kernels
from iocompiler.report.ledger import Lost, Report

_ORDER = ("inference", "forward", "backward")
_RECOMPILES = 256
_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    device: str = "h200",
    training: bool = False,
    compile_kernels: bool = True,
    pipeline: Pipeline = DEFAULT,
    memory_budget: int | float | None = None,
    **kwargs: Any,
) -> Report:
    """Plan, emit and compile a program for a device, which need not be present; nothing is run.

    The model and its inputs are doubled by fake tensors: neither is changed or moved, and nothing
    is read but the masks that modules hold, whose values are looked at as when they are compiled.
    Where a single random number decides what runs (layers that are dropped), it is 0.5.

    Args:
        model: a module or function on tensors; its own mode (train or eval) is kept.
        inputs, kwargs: what it is called with; real or fake tensors of any size, on any device.
        device: the name of a row of the device table.
        training: also the backward, from the output's ``.loss``, else from the first scalar output,
            else from the sum of all outputs. Without it, the model is called under
            ``torch.no_grad()``.
        compile_kernels: compile the generated kernels, and the templates that calls launch, to
            cubins, for registers, spills and shared memory.
        pipeline: the passes to run.
        memory_budget: as the option of that name; the report then has ``trades``.

    Raises:
        UnknownDevice: no such row.
        InvalidOption: the budget is not one.
        CannotExplain: the program fails on fake tensors, or nothing of its output needs a gradient.
    """
    row = device_named(device)
    records: list[Compilation] = []
    options: dict[str, Any] = {
        "engine": _unplanned_engine,
        "device": row.name,
        "memory_budget": memory_budget,
        "on_compiled": records.append,
    }
    breaks = Counter(torch._dynamo.utils.counters["graph_break"])
    mode = Doubles(allow_non_fake_inputs=True)
    try:
        double_model = double(model, mode)
        arguments, keywords = double_inputs((inputs, kwargs), mode)
        run = compiled(double_model, pipeline=retargeted(pipeline), **options)
        with mode, _quiet(), planned_for(row.capability), torch.set_grad_enabled(training):
            result = run(*arguments, **keywords)
            if training:
                loss_of(result).backward()  # type: ignore[no-untyped-call]
    except IOCompilerError:
        raise
    except Exception as error:
        raise CannotExplain(model=_name(model), cause=_cause(error)) from error
    lost = torch._dynamo.utils.counters["graph_break"] - breaks
    return report_of(records, row, compile_kernels, lost)


def report_of(
    records: Iterable[Compilation],
    row: Device,
    compile_kernels: bool,
    breaks: Counter[str] | None = None,
) -> Report:
    """The report of what the backend recorded, one `Compilation` a Dynamo graph."""
    total = Report(row.name)
    for number, record in enumerate(records):
        plans = {name: record.plans[name] for name in _ORDER if name in record.plans}
        parts = [Part(name, plan, size_hints(record.flat[name])) for name, plan in plans.items()]
        kernels = Kernels(parts, row, compile_kernels)
        ledger = build_report(parts, row, kernels.describe, kernels.templates)
        total += replace(
            ledger,
            rewrites=tuple(record.rewrites),
            misses=tuple(record.misses),
            copies=copied(record.copies, [(part.plan, part.hints) for part in parts]),
            trades=() if record.trade is None else (record.trade,),
            fallbacks=(
                *(Lost(f.region, f.cause, f.where) for f in record.fallbacks),
                *kernels.lost,
            ),
            graphs={f"{name}_{number}": record.flat[name] for name in plans},
        )
    broken = tuple(
        Lost("graph break", _first_line(reason)) for reason in (breaks or Counter()).elements()
    )
    return replace(total, fallbacks=total.fallbacks + broken)


def retargeted(pipeline: Pipeline) -> Pipeline:
    """Retargeting stands first among the flat passes: they and the planner see the device that is
    asked for."""
    return Pipeline(*pipeline.stage("graph"), Retarget(), *pipeline.stage("flat"))


def _unplanned_engine(plan: Plan, gm: GraphModule) -> Callable[[list[Any]], Any]:
    """Runs a planned graph on fake tensors, node by node, for the shapes of what follows it."""
    return lambda args: torch.fx.Interpreter(gm).boxed_run(args)


def loss_of(result: Any) -> torch.Tensor:
    """What to differentiate of a model's output: its ``loss``, else the first scalar, else the sum
    of all.

    Raises:
        ValueError: no floating-point tensor in the output needs a gradient.
    """
    named = getattr(result, "loss", None)
    if isinstance(named, torch.Tensor):
        return named
    leaves = [x for x in _tensors(result) if x.requires_grad and x.is_floating_point()]
    if not leaves:
        raise ValueError("nothing in the output needs a gradient")
    scalars = [x for x in leaves if x.numel() == 1]
    return (
        scalars[0].reshape(()) if scalars else sum((x.sum() for x in leaves[1:]), leaves[0].sum())
    )


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    # a mapping that is no registered pytree (an output class of a library) still holds its values
    values = (
        list(result.values())
        if hasattr(result, "values") and not isinstance(result, torch.Tensor)
        else result
    )
    return (x for x in tree_leaves(values) if isinstance(x, torch.Tensor))


@contextmanager
def _quiet() -> Iterator[None]:
    """What is lost stands in the report; copies of one module class are not recompilations to warn
    of."""
    names = [
        n
        for n in ("recompile_limit", "accumulated_recompile_limit")
        if hasattr(torch._dynamo.config, n)
    ]
    limits: dict[str, Any] = dict.fromkeys(names, _RECOMPILES)
    with (
        warnings.catch_warnings(),
        torch._dynamo.config.patch(**limits, automatic_dynamic_shapes=False),
    ):
        warnings.simplefilter("ignore", FallbackWarning)
        warnings.simplefilter("ignore", BudgetWarning)
        yield


def _name(model: Any) -> str:
    return getattr(model, "__name__", type(model).__name__)


def _cause(error: Exception) -> str:
    """Its kind and first line; of a branch on a tensor, where it stands."""
    if not isinstance(error, DataDependentOutputException):
        return cause_of(error)
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((*_NOT_THE_USERS, "<"))]
    place = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    return f"what runs depends on the value of a tensor{place}"


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "unknown"
