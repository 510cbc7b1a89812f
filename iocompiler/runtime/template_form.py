"""What the cubin of a template depends on, and the job of compiling it.

Two launches with equal forms run the same kernel. Where Triton looks at a number only for its
width and whether it is 1 or a multiple of 16, the form has the smallest number that looks the same.
"""

from __future__ import annotations

import functools
import json
import linecache
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from iocompiler.runtime.worker import OPTIONS

ALIGNED = 16
"""Bytes of which Triton takes a pointer for a multiple."""
_PACKAGE = "iocompiler."


class Pointer(NamedTuple):
    """A tensor: its dtype, as Triton reads it, and whether its address is a multiple of 16."""

    dtype: str
    aligned: bool


class Function(NamedTuple):
    """A ``@triton.jit`` function by its name in a module of ours, or in a file."""

    module: str
    path: str
    name: str

    @property
    def is_ours(self) -> bool:
        return self.module.startswith(_PACKAGE)


class Plain(NamedTuple):
    """A bool or a float, which else would equal a number of another type."""

    type: str
    text: str

    @property
    def value(self) -> bool | float:
        return float(self.text) if self.type == "float" else self.text == "True"


# Triton looks at no more of them than their types
_ANY = {bool: Plain("bool", "True"), float: Plain("float", "0.5")}

Leaf: TypeAlias = Any
"""`Pointer`, `Function`, `Plain`, int, str, None; a tuple of these."""


class Form(NamedTuple):
    """A template and all of its arguments that its cubin depends on.

    ``arguments`` and ``options`` are pairs of name and value, those of a launch (num_warps).
    """

    kernel: Function
    arguments: tuple[tuple[str, Leaf], ...]
    options: tuple[tuple[str, Leaf], ...]
    capability: int


def form_of(kernel: Any, given: Mapping[str, Any], capability: int) -> Form:
    """The form of a launch of ``kernel`` with these arguments and options.

    Args:
        given: by name; tensors may be fake, which begin where an allocation would.
        capability: 90 for version 9.0.
    """
    kinds = _kinds.get(kernel.fn) or _kinds_of(kernel)
    arguments = tuple([(n, kind(given[n])) for n, kind in kinds.items()])
    options = tuple(sorted([(n, _constant(value)) for n, value in given.items() if n not in kinds]))
    return Form(_function(kernel), arguments, options, capability)


_kinds: dict[FunctionType, dict[str, Callable[[Any], Leaf]]] = {}


def _kinds_of(kernel: Any) -> dict[str, Callable[[Any], Leaf]]:
    """What each argument is looked at by; kept by the plain function, since hashing Triton's reads
    all of its text.
    """
    found = _kinds[kernel.fn] = {p.name: _kind(p) for p in kernel.params}
    return found


def _kind(parameter: Any) -> Callable[[Any], Leaf]:
    if parameter.is_constexpr:
        return _constant
    looks = not parameter.do_not_specialize
    at_alignment = looks and not parameter.do_not_specialize_on_alignment
    return functools.partial(_leaf, looks, at_alignment)


def _constant(value: Any) -> Leaf:
    if isinstance(value, tuple):
        return tuple([_constant(each) for each in value])
    if isinstance(value, (bool, float)):
        return Plain(type(value).__name__, repr(value))
    return _function(value) if hasattr(value, "fn") else value


def _leaf(looks: bool, at_alignment: bool, value: Any) -> Leaf:
    if isinstance(value, tuple):
        return tuple([_leaf(looks, at_alignment, each) for each in value])
    if isinstance(value, Tensor):
        aligned = not at_alignment or address(value) % ALIGNED == 0
        return Pointer(str(value.dtype).removeprefix("torch."), aligned)
    if isinstance(value, (bool, float)):
        return _ANY[type(value)]
    return _like(looks, at_alignment, value) if isinstance(value, int) else value


def _like(looks: bool, at_alignment: bool, number: int) -> int:
    """The number that stands for all that Triton compiles the same kernel for."""
    if looks and number == 1:
        return 1
    base = 0
    if not -(2**31) <= number < 2**31:
        base = 2**32 if -(2**63) <= number < 2**63 else 2**63
    return base + (ALIGNED if at_alignment and number % ALIGNED == 0 else 3)


def address(x: Tensor) -> int:
    """Where a tensor begins, in bytes; a fake one's memory begins at 0."""
    if isinstance(x, FakeTensor):
        return int(x.storage_offset()) * x.element_size()
    return x.data_ptr()


def _function(function: Any) -> Function:
    plain = function.fn
    return Function(plain.__module__, plain.__code__.co_filename, plain.__name__)


@dataclass(frozen=True)
class TemplateJob:
    """A template to compile; what `compile.Job` is for generated kernels."""

    form: Form
    where: str = ""

    @property
    def name(self) -> str:
        return self.form.kernel.name

    @functools.cached_property
    def paths(self) -> tuple[str, ...]:
        """The files of functions that are in no module of ours."""
        return tuple(dict.fromkeys(_paths((self.form.kernel, self.form.arguments))))

    def as_json(self) -> dict[str, Any]:
        """What the cubin depends on besides the versions, which the texts of our modules are
        among. A function is {"function", "module"} or {"function", "text"}, a place in "texts"; a
        tensor is {"tensor", "aligned"}.
        """
        form = self.form
        return {
            "kernel": self._json(form.kernel),
            "arguments": {n: self._json(value) for n, value in form.arguments},
            "options": {**{n: self._json(value) for n, value in form.options}, **OPTIONS},
            "capability": form.capability,
            "texts": ["".join(linecache.getlines(path)) for path in self.paths],
        }

    def message(self, path: str) -> dict[str, Any]:
        """What a worker is sent; the lines of a template are those of its own files."""
        return {**self.as_json(), "paths": self.paths}

    def files(self) -> dict[str, bytes]:
        """What the cache keeps beside the cubin."""
        return {"job.json": json.dumps(self.as_json(), indent=1).encode()}

    def _json(self, value: Leaf) -> Any:
        if isinstance(value, Pointer):
            return {"tensor": value.dtype, "aligned": value.aligned}
        if isinstance(value, Function):
            ours = {"module": value.module}
            place = ours if value.is_ours else {"text": self.paths.index(value.path)}
            return {"function": value.name, **place}
        if isinstance(value, Plain):
            return value.value
        return [self._json(each) for each in value] if isinstance(value, tuple) else value


def _paths(value: Leaf) -> list[str]:
    if isinstance(value, Function):
        return [] if value.is_ours else [value.path]
    if isinstance(value, (Pointer, Plain)) or not isinstance(value, tuple):
        return []
    return [path for each in value for path in _paths(each)]
