"""Products whose algorithm is measured, and a bench that makes up the times."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from iocompiler.cost_model.device import DEVICES
from iocompiler.ops import linear_cross_entropy
from iocompiler.ops.library_product import Algorithm, Problem
from iocompiler.plan.addressed import addressed
from iocompiler.plan.data import AtenStep, Plan, Ref, Step
from iocompiler.runtime import products
from iocompiler.runtime.cache import default_cache
from iocompiler.runtime.tune_products import Selection, tune_products
from tests.runtime.plans import on_a_gpu, plan, spec

H100 = DEVICES["h100"]
BF16 = torch.bfloat16
CPU = torch.device("cpu")


def algorithm(number: int) -> Algorithm:
    return Algorithm(66, number, 1, 0, 0, 0, 36, 0, 2)


FIRST, SECOND, THIRD = map(algorithm, range(3))


class FakeBench:
    """Proposes the same algorithms for all; times by a function of these; counts what is asked."""

    version = 130000

    def __init__(
        self,
        seconds: Mapping[Algorithm, float | None],
        proposed: Sequence[Algorithm] = (FIRST, SECOND, THIRD),
    ):
        self.seconds, self.algorithms = seconds, proposed
        self.timed: list[Problem] = []

    def proposed(self, problem: Problem) -> Sequence[Algorithm]:
        return self.algorithms

    def time(self, problem: Problem, algorithms: Sequence[Algorithm]) -> list[float | None]:
        assert list(algorithms) == list(self.algorithms)
        self.timed.append(problem)
        return [self.seconds.get(each, 9.0) for each in algorithms]


def half(*shape: Any) -> Any:
    return spec(*shape, dtype=BF16)


def mm(out: str, a: str, b: str, of: Any, bias: str = "") -> AtenStep:
    args = tuple(map(Ref, (bias, a, b) if bias else (a, b)))
    target = "aten.addmm.default" if bias else "aten.mm.default"
    return AtenStep(target, args, (), ((out, of),), False, out)


def chain(rows: Any = 4096, layers: int = 3) -> Plan:
    """Equal layers, as a GPU has them."""
    of = half(rows, 1024)
    steps: list[Step] = [mm(f"y{i + 1}", f"y{i}", "w", of) for i in range(layers)]
    graph = plan({"y0": of, "w": half(1024, 1024)}, steps, (Ref(f"y{layers}"),))
    return addressed(on_a_gpu(graph))


def tuned(
    graph: Plan, bench: FakeBench, hints: Mapping[str, int] | None = None, **more: Any
) -> tuple[Plan, tuple[Selection, ...]]:
    return tune_products(graph, H100, hints or {}, bench, default_cache(), **more)


def faster(which: Algorithm = THIRD) -> FakeBench:
    return FakeBench({which: 1.0})


LAYER = Problem(1, 4096, 1024, 1024, BF16, (0, 1024, 1), (0, 1024, 1), (0, 1024, 1))


def asked_of(monkeypatch: pytest.MonkeyPatch) -> dict[Problem, Algorithm | None]:
    """By product, the algorithm it is prepared with."""
    found: dict[Problem, Algorithm | None] = {}
    prepare = products._prepare

    def note(problem: Problem, alignment: int, device: Any, algorithm: Any = None) -> Any:
        found[problem] = algorithm
        return prepare(problem, alignment, device)

    monkeypatch.setattr(products, "_prepare", note)
    return found


def on_a_gpu_s_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors say that they are there."""
    stream = types.SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)


def lce(rows: int, vocabulary: int, width: int, bias: bool = False) -> Plan:
    """A head and its loss with all gradients."""
    given: dict[str, Any] = {
        "x": half(rows, width),
        "w": half(vocabulary, width),
        "b": half(vocabulary),
        "t": spec(rows, dtype=torch.int64),
    }
    args = (Ref("x"), Ref("w"), Ref("b") if bias else None, Ref("t"), None, None)
    setting = (-100, 0.0, 1.0, 1.0, False, False, True, True, bias)
    outputs = (
        ("losses", spec(rows)),
        (None, None),
        ("dx", half(rows, width)),
        ("dw", half(vocabulary, width)),
        ("db", spec(vocabulary)) if bias else (None, None),
    )
    step = AtenStep(str(linear_cross_entropy.GRADIENTS), (*args, *setting), (), outputs, True)
    return plan(given, [step], (Ref("losses"), Ref("dx"), Ref("dw")))
