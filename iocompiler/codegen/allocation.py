"""The text that makes the tensors of results: allocated, or in memory that is there."""

from __future__ import annotations

from dataclasses import replace

from iocompiler.codegen.pytext import Names, tuple_text
from iocompiler.plan.data import Plan, TensorSpec
from iocompiler.plan.memory import Uses, rooms


class Allocation:
    """Expressions for the results of a plan; ``names`` has the variables of those made before."""

    def __init__(self, plan: Plan, names: Names) -> None:
        self._names = names
        self._placed = dict(plan.placed)
        self._rooms = rooms(plan.steps, self._placed)
        self._seen = Uses(plan).seen
        self._shown: dict[str, TensorSpec] = {}  # of each result what its variable holds

    def has_variable(self, name: str) -> bool:
        """Whether a result is not only an address behind another's."""
        return name not in self._placed or self._placed[name].offset == 0

    def made(self, name: str, spec: TensorSpec) -> tuple[str, set[str]]:
        """The expression for a result that has a variable, and the variables it reads."""
        if name not in self._placed:
            room = self._rooms.get(name)
            whole = spec if room is None else replace(spec, shape=(room,), stride=(1,))
            self._shown[name] = whole
            return empty(whole), set()
        root = self._placed[name].root
        given, held = self._names.of[root], self._shown[root]
        # kernels see addresses alone
        if name not in self._seen or (held.shape, held.stride) == (spec.shape, spec.stride):
            self._shown[name] = held
            return given, {given}
        self._shown[name] = spec
        return reinterpreted(given, spec), {given}


def empty(spec: TensorSpec) -> str:
    return f"empty({tuple_text(spec.shape)}, {tuple_text(spec.stride)}, {spec.dtype})"


def reinterpreted(variable: str, spec: TensorSpec, offset: str = "0") -> str:
    """A tensor of these shape and strides, so many elements behind the start of another."""
    return f"reinterpret({variable}, {tuple_text(spec.shape)}, {tuple_text(spec.stride)}, {offset})"
