"""Algorithms of products as they are written down, and replayed from plan files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from iocompiler import scheduling
from iocompiler.errors import BadPlanFile
from iocompiler.plan.data import Plan
from iocompiler.runtime.algorithm_rows import algorithm_rows, algorithms_of
from iocompiler.runtime.plan_file import PlanFile
from iocompiler.runtime.tune_products import Selection, title
from tests.runtime.algorithms import (
    FIRST,
    LAYER,
    SECOND,
    THIRD,
    chain,
)
from tests.runtime.test_plan_file import compiled

EVERYTHING = (
    (LAYER, FIRST),
    (
        replace(LAYER, added=(0, 0, 1), sums=(0, 1024, 1), activation="gelu"),
        replace(SECOND, twin=1),
    ),
    (replace(LAYER, batch=3, dtype=torch.float16, added=(7, 1024, 1), bias=True), THIRD),
    (replace(LAYER, stored=torch.float32), THIRD),
)


def test_rows_of_json() -> None:
    rows = json.loads(json.dumps(algorithm_rows(EVERYTHING)))
    assert algorithms_of(rows) == EVERYTHING


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: row.pop("algorithm"), "the fields product, algorithm"),
        (lambda row: row["algorithm"].pop("tile"), "an algorithm has the fields id, tile"),
        (lambda row: row["algorithm"].update(tile="20"), "tile is '20', not a number"),
        (lambda row: row["algorithm"].update(twin=-1), "twin is -1, not a number"),
        (lambda row: row["product"].update(more=1), "a product has the fields batch"),
        (lambda row: row["product"].update(m=None), "a product needs m"),
        (lambda row: row["product"].update(m=0), "m is 0, not a number"),
        (lambda row: row["product"].update(a=[1, 2]), "not three strides"),
        (lambda row: row["product"].update(bias=1), "bias is 1, not true or false"),
        (lambda row: row["product"].update(dtype="float64"), "no dtype 'float64'"),
        (lambda row: row["product"].update(activation="silu"), "no activation 'silu': gelu, relu"),
    ],
)
def test_rows_that_are_none(change: Callable[[Any], object], words: str) -> None:
    rows = json.loads(json.dumps(algorithm_rows(EVERYTHING)))
    change(rows[0])
    with pytest.raises(ValueError, match=words):
        algorithms_of(rows)


def test_a_plan_file_has_them(tmp_path: Path) -> None:
    file, graph = PlanFile(tmp_path / "plan.json"), chain()
    bare = replace(graph, steps=tuple(replace(s, product=None) for s in graph.steps))  # type: ignore[call-arg,type-var]
    file.add(replace(bare, algorithms=EVERYTHING), bare, "forward", "h100")
    found = file.replayed(bare, "forward", "h100")
    assert found == replace(bare, algorithms=EVERYTHING)
    other = PlanFile(tmp_path / "other.json")
    other.add(bare, bare, "forward", "h100")
    assert "products" not in other.path.read_text()
    assert other.replayed(bare, "forward", "h100") == bare


def test_a_plan_file_that_is_wrong_is_an_error(tmp_path: Path) -> None:
    file, graph = PlanFile(tmp_path / "plan.json"), chain()
    file.add(replace(graph, algorithms=EVERYTHING), graph, "forward", "h100")
    text = file.path.read_text()
    for wrong in ('"tile": -1', '"tile": "x"'):
        file.path.write_text(text.replace('"tile": 0', wrong))
        with pytest.raises(BadPlanFile, match="\"products\" of graph 'forward'"):
            file.replayed(graph, "forward", "h100")
    file.path.write_text(text.replace('"products": [', '"products": 3, "x": ['))
    with pytest.raises(BadPlanFile, match="it is no list"):
        file.replayed(graph, "forward", "h100")


def test_a_compilation_replays_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured when the file is made, and read from it from then on."""
    measured: list[Plan] = []

    def stand_in(graph: Plan, *given: Any) -> Any:
        measured.append(graph)
        record = Selection(title(LAYER), SECOND, FIRST, {FIRST: 2.0, SECOND: 1.0}, LAYER)
        return replace(graph, algorithms=((LAYER, SECOND),)), (record,)

    monkeypatch.setattr(scheduling, "with_algorithms", stand_in)
    path = tmp_path / "plan.json"
    first, again = compiled(path), compiled(path)
    assert len(measured) == 2
    for record in (first, again):
        assert {p.algorithms for p in record.plans.values()} == {((LAYER, SECOND),)}
    assert set(first.tuned) == {"forward", "backward"}
    assert not again.tuned
