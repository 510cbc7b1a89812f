"""Templates compiled with no GPU, with the arguments a launch would give them."""

from __future__ import annotations

import pytest
import torch

from iocompiler.runtime import attention, attention_operands
from iocompiler.runtime.attention import Problem
from iocompiler.runtime.template_images import image
from iocompiler.runtime.template_launch import Launch


def resources(
    problem: Problem,
    capability: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    gradients: bool = True,
) -> dict[str, dict[str, int]]:
    """Of each kernel of an attention, forward and backward: as `launched` has them."""
    found = launched(monkeypatch, capability)
    query, value = problem.query, problem.value
    out = query.new_empty((*query.shape[:3], value.shape[3]))
    lse = attention.forward(problem, out)
    if not gradients:
        return found
    results = [torch.empty_like(x) for x in (query, problem.key, value)]
    attention.backward(problem, torch.empty_like(out), out, lse, None, results)
    for which, operand in enumerate(problem.operands):
        if operand.is_floating_point():
            attention_operands.operand_gradient(problem, out, out, lse, None, which)
    return found


def launched(monkeypatch: pytest.MonkeyPatch, capability: int) -> dict[str, dict[str, int]]:
    """Of each template launched from here on, by name: registers, spilled bytes, bytes of shared
    memory, warps; they are compiled, and not run.
    """
    found: dict[str, dict[str, int]] = {}

    def compile_(launch: Launch, programs: int, *tensors: torch.Tensor) -> None:
        metadata = image(launch.form(launch.named(tensors), capability)).metadata
        taken = {name: metadata[name] for name in ("registers", "spills", "shared")}
        found[launch.kernel.__name__] = {**taken, "warps": launch.fixed.get("num_warps", 4)}

    monkeypatch.setattr(Launch, "run", compile_)
    return found
