"""The soak of `tests/soak.py`, short: on the CPU's reference interpreter, and on a GPU."""

from __future__ import annotations

import dataclasses

import pytest

from tests import soak
from tests.soak import Setting, Training, Usage

SHORT = Setting("cpu", 40, 100.0, "reference", None, 16, 1, 24, 4, shapes=3)


def test_short() -> None:
    found = soak.soak(SHORT, lambda line: None)
    assert found["steps"] == 40
    assert found["wrong"] == []


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    found = soak.soak(Setting("cuda", 100, 120.0, shapes=6), lambda line: None)
    assert found["wrong"] == []


def test_what_is_wrong_is_said() -> None:
    ours, eager = (Training(None, None, None, losses=[x] * 10) for x in (1.0, 1.1))  # type: ignore[arg-type]
    early = Usage(0, 0, 2, 1, 9)
    late = dataclasses.replace(early, device_bytes=1 << 21, modules=3)
    found = soak._verdict(ours, eager, early, late, [])
    assert [line.split(" grew")[0].split(":")[0] for line in found["wrong"]] == [
        "device_bytes", "modules", "losses differ",
    ]  # fmt: skip


def test_a_run_too_short_to_tell_says_so() -> None:
    found = soak.soak(dataclasses.replace(SHORT, limit=0.01), lambda line: None)
    assert found["steps"] == 1
    assert found["wrong"] == ["cut off too early to see what grows"]
    assert soak._line(found, 40).startswith("soak: 1 of 40 steps in ")
    assert soak._line(found, 40).endswith("; cut off too early to see what grows")
