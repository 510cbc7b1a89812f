"""Multi-tensor operators become plain ones, and an optimizer step computes what it did."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from iocompiler.ops.decompositions import table
from iocompiler.passes.foreach import _ELEMENTS, foreach

aten = torch.ops.aten
A = [torch.tensor([0.5, -1.5, 2.25]), torch.tensor([[1.5], [3.0]]), torch.tensor(0.25)]
B = [torch.tensor([2.0, 0.5, -1.0]), torch.tensor([[0.1], [-3.0]]), torch.tensor(4.0)]
C = [torch.tensor([1.0, 3.0, 0.7]), torch.tensor([[-2.0], [0.3]]), torch.tensor(0.5)]
NUMBERS = [0.3, 2, 1.5]


def multi(gm: GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if "_foreach" in str(node.target)]


def expanded(function: Callable[..., Any], *args: Any) -> GraphModule:
    gm = make_fx(function, tracing_mode="fake")(*args)
    assert multi(gm)
    foreach(gm)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return gm


def arguments(op: Any) -> list[Any]:
    """Fitting arguments, by the schema's types."""
    lists, found = iter((A, B, C)), []
    for argument in op._schema.arguments:
        kind = str(argument.type)
        if argument.kwarg_only or argument.name in ("alpha", "non_blocking"):
            continue
        if kind == "List[Tensor]":
            found.append(next(lists))
        elif kind == "Tensor":
            found.append(torch.tensor(0.3))
        else:
            found.append({"number": 0.3, "Optional[number]": 0.3}.get(kind, NUMBERS))
    if op is aten._foreach_pow.ScalarAndTensor:
        return [0.9, A]
    return found


@pytest.mark.parametrize("op", list(_ELEMENTS), ids=str)
def test_every_operator_as_in_eager(op: Any) -> None:
    given = arguments(op)
    gm = expanded(lambda *args: op(*args), *given)
    assert not multi(gm)
    for ours, theirs in zip(gm(*given), op(*given), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-6, atol=1e-6)
        assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 0.75, 1.0, -0.6])
def test_lerp_from_the_nearer_end(weight: float) -> None:
    gm = expanded(lambda a, b: torch._foreach_lerp(a, b, weight), A, B)
    for ours, theirs in zip(gm(A, B), torch._foreach_lerp(A, B, weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_alpha_is_kept() -> None:
    gm = expanded(lambda a, b: torch._foreach_sub(a, b, alpha=3), A, B)
    for ours, a, b in zip(gm(A, B), A, B, strict=True):
        torch.testing.assert_close(ours, a - 3 * b)


def test_norms_stay_one_call() -> None:
    gm = make_fx(lambda a: torch._foreach_norm(a), tracing_mode="fake")(A)
    assert foreach(gm) == 0
    assert multi(gm) == [aten._foreach_norm.Scalar]


def test_step_counts_on_the_host_stay_one_call() -> None:
    """The counts are results; what kernels need of them is computed from the old ones."""

    def f(steps: list[Tensor], parameters: list[Tensor]) -> Any:
        new = torch._foreach_add(steps, 1)
        return new, torch._foreach_div(parameters, torch._foreach_sqrt(new))

    with FakeTensorMode():
        steps = [torch.empty(()) for _ in range(3)]
        parameters = [torch.empty(5, device="cuda") for _ in range(3)]
        gm = make_fx(f)(steps, parameters)
    foreach(gm)
    gm.graph.lint()
    assert multi(gm) == [aten._foreach_add.Scalar]
    targets = [node.target for node in gm.graph.nodes]
    assert targets.count(aten.add.Tensor) == targets.count(aten.sqrt.default) == 3


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=True),
    "adam, one by one": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "adam, maximize": lambda p: torch.optim.Adam(p, lr=0.01, maximize=True, foreach=True),
    "adam, lr tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "sgd, nesterov": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, foreach=True
    ),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, foreach=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01, foreach=True),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_optimizer_steps(name: str) -> None:
    seen: list[GraphModule] = []

    def compiler(gm: GraphModule, _: Any) -> Any:
        foreach(gm)
        gm.graph.lint()
        gm.recompile()
        seen.append(gm)
        return make_boxed_func(gm.forward)

    backend = aot_autograd(
        fw_compiler=compiler,
        inference_compiler=compiler,
        decompositions=table(),
        keep_inference_input_mutations=True,
    )

    def stepped(compiled: bool, dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).to(dtype)
        optimizer = OPTIMIZERS[name](model.parameters())
        step = torch.compile(optimizer.step, backend=backend) if compiled else optimizer.step
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape).to(dtype)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                step()
        return [p.detach() for p in model.parameters()]

    for ours, theirs in zip(
        stepped(True, torch.float32), stepped(False, torch.float32), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert seen
    assert not any(multi(gm) for gm in seen)
