"""The rooms of the attention pass import one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from iocompiler.passes import attention

_NAME = attention.__name__
_ROOT = Path(attention.__file__).parent
_ROOMS = ("dims", "reading", "sums", "masks", "programs", "running")


def _imported(file: Path) -> set[str]:
    """The rooms that a file imports from, and "" for the top."""
    nodes = ast.walk(ast.parse(file.read_text()))
    modules = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    return {f"{m}."[len(_NAME) + 1 :].split(".")[0] for m in modules if m.startswith(_NAME)}


def test_every_folder_is_a_room() -> None:
    assert {file.parent.name for file in _ROOT.glob("*/__init__.py")} == set(_ROOMS)


@pytest.mark.parametrize("room", _ROOMS)
def test_a_room_imports_from_those_before_it(room: str) -> None:
    before = _ROOMS[: _ROOMS.index(room) + 1]
    files = list((_ROOT / room).glob("*.py"))
    assert len(files) > 1
    for file in files:
        assert _imported(file) <= set(before), file.name
