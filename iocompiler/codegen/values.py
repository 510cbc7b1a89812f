"""The values of a plan as a generated module holds them: which are variables, which views cost
nothing at all.

A view that only kernels and products by address read is no tensor: they get the base's pointer and
an offset. A view equal to its base is the base's variable. Only what aten or the caller sees is
made with `reinterpret`.
"""

from __future__ import annotations

from iocompiler.plan.contents import references
from iocompiler.plan.data import (
    AtenStep,
    BatchStep,
    ConstantStep,
    KernelStep,
    MatmulStep,
    Plan,
    Step,
    TensorSpec,
    ViewStep,
)
from iocompiler.plan.place import Place
from iocompiler.plan.sizes import is_multiple


class Values:
    """Specs, places and uses of every value of a plan; ``extents``: the symbols in shapes."""

    def __init__(self, plan: Plan):
        self.specs: dict[str, TensorSpec | None] = dict(plan.inputs)
        self.places = {name: place for name, place in plan.placed if place.offset != 0}
        self.tensors: set[str] = {r.name for r in references(plan.outputs)}
        self.written: set[str] = set()
        for step in plan.steps:
            self._add(step)
        self.extents = {
            symbol.name
            for spec in self.specs.values()
            for size in (spec.shape if spec else ())
            if not isinstance(size, int)
            for symbol in size.free_symbols
        }

    def _add(self, step: Step) -> None:
        match step:
            case KernelStep() | MatmulStep():
                self.specs.update(step.outputs)
                for buffer, name in zip(step.buffers, step.args, strict=True):
                    if buffer.role in ("out", "inout"):
                        self.written.add(name)
            case BatchStep():
                self.specs.update(step.outputs)
                for args, _ in step.members:
                    for buffer, name in zip(step.program.buffers, args, strict=True):
                        if buffer.role in ("out", "inout"):
                            self.written.add(name)
            case AtenStep():
                self.specs.update({name: spec for name, spec in step.outputs if name is not None})
                if step.product is None:
                    for ref in references((step.args, [value for _, value in step.kwargs])):
                        self.tensors.add(ref.name)
            case ViewStep():
                self.specs[step.name] = step.spec
                base = self.place(step.base)
                self.places[step.name] = Place(base.root, base.offset + step.offset)
            case ConstantStep():
                self.specs[step.name] = step.spec

    def place(self, name: str) -> Place:
        return self.places.get(name, Place(name))

    def is_root(self, name: str) -> bool:
        """Whether the value, a view, has the shape, strides and start of its root: one variable
        serves both.
        """
        place, spec = self.place(name), self.specs[name]
        root = self.specs[place.root]
        assert spec is not None
        assert root is not None
        return place.offset == 0 and (spec.shape, spec.stride) == (root.shape, root.stride)

    def needs_tensor(self, name: str) -> bool:
        """Whether a view is read by something that wants more than an address."""
        return name in self.tensors

    def changes(self, name: str) -> bool:
        """Whether the value's storage may be written here or handed to the caller."""
        return any(self.place(other).root == name for other in self.written | self.tensors)

    def aligned(self, name: str) -> bool:
        """Whether the value starts at a multiple of 16 bytes wherever its root does."""
        spec = self.specs[name]
        assert spec is not None
        return is_multiple(self.place(name).offset * spec.dtype.itemsize, 16)


def symbols(plan: Plan) -> list[str]:
    """Names of the size symbols of the inputs' shapes and strides, sorted."""
    found: set[str] = set()
    for name, spec in plan.inputs:
        if spec is None:
            found.add(name)
            continue
        for size in (*spec.shape, *spec.stride):
            if not isinstance(size, int):
                found |= {s.name for s in size.free_symbols}
    return sorted(found)
