"""The table a batched launch reads: made once for the same tensors, right for every member."""

from __future__ import annotations

import struct

import pytest
import torch

from iocompiler.backend import Compiler
from iocompiler.runtime.batch import BatchLaunch


class Recorder:
    """Stands for the kernel: keeps its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, *arguments: int) -> None:
        self.calls.append(arguments)


def launch_of(numbers: str, block: int = 128) -> tuple[BatchLaunch, Recorder]:
    recorder = Recorder()
    return BatchLaunch(lambda: recorder, block, numbers, torch.device("cpu")), recorder


def test_every_block_of_every_member_has_a_program() -> None:
    launch, recorder = launch_of("pp")
    launch(7, [(16, 32, 300), (48, 64, 1), (80, 96, 128)])
    (call,) = recorder.calls
    assert call[0] == 7
    assert call[1:4] == (3 + 1 + 1, 1, 1)
    assert launch._blocks.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [2, 0]]
    assert launch._table.tolist() == [[16, 32, 300], [48, 64, 1], [80, 96, 128]]


def test_a_member_without_elements_has_no_program() -> None:
    launch, recorder = launch_of("p")
    launch(0, [(16, 0), (32, 5)])
    assert recorder.calls[0][1] == 1
    assert launch._blocks.tolist() == [[1, 0]]


@pytest.mark.parametrize(("address", "aligned"), [(32, 1), (40, 0)])
def test_one_unaligned_address_turns_the_wide_accesses_off(address: int, aligned: int) -> None:
    launch, recorder = launch_of("pp")
    launch(0, [(16, 32, 10), (48, address, 10)])
    assert recorder.calls[0][-1] == aligned


def test_numbers_are_passed_by_their_bits() -> None:
    launch, _ = launch_of("fip")
    launch(0, [(0.25, -3, 16, 10)])
    (row,) = launch._table.tolist()
    assert row[0] == struct.unpack("q", struct.pack("d", 0.25))[0]
    assert row[1] == -3


def test_the_table_is_kept_until_something_changes() -> None:
    launch, _ = launch_of("p")
    launch(0, [(16, 10)])
    table, blocks = launch._table, launch._blocks
    launch(0, [(16, 10)])
    assert launch._table is table
    launch(0, [(32, 10)])
    assert launch._table is not table
    assert launch._blocks is blocks
    launch(0, [(32, 500)])
    assert launch._blocks is not blocks


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
