"""What stands in a plan: its steps and regions, what each makes, what each reads."""

from __future__ import annotations

from collections.abc import Iterator

from iocompiler.plan.data import (
    Argument,
    AtenStep,
    BatchStep,
    KernelStep,
    MatmulStep,
    Plan,
    Ref,
    Region,
    Step,
    TensorSpec,
)


def regions(argument: Argument) -> Iterator[Region]:
    """Every `Region` inside an argument, those inside other regions left out."""
    if isinstance(argument, Region):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from regions(item)
    elif isinstance(argument, dict):
        yield from regions(list(argument.values()))


def all_steps(plan: Plan) -> Iterator[Step]:
    """The steps of a plan, and those of the regions in it, each where it is called."""
    for step in plan.steps:
        if isinstance(step, AtenStep):
            for region in regions((step.args, dict(step.kwargs))):
                yield from all_steps(region.plan)
        yield step


def made(step: Step) -> dict[str, TensorSpec]:
    """The specs of the values a step makes."""
    if isinstance(step, (KernelStep, MatmulStep, BatchStep)):
        return dict(step.outputs)
    if isinstance(step, AtenStep):
        return {name: spec for name, spec in step.outputs if name is not None and spec is not None}
    return {step.name: step.spec}


def references(argument: Argument) -> Iterator[Ref]:
    """Every `Ref` inside an argument; a region has names of its own."""
    if isinstance(argument, Ref):
        yield argument
    elif isinstance(argument, dict):
        yield from references(list(argument.values()))
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from references(item)
