"""What ``python <generated file>.py`` does: run on random inputs, look for differences between
runs, print the time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

_RUNS = 20


def check(
    call: Callable[[list[Any]], list[Any]],
    example_inputs: Callable[[], list[Any]],
    device: torch.device,
) -> None:
    """Print the outputs' shapes, whether two runs agree bit by bit, and the median time of a call
    in microseconds.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"nothing was run: this file needs {device}")
        return
    torch.manual_seed(0)
    inputs = example_inputs()
    first, second = call(_copied(inputs)), call(_copied(inputs))
    for position, (a, b) in enumerate(zip(first, second, strict=True)):
        same = torch.equal(_bits(a), _bits(b)) if isinstance(a, torch.Tensor) else a == b
        shown = f"{a.dtype} {tuple(a.shape)}" if isinstance(a, torch.Tensor) else repr(a)
        print(f"output {position}: {shown}{'' if same else '  DIFFERS between two runs'}")
    print(f"median of {_RUNS} calls: {_median_time(call, inputs, device) * 1e6:.1f} us")


def _copied(inputs: list[Any]) -> list[Any]:
    return [i.clone() if isinstance(i, torch.Tensor) else i for i in inputs]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    # NaN differs from itself, its bits do not
    return (
        tensor.contiguous().view(torch.uint8)
        if tensor.dim()
        else tensor.reshape(1).view(torch.uint8)
    )


def _median_time(
    call: Callable[[list[Any]], list[Any]], inputs: list[Any], device: torch.device
) -> float:
    times = []
    for _ in range(_RUNS):
        _synchronize(device)
        start = time.perf_counter()
        call(list(inputs))
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
