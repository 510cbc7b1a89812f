"""Tables, ratios, and what becomes of a peer that fails."""

from __future__ import annotations

import argparse
import json
import os
import warnings
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.harness import Session, add_best, add_geometric_mean, add_ratio, verdict, wanted
from benchmarks.peers import PEERS, Peer, chosen
from benchmarks.table import Row, Table, geometric_mean, markdown
from benchmarks.timing import summary
from tests.accuracy import Comparison


def _session(limit: float = 100.0, path: str | None = None) -> Session:
    args = argparse.Namespace(quick=True, limit=limit, peers="eager", json=path, caches=None)
    return Session(args, Table("t", ["name", "eager ms"]))


def test_a_failure_is_a_note_and_the_next_peer_still_runs() -> None:
    def fails() -> None:
        raise ValueError("no kernel\nsecond line")

    session, row = _session(), {"name": "row"}
    session.attempt(row, "one", fails)
    session.attempt(row, "two", lambda: row.update({"two ms": 1.0}))
    assert row["note"] == "one: ValueError: no kernel"
    assert row["two ms"] == 1.0


def test_what_is_measured_is_written_at_once(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    session, row = _session(path=str(path)), {"name": "row"}
    session.table.rows.append(row)
    session.attempt(row, "one", lambda: row.update({"one ms": 1.0}))
    assert json.loads(path.read_text())["rows"] == [{"name": "row", "one ms": 1.0}]


def test_a_fallback_warning_is_a_note() -> None:
    def falls_back() -> None:
        warnings.warn("iocompiler: forward runs on aten", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)

    session, row = _session(), {"name": "row"}
    session.attempt(row, "ours", falls_back)
    assert row["note"] == "ours: iocompiler: forward runs on aten"


def test_past_the_limit_rows_are_skipped() -> None:
    session, row = _session(limit=-1.0), {"name": "row"}
    session.attempt(row, "one", lambda: pytest.fail("must not run"))
    assert "Skipped" in row["note"]


def test_ratio_and_geometric_mean_leave_out_what_was_not_measured() -> None:
    table = Table("t", ["name"])
    table.rows = [
        {"ours ms": 2.0, "inductor ms": 1.0},
        {"ours ms": 1.0, "inductor ms": 8.0},
        {"ours ms": 1.0},
    ]
    for row in table.rows:
        add_ratio(row)
    add_geometric_mean(table)
    assert [row["ours/inductor"] for row in table.rows] == [2.0, 0.125, None]
    assert table.summary["geometric mean of ours/inductor"] == pytest.approx(0.5)
    assert table.summary["rows with ours/inductor"] == "2 of 3"
    assert geometric_mean([]) is None


def test_the_best_peer_is_none_of_ours_and_what_was_measured() -> None:
    row: Row = {"name": "bert train", "ours ms": 3.0, "eager ms": 9.0, "inductor-sdpa ms": 6.0}
    row |= {"inductor ms": None, "eager spread ms": 0.1, "ours-autotune ms": 2.0}
    add_best(row)
    assert (row["best peer"], row["ours/best"]) == ("inductor-sdpa", 0.5)
    alone: Row = {"name": "bert train", "ours ms": 3.0}
    add_best(alone)
    assert "ours/best" not in alone

    table = Table("t", ["name"], [row, {"name": "bert forward", "ours/best": 0.25}, alone])
    add_geometric_mean(table, "ours/best", only="train")
    assert table.summary["geometric mean of ours/best of train"] == 0.5
    assert table.summary["rows with ours/best of train"] == "1 of 2"


def test_caches_that_are_kept_are_found_again(tmp_path: Path) -> None:
    session, row = _session(), {"name": "row"}
    session.args.caches = str(tmp_path)
    place = tmp_path / "inductor" / "made"

    def makes() -> None:
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        folder.mkdir(exist_ok=True)
        (folder / "made").touch()

    session.attempt(row, "one", makes)
    session.attempt(row, "two", lambda: row.update({"found": place.exists()}))
    assert row["found"]
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") != str(tmp_path / "inductor")


def test_a_verdict_names_the_worst_tensor() -> None:
    fine = Comparison("a", 1.0, 1.0, 2.0)
    bad = Comparison("b", 1.0, float("nan"), 2.0)
    assert verdict((fine,)) == "ok 0.50"
    assert verdict((fine, Comparison("b", 1.0, 4.0, 2.0))).startswith("FAIL 1 of 2: b: compiled 4")
    assert verdict((bad, fine)).startswith("FAIL 1 of 2: b: compiled nan")
    assert verdict(()).startswith("FAIL")


def test_markdown_keeps_bars_and_lines_out_of_cells() -> None:
    text = markdown(["a", "b"], [{"a": "x|y\nz", "b": 1234.5}, {"a": None, "b": 0.123456}])
    assert text.splitlines() == [
        "| a     | b     |",
        "|-------|-------|",
        "| x/y z | 1234  |",
        "| -     | 0.123 |",
    ]


def test_results_are_appended_as_a_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table("group", ["name", "ms"])
    table.rows = [{"name": "row", "ms": 1.5, "note": "ours: broke"}]
    table.finish(str(tmp_path / "a.json"))
    assert json.loads((tmp_path / "a.json").read_text())["rows"] == table.rows
    target = tmp_path / "R.md"
    target.write_text("# Results\n")
    monkeypatch.setattr("sys.argv", ["results", str(tmp_path / "a.json"), "--to", str(target)])
    results.main()
    text = target.read_text()
    assert text.startswith("# Results\n\n## 2")
    assert "| row  | 1.5 |" in text
    assert "- note, row: ours: broke" in text


def test_names() -> None:
    assert wanted("gpt2 train", "")
    assert wanted("gpt2 train", "bert,gpt2")
    assert not wanted("gpt2 train", "bert")
    assert chosen("ours,eager") == (PEERS["ours"], PEERS["eager"])
    with pytest.raises(SystemExit, match="no peer 'nobody'"):
        chosen("nobody")
    assert Peer("eager", None).compile(len) is len


def test_summary_is_a_median() -> None:
    assert summary([5.0, 1.0, 2.0]).ms == 2.0
    assert summary([3.0]).spread_ms == 0.0
