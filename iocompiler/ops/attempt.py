"""Templates that do not run here, and aten in their place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

from iocompiler.errors import CompileError, FallbackWarning, LaunchError

T = TypeVar("T")
_told: set[str] = set()


def template_or(what: str, template: Callable[[], T], plain: Callable[[], T]) -> T:
    """``template()``; or, where a kernel of it does not compile or the driver refuses to load it,
    ``plain()``, with one `FallbackWarning` for each cause.

    Args:
        template: which has written nothing that ``plain`` reads when it fails.
    """
    try:
        return template()
    except (CompileError, LaunchError) as error:
        text = f"iocompiler: {what} runs on aten: {error}"
        if text not in _told:
            _told.add(text)
            warnings.warn(text, FallbackWarning, stacklevel=2)
        return plain()
