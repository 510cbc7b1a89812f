"""Where a value lies in memory that another was allocated for."""

from __future__ import annotations

from dataclasses import dataclass

from iocompiler.tile.index import Size


@dataclass(frozen=True)
class Place:
    """``offset`` elements behind the first of ``root``, a value that is no view."""

    root: str
    offset: Size = 0
