"""``python -m tests.soak --steps 2000 --limit 600``: training for long, beside eager.

A small GPT is trained twice from the same weights on the same batches, whose shapes change at every
step: compiled, and eager. Asked of the compiled one: losses as eager's to within the noise of
bfloat16, no recompilation once sizes are symbols, and nothing that grows: memory of the device and
of the host, modules, processes, open files. Prints what it saw as JSON, also where the limit
(seconds) cut it off, and then one line; the exit status is 1 where any of it is wrong.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import iocompiler as ioc
from iocompiler.compilation import Compilation
from iocompiler.runtime.module import Module
from tests.models.gpt import GPT

MEGABYTE = 1 << 20
# Noise that training amplifies: two runs of eager that differ in one rounding part as far.
LOSS_TOLERANCE = 0.02
SAID_EVERY = 10.0  # seconds between lines of progress
COMPILATIONS = 3  # for the first sizes, then for each size that Dynamo has seen change


@dataclass(frozen=True)
class Setting:
    """What is trained, on which device, for how long (seconds)."""

    device: str
    steps: int
    limit: float
    engine: str = "auto"
    mode: str | None = None
    width: int = 256
    layers: int = 4
    longest: int = 512
    batch: int = 16
    shapes: int = 40  # libraries keep something for each shape: as many as the first fifth meets
    seed: int = 0


@dataclass
class Usage:
    """What a process holds at one moment; bytes and counts."""

    device_bytes: int
    host_bytes: int
    modules: int
    processes: int
    files: int

    @staticmethod
    def now(device: str) -> Usage:
        gc.collect()
        on_device = 0
        if device == "cuda":
            torch.cuda.synchronize()
            on_device = torch.cuda.memory_allocated()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return Usage(
            on_device,
            pages * os.sysconf("SC_PAGE_SIZE"),
            sum(type(each) is Module for each in gc.get_objects()),
            sum(len(f.read_text().split()) for f in Path("/proc/self/task").glob("*/children")),
            len(os.listdir("/proc/self/fd")),
        )


# how much more of each there may be at the end than after the first fifth
ALLOWED = Usage(device_bytes=MEGABYTE, host_bytes=64 * MEGABYTE, modules=0, processes=0, files=0)


@dataclass
class Training:
    """One model being trained: losses so far, seconds spent."""

    model: nn.Module
    run: Callable[..., Tensor]
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def step(self, tokens: Tensor, device: str) -> None:
        start = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = self.run(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())  # waits: the time is the step's
        self.seconds += time.perf_counter() - start


def soak(setting: Setting, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train; what was seen, and under "wrong" what should not have been."""
    records: list[Compilation] = []
    ours, eager = _trainings(setting, records)
    draw, begun = random.Random(setting.seed), time.perf_counter()
    early: Usage | None = None
    said = begun
    step = 0
    while step < setting.steps and time.perf_counter() - begun < setting.limit:
        tokens = _tokens(setting, draw, step)
        for training in (ours, eager):
            training.step(tokens, setting.device)
        step += 1
        spent = (time.perf_counter() - begun) / setting.limit
        # not inside the compilations, however little time there is
        settled = step >= min(setting.steps // 5, 3 * setting.shapes)
        if early is None and settled and max(step / setting.steps, spent) >= 0.2:
            early = Usage.now(setting.device)
        if time.perf_counter() - said >= SAID_EVERY:
            said = time.perf_counter()
            say(f"step {step}: loss {ours.losses[-1]:.4f}, eager {eager.losses[-1]:.4f}")
    return _verdict(ours, eager, early, Usage.now(setting.device), records)


def _trainings(setting: Setting, records: list[Compilation]) -> tuple[Training, Training]:
    torch.manual_seed(setting.seed)
    model = GPT(256, setting.width, setting.width // 64 or 1, setting.layers, setting.longest)
    models = [model.to(setting.device), copy.deepcopy(model).to(setting.device)]
    backend = ioc.Compiler(
        engine=setting.engine, strict=True, mode=setting.mode or "default",
        on_compiled=records.append,
    )  # fmt: skip
    runs = [torch.compile(models[0], backend=backend), models[1]]
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-3) for m in models]
    ours, eager = (Training(*each) for each in zip(models, runs, optimizers, strict=True))
    return ours, eager


def _tokens(setting: Setting, draw: random.Random, step: int) -> Tensor:
    """Something to learn: counting up from a random start, by a random stride."""
    shape = random.Random(draw.randrange(setting.shapes))
    batch = shape.randint(2, setting.batch)
    length = shape.randint(setting.longest // 4, setting.longest)
    generator = torch.Generator().manual_seed(setting.seed + step)
    start = torch.randint(0, 256, (batch, 1), generator=generator)
    stride = torch.randint(1, 6, (batch, 1), generator=generator)
    return ((start + stride * torch.arange(length + 1)) % 256).to(setting.device)


def _verdict(
    ours: Training, eager: Training, early: Usage | None, late: Usage, records: list[Compilation]
) -> dict[str, Any]:
    """``early`` is None where the limit came before anything had settled: that is wrong, too."""
    tail = max(1, len(ours.losses) // 10)
    losses = {name: sum(t.losses[-tail:]) / tail for name, t in (("ours", ours), ("eager", eager))}
    since = early or late
    grown = {name: getattr(late, name) - getattr(since, name) for name in vars(late)}
    wrong = [
        f"{name} grew by {count}" for name, count in grown.items() if count > getattr(ALLOWED, name)
    ]
    if early is None:
        wrong.append("cut off too early to see what grows")
    first = abs(ours.losses[0] - eager.losses[0])
    if first > LOSS_TOLERANCE or not abs(losses["ours"] - losses["eager"]) <= LOSS_TOLERANCE:
        wrong.append(f"losses differ: {first:.4f} at the first step, {losses} at the end")
    if len(records) > COMPILATIONS:
        wrong.append(f"compiled {len(records)} times")
    wrong += [f"fallback: {f.cause}" for record in records for f in record.fallbacks]
    return {
        "steps": len(ours.losses),
        "loss": losses,
        "seconds": {"ours": ours.seconds, "eager": eager.seconds},
        "compilations": len(records),
        "early": vars(since),
        "grown": grown,
        "wrong": wrong,
    }


def _line(found: dict[str, Any], steps: int) -> str:
    """All of it in one line, the last one."""
    seconds = sum(found["seconds"].values())
    done = f"soak: {found['steps']} of {steps} steps in {seconds:.0f} s"
    return f"{done}; {'; '.join(found['wrong']) or 'nothing wrong'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--mode", default=None, help="of torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    setting = Setting(given.device, given.steps, given.limit, mode=given.mode, seed=given.seed)
    if given.device == "cpu":  # the reference interpreter is slow
        setting = Setting("cpu", given.steps, given.limit, "reference", None, 16, 1, 24, 4, 6)
    found = soak(setting, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(found, indent=1))
    print(_line(found, setting.steps), flush=True)
    return int(bool(found["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
