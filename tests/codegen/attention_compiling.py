"""The attention templates compiled with no GPU, with the arguments a launch would give them."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import pytest
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from iocompiler.runtime import attention, attention_operands
from iocompiler.runtime.attention import Problem
from iocompiler.runtime.template_launch import Launch
from iocompiler.runtime.worker import OPTIONS

_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def resources(
    problem: Problem,
    capability: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    gradients: bool = True,
) -> dict[str, dict[str, int]]:
    """For each kernel of forward and backward: registers, spilled bytes, bytes of shared memory."""
    found = launched(monkeypatch, capability)
    query, value = problem.query, problem.value
    out = query.new_empty((*query.shape[:3], value.shape[3]))
    lse = attention.forward(problem, out)
    if not gradients:
        return found
    results = [torch.empty_like(x) for x in (query, problem.key, value)]
    attention.backward(problem, torch.empty_like(out), out, lse, results)
    for which, operand in enumerate(problem.operands):
        if operand.is_floating_point():
            attention_operands.operand_gradient(problem, torch.empty_like(out), out, lse, which)
    return found


def launched(monkeypatch: pytest.MonkeyPatch, capability: int) -> dict[str, dict[str, int]]:
    """The resources of each template launched from here on, by name: compiled, and not run."""
    found: dict[str, dict[str, int]] = {}

    def compile_(launch: Launch, programs: int, **tensors: Any) -> None:
        arguments = {**launch.fixed, **tensors}
        found[launch.kernel.__name__] = resources_of(launch.kernel, capability, arguments)

    monkeypatch.setattr(Launch, "run", compile_)
    return found


def resources_of(kernel: Any, capability: int, arguments: Any) -> dict[str, int]:
    """Those of one template, compiled as a launch with these arguments would compile it."""
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = {"debug": False, **arguments, **OPTIONS}
    bound, specialization, options = bind(**kwargs)
    options, signature, constants, attrs = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        source = ASTSource(kernel, signature, constants, attrs)
        compiled = triton.compile(source, target=target, options=options.__dict__)
    registers, spills = _REGISTERS.search(log.getvalue()), _SPILLS.search(log.getvalue())
    assert registers is not None
    assert spills is not None
    return {
        "registers": int(registers[1]),
        "spills": int(spills[1]) + int(spills[2]),
        "shared": int(compiled.metadata.shared),
    }
