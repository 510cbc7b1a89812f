"""Small plans timed as they run: several ways to compute one thing, on a GPU, with cold caches."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from iocompiler.errors import CompileError, LaunchError
from iocompiler.plan.data import KernelStep, MatmulStep, Plan, TensorSpec
from iocompiler.runtime.compile import worker_count
from iocompiler.runtime.load import load
from iocompiler.runtime.measure import (
    COVER_L2,
    MOST_SETS,
    REPEATS,
    SHARE_OF_MEMORY,
    DoesNotFit,
    batch_seconds,
)
from iocompiler.runtime.stimulus import index_limits, tensor_for
from iocompiler.runtime.tune_matmul import Built
from iocompiler.runtime.values import size_values, storage_elements
from iocompiler.tile.program import Buffer

# host time of a call that launches two kernels and allocates, in launches
_LAUNCHES = 4


class GpuRegionBench:
    """Loads plans as programs are loaded, compiling them in the worker processes, and times their
    calls on a CUDA device: each on other arguments than the last ones.
    """

    def __init__(self, device: torch.device):
        self.index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", self.index)
        properties: Any = torch.cuda.get_device_properties(self.index)
        self._l2_bytes = int(properties.L2_cache_size)
        self._used = False

    def load(self, plans: Sequence[Plan]) -> list[Built | None]:
        with ThreadPoolExecutor(worker_count()) as threads:
            return list(threads.map(self._loaded, plans))

    def _loaded(self, plan: Plan) -> Built | None:
        try:
            run: Any = load(plan, self.device, "region")
        except (CompileError, LaunchError):
            return None
        spills = any(taken["spills"] > 0 for taken in run.resources.values())
        folded = any(isinstance(step, MatmulStep) for step in plan.steps)
        return None if spills and folded else run

    def time(
        self, plan: Plan, built: Sequence[Built], sizes: Mapping[str, int]
    ) -> list[float | None]:
        """Medians of several batches of calls, the ways taking turns.

        Raises:
            DoesNotFit: there is too little memory for the arguments.
        """
        self._used = True
        torch.cuda.empty_cache()  # what was timed before lies in other pieces
        try:
            with torch.no_grad(), torch.cuda.device(self.index):
                samples = self._samples(plan, built, sizes)
        except torch.OutOfMemoryError as error:
            raise DoesNotFit(str(error)) from error
        # the first round loads code and maps memory
        return [statistics.median(found[1:]) if len(found) > 1 else None for found in samples]

    def _samples(
        self, plan: Plan, built: Sequence[Built], sizes: Mapping[str, int]
    ) -> list[list[float]]:
        """Seconds of each batch of calls; none of a way that cannot be launched."""
        sets = self._argument_sets(plan, sizes)
        calls = [[partial(_call, run, given) for given in sets] for run in built]
        samples: list[list[float]] = [[] for _ in built]
        for _ in range(REPEATS + 1):
            for found, batch in zip(samples, calls, strict=True):
                try:
                    found += [batch_seconds(batch, _LAUNCHES)] if batch else []
                except LaunchError:
                    batch.clear()
                    found.clear()
        return samples

    def release(self) -> None:
        """Give the memory of the arguments back to the driver."""
        if self._used:
            torch.cuda.empty_cache()

    def _argument_sets(self, plan: Plan, sizes: Mapping[str, int]) -> list[list[Any]]:
        specs = [spec for _, spec in plan.inputs if spec is not None]
        one = sum(_elements(spec, sizes) * spec.dtype.itemsize for spec in specs)
        free = torch.cuda.mem_get_info(self.index)[0]
        # results and what is between stand beside them
        most = int(SHARE_OF_MEMORY * free) // max(one, 1) - 1
        if most < 1:
            raise DoesNotFit(f"{one} bytes of arguments, {free} are free")
        count = min(MOST_SETS, most, max(2, -(-COVER_L2 * self._l2_bytes // max(one, 1))))
        limits = _limits(plan, sizes)
        return [
            [
                self._argument(name, spec, sizes, limits.get(name), seed)
                for name, spec in plan.inputs
            ]
            for seed in range(count)
        ]

    def _argument(
        self,
        name: str,
        spec: TensorSpec | None,
        sizes: Mapping[str, int],
        limit: int | None,
        seed: int,
    ) -> Any:
        if spec is None:
            return sizes.get(name, 0.5)
        device = self.device if torch.device(spec.device).type == "cuda" else torch.device("cpu")
        elements = _elements(spec, sizes)
        flat = tensor_for(Buffer(name, spec.dtype, "in", elements), elements, limit, device, seed)
        return flat.as_strided(size_values(spec.shape, sizes), size_values(spec.stride, sizes))


def _call(run: Built, given: list[Any]) -> None:
    run(list(given))  # which empties its list


def _elements(spec: TensorSpec, sizes: Mapping[str, int]) -> int:
    return storage_elements(size_values(spec.shape, sizes), size_values(spec.stride, sizes))


def _limits(plan: Plan, sizes: Mapping[str, int]) -> dict[str, int]:
    """For each input that addresses are made of, the largest value that stays in bounds."""
    found: dict[str, int] = {}
    for step in plan.steps:
        if isinstance(step, KernelStep):
            names = dict(zip([b.name for b in step.buffers], step.args, strict=True))
            found |= {names[b]: limit for b, limit in index_limits(step.program, sizes).items()}
    return found
