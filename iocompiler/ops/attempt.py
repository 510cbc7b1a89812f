"""Templates that do not run here, and aten in their place; or an error, where one is asked for."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

from iocompiler.errors import (
    CompileError,
    FallbackWarning,
    IOCompilerError,
    LaunchError,
    cause_of,
)

T = TypeVar("T")
Boxed = Callable[[list[Any]], Any]
_told: set[str] = set()
_instead: ContextVar[type[IOCompilerError] | None] = ContextVar("instead", default=None)


def template_or(what: str, template: Callable[[], T], plain: Callable[[], T]) -> T:
    """``template()``; or, where a kernel of it does not compile or the driver refuses to load it,
    ``plain()``, with one `FallbackWarning` for each cause.

    Args:
        template: which has written nothing that ``plain`` reads when it fails.

    Raises:
        IOCompilerError: the template fails in a function of `refusing`.
    """
    try:
        return template()
    except (CompileError, LaunchError) as error:
        _tell(what, error)
        return plain()


def refusing(run: Boxed, instead: type[IOCompilerError]) -> Boxed:
    """``run``, in which a template that fails is an error ``instead`` (of a region and a cause)."""

    def call(args: list[Any]) -> Any:
        token = _instead.set(instead)
        try:
            return run(args)
        finally:
            _instead.reset(token)

    vars(call).update(getattr(run, "__dict__", {}))
    return call


def _tell(what: str, error: IOCompilerError) -> None:
    where, instead = _users_line(), _instead.get()
    if instead is not None:
        raise instead(region=what, cause=cause_of(error), where=where) from error
    text = f"iocompiler: {what} runs on aten: {error}"
    if text not in _told:
        _told.add(text)
        warnings.warn(text + (f" (at {where})" if where else ""), FallbackWarning, stacklevel=3)


def _users_line() -> str:
    """The user's line of the call that a generated file is at; "" where none is."""
    frame: Any = sys._getframe()
    while frame is not None:
        where = getattr(frame.f_globals.get("module"), "users_line", None)
        if where is not None:
            return str(where(frame.f_lineno))
        frame = frame.f_back
    return ""
