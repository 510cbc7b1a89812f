"""Launching one kernel over many sets of tensors: the table of addresses, kept while it is true."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch

from iocompiler.runtime.launch import Launch

Row = tuple[Any, ...]
"""Addresses (ints) and by-value numbers in the order of the program's buffers, then the length."""


class BatchLaunch:
    """Callable with ``(stream, rows)``.

    Args:
        launch: gives the kernel's launch function (parameters as `codegen.batch.SIGNATURE`).
        block: points a program covers.
        numbers: "f" or "i" (float or integer by value) or "p" (address) for all but the length.
        device: where the table goes.
        unit: lengths that are multiples of it keep what is aligned aligned.
    """

    def __init__(
        self,
        launch: Callable[[], Launch],
        block: int,
        numbers: str,
        device: torch.device,
        unit: int = 1,
    ):
        self._unit = unit
        self._launch, self._block, self._numbers, self._device = launch, block, numbers, device
        self._pointers = [i for i, kind in enumerate(numbers) if kind == "p"]
        self._rows: list[Row] = []
        self._table = self._blocks = torch.empty(0)
        self._programs = self._aligned = 0
        self._host: list[torch.Tensor] = []

    def __call__(self, stream: int, rows: list[Row]) -> None:
        if rows != self._rows:
            self._upload(rows)
        self._launch()(
            stream,
            self._programs,
            1,
            1,
            self._table.data_ptr(),
            self._blocks.data_ptr(),
            self._aligned,
        )

    def _upload(self, rows: list[Row]) -> None:
        lengths = [row[-1] for row in rows]
        if lengths != [row[-1] for row in self._rows]:
            self._upload_blocks(lengths)
        self._rows = rows
        bits = [
            [self._bits(kind, value) for kind, value in zip(self._numbers + "i", row, strict=True)]
            for row in rows
        ]
        self._table = self._on_device(torch.tensor(bits, dtype=torch.int64), 0)
        odd = any(row[i] & 15 for row in rows for i in self._pointers)
        self._aligned = int(not odd and not any(length % self._unit for length in lengths))

    def _upload_blocks(self, lengths: Sequence[int]) -> None:
        counts = torch.tensor([-(-length // self._block) for length in lengths])
        members = torch.repeat_interleave(torch.arange(len(lengths)), counts)
        first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        within = torch.arange(int(counts.sum())) - first
        self._blocks = self._on_device(torch.stack([members, within], 1).to(torch.int32), 1)
        self._programs = len(members)

    def _on_device(self, tensor: torch.Tensor, slot: int) -> torch.Tensor:
        if self._device.type != "cuda":
            return tensor
        # the copy is asynchronous: the pinned source stays until it is replaced
        pinned = tensor.pin_memory()
        self._host[slot : slot + 1] = [pinned]
        return pinned.to(self._device, non_blocking=True)

    @staticmethod
    def _bits(kind: str, value: Any) -> int:
        if kind == "f":
            return int(struct.unpack("q", struct.pack("d", value))[0])
        return int(value)
