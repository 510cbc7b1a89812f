"""Products that free more memory than they take run before what does not wait for them.

The gradients of a linear layer's input and weight read the same gradient of its output; that of the
weight is the last to read the input that was saved. Run first, it frees this before the other is
allocated, at no cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from iocompiler.plan.contents import made, references
from iocompiler.plan.data import Argument, AtenStep, ConstantStep, Step, TensorSpec, ViewStep
from iocompiler.plan.inplace import FRESH
from iocompiler.plan.moving import bases_of, names_read, storage, storages, written
from iocompiler.plan.peak import storage_bytes

_WINDOW = 16
"""Steps that a product may pass."""
_HELD = "primals"
"""AOTAutograd's name for what the caller holds: parameters and inputs."""


def early(
    steps: Sequence[Step],
    inputs: Sequence[tuple[str, TensorSpec | None]],
    outputs: tuple[Argument, ...],
    hints: Mapping[str, int],
) -> list[Step]:
    """The steps with such products moved up, and the views they read before them."""
    order = _Order(steps, inputs, outputs, hints)
    result: list[Step] = []
    for place, step in enumerate(steps):
        if isinstance(step, AtenStep) and step.target in FRESH:
            order.insert(result, step, place)
        else:
            result.append(step)
    return result


class _Order:
    def __init__(
        self,
        steps: Sequence[Step],
        inputs: Sequence[tuple[str, TensorSpec | None]],
        outputs: tuple[Argument, ...],
        hints: Mapping[str, int],
    ) -> None:
        self._bases = bases_of(steps)
        specs = {name: spec for name, spec in inputs if spec is not None}
        held = {name for name in specs if name.startswith(_HELD)}
        for step in steps:
            if not isinstance(step, ViewStep):
                specs |= made(step)
        held |= {storage(ref.name, self._bases) for ref in references(outputs)}
        self._made = {name: storage_bytes(spec, hints) for name, spec in specs.items()}
        self._bytes = {name: 0 if name in held else size for name, size in self._made.items()}
        self._last: dict[str, int] = {}
        for place, step in enumerate(steps):
            for root in self._touched(step):
                self._last[root] = place

    def insert(self, result: list[Step], step: AtenStep, place: int) -> None:
        """Put the product, which stands at ``place``, as far up as it still frees memory."""
        dying = {root for root in self._touched(step) if self._last[root] == place}
        taken = sum(self._made.get(name, 0) for name in made(step))
        needed, views = self._roots(names_read(step)), set(names_read(step))
        best, passes = len(result), False
        for at in range(len(result) - 1, max(len(result) - 1 - _WINDOW, -1), -1):
            other = result[at]
            if isinstance(other, ViewStep):
                views |= {other.base} if other.name in views else set()
                continue
            makes = self._roots(set(made(other)) | written(other))
            if makes & needed:
                break
            passes = passes or (bool(made(other)) and not isinstance(other, ConstantStep))
            dying -= self._touched(other)
            if sum(self._bytes.get(root, 0) for root in dying) <= taken:
                break
            best = at if passes else best
        passed = result[best:]
        own = [s for s in passed if isinstance(s, ViewStep) and s.name in views]
        result[best:] = [*own, step, *(s for s in passed if s not in own)]

    def _touched(self, step: Step) -> set[str]:
        return self._roots(names_read(step) | written(step) | set(made(step)))

    def _roots(self, names: set[str]) -> set[str]:
        return storages(names, self._bases)
