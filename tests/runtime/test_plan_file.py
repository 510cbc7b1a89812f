"""Plan files: what is chosen once is replayed exactly, and what cannot be replayed is an error."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from iocompiler import scheduling
from iocompiler.backend import Compiler
from iocompiler.codegen.module import emit_module
from iocompiler.compilation import Compilation
from iocompiler.plan.data import BatchStep, KernelStep, Plan
from iocompiler.runtime.plan_file import PlanFile, fingerprint


def program(x: Tensor, w: Tensor) -> Tensor:
    return F.gelu(F.layer_norm(x @ w, (w.shape[1],))).sum(-1)


def interpreted(plan: Plan, graph: GraphModule) -> Callable[[list[Any]], Any]:
    return lambda args: Interpreter(graph).boxed_run(args)


def compiled(
    path: Path | str, function: Callable[..., Tensor] = program, **options: Any
) -> Compilation:
    """The record of a training step, compiled with the plan file at ``path``."""
    records: list[Compilation] = []
    torch._dynamo.reset()
    settings = {"engine": interpreted, "plan": path, "strict": True, **options}
    run = torch.compile(function, backend=Compiler(on_compiled=records.append, **settings))
    x, w = (torch.randn(shape, requires_grad=True) for shape in ((40, 64), (64, 96)))
    run(x, w).sum().backward()
    (record,) = records
    return record


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def edited(path: Path, edit: Callable[[Any], object]) -> None:
    data = read(path)
    edit(data)
    path.write_text(json.dumps(data))


def first(data: Any, name: str = "forward") -> Any:
    """The entry of a flat graph."""
    return next(entry for entry in data["graphs"].values() if entry["graph"] == name)


def some_kernel(data: Any) -> dict[str, Any]:
    kernels = first(data)["kernels"]
    return kernels[next(iter(kernels))]


def refused(path: Path, *words: str) -> None:
    with pytest.raises(Exception, match="cannot be replayed") as told:
        compiled(path, strict=False)
    for word in (str(path), "delete the file", *words):
        assert word in str(told.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A plan file of `program`."""
    path = tmp_path / "made" / "plan.json"
    compiled(path)
    return path


def test_what_was_chosen_is_written_down(path: Path) -> None:
    data = read(path)
    assert sorted(entry["graph"] for entry in data["graphs"].values()) == ["backward", "forward"]
    assert {entry["device"] for entry in data["graphs"].values()} == {"h200"}
    assert some_kernel(data)["num_warps"] >= 1
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


def test_a_round_trip_changes_nothing(path: Path, tmp_path: Path) -> None:
    before = path.read_text()
    assert compiled(path).plans == compiled(tmp_path / "other.json").plans == compiled("").plans
    assert path.read_text() == before


def test_a_schedule_changed_by_hand_is_replayed(path: Path) -> None:
    def edit(data: Any) -> None:
        some_kernel(data)["num_warps"] = 16 if some_kernel(data)["num_warps"] != 16 else 8

    edited(path, edit)
    plain, record = compiled(""), compiled(path)
    wanted = some_kernel(read(path))["num_warps"]
    steps = [s for s in record.plans["forward"].steps if isinstance(s, KernelStep)]
    assert steps[0].schedule.num_warps == wanted
    assert record.plans["forward"] != plain.plans["forward"]
    assert record.plans["backward"] == plain.plans["backward"]
    texts = [emit_module(r.plans["forward"], "forward") for r in (plain, record)]
    assert f"num_warps={wanted}" in texts[1]
    assert texts[0] != texts[1]
    assert record.cache.startswith("not cached: ")


def test_programs_that_walk_rows_are_replayed(path: Path) -> None:
    """As max-autotune may find them, where each row had a program of its own."""
    change = {"kind": "rows", "programs": 7, "x_block": 1, "r_block": 128}
    edited(path, lambda data: some_kernel(data).update(change))
    steps = [s for s in compiled(path).plans["forward"].steps if isinstance(s, KernelStep)]
    assert (steps[0].schedule.kind, steps[0].schedule.programs) == ("rows", 7)


def activations(x: Tensor, w: Tensor) -> Tensor:
    """Two equal kernels over different tensors, in one launch."""
    return (x.tanh() @ w.tanh()).sum(-1)


