"""Training on ranks, compiled beside uncompiled, judged by the rule of `tests.accuracy` on each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import iocompiler as ioc
from iocompiler.compilation import Compilation
from tests.accuracy import Results, compare, over_draws
from tests.models.stepping import steps_counted_in

STEPS = 3
ENGINES = {"cpu": "reference", "cuda": "auto"}

SGD = partial(torch.optim.SGD, lr=0.1)

Batch = tuple[Tensor, ...]
Wrap = Callable[[nn.Module, ioc.Compiler], nn.Module]
"""From a model to the one that is trained, compiled and spread over the ranks."""


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        build: the model, on the CPU and with the same weights every time.
        batch: tensors on the CPU, drawn from the generator.
        loss: of the model on a batch: a scalar.
        updates_compiled: whether the optimizer's step is compiled too.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = SGD
    autocast: torch.dtype | None = None
    updates_compiled: bool = False


def backend(
    records: list[Compilation], device: torch.device, mode: str = "default"
) -> ioc.Compiler:
    return ioc.Compiler(
        engine=ENGINES[device.type], mode=mode, strict=True, on_compiled=records.append
    )


def as_eager(
    task: Task,
    device: torch.device,
    wrap: Wrap,
    mode: str = "default",
    eager: Callable[[nn.Module], nn.Module] = DistributedDataParallel,
) -> list[Compilation]:
    """A few steps give losses, gradients, parameters and buffers as accurate as those of eager
    code (DDP where nothing else is given), on every rank. Returns what was compiled.
    """
    records: list[Compilation] = []
    compiler = backend(records, device, mode)
    reference = _steps(task, device, torch.float64, eager)
    theirs = _steps(task, device, torch.float32, eager)
    ours = _steps(
        task, device, torch.float32, lambda net: wrap(net, compiler),
        compiler if task.updates_compiled else None,
    )  # fmt: skip
    unit = task.autocast or torch.float32
    runs = zip(ours, theirs, reference, strict=True)
    judged = over_draws(
        [tuple(c for same in zip(*run, strict=True) for c in compare(*same, unit)) for run in runs]
    )
    bad = [str(c) for c in judged if not c.ok]
    assert judged
    assert not bad, "less accurate than eager:\n  " + "\n  ".join(bad)
    assert any("backward" in record.plans or record.cache == "found" for record in records)
    return records


def _steps(
    task: Task,
    device: torch.device,
    dtype: torch.dtype,
    wrap: Callable[[nn.Module], nn.Module],
    compiler: ioc.Compiler | None = None,
) -> list[tuple[Results, Results]]:
    """What each step gave, and the parameters after it, which are as exact as the gradients they
    are made of. Every rank has batches of its own.
    """
    net = wrap(task.build().to(device, dtype))
    optimizer = task.optimizer(net.parameters())
    update = torch.compile(optimizer.step, backend=compiler) if compiler else optimizer.step
    draw = torch.Generator().manual_seed(1 + dist.get_rank())
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        batch = moved(task.batch(draw), device, dtype)
        with torch.autocast(
            device.type, task.autocast, enabled=bool(task.autocast) and dtype != torch.float64
        ):
            loss = task.loss(net, batch)
        loss.backward()
        given = gradients(net)
        with steps_counted_in(dtype):
            update()
        values = {"loss": loss.detach().clone(), **_wholes(net.named_buffers())}
        found.append((Results(values, given), Results({}, _wholes(net.named_parameters()))))
    return found


def moved(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    return tuple(t.to(device, dtype if t.is_floating_point() else t.dtype) for t in batch)


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return _wholes((name, p.grad) for name, p in net.named_parameters())


def _wholes(named: Iterable[tuple[str, Any]]) -> dict[str, Tensor]:
    """Copies, whole on every rank, under the names from before anything was wrapped."""
    return {_plain(name): _whole(t).detach().clone() for name, t in named}


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "").replace("module.", "")


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
