"""Calls of a library that are made while kernels are being compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iocompiler.ops import library
from iocompiler.plan.data import AtenStep, Plan, Ref, TensorSpec
from iocompiler.runtime import rehearsal
from iocompiler.runtime.rehearsal import rehearse
from tests.runtime.plans import S0, plan, spec

CPU = torch.device("cpu")
SHAPE, STRIDE = (2, 3, 8, 16), (384, 16, 48, 1)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[Any]]]:
    """The calls: their names, and the tensors they were given."""
    found: list[tuple[str, list[Any]]] = []

    def function(name: str) -> Any:
        return lambda *args: found.append((name, list(args)))

    monkeypatch.setattr(library, "function", function)
    monkeypatch.setattr(rehearsal.torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 30))
    return found


def forward(name: str, query: str, kernel: str = "cudnn", dropout_p: float = 0.0) -> AtenStep:
    args = (Ref(query), Ref(query), Ref(query), None, 0.25, True, dropout_p, kernel, "ssss")
    outputs = ((f"{name}_0", TensorSpec(SHAPE, STRIDE, torch.bfloat16, "cpu")), *[(None, None)] * 3)
    return AtenStep("iocompiler.attention_forward.default", args, (), outputs, False)


def attending(*steps: AtenStep) -> Plan:
    inputs = {
        "q": TensorSpec(SHAPE, STRIDE, torch.bfloat16, "cpu"),
        "long": TensorSpec((2, 3, S0, 16), STRIDE, torch.bfloat16, "cpu"),
        "x": spec(8),
    }
    return plan(inputs, list(steps), (Ref("x"),))


def test_each_kind_once_on_memory_that_lies_the_same(made: list[Any]) -> None:
    rehearse(attending(forward("a", "q"), forward("b", "q"), forward("c", "a_0")), CPU, {})
    ((name, args),) = made
    assert name == "attention_forward"
    assert (args[0].shape, args[0].stride(), args[0].dtype) == (SHAPE, STRIDE, torch.bfloat16)
    assert args[3:] == [None, 0.25, True, 0.0, "cudnn", "ssss"]


def test_random_numbers_and_other_libraries_are_left_alone(made: list[Any]) -> None:
    rehearse(attending(forward("a", "q", dropout_p=0.1), forward("b", "q", "flash")), CPU, {})
    assert made == []


def test_sizes_are_hints_and_those_without_are_left_out(made: list[Any]) -> None:
    graph = attending(forward("a", "long"))
    rehearse(graph, CPU, {})
    assert made == []
    rehearse(graph, CPU, {S0.name: 5})
    assert made[0][1][0].shape == (2, 3, 5, 16)


def test_little_memory_is_left_to_the_program(
    made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal.torch.cuda, "mem_get_info", lambda device: (1 << 16, 1 << 30))
    rehearse(attending(forward("a", "q")), CPU, {})
    assert made == []


def test_a_failure_is_left_to_who_calls_in_earnest(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(name: str) -> Any:
        raise RuntimeError("no such engine")

    monkeypatch.setattr(library, "function", function)
    monkeypatch.setattr(rehearsal.torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 30))
    rehearse(attending(forward("a", "q")), CPU, {})


@pytest.mark.gpu
def test_what_draws_random_numbers_draws_the_same() -> None:
    """A first call leaves the generator where every other one does."""
    import iocompiler as ioc

    def attend(q: torch.Tensor) -> torch.Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        return torch.nn.functional.dropout(out, 0.5)

    q = torch.randn(2, 4, 128, 64, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(attend, backend=ioc.Compiler(strict=True))
    found = []
    for _ in range(3):
        torch.manual_seed(5)
        found.append(compiled(q))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
