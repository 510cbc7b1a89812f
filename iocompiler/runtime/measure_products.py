"""The library's algorithms for a product timed on a GPU, with cold caches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import torch

from iocompiler.ops.library_product import Algorithm, Problem
from iocompiler.runtime import cublaslt, measure
from iocompiler.runtime.cublaslt import Refused
from iocompiler.runtime.measure import Call, DoesNotFit, OnGpu
from iocompiler.runtime.products import asked, on_library
from iocompiler.runtime.stimulus import tensor_for
from iocompiler.runtime.values import storage_elements
from iocompiler.tile.program import Buffer

# how long all batches of all algorithms may take
_ENOUGH_S = 0.1
# host time of a call that sets addresses, in launches
_LAUNCHES = 2

Given: TypeAlias = list[torch.Tensor | None]
"""The memory of a, b, out, added, bias, sums."""


class GpuProductBench(OnGpu):
    """Asks cuBLASLt for its algorithms and times their launches by address, each on other memory
    than the last ones; algorithms take turns.
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        try:
            self.version = cublaslt.version()
        except Refused:  # it proposes nothing either
            self.version = 0

    def proposed(self, problem: Problem) -> Sequence[Algorithm]:
        described = asked(problem)
        if described is None:
            return ()
        try:
            with torch.cuda.device(self.index):
                return cublaslt.proposed(described[0], self.index)
        except Refused:
            return ()

    def time(self, problem: Problem, algorithms: Sequence[Algorithm]) -> list[float | None]:
        """Medians of several batches of launches.

        Raises:
            DoesNotFit: there is too little memory for the operands.
        """
        self._used = True
        try:
            with torch.no_grad(), torch.cuda.device(self.index):
                sets = self.argument_sets(problem)
                return in_turns([self.calls(problem, a, sets) for a in algorithms])
        except torch.OutOfMemoryError as error:
            raise DoesNotFit(str(error)) from error

    def argument_sets(self, problem: Problem) -> list[Given]:
        """As many as it takes to go round the L2 cache.

        Raises:
            DoesNotFit: not one fits into the memory that is free.
        """
        buffers = _buffers(problem)
        one = sum(int(b.elements) * b.dtype.itemsize for b in buffers if b is not None)
        return [
            [
                None if b is None else tensor_for(b, int(b.elements), None, self.device, seed)
                for b in buffers
            ]
            for seed in range(self._sets(one, least=1))
        ]

    def calls(self, problem: Problem, algorithm: Algorithm, sets: list[Given]) -> list[Call]:
        """One launch for each set of operands."""
        described = asked(problem)
        assert described is not None
        found = cublaslt.prepared(described[0], self.index, algorithm)
        run = on_library(found, described[1], problem, _refused)
        stream = torch.cuda.current_stream(self.index).cuda_stream
        return [
            partial(run, stream, *(0 if x is None else x.data_ptr() for x in given))
            for given in sets
        ]


def _refused(*addresses: int) -> None:
    raise Refused("a call")


in_turns = partial(measure.in_turns, launches=_LAUNCHES, failing=(Refused,), enough_s=_ENOUGH_S)
"""Seconds of a launch of each way; None where the library refuses it."""


def _buffers(of: Problem) -> list[Buffer | None]:
    """What `Given` consists of."""

    def buffer(name: str, rows: int, columns: int, strides: Any, role: Any = "in") -> Buffer:
        dtype = of.stored if of.stored and name == "out" else of.dtype
        return Buffer(name, dtype, role, storage_elements((of.batch, rows, columns), strides))

    m, n, k = of.m, of.n, of.k
    return [
        buffer("a", m, k, of.a),
        buffer("b", k, n, of.b),
        buffer("out", m, n, of.out, "out"),
        None if of.added is None else buffer("added", m, n, of.added),
        buffer("bias", 1, n, (0, 0, 1)) if of.bias else None,
        None if of.sums is None else buffer("sums", m, n, of.sums, "out"),
    ]
