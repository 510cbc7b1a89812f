"""Small plans timed as they run: several ways to compute one thing, on a GPU, with cold caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from iocompiler.errors import CompileError, LaunchError
from iocompiler.plan.data import KernelStep, MatmulStep, Plan, TensorSpec
from iocompiler.runtime.compile import worker_count
from iocompiler.runtime.load import load
from iocompiler.runtime.measure import Call, DoesNotFit, OnGpu, in_turns
from iocompiler.runtime.stimulus import index_limits, tensor_for
from iocompiler.runtime.tune_matmul import Built
from iocompiler.runtime.values import size_values, storage_elements
from iocompiler.tile.program import Buffer

# host time of a call that launches two kernels and allocates, in launches
_LAUNCHES = 4


class GpuRegionBench(OnGpu):
    """Loads plans as programs are loaded, compiling them in the worker processes, and times their
    calls on a CUDA device: each on other arguments than the last ones.
    """

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
                sets = self._argument_sets(plan, sizes)
                calls: list[list[Call]] = [
                    [partial(_call, run, given) for given in sets] for run in built
                ]
                return in_turns(calls, _LAUNCHES, (LaunchError,))
        except torch.OutOfMemoryError as error:
            raise DoesNotFit(str(error)) from error

    def _argument_sets(self, plan: Plan, sizes: Mapping[str, int]) -> list[list[Any]]:
        specs = [spec for _, spec in plan.inputs if spec is not None]
        one = sum(_elements(spec, sizes) * spec.dtype.itemsize for spec in specs)
        limits = _limits(plan, sizes)
        return [
            [
                self._argument(name, spec, sizes, limits.get(name), seed)
                for name, spec in plan.inputs
            ]
            for seed in range(self._sets(one, beside=1))
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
