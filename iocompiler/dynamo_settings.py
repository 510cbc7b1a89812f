"""The Dynamo settings the compiler wants, in force while Dynamo compiles a frame of a call of ours,
and at no other time: a call that compiles nothing pays next to nothing, and no code of the user's
sees them.

Dynamo says when it begins, unless another thread is compiling a backward at that moment: such a
frame is compiled with Dynamo's own settings.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.callback import callback_handler

# for fewer graph breaks
_SETTINGS: dict[str, Any] = {
    "capture_dynamic_output_shape_ops": True,  # an expert loop with torch.where is one graph
}
# the setting that names the logger calls to skip; older torch has it under the second name
_IGNORED = next(
    name
    for name in ("ignore_logging_functions", "ignore_logger_methods")
    if hasattr(torch._dynamo.config, name)
)
_LOGGERS = ("debug", "info", "warning", "warning_once", "error")


class _Thread(threading.local):
    """Of one thread, as Dynamo's settings are.

    Attributes:
        calls: of ours that are under way.
        patch: the settings, where they are in force.
    """

    calls = 0
    patch: Any = None


_thread = _Thread()


def with_settings(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, compiled by Dynamo: with the settings in force while that is done."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # traced into a caller's frame
            return function(*args, **kwargs)
        if _begin not in callback_handler.start_callbacks:  # at first, or `torch._dynamo.reset`
            callback_handler.register_start_callback(_begin)
            callback_handler.register_end_callback(_end)
        _thread.calls += 1
        try:
            return function(*args, **kwargs)
        finally:
            _thread.calls -= 1
            if _thread.patch is not None and not _thread.calls:
                _end()  # Dynamo tells the thread that is the last of several to be done

    return call


def _begin(*about: Any) -> None:
    """Dynamo begins to compile. It writes the settings down after `_end`: some versions cannot
    write a set of functions.
    """
    if _thread.calls and _thread.patch is None:
        patch = torch._dynamo.config.patch({**_SETTINGS, _IGNORED: _loggers()})
        patch.__enter__()
        _thread.patch = patch


def _end(*about: Any) -> None:
    patch, _thread.patch = _thread.patch, None
    if patch is not None:
        patch.__exit__(None, None, None)


def _loggers() -> set[Any]:
    found: set[Any] = set(getattr(torch._dynamo.config, _IGNORED))
    for name in _LOGGERS:
        if hasattr(logging.Logger, name):
            found.add(getattr(logging.Logger, name))
    return found
