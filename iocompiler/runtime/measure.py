"""Kernels compiled and timed one by one: several schedules of each, on a GPU, with cold caches."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import torch

from iocompiler.codegen.batch import numbers_of
from iocompiler.errors import CompileError, LaunchError
from iocompiler.plan.data import BatchStep, Schedule
from iocompiler.runtime.batch import BatchLaunch
from iocompiler.runtime.cache import default_cache, key_of
from iocompiler.runtime.compile import worker_count
from iocompiler.runtime.kernels import compiled_images
from iocompiler.runtime.launch import Image, Launch, Signature, make_launch
from iocompiler.runtime.stimulus import index_limits, number_for, tensor_for
from iocompiler.runtime.subject import Subject

REPEATS = 7
# of what takes long
_LEAST_REPEATS = 5
MOST_SETS = 24
# how often the sets of arguments together cover the L2 cache
COVER_L2 = 3
# share of the free memory that arguments may take
SHARE_OF_MEMORY = 0.4
# host time of one launch, from above, and clock rate, from above: the device sleeps that long
_LAUNCH_S = 2e-5
_CYCLES_PER_S = 2e9

Call = Callable[[], None]


class DoesNotFit(Exception):
    """The arguments of a kernel do not fit into the memory that is free."""


class Bench(Protocol):
    """What `tune` measures with; a test has its own."""

    def compile(self, wanted: Sequence[tuple[Subject, Schedule]]) -> list[Image | None]:
        """Compiled kernels in order, None for one that does not compile."""

    def time(self, subject: Subject, built: Sequence[tuple[Schedule, Image]]) -> list[float | None]:
        """Seconds of each, None for one that cannot be launched."""


class OnGpu:
    """What times calls on a CUDA device: every one reads and writes other memory than the last ones
    did, so caches are cold.
    """

    def __init__(self, device: torch.device):
        self.index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", self.index)
        properties: Any = torch.cuda.get_device_properties(self.index)
        self._l2_bytes = int(properties.L2_cache_size)
        self._used = False

    def release(self) -> None:
        """Give the memory of the arguments back to the driver: the program wants it in other
        pieces.
        """
        if self._used:
            torch.cuda.empty_cache()

    def _sets(self, one: int, least: int = 2, beside: int = 0) -> int:
        """How many sets of arguments, of ``one`` bytes each, it takes to go round the L2 cache.

        Args:
            least: so many, where they fit.
            beside: so many more must fit: results and what is between.

        Raises:
            DoesNotFit: not one fits into the memory that is free.
        """
        free = torch.cuda.mem_get_info(self.index)[0]
        most = int(SHARE_OF_MEMORY * free) // max(one, 1) - beside
        if most < 1:
            raise DoesNotFit(f"{one} bytes of arguments, {free} are free")
        return min(MOST_SETS, most, max(least, -(-COVER_L2 * self._l2_bytes // max(one, 1))))


class GpuBench(OnGpu):
    """Compiles in the worker processes and times on a CUDA device.

    The device sleeps while the host queues the launches, so that host time does not count.
    Schedules take turns.
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        major, minor = torch.cuda.get_device_capability(self.index)
        self._capability = 10 * major + minor

    def compile(self, wanted: Sequence[tuple[Subject, Schedule]]) -> list[Image | None]:
        with ThreadPoolExecutor(worker_count()) as threads:
            return list(threads.map(lambda pair: self._image(*pair), wanted))

    def _image(self, subject: Subject, schedule: Schedule) -> Image | None:
        job = subject.job(schedule, self._capability)
        key = key_of("kernel", job.as_json())
        try:
            return compiled_images({key: job}, default_cache())[key]
        except CompileError:
            return None

    def time(self, subject: Subject, built: Sequence[tuple[Schedule, Image]]) -> list[float | None]:
        """Medians of several batches of launches.

        Raises:
            DoesNotFit: there is too little memory for the arguments.
            UnknownRange: no safe arguments can be made up.
        """
        self._used = True
        with torch.no_grad(), torch.cuda.device(self.index):
            sets = self._argument_sets(subject)
            return in_turns(
                [self._calls(subject, schedule, image, sets) for schedule, image in built]
            )

    def _argument_sets(self, subject: Subject) -> list[list[list[torch.Tensor]]]:
        """For each set, for each member of a batch (a plain kernel is one), its tensors."""
        members = self._members(subject)
        one = sum(
            elements * b.dtype.itemsize
            for sizes in members
            for elements, b in zip(sizes, subject.program.buffers, strict=True)
        )
        limits = index_limits(subject.program, subject.sizes)
        return [
            [
                [
                    tensor_for(b, elements, limits.get(b.name), self.device, seed)
                    for b, elements in zip(subject.program.buffers, sizes, strict=True)
                ]
                for sizes in members
            ]
            for seed in range(self._sets(one))
        ]

    def _members(self, subject: Subject) -> list[list[int]]:
        if isinstance(subject.step, BatchStep):
            return [subject.elements(length) for length in subject.lengths]
        return [subject.elements()]

    def _calls(
        self,
        subject: Subject,
        schedule: Schedule,
        image: Image,
        sets: list[list[list[torch.Tensor]]],
    ) -> list[Call]:
        """One launch for each set of arguments; none where the driver refuses the kernel."""
        from iocompiler.runtime.driver import driver

        stream = torch.cuda.current_stream(self.index).cuda_stream
        try:
            signature = Signature.parse(subject.signature)
            launch = make_launch(signature, image, driver(), self.index)
            return [self._call(subject, schedule, launch, stream, given) for given in sets]
        except LaunchError:
            return []

    def _call(
        self,
        subject: Subject,
        schedule: Schedule,
        launch: Launch,
        stream: int,
        given: list[list[torch.Tensor]],
    ) -> Call:
        buffers = subject.program.buffers
        rows = [
            [
                number_for(b) if b.role == "scalar" else tensor.data_ptr()
                for b, tensor in zip(buffers, tensors, strict=True)
            ]
            for tensors in given
        ]
        if not isinstance(subject.step, BatchStep):
            return partial(launch, stream, *subject.grid(schedule), *rows[0], *subject.numbers)
        numbers = numbers_of(subject.program)
        block, programs = schedule.x_block, schedule.programs
        batch = BatchLaunch(lambda: launch, block, numbers, self.device, programs=programs)
        table = [(*row, length) for row, length in zip(rows, subject.lengths, strict=True)]
        return partial(batch, stream, table)


