"""What a function or a pass does, as text: its source and all it reads from around it.

Equal text means equal behaviour, as far as a program can tell. What cannot be told is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Graph

from iocompiler.errors import NotCacheable

# their versions are in every key
_KNOWN = ("torch", "triton", "iocompiler", *sys.stdlib_module_names)
_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)


def identity(value: Any) -> str:
    """The text of a function, a pass or a plain value.

    Raises:
        NotCacheable: the source cannot be had, or it reads something that may change unseen.
    """
    return hashlib.sha256(_text(value, set()).encode()).hexdigest()


def _text(value: Any, seen: set[int]) -> str:
    if isinstance(value, _PLAIN):
        return repr(value)
    if id(value) in seen:
        return "again"
    seen.add(id(value))
    if isinstance(value, (OpOverload, OpOverloadPacket, torch._ops._OpNamespace)):
        return str(value)
    if isinstance(value, Graph):
        return str(value)
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_text(v, seen) for v in value)})"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(_text(v, seen) for v in value))}}}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_text(k, seen)}: {_text(v, seen)}' for k, v in value.items())}}}"
    return _definition(value, seen)


def _definition(value: Any, seen: set[int]) -> str:
    if isinstance(value, types.ModuleType):
        return value.__name__ if _known(value.__name__) else _file(value)
    if isinstance(value, functools.partial):
        return _text((value.func, value.args, value.keywords), seen)
    if isinstance(value, types.MethodType):
        return _text((value.__func__, value.__self__), seen)
    if isinstance(value, types.FunctionType):
        return _function(value, seen)
    if isinstance(value, (type, types.BuiltinFunctionType)):
        name = f"{value.__module__}.{value.__qualname__}"
        return name if _known(str(value.__module__)) else f"{name} {_file(value)}"
    inner = _fields(value)
    return f"{_text(type(value), seen)}{_text(inner, seen)}"


def _fields(value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if _known(type(value).__module__) or not hasattr(value, "__dict__"):
        raise NotCacheable(cause=f"what a {type(value).__name__} holds cannot be told")
    return dict(vars(value))


def _function(function: types.FunctionType, seen: set[int]) -> str:
    """Its place and its code, and the values it reads, followed in turn."""
    name = f"{function.__module__}.{function.__qualname__}"
    known = _known(str(function.__module__))
    if known and function.__closure__ is None:
        return name
    around = inspect.getclosurevars(function)
    code = function.__code__
    read = {**around.globals, **around.nonlocals}
    for inner in _inner_names(code):  # names that only a nested function reads
        if inner in function.__globals__:
            read[inner] = function.__globals__[inner]
    place = f"{name}:{code.co_firstlineno} {hashlib.sha256(code.co_code).hexdigest()}"
    rest = _text([function.__defaults__, function.__kwdefaults__, sorted(read.items())], seen)
    file = "" if known else _file(function)
    return f"{place} {file} {rest}"


def _inner_names(code: types.CodeType) -> set[str]:
    found: set[str] = set()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= set(constant.co_names) | _inner_names(constant)
    return found


def _known(module: str) -> bool:
    return module.split(".")[0] in _KNOWN and module != "__main__"


def _file(value: Any) -> str:
    """The hash of the whole file that ``value`` is written in."""
    try:
        path = inspect.getsourcefile(value)
        if path is None:
            raise TypeError
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except (TypeError, OSError) as error:
        name = getattr(value, "__qualname__", getattr(value, "__name__", type(value).__name__))
        raise NotCacheable(cause=f"the source of {name} cannot be had") from error
