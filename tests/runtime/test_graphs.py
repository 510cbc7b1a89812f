"""CUDA graphs: what cannot be recorded is told; what is recorded follows its inputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from iocompiler.plan.data import AtenStep, Plan, Ref, TensorSpec, ViewStep
from iocompiler.runtime import kept
from iocompiler.runtime.graphs import bytes_made, mutated_inputs, obstacle, record
from iocompiler.runtime.load import load
from iocompiler.tile.index import Affine, Axis
from iocompiler.tile.program import Buffer, Builder, TileProgram
from tests.runtime.plans import S0, SCHEDULE, KernelStep, binary, kernel, plan, spec
from tests.runtime.test_load import dynamic, on_cuda, static


def doubled_in_place(size: int) -> TileProgram:
    builder, x = Builder(), Affine.of("x")
    value = builder.load("a", x, torch.float32)
    builder.store("a", x, builder.map("add", value, value))
    buffers = (Buffer("a", torch.float32, "inout", size),)
    return builder.program((Axis("x", size),), (), buffers)


def in_place() -> Plan:
    return plan(
        {"x": spec(8), "y": spec(8), "z": spec(8)},
        [
            ViewStep("half", "y", spec(4), 4),
            KernelStep("double", doubled_in_place(4), SCHEDULE, ("half",), ()),
            AtenStep("aten.copy_.default", (Ref("x"), Ref("z")), (), ((None, None),), False),
        ],
        (Ref("z"),),
    )


def test_inputs_written_through_views_and_by_operators() -> None:
    assert mutated_inputs(in_place()) == (0, 1)
    assert mutated_inputs(static()) == ()


def test_bytes_that_a_plan_makes() -> None:
    assert bytes_made(in_place()) == 0  # a view, and what lies in inputs
    copied = AtenStep("aten.clone.default", (Ref("x"),), (), (("c", spec(8)),), False)
    assert bytes_made(plan({"x": spec(8)}, [copied, copied], (Ref("c"),))) == 2 * 8 * 4
    assert bytes_made(dynamic()) == 0


def test_plans_that_can_be_recorded() -> None:
    assert obstacle(on_cuda(static()), ()) == ""
    assert obstacle(on_cuda(dynamic()), ()) == ""
    assert obstacle(on_cuda(in_place()), (0, 1)) == ""


def test_plans_that_cannot() -> None:
    assert obstacle(static(), ()) == "it runs on cpu"
    assert "input x is written in place" in obstacle(on_cuda(in_place()), (1,))
    scalar = dataclasses.replace(on_cuda(static()), inputs=(("x", spec(8)), ("factor", spec())))
    assert obstacle(scalar, ()) == "input x is on cpu"


@pytest.mark.parametrize(
    ("target", "output"),
    [
        ("aten._local_scalar_dense.default", ("n", None)),
        ("aten.nonzero.default", ("n", TensorSpec((S0, 1), (1, 1), torch.int64, "cuda"))),
        ("aten.relu.default", ("n", spec(8))),
        ("aten._linalg_check_errors.default", (None, None)),
        ("higher_order.cond", ("n", TensorSpec((8,), (1,), torch.float32, "cuda"))),
    ],
)
def test_calls_the_host_waits_for(target: str, output: Any) -> None:
    step = AtenStep(target, (Ref("x"),), (), (output,), False)
    graph = plan({"x": TensorSpec((8,), (1,), torch.float32, "cuda")}, [step], (Ref("n"),))
    assert target in obstacle(dataclasses.replace(graph, device="cuda"), ())


class Trees:
    """In place of torch's: what is recorded is called, and a step begins when it is said."""

    def __init__(self) -> None:
        self.recordings: list[tuple[tuple[int, ...], dict[str, Any]]] = []
        self.begins = False

    def cudagraphify_impl(
        self, call: Any, args: list[Any], static_inputs: tuple[int, ...], **settings: Any
    ) -> Any:
        self.recordings.append((static_inputs, settings))
        return call

    def get_manager(self, index: int, create_if_none_exists: bool) -> Trees:
        assert (index, create_if_none_exists) == (7, False)
        return self

    def can_start_new_generation(self) -> bool:
        return self.begins


class Handed:
    """In place of `kept.Kept`: what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def hand_out(self, outputs: list[Any], returned: int, little: int) -> list[Any]:
        self.told.append(("hand out", returned, little))
        return [*outputs, "handed"]

    def watch(self, parameters: Any) -> None:
        self.told.append(("watch", list(parameters)))

    def gradients(self, outputs: list[Any]) -> None:
        self.told.append(("gradients", outputs))

    def move(self) -> None:
        self.told.append("move")


@pytest.fixture
def trees(monkeypatch: pytest.MonkeyPatch) -> Trees:
    from torch._inductor import cudagraph_trees

    found = Trees()
    for name in ("cudagraphify_impl", "get_manager"):
        monkeypatch.setattr(cudagraph_trees, name, getattr(found, name))
    return found


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> Handed:
    found = Handed()
    monkeypatch.setattr(kept, "on_device", lambda index: found)
    return found


def test_a_forward_is_recorded_once_and_its_parameters_are_watched(
    trees: Trees, handed: Handed
) -> None:
    run = record(list, in_place(), 7, static_inputs=(1,), returned=1)
    parameter, other = torch.ones(1), torch.ones(1)
    assert run(["x", parameter, "z"]) == ["x", parameter, "z", "handed"]
    assert handed.told == [("watch", [parameter]), ("hand out", 1, 0)]
    handed.told.clear()
    trees.begins = True
    run(["x", parameter, "z"])
    assert handed.told == ["move", ("hand out", 1, 0)]
    run(["x", other, "z"])
    assert ("watch", [other]) in handed.told
    ((static_inputs, settings),) = trees.recordings
    assert static_inputs == (1,)
    assert settings["device_index"] == 7
    assert settings["mutated_input_idxs"] == (0, 1)
    assert not settings["is_backward"]


def test_a_backward_tells_its_gradients(trees: Trees, handed: Handed) -> None:
    run = record(list, in_place(), 7, static_inputs=(1,), returned=1, is_backward=True)
    assert run([1, 2, 3]) == [1, 2, 3]
    assert handed.told == [("gradients", [1, 2, 3])]
    assert run._boxed_call  # type: ignore[attr-defined]
    assert trees.recordings[0][1]["is_backward"]


@pytest.mark.gpu
def test_gpu_replays_follow_moving_inputs() -> None:
    size = 1024
    graph = on_cuda(
        plan(
            {"w": spec(size), "x": spec(size)},
            [kernel("mul", binary("mul", size), ("w", "x", "y"), spec(size))],
            (Ref("y"),),
        )
    )
    call = record(load(graph), graph, 0, static_inputs=(0,), is_inference=True)
    w = torch.randn(size, device="cuda")
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(size, device="cuda")
        torch.testing.assert_close(call([w, x])[0], w * x)
        w.add_(1)


@pytest.mark.gpu
def test_gpu_each_size_has_its_graph() -> None:
    graph = on_cuda(dynamic())
    call = record(load(graph), graph, 0, is_inference=True)
    for size in (3, 5, 3, 5, 3):
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(size, 8, device="cuda")
        torch.testing.assert_close(call([size, x])[0], x * x)
