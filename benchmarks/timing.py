"""Clocks: CUDA events on a GPU, the host clock on a CPU. Medians; never the first call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Time:
    """Milliseconds: the median, and half the spread of the middle half of ``count`` repetitions."""

    ms: float
    spread_ms: float
    count: int


def summary(samples: Sequence[float]) -> Time:
    ordered = sorted(samples)
    low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4 - (len(ordered) > 1)]
    return Time(statistics.median(ordered), max(0.0, high - low) / 2, len(ordered))


def on_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> str:
    """Where benchmarks run."""
    return "cuda" if on_gpu() else "cpu"


def device_name() -> str:
    return torch.cuda.get_device_name() if on_gpu() else "cpu"


def synchronize() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def first_call(call: Call) -> tuple[Any, float]:
    """The result and the host seconds until the device is done."""
    synchronize()
    start = time.perf_counter()
    result = call()
    synchronize()
    return result, time.perf_counter() - start


def steps(
    call: Call,
    repetitions: int,
    budget_s: float,
    warm_up: int = 3,
    *,
    flush: bool = False,
    queued: bool = False,
) -> Time:
    """Time whole steps one by one, gaps between their kernels included.

    At most ``repetitions``, at least three, about ``budget_s`` in all.

    Args:
        flush: write a buffer of five times the L2 before each step, so that it starts with its
            inputs in HBM; a whole model's working set does that itself.
        queued: the device sleeps until the host has queued the step, as it would lie in a queue
            behind other work: host time does not count.
    """
    for _ in range(warm_up):
        call()
    _, once = first_call(call)
    count = max(3, min(repetitions, int(budget_s / max(once, 1e-6))))
    if not on_gpu():
        return summary([first_call(call)[1] * 1e3 for _ in range(count)])
    events = [(_event(), _event()) for _ in range(count)]
    scratch = torch.empty(5 * l2_bytes() if flush else 0, dtype=torch.uint8, device="cuda")
    sleep = _cycles(_queue([call])) if queued else 0
    for start, end in events:
        scratch.zero_()
        if sleep:
            torch.cuda._sleep(sleep)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return summary([start.elapsed_time(end) for start, end in events])


def queueing(call: Call, repetitions: int, budget_s: float, warm_up: int = 3) -> Time:
    """Time what the host takes to queue a call on an idle device, which is not waited for.

    At most ``repetitions``, at least three, about ``budget_s`` in all.
    """
    for _ in range(warm_up):
        call()
    _, once = first_call(call)
    count = max(3, min(repetitions, int(budget_s / max(once, 1e-6))))
    return summary([_queue([call]) * 1e3 for _ in range(count)])


def _cycles(queue_s: float) -> int:
    """How long the device sleeps while the host queues what takes it so many seconds: cycles, at no
    more than 2 GHz.
    """
    return int(2e9 * (1.5 * queue_s + 2e-4))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def batches(prepare: Callable[[], Sequence[Call]], repetitions: int, budget_s: float) -> Time:
    """Time one short call: a batch of them runs back to back on the GPU, and the batch's time is
    divided.

    ``prepare`` returns the calls of one batch, each on its own inputs (so that the batch is larger
    than L2) and does what is not timed (a forward before a timed backward). The device sleeps while
    the host queues the batch, so host time does not count; results are kept until its end, so that
    every call writes memory of its own.
    """
    queue_s = 0.0
    for _ in range(3):
        queue_s = _queue(prepare())
    synchronize()
    start = time.perf_counter()
    samples: list[float] = []
    while len(samples) < 3 or (
        len(samples) < repetitions and time.perf_counter() - start < budget_s
    ):
        samples.append(_batch(prepare(), queue_s))
    return summary(samples)


def _queue(calls: Sequence[Call]) -> float:
    synchronize()
    start = time.perf_counter()
    kept = [call() for call in calls]
    seconds = time.perf_counter() - start
    del kept
    return seconds


def _batch(calls: Sequence[Call], queue_s: float) -> float:
    if not on_gpu():
        return _queue(calls) * 1e3 / len(calls)
    start, end = _event(), _event()
    torch.cuda.synchronize()
    torch.cuda._sleep(_cycles(queue_s))
    start.record()
    kept = [call() for call in calls]
    end.record()
    torch.cuda.synchronize()
    del kept
    return start.elapsed_time(end) / len(calls)


def copy_bandwidth(bytes_each: int, quick: bool = False) -> float:
    """Bytes/s of a device-to-device copy of ``bytes_each`` (read plus written), timed as `batches`
    times kernels."""
    count = max(2, -(-l2_bytes() * 5 // (2 * bytes_each)))
    pairs = [
        tuple(
            torch.empty(bytes_each, dtype=torch.uint8, device=device()).random_() for _ in range(2)
        )
        for _ in range(count)
    ]
    time_ = batches(
        lambda: [lambda a=a, b=b: b.copy_(a) for a, b in pairs], 5 if quick else 30, 0.5
    )
    return 2 * bytes_each / (time_.ms * 1e-3)


def l2_bytes() -> int:
    """Bytes of the last-level cache of the device (0 where nobody tells)."""
    return int(torch.cuda.get_device_properties().L2_cache_size) if on_gpu() else 0


class PeakMemory:
    """``with PeakMemory() as peak: ...`` then ``peak.gib``: GiB allocated at most above what was
    there before."""

    gib: float | None = None

    def __enter__(self) -> PeakMemory:
        if on_gpu():
            torch.cuda.synchronize()
            self._before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: object) -> None:
        if on_gpu():
            torch.cuda.synchronize()
            self.gib = (torch.cuda.max_memory_allocated() - self._before) / 2**30
