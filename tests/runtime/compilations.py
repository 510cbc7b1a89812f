"""Whole compilations as other processes do them: a graph traced, planned, written to the cache, its
kernels compiled for a GPU that is not there.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import time
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from types import FunctionType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import iocompiler as ioc
from iocompiler.compilation import Compilation
from iocompiler.cost_model.device import DEVICES
from iocompiler.runtime import compile as compiling
from iocompiler.runtime.load import prepare
from tests.runtime.text_engine import TextEngine


class PreparingEngine(TextEngine):
    """As `TextEngine`, but each plan's kernels are compiled for an H200 before."""

    def __call__(self, plan: Any, gm: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)
            prepare(plan, DEVICES["h200"])
        return super().__call__(plan, gm)


def model(x: Tensor, w: Tensor) -> Tensor:
    return F.gelu(F.layer_norm(x @ w, (w.shape[1],)) * 2).softmax(-1)


def compile_and_check() -> str:
    """Compile, forward and backward, and hold it against eager; what the graph cache said."""
    torch.set_num_threads(1)
    records: list[Compilation] = []
    backend = ioc.Compiler(engine=PreparingEngine(), strict=True, on_compiled=records.append)
    # code that Dynamo has not seen. Not `torch._dynamo.reset()`: it frees what another thread that
    # is compiling writes to next (a segmentation fault of torch's, with any backend)
    fresh = FunctionType(model.__code__.replace(), globals())
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(6, 6, generator=generator).requires_grad_() for _ in range(2))
    found, expected = torch.compile(fresh, backend=backend)(x, w), model(x, w)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(y.square().sum(), (x, w)) for y in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    return records[0].cache


def report(sender: Connection, start: Any, cache: str) -> None:
    """For a process: `compile_and_check`, its result or what it raised sent back, warnings too."""
    os.environ["IOCOMPILER_CACHE_DIR"] = cache
    sender.send("ready")
    if start is not None:
        start.wait()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            result = compile_and_check()
        except Exception as error:
            result = f"{error!r}"
    compiling.shut_down()
    ours = [str(w.message) for w in told if issubclass(w.category, ioc.errors.CacheWarning)]
    sender.send((result, ours))


class Processes:
    """Children of a server that has imported torch: they start in milliseconds."""

    def __init__(self, cache: str) -> None:
        self.cache = cache
        self.context = mp.get_context("forkserver")
        self.context.set_forkserver_preload([__name__])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")  # how `TextEngine` runs what it finds
            forkserver.ensure_running()

    def start(self, start: Any = None) -> tuple[Any, Connection]:
        """A process about to compile: it has said that it is ready."""
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(target=report, args=(sender, start, self.cache))
        process.start()
        sender.close()
        assert receiver.poll(60)
        assert receiver.recv() == "ready"
        return process, receiver

    def together(self, count: int) -> list[tuple[str, list[str]]]:
        """What each of so many processes, all compiling at once, gives."""
        start = self.context.Event()
        running = [self.start(start) for _ in range(count)]
        start.set()
        return [self.result(*each) for each in running]

    def result(self, process: Any, receiver: Connection) -> tuple[str, list[str]]:
        assert receiver.poll(180), "no answer"
        found: tuple[str, list[str]] = receiver.recv()
        process.join(60)
        assert process.exitcode == 0
        return found

    def killed(self, after: Callable[[], float]) -> None:
        """A process killed so many seconds after it began to compile."""
        process, _ = self.start()
        time.sleep(after())
        process.kill()
        process.join(60)
