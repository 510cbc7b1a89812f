"""The models on a GPU: accuracy, sizes that change, two graphs, autocast, seeds, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from tests.accuracy import Results, assert_as_accurate_as_eager, compare
from tests.models.stepping import adamw_steps
from tests.models.zoo import CASES, LAYERS, MEDIUM, PLAIN, SDPA, Case, Size

pytestmark = pytest.mark.gpu

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
CASES_HERE = (*PLAIN, *SDPA, *LAYERS)


def _compiled(f: Any, records: list[Compilation] | None = None, **settings: Any) -> Any:
    note = None if records is None else records.append
    return torch.compile(f, backend=Compiler(on_compiled=note), **settings)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("train", [True, False], ids=["train", "forward"])
@pytest.mark.parametrize("case", CASES_HERE, ids=str)
def test_is_as_accurate_as_eager(case: Case, train: bool, dtype: torch.dtype) -> None:
    records: list[Compilation] = []
    assert_as_accurate_as_eager(
        lambda: case.module(MEDIUM),
        case.draws(dtype, MEDIUM),
        lambda module: _compiled(module, records),
        dtype=dtype,
        device="cuda",
        train=train,
    )
    assert not [fallback for record in records for fallback in record.fallbacks]
    assert len(records) == (2 if case.name == "graph-break" else 1)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_a_compiled_optimizer_steps_like_eager(dtype: torch.dtype) -> None:
    compiled = adamw_steps(dtype, MEDIUM, "cuda", _compiled)
    eager, wide = (adamw_steps(d, MEDIUM, "cuda", None) for d in (dtype, torch.float64))
    bad = [str(c) for c in compare(compiled, eager, wide, dtype) if not c.ok]
    assert not bad


@pytest.mark.parametrize("case", [c for c in CASES_HERE if c.name != "cell-loop"], ids=str)
def test_autocast(case: Case) -> None:
    assert_as_accurate_as_eager(
        lambda: case.module(MEDIUM),
        case.draws(BFLOAT16, MEDIUM),
        _compiled,
        dtype=FLOAT32,
        device="cuda",
        autocast=BFLOAT16,
    )


SIZES = [(2, 33), (3, 64), (5, 33), (4, 200), (1, 17), (7, 128)]
STRETCHY = ["mlp", "encoder-layer", "bert-eager", "gpt2-eager", "gpt2-sdpa", "llama-eager"]


def _sized(batch: int, length: int) -> Size:
    return Size(MEDIUM.hidden, MEDIUM.layers, MEDIUM.vocabulary, batch, length)


def _moved(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().cuda().requires_grad_(t.requires_grad) for n, t in inputs.items()}


def _loss(output: Any) -> Tensor:
    # not of the squares, whose mean is one after a norm, whatever was dropped before it
    loss: Tensor = output.float().exp().mean() if torch.is_tensor(output) else output["loss"]
    return loss


@pytest.mark.parametrize("train", [True, False], ids=["train", "forward"])
@pytest.mark.parametrize("name", STRETCHY)
def test_one_compilation_serves_every_size(name: str, train: bool) -> None:
    """Batch and length change; a batch of one may be compiled for itself, as torch.compile does."""
    case, records = CASES[name], list[Compilation]()
    module = case.module(MEDIUM).cuda().train(train)
    compiled = _compiled(module, records, dynamic=True)
    for seed, (batch, length) in enumerate(SIZES):
        inputs = _moved(case.inputs(_sized(batch, length), seed))
        losses, gradients = [], []
        for function in (compiled, module):
            module.zero_grad()
            with torch.set_grad_enabled(train):
                losses.append(_loss(function(**inputs)))
            if train:
                losses[-1].backward()
                gradients.append([p.grad.norm() for p in module.parameters()])
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
        for ours, theirs in zip(*gradients, strict=True) if train else ():
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-4)
    assert len(records) <= 1 + sum(batch == 1 for batch, _ in SIZES)


def test_a_second_size_without_dynamic_compiles_once_more_and_then_never() -> None:
    case, records = CASES["gpt2-eager"], list[Compilation]()
    module = case.module(MEDIUM).cuda().eval()
    compiled, counts = _compiled(module, records), []
    for seed, (batch, length) in enumerate([(2, 33), (3, 64), (5, 40), (4, 200)]):
        inputs = _moved(case.inputs(_sized(batch, length), seed))
        with torch.no_grad():
            torch.testing.assert_close(
                _loss(compiled(**inputs)), _loss(module(**inputs)), rtol=1e-3, atol=1e-4
            )
        counts.append(len(records))
    assert counts == [1, 2, 2, 2]


@pytest.mark.parametrize("name", ["bert-eager", "gpt2-eager", "t5-eager", "mlp"])
def test_a_seed_repeats_a_step_with_dropout(name: str) -> None:
    case = CASES[name]
    module = case.module(MEDIUM, dropout=0.2).cuda().train()
    compiled, inputs = _compiled(module), _moved(case.inputs(MEDIUM))

    def step(seed: int) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(seed)
        module.zero_grad()
        loss = _loss(compiled(**inputs))
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in module.parameters()]

    first, second, other = step(1), step(1), step(2)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], other[0])
    for one, two in zip(first[1], second[1], strict=True):
        # the gradient of an embedding is summed in any order
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_forward_and_backward_draw_the_same_mask() -> None:
    dropped = _compiled(lambda x: torch.nn.functional.dropout(x.exp(), 0.4, True))
    x = torch.rand(1023, 777, device="cuda", requires_grad=True)
    out = dropped(x)
    out.sum().backward()
    assert torch.equal(out == 0, x.grad == 0)
    torch.testing.assert_close(out, x.grad)  # d exp = exp
    assert abs((out != 0).double().mean().item() - 0.6) < 0.005


@pytest.mark.parametrize("name", ["gpt2-eager", "llama-sdpa", "vit-eager", "mlp"])
def test_reduce_overhead_sees_new_inputs(name: str) -> None:
    """Steps replayed from a CUDA graph, each on other inputs, against eager."""
    case = CASES[name]
    module = case.module(MEDIUM).cuda().train()
    compiled = _compiled_mode(module, "reduce-overhead")
    for seed in range(6):
        inputs = _moved(case.inputs(MEDIUM, seed))
        found = []
        for function in (compiled, module):
            module.zero_grad(set_to_none=True)
            loss = _loss(function(**inputs))
            loss.backward()
            found.append((loss.item(), [p.grad.norm().item() for p in module.parameters()]))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
        assert found[0][1] == pytest.approx(found[1][1], rel=2e-2, abs=1e-4)


def _compiled_mode(module: torch.nn.Module, mode: str) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(module, backend=Compiler(mode=mode))
    return compiled


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_graph_on_the_second_device_runs_there() -> None:
    case = CASES["mlp"]
    module = case.module(MEDIUM).to("cuda:1")
    x = case.inputs(MEDIUM)["x"].detach().to("cuda:1")
    out = _compiled(module)(x)
    assert out.device == torch.device("cuda:1")
    torch.testing.assert_close(out, module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # of eager's, too
def test_a_graph_on_two_devices_runs_on_both() -> None:
    def two(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        here = (x @ w).sin() * 2
        there = (here.to(v.device) @ v).exp().softmax(-1)
        return there @ v + here.to(v.device).cos()

    given = [torch.randn(64, 64, device=place) / 8 for place in ("cuda:0", "cuda:0", "cuda:1")]

    def outcome(function: Callable[..., Tensor], dtype: torch.dtype) -> Results:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in given]
        out = function(*leaves)
        assert out.device == torch.device("cuda:1")
        out.square().sum().backward()
        return Results(
            {"out": out.detach()}, {n: t.grad for n, t in zip("xwv", leaves, strict=True)}
        )

    ours, eager = (outcome(f, FLOAT32) for f in (_compiled(two), two))
    judged = compare(ours, eager, outcome(two, torch.float64), FLOAT32)
    assert all(c.ok for c in judged), judged
