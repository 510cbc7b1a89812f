"""Steps in turns, and the repetition in the middle."""

from __future__ import annotations

import pytest

from benchmarks import cpu


def test_steps_take_turns_and_each_is_first_as_often() -> None:
    ran: list[str] = []
    steps = {peer: (lambda peer=peer: ran.append(peer)) for peer in ("ours", "inductor")}
    times = cpu.in_turns(steps, 4)
    assert ran == ["inductor", "ours", "ours", "inductor"] * 2
    assert times.keys() == {"ours", "inductor"}
    assert all(ms >= 0 for ms in times.values())


def test_the_median_ratio_is_one_repetition_s() -> None:
    pairs = [(4.0, 2.0), (1.0, 2.0), (3.0, 2.0)]
    row = cpu.middle([{"ours": mine, "inductor": theirs} for mine, theirs in pairs])
    assert row == {
        "ours ms": 3.0,
        "inductor ms": 2.0,
        "ours/inductor": 1.5,
        "least": 0.5,
        "greatest": pytest.approx(2.0),
    }


def test_every_model_and_module_has_a_row() -> None:
    names = cpu.subjects()
    assert {"bert train", "bert forward", "encoder layer step"} <= names.keys()
    assert names["rms norm + swiglu step"]("eager")() is None
