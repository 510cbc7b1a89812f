"""The scheduled peak of a training step: the most bytes its plans hold at once.

Buffers live as in the generated module (`codegen/body.py`): allocated before the step that fills
them, dropped after the last step that reads them or a view of them. Counted is what stands above
parameters and inputs: activations, gradients, temporaries. Of what an operator allocates for itself
while it runs, only what `workspace.py` knows of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from iocompiler.cost_model.call import call_of_step
from iocompiler.graph.view import results
from iocompiler.plan.contents import made, references, regions
from iocompiler.plan.data import (
    AtenStep,
    BatchStep,
    ConstantStep,
    KernelStep,
    MatmulStep,
    Plan,
    Ref,
    Step,
    TensorSpec,
    ViewStep,
)
from iocompiler.plan.moving import returned
from iocompiler.plan.sizes import value_at
from iocompiler.plan.workspace import workspace_bytes

Hints = Mapping[str, int]


def kept(forward: GraphModule, backward: GraphModule) -> dict[str, int]:
    """The inputs of a flat backward graph that its forward hands over: by name, the position among
    the forward's outputs.
    """
    return taken(backward, results(forward))


def taken(backward: GraphModule, returned: Mapping[str, int]) -> dict[str, int]:
    """Of what a forward returned, by name, the inputs of a flat backward graph."""
    inputs = (node.name for node in backward.graph.find_nodes(op="placeholder"))
    return {name: returned[name] for name in inputs if name in returned}


def scheduled_peak(
    forward: Plan, backward: Plan, handed_over: Mapping[str, int], hints: Hints
) -> int:
    """Bytes of the peak of both plans, the forward's results held by the caller to the end.

    Args:
        handed_over: as `kept` gives it.
        hints: an example value for every size symbol.
    """
    first = _Memory(forward, {}, hints)
    saved = set(handed_over.values())
    at = [first.storage(output) for output in forward.outputs]
    returned = {root for position, root in enumerate(at) if position not in saved}
    held = sum(first.bytes.get(root, 0) for root in returned)
    given: dict[str, int] = {}
    owners: dict[str, str] = {}  # of each storage handed over, the input that stands for it
    roots: dict[str, str] = {}
    for name, spec in backward.inputs:
        if name in handed_over:
            root = at[handed_over[name]]
            roots[name] = owners.setdefault(root, name)
            given[roots[name]] = 0 if root in returned else first.bytes.get(root, 0)
        elif spec is not None and name.startswith("tangents"):
            given[name] = storage_bytes(spec, hints)
    return max(first.peak, held + _Memory(backward, given, hints, roots).peak)


def held_bytes(plan: Plan, given: Mapping[str, int], hints: Hints) -> list[int]:
    """Bytes in use at each step of a plan.

    Args:
        given: of each input that dies here, its bytes. hints: as of `scheduled_peak`.
    """
    return _Memory(plan, given, hints).in_use


class _Memory:
    """Bytes in use while a plan runs.

    Args:
        given: of each input that counts, its bytes. roots: inputs that lie in another's storage.

    Attributes:
        peak: the most bytes in use at once. in_use: at each step.
        bytes: of each storage that was allocated here, by the value that owns it.
    """

    def __init__(
        self,
        plan: Plan,
        given: Mapping[str, int],
        hints: Hints,
        roots: Mapping[str, str] | None = None,
    ) -> None:
        self.bytes = dict(given)
        self._roots = dict(roots or {})
        self._specs = {name: spec for name, spec in plan.inputs if spec is not None}
        self._hints = hints
        self.in_use: list[int] = []
        self.peak = self._run(plan, given)

    def storage(self, output: Any) -> str:
        """The storage an output of the plan lies in; "" for one that is no tensor."""
        return self._root(output.name) if isinstance(output, Ref) else ""

    def _root(self, name: str) -> str:
        return self._roots.get(name, name)

    def _run(self, plan: Plan, given: Mapping[str, int]) -> int:
        touched = [self._touched(step) for step in plan.steps]
        last = {root: at for at, roots in enumerate(touched) for root in roots}
        forever = {self.storage(output) for output in plan.outputs}
        peak = in_use = sum(given.values())
        in_use -= sum(size for root, size in given.items() if root not in {*last, *forever})
        alive: set[str] = {self._root(name) for name, _ in plan.inputs}
        for at, step in enumerate(plan.steps):
            fresh = [root for root in touched[at] if root not in alive]
            alive.update(fresh)
            in_use += sum(self.bytes.get(root, 0) for root in fresh)
            self.in_use.append(in_use + self._within(step))
            peak = max(peak, self.in_use[-1])
            dead = (root for root in touched[at] if last[root] == at and root not in forever)
            in_use -= sum(self.bytes.get(root, 0) for root in dead)
        return peak

    def _touched(self, step: Step) -> set[str]:
        """The storages a step reads or writes; those it makes are entered."""
        self._specs |= made(step)
        match step:
            case KernelStep() | MatmulStep() | BatchStep():
                over = dict(step.over) if isinstance(step, KernelStep) else {}
                self._roots |= {name: self._root(of) for name, of in over.items()}
                self._made([each for each in step.outputs if each[0] not in over])
                members = step.members if isinstance(step, BatchStep) else ((step.args, 0),)
                names = [name for args, _ in members for name in args]
                return {self._root(n) for n in (*names, *(n for n, _ in step.outputs))}
            case AtenStep():
                read = [r.name for r in references((step.args, dict(step.kwargs)))]
                results = [(name, spec) for _, name, spec in step.results()]
                self._made(self._fresh(step, results))
                return {self._root(n) for n in (*read, *(n for n, _ in results))}
            case ViewStep():
                self._roots[step.name] = self._root(step.base)
                return set()  # without a reader of its own it holds nothing
            case ConstantStep():
                return set()  # the module's own

    def _made(self, outputs: Sequence[tuple[str, TensorSpec | None]]) -> None:
        for name, spec in outputs:
            if spec is not None:
                self.bytes[name] = storage_bytes(spec, self._hints)

    def _fresh(
        self, step: AtenStep, results: list[tuple[str, TensorSpec | None]]
    ) -> list[tuple[str, TensorSpec | None]]:
        """The results with memory of their own; the others are entered as views of an argument."""
        shown = returned(step)
        self._roots |= {name: self._root(of) for name, of in shown.items()}
        return [(name, spec) for name, spec in results if name not in shown]

    def _within(self, step: Step) -> int:
        """What the operator of the step, and functions that it calls, hold beside it."""
        if not isinstance(step, AtenStep):
            return 0
        inner = regions((step.args, dict(step.kwargs)))
        called = max((_Memory(region.plan, {}, self._hints).peak for region in inner), default=0)
        return called + workspace_bytes(call_of_step(step, self._specs), self._hints)


def storage_bytes(spec: TensorSpec, hints: Hints) -> int:
    """From the tensor's first element to its last."""
    if any(value_at(size, hints) == 0 for size in spec.shape):
        return 0
    return value_at(spec.reach, hints) * spec.dtype.itemsize
