"""The table a batched launch reads: made once for the same tensors, right for every member."""

from __future__ import annotations

import struct

import pytest
import torch

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.plan import folds as plan_folds
from iocompiler.plan.data import BatchStep
from iocompiler.runtime import batch
from iocompiler.runtime.batch import BatchLaunch
from tests.plan.test_folds import Blocks


class Recorder:
    """Stands for the kernel: keeps its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, *arguments: int) -> None:
        self.calls.append(arguments)


def launch_of(numbers: str, block: int = 128) -> tuple[BatchLaunch, Recorder]:
    recorder = Recorder()
    return BatchLaunch(lambda: recorder, block, numbers, torch.device("cpu")), recorder


def tables(launch: BatchLaunch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the last launch that was not seen before read."""
    kept = next(reversed(launch._kept.values()))
    return kept.table, kept.blocks


def test_every_block_of_every_member_has_a_program() -> None:
    launch, recorder = launch_of("pp")
    launch(7, [(16, 32, 300), (48, 64, 1), (80, 96, 128)])
    (call,) = recorder.calls
    assert call[0] == 7
    assert call[1:4] == (3 + 1 + 1, 1, 1)
    table, blocks = tables(launch)
    assert blocks.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [2, 0]]
    assert table.tolist() == [[16, 32, 300], [48, 64, 1], [80, 96, 128]]


@pytest.mark.parametrize("programs", [1, 2, 5, 100])
def test_programs_that_walk_find_every_block_and_their_end(programs: int) -> None:
    recorder = Recorder()
    cpu = torch.device("cpu")
    launch = BatchLaunch(lambda: recorder, 128, "pp", cpu, programs=programs)
    launch(0, [(16, 32, 300), (48, 64, 1), (80, 96, 128)])
    launched = recorder.calls[0][1]
    assert launched == min(programs, 5)
    blocks = [tuple(row) for row in tables(launch)[1].tolist()]
    walked = []
    for program in range(launched):
        while blocks[program][0] >= 0:
            walked.append(blocks[program])
            program += launched
    assert sorted(walked) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]


def test_a_member_without_elements_has_no_program() -> None:
    launch, recorder = launch_of("p")
    launch(0, [(16, 0), (32, 5)])
    assert recorder.calls[0][1] == 1
    assert tables(launch)[1].tolist() == [[1, 0]]


@pytest.mark.parametrize(("address", "aligned"), [(32, 1), (40, 0)])
def test_one_unaligned_address_turns_the_wide_accesses_off(address: int, aligned: int) -> None:
    launch, recorder = launch_of("pp")
    launch(0, [(16, 32, 10), (48, address, 10)])
    assert recorder.calls[0][-1] == aligned


def test_numbers_are_passed_by_their_bits() -> None:
    launch, _ = launch_of("fip")
    launch(0, [(0.25, -3, 16, 10)])
    (row,) = tables(launch)[0].tolist()
    assert row[0] == struct.unpack("q", struct.pack("d", 0.25))[0]
    assert row[1] == -3


def test_tables_are_kept_while_they_are_true() -> None:
    launch, recorder = launch_of("p")
    for rows in ([(16, 10)], [(32, 10)], [(16, 10)], [(32, 500)], [(16, 10)]):
        launch(0, rows)
    made = [(call[4], call[5]) for call in recorder.calls]
    assert made[0] == made[2] == made[4]
    assert made[1][0] != made[0][0]
    assert made[1][1] == made[0][1], "the same lengths, the same blocks"
    assert made[3][1] != made[0][1]


def test_each_stream_has_its_tables() -> None:
    launch, recorder = launch_of("p")
    for stream in (0, 5, 0, 5):
        launch(stream, [(16, 10)])
    tables = [call[4] for call in recorder.calls]
    assert tables[0] == tables[2] != tables[1] == tables[3]


def test_only_the_last_tables_are_kept() -> None:
    launch, _ = launch_of("p")
    for address in range(16, 16 * 100, 16):
        launch(0, [(address, 10), (32, address)])
    assert len(launch._kept) < 20
    assert len(launch._blocks) < 20


def test_rows_of_another_length_turn_the_wide_accesses_of_folds_off() -> None:
    recorder = Recorder()
    launch = BatchLaunch(lambda: recorder, 128, "ppi", torch.device("cpu"), unit=16)
    launch(0, [(16, 32, 264, 1024), (48, 64, 8, 256)])
    launch(0, [(16, 32, 264, 1024), (48, 64, 8, 250)])
    assert [call[-1] for call in recorder.calls] == [1, 0]
    assert tables(launch)[0].tolist() == [[16, 32, 264, 1024], [48, 64, 8, 250]]


