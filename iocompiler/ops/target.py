"""The device a graph is compiled for: that of its tensors, or one that is only planned for; and
whether Inductor compiles it.

`explain` walks a double of the model on the CPU; what is chosen by device (kernels of attention,
dropout by seeds) has to be chosen as on the device that was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from iocompiler.cost_model.device import Device, current_device, kin
from iocompiler.cost_model.device import device as device_named

Capability = tuple[int, int]

HOPPER: Capability = (9, 0)
_NO_GPU = HOPPER  # what is compiled for where no GPU is present
_planned: ContextVar[Capability | None] = ContextVar("planned", default=None)
_inductor: ContextVar[bool] = ContextVar("inductor", default=False)

planned = _planned.get  # no function of its own: each launch asks
"""What tensors on the CPU count as: ``planned()``."""


@contextmanager
def planned_for(capability: Capability | None) -> Iterator[None]:
    """Tensors on the CPU count as on a CUDA device of this capability; None: as they are."""
    token = _planned.set(capability)
    try:
        yield
    finally:
        _planned.reset(token)


@contextmanager
def inductor() -> Iterator[None]:
    """What is chosen inside is for a graph that Inductor compiles for the CPU."""
    token = _inductor.set(True)
    try:
        yield
    finally:
        _inductor.reset(token)


def is_inductor() -> bool:
    """Whether Inductor compiles the graph, for the CPU: what it fuses itself is left to it."""
    return _inductor.get()


def on_gpu(x: Tensor) -> bool:
    """Whether kernels can be launched over ``x``, or over what ``x`` stands for: a fake tensor on
    the CPU, for the one that will be on the device planned for.
    """
    return x.is_cuda or (_planned.get() is not None and isinstance(x, FakeTensor))


def device_type(x: Tensor) -> str:
    """The type of the device that ``x`` will be on."""
    return "cuda" if x.device.type == "cpu" and _planned.get() is not None else x.device.type


def capability(x: Tensor) -> Capability:
    """The compute capability of the CUDA device that ``x`` will be on."""
    planned = _planned.get()
    if planned is not None:
        return planned
    return torch.cuda.get_device_capability(x.device) if torch.cuda.is_available() else _NO_GPU


def row(x: Tensor) -> Device:
    """The cost model's row of the CUDA device that ``x`` will be on."""
    if _planned.get() is None and x.device.type == "cuda" and torch.cuda.is_available():
        return current_device(x.device)
    return kin(capability(x))


def any_row(x: Tensor) -> Device:
    """The cost model's row of the device that ``x`` will be on: of a CUDA device, or of a CPU."""
    return row(x) if device_type(x) == "cuda" else device_named("cpu")