def test_programs_that_walk_many_tensors_are_replayed(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    compiled(path, activations)
    edited(path, lambda data: some_kernel(data).update(programs=7))
    steps = compiled(path, activations).plans["forward"].steps
    assert [s.schedule.programs for s in steps if isinstance(s, BatchStep)] == [7]


def test_another_graph_is_added(path: Path) -> None:
    before = read(path)["graphs"]
    compiled(path, lambda x, w: torch.tanh(x @ w).softmax(-1).sum(0))
    after = read(path)["graphs"]
    assert len(after) == len(before) + 2
    assert {key: after[key] for key in before} == before


def test_what_is_in_the_file_is_not_measured(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def measuring(plan: Plan, *given: Any) -> tuple[Plan, tuple[()]]:
        measured.append("measured")
        return plan, ()

    monkeypatch.setattr(scheduling, "tuned", measuring)
    compiled(path, mode="max-autotune")
    assert not measured
    compiled(path, lambda x, w: torch.tanh(x @ w), mode="max-autotune")
    assert measured == ["measured"] * 2


def test_the_fingerprint_leaves_schedules_out(path: Path) -> None:
    edited(path, lambda data: some_kernel(data).update(num_warps=16))
    plans = [compiled(p).plans["forward"] for p in (path, "")]
    assert plans[0] != plans[1]
    assert fingerprint(plans[0], "forward") == fingerprint(plans[1], "forward")
    assert fingerprint(plans[0], "forward") in read(path)["graphs"]
    assert fingerprint(plans[0], "forward") != fingerprint(plans[0], "backward")


def test_every_card_of_a_node_replays_one_entry(path: Path) -> None:
    plan = compiled(path).plans["forward"]

    def on(card: str) -> Plan:
        given = [(name, spec and replace(spec, device=card)) for name, spec in plan.inputs]
        return replace(plan, device=card, inputs=tuple(given))

    prints = [fingerprint(on(card), "forward") for card in ("cuda:0", "cuda:1", "cpu")]
    assert prints[0] == prints[1] != prints[2] == fingerprint(plan, "forward")


def test_processes_that_add_at_one_time_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    plan = compiled(path).plans["forward"]
    path.unlink()
    read_before = PlanFile._graphs

    def slowly(file: PlanFile) -> dict[str, Any]:
        found = read_before(file)
        time.sleep(0.05)
        return found

    monkeypatch.setattr(PlanFile, "_graphs", slowly)
    names = [f"graph {number}" for number in range(4)]
    add = lambda name: PlanFile(path).add(plan, plan, name, "h200")
    threads = [threading.Thread(target=add, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry["graph"] for entry in read(path)["graphs"].values()) == names
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_what_another_process_added_first_stays(path: Path) -> None:
    plan = compiled(path).plans["forward"]
    edited(path, lambda data: some_kernel(data).update(num_warps=16))
    before = read(path)
    PlanFile(path).add(plan, plan, "forward", "h200")
    assert read(path) == before


def test_the_rights_of_the_file_and_a_link_to_it_stay(path: Path, tmp_path: Path) -> None:
    path.chmod(0o664)
    link = tmp_path / "link.json"
    link.symlink_to(path)
    compiled(link, lambda x, w: torch.tanh(x @ w))
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o664
    assert len(read(path)["graphs"]) == 4
    (tmp_path / "plain").write_text("")
    compiled(tmp_path / "new.json")
    modes = [(tmp_path / name).stat().st_mode for name in ("plain", "new.json")]
    assert modes[0] == modes[1]


def test_a_file_that_an_editor_marked_as_unicode_is_read(path: Path) -> None:
    path.write_text(path.read_text(), encoding="utf-8-sig")
    before = path.read_bytes()
    compiled(path)
    assert path.read_bytes() == before


def test_an_entry_of_nothing_is_an_error(path: Path) -> None:
    edited(path, lambda data: data["graphs"].update(dict.fromkeys(data["graphs"])))
    refused(path, "graph 'forward'", "no kernels")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 0}'])
def test_a_damaged_file_is_an_error(path: Path, text: str) -> None:
    path.write_text(text)
    refused(path)
    assert path.read_text() == text


def test_another_device_is_an_error(path: Path) -> None:
    edited(path, lambda data: first(data).update(device="a100"))
    refused(path, "'a100'", "'h200'", "graph 'forward'")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_warps": 3}, ("num_warps is 3",)),
        ({"num_warps": 64}, ("num_warps is 64",)),
        ({"registers": 16}, ("registers is 16", "32 to 255")),
        ({"x_block": 0}, ("x_block is 0",)),
        ({"x_block": "4"}, ("x_block is '4'",)),
        ({"kind": "spiral"}, ("'spiral'", "persistent")),
        ({"kind": "rows"}, ("rows", "0 programs", "does not fit")),
        ({"programs": 7}, ("7 programs",)),
        ({"kind": "persistent", "r_block": 32}, ("r_block is 32", "a row of 96")),
        ({"kind": "rows", "programs": 7, "r_block": 32}, ("r_block is 32", "a row of 96")),
        ({"clusters": 2}, ("fields", "num_stages")),
    ],
)
def test_a_schedule_that_does_not_exist_is_an_error(
    path: Path, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    edited(path, lambda data: some_kernel(data).update(change))
    refused(path, "kernel '", *words)


def test_a_kernel_that_does_not_exist_is_an_error(path: Path) -> None:
    def rename(data: Any) -> None:
        kernels = first(data)["kernels"]
        kernels["no_such_kernel"] = kernels.pop(next(iter(kernels)))

    edited(path, rename)
    refused(path, "no_such_kernel", "graph 'forward'")


def test_schedules_that_do_not_load_are_an_error(path: Path) -> None:
    def failing(plan: Plan, graph: GraphModule) -> Callable[[list[Any]], Any]:
        raise ValueError("out of registers")

    with pytest.raises(Exception, match=r"do not load: out of registers; delete the file"):
        compiled(path, engine=failing, strict=False)


def test_nothing_is_written_for_what_does_not_load(tmp_path: Path) -> None:
    def failing(plan: Plan, graph: GraphModule) -> Callable[[list[Any]], Any]:
        raise ValueError("out of registers")

    with pytest.raises(Exception, match="out of registers"):
        compiled(tmp_path / "plan.json", engine=failing)
    assert not (tmp_path / "plan.json").exists()


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="it cannot be written"):
        compiled(tmp_path / "file" / "plan.json", strict=False)
