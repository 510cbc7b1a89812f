"""Launching one kernel over many sets of tensors: the table of addresses, kept while it is true."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from iocompiler.runtime.launch import Launch

Row = tuple[Any, ...]
"""Addresses (ints) and by-value numbers in the order of the program's buffers, then the length."""

Tables: TypeAlias = "list[torch.Tensor]"
"""The rows, and for each program its member and which block of it."""

_HOST = torch.device("cpu")  # said wherever tables are made: a default device may be in force
_RECORDINGS = 4  # of one launch, for which memory on the host is made ready


class BatchLaunch:
    """Callable with ``(stream, rows)``.

    Args:
        launch: gives the kernel's launch function (parameters as `codegen.batch.SIGNATURE`).
        block: points a program covers.
        numbers: "f" or "i" (float or integer by value) or "p" (address) for all but the length.
        device: where the table goes.
        unit: lengths that are multiples of it keep what is aligned aligned.

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
    ):
        self.recorded = False
        self._unit = unit
        self._launch, self._block, self._numbers, self._device = launch, block, numbers, device
        self._pointers = [i for i, kind in enumerate(numbers) if kind == "p"]
        self._rows: list[Row] = []
        self._table = self._blocks = torch.empty(0, device=_HOST)
        self._programs = self._aligned = 0
        self._host: list[torch.Tensor] = []
        self._ready: list[Tables] = []
        self._forever: list[Tables] = []

    def __call__(self, stream: int, rows: list[Row]) -> None:
        if self._is_captured() or self.recorded:
            self._run(stream, *self._passing(rows))
            return
        if rows != self._rows:
            self._upload(rows)
        self._run(stream, self._table, self._blocks)

    def _run(self, stream: int, table: torch.Tensor, blocks: torch.Tensor) -> None:
        self._launch()(
            stream, self._programs, 1, 1, table.data_ptr(), blocks.data_ptr(), self._aligned
        )

    def _is_captured(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    # --- tables that are kept

    def _upload(self, rows: list[Row]) -> None:
        lengths = [row[-1] for row in rows]
        if lengths != [row[-1] for row in self._rows]:
            self._blocks = self._on_device(self._blocks_of(lengths), 1)
        self._rows = rows
        self._table = self._on_device(self._table_of(rows), 0)
        if self._device.type == "cuda":  # a graph of the user's may be next
            self._make_ready([self._table, self._blocks])

    def _on_device(self, tensor: torch.Tensor, slot: int) -> torch.Tensor:
        if self._device.type != "cuda":
            return tensor
        # the copy is asynchronous: the pinned source stays until it is replaced
        pinned = tensor.pin_memory()
        self._host[slot : slot + 1] = [pinned]
        return pinned.to(self._device, non_blocking=True)

    # --- tables for one launch

    def _passing(self, rows: list[Row]) -> Tables:
        """Tables in memory that the caller's graph may have back after the launch."""
        made = [self._table_of(rows), self._blocks_of([row[-1] for row in rows])]
        self._rows = []  # what is kept is no longer what `_programs` and `_aligned` are of
        if self._device.type != "cuda":
            return made
        host = self._host_memory(made)
        for pinned, tensor in zip(host, made, strict=True):
            pinned.copy_(tensor)
        return [pinned.to(self._device, non_blocking=True) for pinned in host]

    def _host_memory(self, like: Tables) -> Tables:
        """Pinned memory for tables of these sizes. What is copied by a graph is read each time that
        is replayed; memory for it is made before, since making it is not allowed meanwhile.
        """
        if not self._is_captured():
            self._make_ready(like)
            return _pinned(like)
        kept = self._ready.pop() if self._is_ready(like) else _pinned(like)
        self._forever.append(kept)
        return kept

    def _make_ready(self, like: Tables) -> None:
        if not self._is_ready(like):
            self._ready = []
        while len(self._ready) < _RECORDINGS:
            self._ready.append(_pinned(like))

    def _is_ready(self, like: Tables) -> bool:
        """Whether memory for tables of these sizes is left."""
        return bool(self._ready) and _shapes(self._ready[-1]) == _shapes(like)

    # --- their contents

    def _table_of(self, rows: list[Row]) -> torch.Tensor:
        bits = [
            [self._bits(kind, value) for kind, value in zip(self._numbers + "i", row, strict=True)]
            for row in rows
        ]
        odd = any(row[i] & 15 for row in rows for i in self._pointers)
        self._aligned = int(not odd and not any(row[-1] % self._unit for row in rows))
        return torch.tensor(bits, dtype=torch.int64, device=_HOST)

    def _blocks_of(self, lengths: Sequence[int]) -> torch.Tensor:
        counts = torch.tensor([-(-length // self._block) for length in lengths], device=_HOST)
        members = torch.repeat_interleave(torch.arange(len(lengths), device=_HOST), counts)
        first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        within = torch.arange(int(counts.sum()), device=_HOST) - first
        self._programs = len(members)
        return torch.stack([members, within], 1).to(torch.int32)

    @staticmethod
    def _bits(kind: str, value: Any) -> int:
        if kind == "f":
            return int(struct.unpack("q", struct.pack("d", value))[0])
        return int(value)


def _pinned(like: Tables) -> Tables:
    return [torch.empty(t.shape, dtype=t.dtype, device=_HOST, pin_memory=True) for t in like]


def _shapes(tables: Tables) -> list[torch.Size]:
    return [tensor.shape for tensor in tables]