def test_a_default_device_is_not_where_tables_are_made() -> None:
    launch, _ = launch_of("p")
    with torch.device("meta"):
        launch(0, [(16, 300)])
        launch.recorded = True
        launch(0, [(32, 5)])
    assert tables(launch)[0].tolist() == [[16, 300]]


def test_nothing_is_kept_of_a_launch_that_is_recorded() -> None:
    """Graphs read the table of each launch where it was when they were recorded."""
    launch, recorder = launch_of("p")
    launch(0, [(16, 300)])
    launch.recorded = True
    launch(0, [(32, 5)])
    assert list(launch._kept) == [(0, (16, 300))]
    assert recorder.calls[1][1:4] == (1, 1, 1)
    assert recorder.calls[1][4] != recorder.calls[0][4]
    launch.recorded = False
    launch(0, [(16, 300)])
    assert recorder.calls[2] == recorder.calls[0]


def test_memory_is_made_ready_for_every_size_of_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[torch.Size]] = []

    def pinned(like: list[torch.Tensor]) -> list[torch.Tensor]:
        made.append([t.shape for t in like])
        return [torch.empty_like(t) for t in like]

    monkeypatch.setattr(batch, "_pinned", pinned)
    launch, _ = launch_of("p")
    sizes = [torch.empty(2, 2), torch.empty(3, 2)]
    for count in (1, 2, 1, 2):  # the kernel at two places of a step
        launch._make_ready([size.repeat(count, 1) for size in sizes])
    assert len(made) == 2 * batch._RECORDINGS
    monkeypatch.setattr(launch, "_is_captured", lambda: True)
    kept = [launch._host_memory([size.repeat(n, 1) for size in sizes]) for n in (1, 2, 1)]
    assert len(made) == 2 * batch._RECORDINGS, "nothing is made while a graph is captured"
    assert [tables[0].shape for tables in kept] == [(2, 2), (4, 2), (2, 2)]
    assert kept[0] is not kept[2]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folds_on_a_gpu(mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward whose norms' and biases' gradients are folded in one launch, against eager."""
    monkeypatch.setattr(plan_folds, "SHARE", 1)
    records: list[Compilation] = []
    torch.manual_seed(0)
    ours, theirs = (Blocks(width=131).cuda().to(dtype) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    wide = Blocks(width=131).cuda().double()
    wide.load_state_dict(ours.state_dict())
    step = torch.compile(ours, backend=Compiler(mode=mode, on_compiled=records.append))
    for _ in range(4):  # warm-up, recording, replays
        x = torch.randn(700, 131, device="cuda", dtype=dtype)
        for module, run, given in (
            (ours, step, x),
            (theirs, theirs, x),
            (wide, wide, x.double()),
        ):
            module.zero_grad(set_to_none=True)
            run(given).square().mean().backward()
        for mine, eager, exact in zip(
            ours.parameters(), theirs.parameters(), wide.parameters(), strict=True
        ):
            error, allowed = ((g.grad - exact.grad).norm() for g in (mine, eager))  # type: ignore[operator,union-attr]
            assert error <= 3 * allowed + 1e-5 * exact.grad.norm()  # type: ignore[union-attr]
    folded = [s for s in records[0].plans["backward"].steps if isinstance(s, BatchStep)]
    assert [bool(s.parts) for s in folded] == [True]


@pytest.mark.gpu
def test_a_batch_inside_a_graph_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was captured computes with its own addresses, whatever ran since."""
    monkeypatch.setattr(plan_folds, "SHARE", 1)
    torch.manual_seed(0)
    module = Blocks(width=64).cuda()
    run = torch.compile(module, backend=Compiler(strict=True))
    x = torch.randn(600, 64, device="cuda")

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(run(x).square().mean(), list(module.parameters())))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            gradients()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    gradients()  # with addresses of its own
    x.copy_(torch.randn_like(x))
    graph.replay()
    for got, expected in zip(captured, gradients(), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("foreach", [True, False])
def test_an_optimizer_step_on_a_gpu(foreach: bool) -> None:
    """AdamW over tensors of many sizes, some of them not aligned, against eager."""
    storage = torch.randn(4096, device="cuda")
    shapes = [(33, 7), (1000,), (64, 64), (1,)]
    values = [torch.randn(*s, device="cuda") for s in shapes] + [storage[1:258], storage[513:1025]]
    ours, theirs = ([torch.nn.Parameter(v.detach().clone()) for v in values] for _ in range(2))
    ours[-1].data, theirs[-1].data = storage[513:1025], storage[513:1025].clone()
    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    optimizer = torch.optim.AdamW(ours, lr=1e-2, foreach=foreach)
    twin = torch.optim.AdamW(theirs, lr=1e-2, foreach=foreach)
    step = torch.compile(optimizer.step, backend=Compiler())
    for _ in range(3):
        step()
        twin.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)
