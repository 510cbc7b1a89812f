"""The gradient of an embedding table as an operator: values, in place, where it is put in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.convenience import explain
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


def inference(run: Any, *inputs: Tensor, planned: bool = True) -> tuple[Any, Plan]:
    """What ``run`` gives as planned for a GPU, and the plan."""
    torch._dynamo.reset()
    records: list[Compilation] = []
    backend = Compiler(engine="reference", strict=True, cache=False, on_compiled=records.append)
    with target.planned_for((9, 0) if planned else None):
        result = torch.compile(run, backend=backend)(*inputs)
    return result, records[0].plans["inference"]


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

    def __init__(
        self, tied: bool = False, lookups: int = 1, indexed: bool = False, **settings: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.indexed = indexed
        self.table = nn.Embedding(11, 6, **settings)
        self.tied, self.lookups = tied, lookups

    def forward(self, x: Tensor) -> Tensor:
        ids = (x * 5).abs().long() % 11
        if self.indexed:
            rows = torch.tanh(self.table.weight[ids - 4])
        else:
            rows = sum(torch.tanh(self.table((ids + k) % 11)) for k in range(self.lookups))
        return F.linear(rows, self.table.weight).sin() if self.tied else rows * x[..., None]


CASES: dict[str, tuple[Looked, list[str]]] = {
    "alone": (Looked(), [FRESH]),
    "padding": (Looked(padding_idx=3), [FRESH]),
    "padding from behind": (Looked(padding_idx=-1), [FRESH]),
    "tied": (Looked(tied=True), [IN_PLACE]),
    "tied, looked up twice": (Looked(tied=True, lookups=2), [IN_PLACE, IN_PLACE]),
    "looked up three times": (Looked(lookups=3), [FRESH, IN_PLACE, IN_PLACE]),
    "indexed, from behind too": (Looked(indexed=True), [FRESH]),
    "indexed and tied": (Looked(indexed=True, tied=True), [IN_PLACE]),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    module, wanted = CASES[name]
    tied = "tied" in name
    records: list[Compilation] = []
    backend = Compiler(engine="reference", strict=True, on_compiled=records.append)
    torch._dynamo.reset()
    with target.planned_for((9, 0)):
        for each in compare_with_eager(
            lambda: module,
            {"x": torch.randn(3, 9, requires_grad=True)},
            lambda m: torch.compile(m, backend=backend, dynamic=tied),
            dtype=torch.bfloat16 if tied else torch.float32,
            device="cpu",
            train=True,
        ):
            assert each.ok, each
    assert gradients(records[0].plans["backward"]) == wanted


def test_a_tied_model_adds_nothing_apart() -> None:
    """A GPT-2's table: no call of aten, and no kernel that passes over a table."""
    model = GPT(vocabulary=4096, width=64, layers=1)
    tokens = torch.randint(0, 4096, (2, 8))
    report = explain(
        model, tokens, tokens, device="h200", training=True, compile_kernels=False
    )  # fmt: skip
    names = [kernel.name for kernel in report.kernels]
    assert [name for name in names if "embedding" in name and "." in name] == [IN_PLACE]
    table = model.tokens.weight.nbytes
    assert all(kernel.bytes < table for kernel in report.kernels if "." not in kernel.name)


def found(e: Tensor, x: Tensor, other: Tensor) -> dict[str, Any]:
    """What is made of a gradient e [11, 6], x [6, 11] and other [11, 6], by what it tests."""
    product = x.t() @ x[:, :6]
    return {
        "onto what dies": lambda: (product + e).sin(),
        "onto what dies, the other way": lambda: e + product,
        "onto what dies, by views": lambda: product.view(66).view(11, 6) + e,
        "onto an input": lambda: other + e,
        "onto what is returned": lambda: (product, product + e),
        "onto what lies otherwise": lambda: (x[:, :6].t() @ x).t() + e,
        "scaled": lambda: torch.add(product, e, alpha=2),
        "subtracted": lambda: product - e,
        "onto itself": lambda: e + e,
        "read again": lambda: (product + e, e.sin()),
        "onto a row": lambda: e + other[0],
        "onto a wider dtype": lambda: e + product.double(),
    }


PLACES = {
    **dict.fromkeys(
        ("onto what dies", "onto what dies, the other way", "onto what dies, by views"), IN_PLACE
    ),
    **dict.fromkeys(
        ("onto an input", "onto what is returned", "onto what lies otherwise"), COPIED
    ),
    **dict.fromkeys(
        ("scaled", "subtracted", "onto itself", "read again", "onto a row", "onto a wider dtype"),
        FRESH,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_where_it_is_added(name: str) -> None:
    torch.manual_seed(5)
    given = torch.randn(9, 6), torch.randn(6, 11), torch.randn(11, 6)
    ids = torch.randint(0, 11, (9,))

    def run(grad: Tensor, x: Tensor, other: Tensor) -> Any:
        e = torch.ops.aten.embedding_dense_backward(grad, ids, 11, -1, False)
        return found(e, x, other)[name]()

    results, plan = inference(run, *given)
    torch.testing.assert_close(results, run(*given))
    assert gradients(plan) == [PLACES[name]]


@pytest.mark.parametrize(
    ("dtype", "by_frequency", "planned"),
    [(torch.float64, False, True), (torch.float32, True, True), (torch.float32, False, False)],
)
def test_declined(dtype: torch.dtype, by_frequency: bool, planned: bool) -> None:
    """Double precision, a scale by frequency, a CPU: the library's, and added apart."""
    ids = torch.randint(0, 11, (9,))

    def run(grad: Tensor, x: Tensor) -> Tensor:
        e = torch.ops.aten.embedding_dense_backward(grad, ids, 11, -1, by_frequency)
        return e + x @ x.t()[:, :6]

    given = torch.randn(9, 6).to(dtype), torch.randn(11, 7).to(dtype)
    result, plan = inference(run, *given, planned=planned)
    torch.testing.assert_close(result, run(*given))
    assert gradients(plan) == [LIBRARY]


INDEXED = {
    "by a mask": lambda x, i: x[i > 4],
    "by two": lambda x, i: x[i, i % 6],
    "columns": lambda x, i: x[:, i % 6],
    "of three dimensions": lambda x, i: x.view(11, 2, 3)[i],
}


@pytest.mark.parametrize("name", INDEXED)
def test_other_gradients_of_indexing_stay(name: str) -> None:
    torch._dynamo.reset()
    records: list[Compilation] = []
    backend = Compiler(engine="reference", strict=True, on_compiled=records.append)
    x, i = torch.randn(11, 6, requires_grad=True), torch.arange(11) * 3 % 11
    run = lambda x, i: INDEXED[name](x, i).sin().sum()
    with target.planned_for((9, 0)):
        (mine,) = torch.autograd.grad(torch.compile(run, backend=backend)(x, i), x)
    torch.testing.assert_close(mine, *torch.autograd.grad(run(x, i), x))
    assert all(gradients(plan) == [] for record in records for plan in record.plans.values())
