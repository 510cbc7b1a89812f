"""The statements of a function that a generated module has, each variable deleted behind the last
that reads it: its memory is free for what comes next.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field

from iocompiler.codegen.pytext import wrapped


@dataclass(frozen=True)
class _Statement:
    """Lines, and the variables they read or make."""

    lines: list[str]
    variables: Set[str]


@dataclass
class Statements:
    """What a function does, in order.

    Attributes:
        numbers: variables that hold no memory: sizes and numbers.
    """

    numbers: set[str] = field(default_factory=set)
    _added: list[_Statement] = field(default_factory=list)

    def add(self, lines: list[str], variables: Set[str]) -> None:
        """One more, which reads or makes these variables; comments are lines that begin with #."""
        self._added.append(_Statement(lines, variables - self.numbers))

    def lines(self, kept: Set[str]) -> list[str]:
        """All of them, indented; variables that are ``kept`` are not deleted."""
        last: dict[str, int] = {}
        for position, statement in enumerate(self._added):
            last.update(dict.fromkeys(statement.variables, position))
        lines: list[str] = []
        comment = ""
        for position, statement in enumerate(self._added):
            for line in statement.lines:
                if line != comment:  # one line of the user's often makes several steps
                    lines += wrapped(f"    {line}")
                if line.startswith("#"):
                    comment = line
            dead = sorted(v for v in statement.variables - kept if last[v] == position)
            if dead:
                names = ", ".join(dead)
                lines += wrapped(f"    del {names}" if len(dead) < 8 else f"    del ({names})")
        return lines
