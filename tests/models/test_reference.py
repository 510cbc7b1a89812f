"""Every model of the zoo through capture, rewriting, AOTAutograd and the GPU planner, run by the
tile interpreter.

The plan is the one a GPU would get; the interpreter stands for its kernels, so this needs no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.plan.data import KernelStep
from tests.accuracy import assert_as_accurate_as_eager, compare
from tests.compiling import OLD_TORCH
from tests.models.stepping import adamw_steps
from tests.models.zoo import CASES, LAYERS, PLAIN, SDPA, T5_RELU, TINY, Case, Size, with_signs

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SLOW = pytest.mark.slow
ONE_OPERATOR = pytest.mark.skipif(
    OLD_TORCH,
    reason="in evaluation the encoder layer is one operator, which Dynamo does not trace",
)
_TRAINED = ("bert", "gpt2", "llama", "t5")


def _planned(records: list[Compilation] | None = None) -> Callable[[Any], Any]:
    note = None if records is None else records.append
    return lambda f: torch.compile(f, backend=Compiler(engine="reference", on_compiled=note))


def _cases() -> list[object]:
    """Plain models and layers: a training step in each dtype. The rest is slow."""
    found = []
    for case in (*PLAIN, *SDPA, *LAYERS):
        for train in (True, False):
            for dtype in (FLOAT32, BFLOAT16):
                marks = () if train and case not in SDPA else (SLOW,)
                label = f"{case}-{'train' if train else 'forward'}-{str(dtype)[6:]}"
                found.append(pytest.param(case, train, dtype, id=label, marks=marks))
    return found


@pytest.mark.parametrize(("case", "train", "dtype"), _cases())
def test_is_as_accurate_as_eager(case: Case, train: bool, dtype: torch.dtype) -> None:
    records: list[Compilation] = []
    assert_as_accurate_as_eager(
        case.module, case.draws(dtype), _planned(records), dtype=dtype, train=train
    )
    assert not [fallback for record in records for fallback in record.fallbacks]
    graphs = {name for record in records for name in record.plans}
    assert graphs == ({"forward", "backward"} if train else {"inference"})
    steps = [step for record in records for plan in record.plans.values() for step in plan.steps]
    # in evaluation PyTorch itself runs the whole encoder layer as one operator
    fused = case.name == "encoder-layer" and not train
    assert fused or any(isinstance(step, KernelStep) for step in steps)


def test_t5_with_relu() -> None:
    inputs, signs = T5_RELU.inputs(), dict[str, torch.Tensor]()
    assert_as_accurate_as_eager(T5_RELU.module, inputs, _planned(), dtype=FLOAT32)
    assert_as_accurate_as_eager(
        lambda: with_signs(T5_RELU.module(), signs), inputs, _planned(), dtype=BFLOAT16
    )
    assert len(signs) == 4  # two layers, in the encoder and in the decoder


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_a_compiled_optimizer_steps_like_eager(dtype: torch.dtype) -> None:
    compiled = adamw_steps(dtype, TINY, "cpu", _planned())
    eager, wide = (adamw_steps(d, TINY, "cpu", None) for d in (dtype, torch.float64))
    bad = [str(c) for c in compare(compiled, eager, wide, dtype) if not c.ok]
    assert not bad


@pytest.mark.parametrize(
    "name", ["encoder-layer", *(pytest.param(n, marks=SLOW) for n in ("bert-eager", "gpt2-sdpa"))]
)
def test_autocast(name: str) -> None:
    case = CASES[name]
    assert_as_accurate_as_eager(
        case.module, case.draws(BFLOAT16), _planned(), dtype=FLOAT32, autocast=BFLOAT16
    )


def test_a_graph_break_gives_two_graphs() -> None:
    records: list[Compilation] = []
    case = CASES["graph-break"]
    assert_as_accurate_as_eager(case.module, case.inputs(), _planned(records), dtype=FLOAT32)
    assert len(records) == 2


@pytest.mark.parametrize(
    "name", ["mlp", pytest.param("encoder-layer", marks=ONE_OPERATOR), "gpt2-eager", "llama-eager"]
)
def test_one_compilation_serves_every_size(name: str) -> None:
    case, records = CASES[name], list[Compilation]()
    module = case.module().eval()
    compiled = torch.compile(
        module, backend=Compiler(engine="reference", on_compiled=records.append), dynamic=True
    )
    for seed, (batch, length) in enumerate([(2, 9), (3, 14), (5, 9), (4, 31)]):
        size = Size(TINY.hidden, TINY.layers, TINY.vocabulary, batch, length)
        inputs = case.inputs(size, seed)
        with torch.no_grad():
            ours, theirs = compiled(**inputs), module(**inputs)
        ours, theirs = (r if torch.is_tensor(r) else r["logits"] for r in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(records) == 1


@pytest.mark.parametrize(
    "name", ["encoder-layer", *(pytest.param(f"{n}-eager", marks=SLOW) for n in _TRAINED)]
)
@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "default"])
def test_a_step_on_every_size(name: str, dynamic: bool | None) -> None:
    """One compilation where sizes are said to change, at most one more where they are seen to."""
    case, records = CASES[name], list[Compilation]()
    module = case.module().train()
    backend = Compiler(engine="reference", strict=True, on_compiled=records.append)
    compiled = torch.compile(module, backend=backend, dynamic=dynamic)
    for seed, (batch, length) in enumerate([(2, 9), (3, 14), (5, 9), (4, 31)]):
        size = Size(TINY.hidden, TINY.layers, TINY.vocabulary, batch, length)
        inputs = case.inputs(size, seed)
        found = []
        for function in (compiled, module):
            module.zero_grad()
            output = function(**inputs)
            loss = output.square().mean() if torch.is_tensor(output) else output["loss"]
            loss.backward()
            found.append([loss.detach(), *(p.grad.clone() for p in module.parameters())])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert len(records) <= (1 if dynamic else 2)


def test_dropout_repeats_with_the_seed_and_its_backward_sees_the_same_mask() -> None:
    @_planned()
    def dropped(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x.exp(), 0.4, True)

    x = torch.rand(33, 65, requires_grad=True)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        x.grad = None
        out = dropped(x)
        out.sum().backward()
        assert torch.equal(out == 0, x.grad == 0)
        torch.testing.assert_close(out, x.grad)  # d exp = exp
        outs.append(out.detach())
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert abs((outs[0] != 0).double().mean() - 0.6) < 0.06
