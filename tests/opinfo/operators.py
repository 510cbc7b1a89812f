"""The operators torch tests itself with, as calls of `check`."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.testing._internal import common_methods_invocations as invocations

from tests.opinfo.check import Call, problems
from tests.opinfo.exceptions import RANDOM, excepted


def _unseeded(op: Any, *args: Any, **kwargs: Any) -> Any:
    """torch's own seeds before each call, which breaks the graph; here the caller has seeded."""
    return op(*args, **kwargs)


invocations.wrapper_set_seed = _unseeded
op_db = invocations.op_db

DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.bool,
    torch.complex64,
)
OPERATORS = {
    f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name: op for op in op_db
}


ENGINES = {"cpu": "reference", "cuda": "auto"}


def forward_and_backward(name: str, device: str = "cpu", count: int = 3) -> list[str]:
    """Problems of a few float32 samples, spread over those the operator has."""
    op = OPERATORS[name]
    if torch.float32 not in op.supported_dtypes(device):
        return []
    grad = op.supports_autograd and torch.float32 in op.supported_backward_dtypes(device)
    return problems(_calls(name, torch.float32, device, count, grad), grad, ENGINES[device])


def other_dtypes(name: str, device: str = "cpu") -> list[str]:
    """Problems of one sample a dtype, forward alone."""
    dtypes = [d for d in DTYPES if d in OPERATORS[name].supported_dtypes(device)]
    calls = [c for d in dtypes for c in _calls(name, d, device, 1, False)]
    return problems(calls, False, ENGINES[device])


def _calls(name: str, dtype: torch.dtype, device: str, count: int, grad: bool) -> list[Call]:
    op = OPERATORS[name]
    torch.manual_seed(0)
    samples = list(itertools.islice(op.sample_inputs(device, dtype, requires_grad=grad), 12))
    step = max(1, len(samples) // count)
    on = "" if device == "cpu" else f" on {device}"
    calls = [_call(name, dtype, i, s, on) for i, s in list(enumerate(samples))[::step][:count]]
    return [call for call in calls if not excepted(call.label)]


def _call(name: str, dtype: torch.dtype, position: int, sample: Any, on: str) -> Call:
    op = OPERATORS[name]
    label = f"{name} {str(dtype)[6:]} sample {position}{on}"
    random = op.name in RANDOM or bool(sample.kwargs.get("dropout_p"))
    return Call(label, op.op, (sample.input, *sample.args), sample.kwargs, random)
