"""The gradient of an embedding table as an operator: values, in place, where it is put in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.ops import target
from iocompiler.ops.embedding_gradient import GRADIENT, INTO, ONTO
from iocompiler.plan.data import AtenStep, Plan
from tests.accuracy import compare_with_eager
from tests.models.gpt import GPT

FRESH, COPIED, IN_PLACE = (
    f"iocompiler.embedding_gradient{form}.default" for form in ("", "_onto", "_")
)
LIBRARY = "aten.embedding_dense_backward.default"


def gradients(plan: Plan) -> list[str]:
    """The calls of a plan that make gradients of tables, or add to them."""
    names = [step.target for step in plan.steps if isinstance(step, AtenStep)]
    return [name for name in names if "embedding" in name]


def backward(run: Any, *inputs: Any, dynamic: bool = False) -> Plan:
    """The plan of the backward of ``run``, summed, for a GPU."""
    torch._dynamo.reset()
    records: list[Compilation] = []
    backend = Compiler(engine="reference", strict=True, cache=False, on_compiled=records.append)
    with target.planned_for((9, 0)):
        result = torch.compile(run, backend=backend, dynamic=dynamic)(*inputs)
        torch.stack([each.sum() for each in result if each.requires_grad]).sum().backward()
    return records[0].plans["backward"]


# --- the operator


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_values(dtype: torch.dtype, index: torch.dtype) -> None:
    torch.manual_seed(0)
    indices = torch.randint(0, 7, (3, 20)).to(index)
    grad = torch.randn(20, 3, 5).to(dtype).transpose(0, 1)
    base = torch.randn(5, 7).to(dtype).t()
    kept = indices != 2
    sums = torch.zeros(7, 5).double().index_add(0, indices[kept].long(), grad[kept].double())
    near = {"rtol": max(torch.finfo(dtype).eps, 1e-6), "atol": 1e-5}
    torch.testing.assert_close(GRADIENT(grad, indices, 7, 2), sums.to(dtype), **near)
    wanted, before = (sums + base).to(dtype), base.clone()
    found = ONTO(base, grad, indices, 2)
    torch.testing.assert_close(found, wanted, **near)
    assert torch.equal(base, before)
    assert found.is_contiguous()
    INTO(base, grad, indices, 2)
    torch.testing.assert_close(base, wanted, **near)


def test_no_tokens_and_one() -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert torch.equal(GRADIENT(torch.empty(0, 3), none, 4, -1), torch.zeros(4, 3))
    one = GRADIENT(torch.ones(3), torch.tensor(2), 4, -1)
    assert torch.equal(one, torch.tensor([0.0, 0, 1, 0])[:, None].expand(4, 3))


def test_as_torch_checks_it() -> None:
    grad, indices, base = torch.randn(2, 3, 5), torch.randint(0, 7, (2, 3)), torch.randn(7, 5)
    for operator, given in ((GRADIENT, (grad, indices, 7, -1)), (ONTO, (base, grad, indices, 1)),
                            (INTO, (base, grad, indices, -1))):  # fmt: skip
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(operator, given, test_utils=tests)


# --- where it is put in


class Looked(nn.Module):
    """Rows of a table, as a function of them; with a head tied to the table where asked for."""

    def __init__(self, tied: bool = False, lookups: int = 1, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(11, 6, **settings)
        self.tied, self.lookups = tied, lookups

    def forward(self, x: Tensor) -> Tensor:
        ids = (x * 5).abs().long() % 11
        rows = sum(torch.tanh(self.table((ids + k) % 11)) for k in range(self.lookups))
        return F.linear(rows, self.table.weight).sin() if self.tied else rows * x[..., None]


CASES: dict[str, tuple[Looked, list[str]]] = {
    "alone": (Looked(), [FRESH]),
    "padding": (Looked(padding_idx=3), [FRESH]),
    "padding from behind": (Looked(padding_idx=-1), [FRESH]),
    "tied": (Looked(tied=True), [IN_PLACE]),
    "tied, looked up twice": (Looked(tied=True, lookups=2), [IN_PLACE, IN_PLACE]),
    "looked up three times": (Looked(lookups=3), [FRESH, IN_PLACE, IN_PLACE]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [False, True])
def test_gradients(name: str, dtype: torch.dtype, dynamic: bool) -> None:
    module, wanted = CASES[name]
    records: list[Compilation] = []
    backend = Compiler(engine="reference", strict=True, on_compiled=records.append)
    torch._dynamo.reset()
    with target.planned_for((9, 0)):
        for each in compare_with_eager(
            lambda: module,
            {"x": torch.randn(3, 9, requires_grad=True)},
            lambda m: torch.compile(m, backend=backend, dynamic=dynamic),
            dtype=dtype,
            device="cpu",
            train=True,
        ):
            assert each.ok, each
    assert gradients(records[0].plans["backward"]) == wanted


def test_a_tied_model_adds_nothing_apart() -> None:
    """GPT-2's table: no call of aten, no kernel that reads and writes the whole table."""
    model = GPT()
    tokens = torch.randint(0, 65, (2, 8))
    records: list[Compilation] = []
    backend = Compiler(engine="reference", strict=True, cache=False, on_compiled=records.append)
    torch._dynamo.reset()
    with target.planned_for((9, 0)):
        torch.compile(model, backend=backend)(tokens, tokens).backward()
    plan = records[0].plans["backward"]
    assert gradients(plan) == [IN_PLACE]
    (table,) = (spec for step in plan.steps if isinstance(step, AtenStep)
                for _, spec in step.outputs if spec is not None and spec.shape == (65, 16))  # fmt: skip
    assert table.shape == (65, 16)  # the head's, and no other


def add(table: Tensor, ids: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    return F.embedding(ids, table).tanh(), (table * other).sin()


def subtracted(table: Tensor, ids: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    return (F.embedding(ids, table, scale_grad_by_freq=True).tanh(),)


def doubles(table: Tensor, ids: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    return (F.embedding(ids, table.double()).tanh(),)