def in_turns(
    calls: Sequence[list[Call]],
    launches: int = 1,
    failing: tuple[type[Exception], ...] = (),
    enough_s: float = math.inf,
) -> list[float | None]:
    """Seconds of a call of each way, the median of several batches of its calls; None where it has
    none.

    Args:
        calls: of each way; emptied where one is ``failing``.
        launches: as of `batch_seconds`.
        enough_s: after so long there are fewer batches.
    """
    samples: list[list[float]] = [[] for _ in calls]

    def turn() -> float:
        taken = 0.0
        for found, batch in zip(samples, calls, strict=True):
            try:
                found += [batch_seconds(batch, launches)] if batch else []
                taken += found[-1] * len(batch) if batch else 0.0
            except failing:
                batch.clear()
                found.clear()
        return taken

    turn()  # loads code and maps memory
    for found in samples:
        found.clear()
    taken = turn()
    for _ in range(max(_LEAST_REPEATS, int(min(REPEATS, enough_s / max(taken, 1e-9)))) - 1):
        turn()
    return [statistics.median(found) if found else None for found in samples]


def batch_seconds(calls: Sequence[Call], launches: int = 1) -> float:
    """Seconds of one of the calls, run back to back; each takes the host so many launches."""
    cuda: Any = torch.cuda
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    cuda._sleep(int(_CYCLES_PER_S * _LAUNCH_S * launches * (len(calls) + 5)))
    start.record()
    for call in calls:
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / len(calls)
