"""A template's job as Triton's source, in a worker: stand-ins for the arguments of a launch, which
Triton then specialises as it does for a launch of its own.

Imports Triton and the standard library only, and the kernels' modules, which import no more.
"""

from __future__ import annotations

import importlib
import linecache
from collections.abc import Iterator
from typing import Any, NamedTuple


class Source(NamedTuple):
    """What `triton.compile` takes, and the parameters of the kernel in its own order: where each
    lies in the arguments (the number of the argument, then places in tuples), and its type.
    """

    source: Any
    options: dict[str, Any]
    parameters: list[tuple[tuple[int, ...], str]]


class Address:
    """Stands for a tensor, of which Triton asks no more than this."""

    def __init__(self, dtype: str, aligned: bool):
        self.dtype, self._place = dtype, 0 if aligned else 1

    def data_ptr(self) -> int:
        return self._place


def template_source(job: dict[str, Any], target: Any) -> Source:
    """The source of a job as `template_form.TemplateJob` describes it."""
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    modules = [executed(*pair) for pair in zip(job["texts"], job["paths"], strict=True)]
    kernel = _function(job["kernel"], modules)
    given = {name: _value(value, modules) for name, value in job["arguments"].items()}
    given |= {"debug": False, **job["options"]}
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**given)
    options, signature, constants, attrs = kernel._pack_args(
        backend, given, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attrs)
    return Source(source, options.__dict__, parameters_of(signature))


def parameters_of(signature: dict[str, Any]) -> list[tuple[tuple[int, ...], str]]:
    """The parameters of a kernel from Triton's types of its arguments, tuples among them."""
    return list(_parameters(tuple(signature.values()), ()))


def executed(text: str, path: str) -> dict[str, Any]:
    """The globals of a module's text; Triton reads functions by the lines of its file."""
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    namespace: dict[str, Any] = {"__name__": "kernel", "__file__": path}
    exec(compile(text, path, "exec"), namespace)
    return namespace


def _function(described: dict[str, Any], modules: list[dict[str, Any]]) -> Any:
    if "module" in described:
        return getattr(importlib.import_module(described["module"]), described["function"])
    return modules[described["text"]][described["function"]]


def _value(described: Any, modules: list[dict[str, Any]]) -> Any:
    if isinstance(described, list):
        return tuple(_value(each, modules) for each in described)
    if not isinstance(described, dict):
        return described
    if "tensor" in described:
        return Address(described["tensor"], described["aligned"])
    return _function(described, modules)


def _parameters(types: Any, place: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
    """Those in memory: what is a constant is in the code."""
    if isinstance(types, (tuple, list)):
        for position, each in enumerate(types):
            yield from _parameters(each, (*place, position))
    elif types != "constexpr":
        yield place, types
