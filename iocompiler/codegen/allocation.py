"""The text that makes the tensors of results and views: allocated, in memory that is there, or a
tensor that is there.
"""

from __future__ import annotations

from dataclasses import replace

from iocompiler.codegen.pytext import Names, size_text, tuple_text
from iocompiler.plan.contents import references
from iocompiler.plan.data import Plan, TensorSpec
from iocompiler.plan.memory import Uses, rooms
from iocompiler.plan.place import Place


class Allocation:
    """Expressions for the values of a plan; ``names`` has the variables of those made before.

    Memory that results pass on is shown by the same tensors again: ``_tensors`` has, of each
    memory, the variables by what they show of it.
    """

    def __init__(self, plan: Plan, names: Names) -> None:
        self._names = names
        self._placed = dict(plan.placed)
        self._rooms = rooms(plan.steps, self._placed)
        self._seen = Uses(plan).seen
        self._outputs = {ref.name for ref in references(plan.outputs)}
        self._held: dict[str, TensorSpec] = {}  # of each result what its variable shows
        self._memory: dict[str, str] = {}  # the value that each result's was allocated for
        self._tensors: dict[tuple[str, str], str] = {}

    def has_variable(self, name: str) -> bool:
        """Whether a result is not only an address behind another's."""
        return name not in self._placed or self._placed[name].offset == 0

    def made(self, name: str, spec: TensorSpec) -> tuple[str, set[str]]:
        """The expression for a result that has a variable, and the variables it reads."""
        if name not in self._placed:
            room = self._rooms.get(name)
            whole = spec if room is None else replace(spec, shape=(room,), stride=(1,))
            self._held[name] = whole
            return empty(whole), set()
        root = self._placed[name].root
        self._memory[name] = self._memory.get(root, root)
        given, held = self._names.of[root], self._held[root]
        # kernels see addresses alone
        if name not in self._seen or (held.shape, held.stride) == (spec.shape, spec.stride):
            self._held[name] = held
            return given, {given}
        self._held[name] = spec
        return self.view(name, Place(root), spec)

    def view(self, name: str, place: Place, spec: TensorSpec) -> tuple[str, set[str]]:
        """The expression for a tensor that shows memory at a place, and the variables it reads."""
        given = self._names.of[place.root]
        shown = f"{tuple_text(spec.shape)}, {tuple_text(spec.stride)}, {size_text(place.offset)}"
        text = f"reinterpret({given}, {shown})"
        if name in self._outputs:  # the caller's alone
            return text, {given}
        key = self._memory.get(place.root, place.root), shown
        if key in self._tensors:
            return self._tensors[key], {self._tensors[key]}
        self._tensors[key] = self._names.add(name)
        return text, {given}


def empty(spec: TensorSpec) -> str:
    return f"empty({tuple_text(spec.shape)}, {tuple_text(spec.stride)}, {spec.dtype})"


def reinterpreted(variable: str, spec: TensorSpec) -> str:
    """A tensor of these shape and strides in the memory of another."""
    return f"reinterpret({variable}, {tuple_text(spec.shape)}, {tuple_text(spec.stride)}, 0)"
