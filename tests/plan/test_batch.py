"""Which equal kernels are launched together: nothing between may touch what they read or write."""

from __future__ import annotations

import pytest
import torch

from iocompiler.cost_model.device import DEVICES
from iocompiler.plan.batch import batch
from iocompiler.plan.data import (
    AtenStep,
    BatchStep,
    KernelStep,
    Ref,
    Schedule,
    Step,
    TensorSpec,
    ViewStep,
)
from tests.tile.test_flat import scaled

SPEC = TensorSpec((6,), (1,), torch.float32, "cpu")


def kernel(source: str, result: str) -> KernelStep:
    program = scaled((6,))
    names = {"x": source, "s": "scale", "out": result}
    args = tuple(names[b.name] for b in program.buffers)
    return KernelStep("k", program, Schedule("pointwise"), args, ((result, SPEC),))


def overwrite(target: str) -> AtenStep:
    args = (Ref(target), Ref("new"))
    return AtenStep("aten.copy_.default", args, (), ((None, None),), False)


def batched(steps: list[Step]) -> bool:
    return any(isinstance(s, BatchStep) for s in batch(steps, DEVICES["h200"], {}))


def test_independent_kernels_go_together() -> None:
    assert batched([kernel("a", "p"), overwrite("c"), kernel("b", "q")])


def test_a_kernel_stays_before_what_overwrites_its_input() -> None:
    assert not batched([kernel("a", "p"), overwrite("a"), kernel("b", "q")])


@pytest.mark.parametrize(("read", "changed"), [("v", "a"), ("a", "v")])
def test_a_view_stands_for_its_base(read: str, changed: str) -> None:
    view = ViewStep("v", "a", SPEC)
    assert not batched([view, kernel(read, "p"), overwrite(changed), kernel("b", "q")])


def test_a_kernel_stays_before_what_reads_its_result() -> None:
    assert not batched([kernel("a", "p"), kernel("p", "q")])
