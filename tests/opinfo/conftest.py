"""Which operators run in a session, for how long, and the last line: how many did."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence

import pytest

Find = Callable[[str], Iterable[str]]
"""From a name to problems."""


@pytest.fixture(scope="session")
def deadline(request: pytest.FixtureRequest) -> float:
    """On the monotonic clock, of ``--limit``."""
    limit: float = request.config.getoption("--limit")
    return time.monotonic() + limit


@pytest.fixture
def shared(request: pytest.FixtureRequest) -> Callable[[Iterable[str]], list[str]]:
    """The names that are this session's ``--share``, in the order of ``--seed``: the first ones are
    a fair sample of all.
    """

    def chosen(names: Iterable[str]) -> list[str]:
        place, count = map(int, request.config.getoption("--share").split("/"))
        order = sorted(names)
        random.Random(request.config.getoption("--seed")).shuffle(order)
        return order[place - 1 :: count]

    return chosen


@pytest.fixture
def check(deadline: float, record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """``check(names, find)``: no problem of any name; what the limit leaves out is skipped."""

    def checked(names: Sequence[str], find: Find) -> None:
        found: list[str] = []
        done = 0
        while done < len(names) and time.monotonic() < deadline:
            found += find(names[done])
            done += 1
        for key, value in (("checked", done), ("names", len(names)), ("problems", len(found))):
            record_property(key, value)
        assert not found, "\n".join(found)
        if done < len(names):
            pytest.skip(f"the limit of time: {done} of {len(names)} were checked")

    return checked


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    totals = dict.fromkeys(("checked", "names", "problems"), 0)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                for key, value in report.user_properties:
                    totals[key] += value
    if totals["names"]:
        terminalreporter.write_line(
            f"torch's operators and modules: {totals['checked']} of {totals['names']} checked, "
            f"{totals['problems']} problems"
        )
