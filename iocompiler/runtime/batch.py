"""Launching one kernel over many sets of tensors: tables of addresses, kept for the next step."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from iocompiler.runtime.launch import Launch

Row = tuple[Any, ...]
"""Addresses (ints) and by-value numbers in the order of the program's buffers, then the length."""

Tables: TypeAlias = "list[torch.Tensor]"
"""The rows, and for each program its member and which block of it: of programs that walk, the first
of each, and so on in turns, and behind the last for each of them that there is no member.
"""

_HOST = torch.device("cpu")  # said wherever tables are made: a default device may be in force
_NO_MEMBER = -1
_SETS = 16  # of one launch whose tables are kept
_RECORDINGS = 4  # of one launch, for which memory on the host is made ready


class BatchLaunch:
    """Callable with ``(stream, rows)``.

    Args:
        launch: gives the kernel's launch function (parameters as `codegen.batch.SIGNATURE`).
        block: points a program covers.
        numbers: "f" or "i" (float or integer by value) or "p" (address) for all but the length.
        device: where the table goes.
        unit: lengths that are multiples of it keep what is aligned aligned.
        programs: as many walk the blocks, if there are more; 0: each block has its own.

    Attributes:
        recorded: whether the calls go into CUDA graphs, whose pool may keep nothing of ours: the
            table then lives for one launch, and what a recorded copy reads stays for good.
    """

    def __init__(
        self,
        launch: Callable[[], Launch],
        block: int,
        numbers: str,
        device: torch.device,
        unit: int = 1,
        programs: int = 0,
    ):
        self.recorded = False
        self._unit, self._programs = unit, programs
        self._launch, self._block, self._device = launch, block, device
        self._pointers = [i for i, kind in enumerate(numbers) if kind == "p"]
        self._row = struct.Struct("<" + "".join("d" if n == "f" else "q" for n in numbers + "i"))
        # each under its stream: what another one copies may not be there yet
        self._kept: OrderedDict[tuple[Any, ...], _Kept] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, ...], torch.Tensor] = OrderedDict()
        self._ready: OrderedDict[tuple[torch.Size, ...], list[Tables]] = OrderedDict()
        self._forever: list[Tables] = []

    def __call__(self, stream: int, rows: list[Row]) -> None:
        if self._is_captured() or self.recorded:
            self._run(stream, self._passing(rows))
            return
        key = (stream, *rows)
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = self._uploaded(stream, rows)
            _bound(self._kept)
        self._run(stream, kept)

    def _run(self, stream: int, kept: _Kept) -> None:
        table, blocks = kept.table.data_ptr(), kept.blocks.data_ptr()
        self._launch()(stream, self._launched(kept.blocks), 1, 1, table, blocks, kept.aligned)

    def _launched(self, blocks: torch.Tensor) -> int:
        """How many programs a table of blocks is for."""
        if not self._programs:
            return len(blocks)
        # as many ends stand behind the blocks, of which there are no fewer
        return min(self._programs, len(blocks) // 2)

    def _is_captured(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    # --- tables that are kept

    def _uploaded(self, stream: int, rows: list[Row]) -> _Kept:
        lengths = [row[-1] for row in rows]
        key = (stream, *lengths)
        blocks = self._blocks.get(key)
        if blocks is None:
            blocks = self._blocks[key] = self._on_device(self._blocks_of(lengths))
            _bound(self._blocks)
        table = self._on_device(self._table_of(rows))
        if self._device.type == "cuda":  # a graph of the user's may be next
            self._make_ready([table, blocks])
        return _Kept(table, blocks, self._is_aligned(rows))

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor there. Of memory that is not pinned CUDA keeps a copy before it returns, and
        waits for nothing on the device: pinning took three times as long as all else.
        """
        return tensor.to(self._device, non_blocking=True)

    # --- tables for one launch

    def _passing(self, rows: list[Row]) -> _Kept:
        """Tables in memory that the caller's graph may have back after the launch."""
        made = [self._table_of(rows), self._blocks_of([row[-1] for row in rows])]
        if self._device.type == "cuda":
            host = self._host_memory(made)
            for pinned, tensor in zip(host, made, strict=True):
                pinned.copy_(tensor)
            made = [pinned.to(self._device, non_blocking=True) for pinned in host]
        table, blocks = made
        return _Kept(table, blocks, self._is_aligned(rows))

    def _host_memory(self, like: Tables) -> Tables:
        """Pinned memory for tables of these sizes. What is copied by a graph is read each time that
        is replayed; memory for it is made before, since making it is not allowed meanwhile.
        """
        if not self._is_captured():
            self._make_ready(like)
            return _pinned(like)
        ready = self._ready_for(like)
        kept = ready.pop() if ready else _pinned(like)
        self._forever.append(kept)
        return kept

    def _make_ready(self, like: Tables) -> None:
        ready = self._ready_for(like)
        while len(ready) < _RECORDINGS:
            ready.append(_pinned(like))

    def _ready_for(self, like: Tables) -> list[Tables]:
        ready = self._ready.setdefault(tuple(tensor.shape for tensor in like), [])
        _bound(self._ready)
        return ready

    # --- their contents

    def _table_of(self, rows: list[Row]) -> torch.Tensor:
        bits = bytearray(self._row.size * len(rows))
        for place, row in enumerate(rows):
            self._row.pack_into(bits, self._row.size * place, *row)
        return torch.frombuffer(bits, dtype=torch.int64).view(len(rows), -1)

    def _blocks_of(self, lengths: Sequence[int]) -> torch.Tensor:
        # no operator here may run in several threads: they would spin beside the next launches
        counts = [-(-length // self._block) for length in lengths]
        ends = min(self._programs, sum(counts))
        made = torch.empty(sum(counts) + ends, 2, dtype=torch.int32, device=_HOST)
        made[sum(counts) :] = _NO_MEMBER
        first = 0
        for member, count in enumerate(counts):
            part = made[first : first + count]
            part[:, 0] = member
            part[:, 1] = torch.arange(count, dtype=torch.int32, device=_HOST)
            first += count
        return made

    def _is_aligned(self, rows: list[Row]) -> int:
        odd = any(row[i] & 15 for row in rows for i in self._pointers)
        return int(not odd and not any(row[-1] % self._unit for row in rows))


@dataclass(frozen=True)
class _Kept:
    """The tables of a launch, and whether wide accesses are right."""

    table: torch.Tensor
    blocks: torch.Tensor
    aligned: int


def _bound(kept: OrderedDict[Any, Any]) -> None:
    """The same kernel has other members at other places of a step, and a few sets of addresses."""
    while len(kept) > _SETS:
        kept.popitem(last=False)


def _pinned(like: Tables) -> Tables:
    return [torch.empty(t.shape, dtype=t.dtype, device=_HOST, pin_memory=True) for t in like]
