"""A site of the matmul template as plans of its own: apart, as it stands, and folded.

Both compute the same from the same inputs, so a clock can compare them. Values are named by their
places, so equal sites give equal plans; kernels keep their names, so what is compiled for the clock
is found again in the cache.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from iocompiler.plan.contents import made, references
from iocompiler.plan.data import (
    Argument,
    AtenStep,
    KernelStep,
    MatmulStep,
    Plan,
    Ref,
    Step,
    TensorSpec,
    ViewStep,
)
from iocompiler.plan.product import MatmulTile
from iocompiler.plan.sites import Site


def apart(plan: Plan, site: Site) -> Plan:
    """The products and the kernel of a site by themselves."""
    return _Cut(plan, site).plan([plan.steps[place] for place in site.places])


def together(plan: Plan, site: Site, tile: MatmulTile) -> Plan:
    """The site folded, with the inputs and outputs of `apart`."""
    return _Cut(plan, site).plan([replace(site.step, tile=tile)])


class _Cut:
    """Names and specs of what a site reads and makes, in an order that is the same for both."""

    def __init__(self, plan: Plan, site: Site) -> None:
        self.device = plan.device
        self.bases = {s.name: s.base for s in plan.steps if isinstance(s, ViewStep)}
        specs: dict[str, TensorSpec | None] = dict(plan.inputs)
        for step in plan.steps:
            specs |= made(step)
        steps = [plan.steps[place] for place in site.places]
        results = {name for step in steps for name in made(step)}
        self.outputs = [name for name, _ in site.step.outputs]
        read = list(dict.fromkeys(name for step in steps for name in self._read(step)))
        self.inputs = [name for name in read if self._own(name, results) not in results]
        self.names = {name: f"x{n}" for n, name in enumerate(self.inputs)}
        self.names |= {name: f"y{n}" for n, name in enumerate(sorted(results, key=_order(steps)))}
        self.results, self.specs = results, specs
        self.symbols = sorted(
            symbol.name
            for symbol in {
                symbol
                for spec in map(specs.get, [*self.inputs, *results])
                if spec is not None
                for size in (*spec.shape, *spec.stride)
                if not isinstance(size, int)
                for symbol in size.free_symbols
            }
        )

    def _read(self, step: Step) -> list[str]:
        if isinstance(step, AtenStep):
            return [ref.name for ref in references((step.args, dict(step.kwargs)))]
        assert isinstance(step, KernelStep)
        return list(step.args)

    def _own(self, name: str, results: set[str]) -> str:
        """A view of a product, that starts where it does, is the product here."""
        seen = name
        while seen not in results and seen in self.bases:
            seen = self.bases[seen]
        return seen if seen in results else name

    def plan(self, steps: list[Step]) -> Plan:
        inputs: list[tuple[str, TensorSpec | None]] = [(name, None) for name in self.symbols]
        inputs += [(self.names[name], self.specs[name]) for name in self.inputs]
        outputs = tuple(Ref(self.names[name]) for name in self.outputs)
        return Plan(tuple(inputs), tuple(map(self._step, steps)), outputs, self.device)

    def _step(self, step: Step) -> Step:
        if isinstance(step, AtenStep):
            return replace(
                step,
                args=self._argument(step.args),
                kwargs=self._argument(step.kwargs),
                outputs=tuple((self.names[name or ""], spec) for name, spec in step.outputs),
                node="",
                where="",
            )
        assert isinstance(step, (KernelStep, MatmulStep))
        return replace(
            step,
            args=tuple(self.names[self._own(name, self.results)] for name in step.args),
            outputs=tuple((self.names[name], spec) for name, spec in step.outputs),
            nodes=(),
            where=(),
        )

    def _argument(self, argument: Argument) -> Any:
        if isinstance(argument, Ref):
            return Ref(self.names[argument.name])
        if isinstance(argument, (list, tuple)):
            return type(argument)(self._argument(item) for item in argument)
        return argument


def _order(steps: list[Step]) -> Any:
    """The order in which steps make values."""
    places = [name for step in steps for name in made(step)]
    return places.index
