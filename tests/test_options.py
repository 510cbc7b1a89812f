from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch._inductor

from iocompiler.errors import InvalidOption, IOCompilerError, UnknownOption
from iocompiler.options import Options


def test_defaults_are_valid() -> None:
    assert Options.build({}) == Options()


def test_modes_of_torch_compile() -> None:
    # "lite" leaves out what Inductor does unasked
    for mode in set(torch._inductor.list_mode_options()) - {"lite"}:
        built = Options.build({"mode": mode})
        assert built.mode == mode
        assert built.measures == mode.startswith("max-autotune")
        assert not built.updated({"mode": "default"}).measures


def test_a_path_may_be_a_path(tmp_path: Path) -> None:
    built = Options.build({"dump": tmp_path, "plan": tmp_path / "plan.json"})
    assert (built.dump, built.plan) == (str(tmp_path), str(tmp_path / "plan.json"))


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    built = Options.build({"dump": "~/out", "plan": Path("~/plan.json")})
    assert (built.dump, built.plan) == (str(tmp_path / "out"), str(tmp_path / "plan.json"))


def test_none_is_no_path() -> None:
    built = Options.build({"dump": "out", "plan": "plan.json"})
    assert built.updated({"dump": None, "plan": None}) == Options()


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UnknownOption, match=r"unknown option 'dmp' \(did you mean 'dump'\?\)") as e:
        Options.build({"dmp": "out"})
    for name in ("mode", "dump", "strict", "verify", "device", "engine"):
        assert name in str(e.value)
    assert isinstance(e.value, IOCompilerError)


def test_no_hint_where_nothing_is_close() -> None:
    with pytest.raises(UnknownOption, match=r"unknown option 'zzzz'; the options are"):
        Options.build({"zzzz": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "fast"),
        ("mode", None),
        ("dump", 3),
        ("plan", 3),
        ("strict", "yes"),
        ("strict", 1),
        ("verify", None),
        ("device", "h2000"),
        ("engine", "gpu"),
        ("memory_budget", 0),
        ("memory_budget", -1),
        ("memory_budget", 0.0),
        ("memory_budget", 1.5),
        ("memory_budget", float("nan")),
        ("memory_budget", True),
        ("memory_budget", "0.5"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: object) -> None:
    with pytest.raises(InvalidOption, match=f"option '{name}' must be"):
        Options.build({name: value})


def test_updated_keeps_the_rest() -> None:
    assert Options(strict=True).updated({"verify": True}) == Options(strict=True, verify=True)


def test_an_engine_may_be_a_function() -> None:
    def engine(plan: object, graph: object) -> object:
        return plan

    assert Options.build({"engine": engine}).engine is engine


@pytest.mark.parametrize("value", [None, 1, 10**12, 1.0, 1e-9])
def test_a_memory_budget_is_bytes_or_a_fraction(value: object) -> None:
    assert Options.build({"memory_budget": value}).memory_budget == value
