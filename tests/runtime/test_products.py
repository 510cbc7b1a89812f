"""Products by addresses, without a GPU: what the library would be asked, and aten in its place."""

from __future__ import annotations

import ctypes
import gc
import itertools
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from iocompiler.ops.library_product import Problem
from iocompiler.runtime import cublaslt, products
from iocompiler.runtime.cublaslt import Description, Matrix
from iocompiler.runtime.products import Product, describe, supported

ROWS, COLUMNS = "rows", "columns"
BF16 = torch.bfloat16


def memory(batch: int, rows: int, columns: int, lie: str, room: int = 0) -> tuple[Tensor, Tensor]:
    """A tensor [batch, rows, columns] and what lies in all of its memory."""
    extents = (rows, columns + room) if lie == ROWS else (columns, rows + room)
    flat = torch.randn(batch, *extents)
    seen = flat if lie == ROWS else flat.transpose(1, 2)
    return seen[:, :rows, :columns], flat.flatten()


def strides(t: Tensor) -> tuple[int, int, int]:
    return t.stride(0), t.stride(1), t.stride(2)


def asked(
    of: Description, first: Tensor, second: Tensor, c: Tensor, d: Tensor, bias: Tensor | None = None
) -> None:
    """What the library does, on flat memory; ``bias``: where that is not ``c``."""

    def at(flat: Tensor, m: Matrix) -> Tensor:
        return flat.as_strided((of.batch, m.rows, m.columns), (m.stride, 1, m.leading))

    a, b = at(first, of.a), at(second, of.b)
    a, b = a.mT if of.transpose_a else a, b.mT if of.transpose_b else b
    added = at(c, of.c) if of.c is not None else 0
    if of.bias:
        row = (c if bias is None else bias)[: of.d.rows, None]
        added = row if of.c is None else added + row
    at(d, of.d).copy_(a @ b + added)


@pytest.mark.parametrize("added", ["", "bias", ROWS, COLUMNS])
@pytest.mark.parametrize("lies", list(itertools.product((ROWS, COLUMNS), repeat=3)))
def test_the_library_is_asked_for_the_product(lies: tuple[str, str, str], added: str) -> None:
    if "bias" in added and lies[2] == COLUMNS:
        pytest.skip("a bias along columns: declined below")
    if added in (ROWS, COLUMNS) and added != lies[2]:
        pytest.skip("a matrix that lies across the result: declined below")
    batch, m, n, k = 2, 3, 5, 4
    a, in_a = memory(batch, m, k, lies[0], room=1)
    b, in_b = memory(batch, k, n, lies[1], room=2)
    out, in_out = memory(batch, m, n, lies[2], room=3)
    c, in_c = memory(1, 1, n, ROWS) if added == "bias" else memory(batch, m, n, added or ROWS)
    given = None if not added else (0, 0, 1) if added == "bias" else strides(c)
    problem = Problem(batch, m, n, k, BF16, strides(a), strides(b), strides(out), given)
    described = describe(problem, 16)
    assert described is not None
    of, swapped = described
    expected = a @ b + (c if added else 0)
    asked(of, *((in_b, in_a) if swapped else (in_a, in_b)), in_c, in_out)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("lies", list(itertools.product((ROWS, COLUMNS), repeat=2)))
@pytest.mark.parametrize("m", [1, 3])
def test_the_library_adds_a_matrix_and_a_bias(m: int, lies: tuple[str, str]) -> None:
    batch, n, k = 1, 5, 4
    a, in_a = memory(batch, m, k, lies[0], room=1)
    b, in_b = memory(batch, k, n, lies[1], room=2)
    out, in_out = memory(batch, m, n, ROWS, room=3)
    c, in_c = memory(batch, m, n, ROWS, room=1)
    bias = torch.randn(n)
    given = strides(a), strides(b), strides(out), strides(c)
    described = describe(Problem(batch, m, n, k, BF16, *given, bias=True), 16)
    assert described is not None
    of, swapped = described
    assert of.c is not None
    assert of.bias
    asked(of, *((in_b, in_a) if swapped else (in_a, in_b)), in_c, in_out, bias)
    torch.testing.assert_close(out, a @ b + c + bias)


PLAIN = Problem(1, 3, 5, 4, BF16, (0, 4, 1), (0, 5, 1), (0, 5, 1))


@pytest.mark.parametrize(
    "other",
    [
        replace(PLAIN, dtype=torch.float32),  # a user's choice of tf32
        replace(PLAIN, a=(0, 8, 2)),  # no unit stride
        replace(PLAIN, a=(0, 0, 1)),  # one row for all
        replace(PLAIN, b=(0, 4, 1)),  # rows that overlap
        replace(PLAIN, m=0),
        replace(PLAIN, k=0),
        replace(PLAIN, batch=2, a=(12, 4, 1), b=(0, 5, 1), out=(0, 5, 1)),  # all in one place
        replace(PLAIN, out=(0, 1, 3), added=(0, 0, 1)),  # a bias along columns
        replace(PLAIN, added=(0, 1, 3)),  # lies across the result
        replace(PLAIN, added=(0, 0, 2)),  # every other element
        replace(PLAIN, added=(0, 0, 0)),  # one number
        replace(PLAIN, added=(0, 0, 1), bias=True),  # one row for all as a matrix
        replace(PLAIN, added=(0, 1, 3), bias=True),  # lies across the result
        replace(PLAIN, out=(0, 1, 3), added=(0, 1, 3), bias=True),  # a bias along columns
    ],
)
def test_other_forms_are_not_asked_for(other: Problem) -> None:
    assert supported(PLAIN)
    assert not supported(other)


WIDE = replace(PLAIN, n=16, b=(0, 16, 1), out=(0, 16, 1), added=(0, 0, 1))
GELU = replace(WIDE, sums=(0, 24, 1), activation="gelu")


@pytest.mark.parametrize("bias", [True, False])
def test_sums_are_stored_beside_their_gelu(bias: bool) -> None:
    """Their rows may be further apart than the activation's."""
    described = describe(GELU if bias else replace(GELU, added=None), 16)
    assert described is not None
    of, swapped = described
    assert swapped
    assert of.sums == Matrix(16, 3, 24)
    assert of.d == Matrix(16, 3, 16)
    assert of.bias == bias


@pytest.mark.parametrize(("activation", "epilogue"), [("gelu", 36), ("relu", 6)])
def test_an_activation_alone(activation: Any, epilogue: int) -> None:
    described = describe(replace(WIDE, activation=activation), 16)
    assert described is not None
    of, swapped = described
    assert (of.activation, of.sums, of.bias, swapped) == (activation, None, True, True)
    told: dict[int, int] = {}

    def set_attribute(description: object, attribute: int, value: Any, size: int) -> int:
        told[attribute] = ctypes.cast(value, ctypes.POINTER(ctypes.c_uint32))[0]
        return 0

    library = types.SimpleNamespace(
        cublasLtMatmulDescCreate=lambda *_: 0,
        cublasLtMatmulDescSetAttribute=set_attribute,
        cublasLtMatrixLayoutCreate=lambda *_: 0,
    )
    cublaslt._described(library, of, [])
    assert told[7] == epilogue  # CUBLASLT_MATMUL_DESC_EPILOGUE


def test_sums_by_columns() -> None:
    turned = replace(GELU, m=16, n=3, a=(0, 4, 1), b=(0, 3, 1), out=(0, 1, 16), sums=(0, 1, 24))
    assert describe(turned, 16) is None  # a bias along columns
    described = describe(replace(turned, added=None), 16)
    assert described is not None
    assert described[0].sums == Matrix(16, 3, 24)
    assert not described[1]


@pytest.mark.parametrize(
    ("other", "alignment"),
    [
        (GELU, 8),
        (replace(GELU, sums=(0, 20, 1)), 256),  # rows that are not aligned
        (replace(GELU, n=12), 256),  # that do not end where a vector does
        (replace(GELU, sums=(0, 8, 1)), 256),  # rows that overlap
        (replace(GELU, sums=(0, 1, 16)), 256),  # across the activation
        (replace(GELU, added=(0, 16, 1)), 256),  # a matrix added
        (replace(GELU, batch=2, a=(12, 4, 1), out=(48, 16, 1), sums=(72, 24, 1)), 256),
        (replace(GELU, activation="relu"), 256),  # of which signs are stored
        (replace(GELU, activation=None), 256),
        (replace(WIDE, n=12, activation="relu"), 256),
        (replace(WIDE, added=(0, 16, 1), activation="gelu"), 256),
    ],
)
def test_other_sums_are_not_asked_for(other: Problem, alignment: int) -> None:
    assert describe(GELU, 16) is not None
    assert describe(other, alignment) is None


@pytest.mark.parametrize("extents", [(1, 5, 4), (3, 1, 4), (3, 5, 1), (1, 1, 1)])
def test_extents_of_one(extents: tuple[int, int, int]) -> None:
    """Their strides mean nothing."""
    m, n, k = extents
    a, in_a = memory(1, m, k, ROWS)
    b, in_b = memory(1, k, n, COLUMNS)
    out, in_out = memory(1, m, n, ROWS)
    a_strides = (7, 1 if m == 1 else k, 1)
    problem = Problem(1, m, n, k, BF16, a_strides, strides(b), strides(out))
    described = describe(problem, 256)
    assert described is not None
    of, swapped = described
    asked(of, *((in_b, in_a) if swapped else (in_a, in_b)), in_out, in_out)
    torch.testing.assert_close(out, a @ b)


@pytest.mark.parametrize("added", [None, (0, 0, 1), (0, 5, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_aten_in_its_place(dtype: torch.dtype, added: tuple[int, int, int] | None) -> None:
    a, b = torch.randn(3, 4).to(dtype), torch.randn(5, 4).to(dtype).t()
    c = torch.randn(3, 5).to(dtype)
    out = torch.full((3, 5), float("nan"), dtype=dtype)

    def problem(m: int) -> Problem:
        return Problem(1, m, 5, 4, dtype, (0, 4, 1), (0, 1, 4), (0, 5, 1), added)

    product = Product(problem, torch.device("cpu"))
    addresses = a.data_ptr(), b.data_ptr(), out.data_ptr(), c.data_ptr() if added else 0
    product.run(0, (3,), *addresses)
    expected = a @ b + (0 if added is None else c if added[1] else c[0])
    torch.testing.assert_close(out, expected)
    out.fill_(float("nan"))
    product.run(0, (2,), *addresses)
    torch.testing.assert_close(out[:2], expected[:2])
    assert out[2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_aten_in_its_place_stores_sums_as_they_are(dtype: torch.dtype) -> None:
    a, b = torch.randn(3, 40).to(dtype), torch.randn(5, 40).to(dtype).t()
    out = torch.full((3, 7), float("nan"))
    problem = Problem(
        1, 3, 5, 40, dtype, (0, 40, 1), (0, 1, 40), (0, 7, 1), stored=torch.float32
    )  # fmt: skip
    run = Product(lambda: problem, torch.device("cpu")).run
    run(0, (), a.data_ptr(), b.data_ptr(), out.data_ptr())
    torch.testing.assert_close(out[:, :5], a.float() @ b.float())
    assert out[:, 5:].isnan().all()


@pytest.mark.parametrize("added", [None, (0, 0, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_aten_in_place_of_a_gelu(dtype: torch.dtype, added: tuple[int, int, int] | None) -> None:
    a, b, c = torch.randn(3, 4).to(dtype), torch.randn(5, 4).to(dtype).t(), torch.randn(5).to(dtype)
    out = torch.full((3, 5), float("nan"), dtype=dtype)
    sums = torch.full((3, 7), float("nan"), dtype=dtype)
    plain = Problem(1, 3, 5, 4, dtype, (0, 4, 1), (0, 1, 4), (0, 5, 1), added)
    problem = replace(plain, sums=(0, 7, 1), activation="gelu")
    addresses = a.data_ptr(), b.data_ptr(), out.data_ptr(), c.data_ptr() if added else 0
    Product(lambda: problem, torch.device("cpu")).run(0, (), *addresses, sums=sums.data_ptr())
    expected = torch.mm(a, b) if added is None else torch.addmm(c, a, b)
    torch.testing.assert_close(sums[:, :5], expected, rtol=0, atol=0)
    assert sums[:, 5:].isnan().all()
    gelu = torch.nn.functional.gelu(expected, approximate="tanh")
    torch.testing.assert_close(out, gelu, rtol=0, atol=0)
    for activation, of in (("gelu", gelu), ("relu", expected.relu())):
        out.fill_(float("nan"))
        alone = replace(plain, activation=activation)  # type: ignore[arg-type]
        Product(lambda alone=alone: alone, torch.device("cpu")).run(0, (), *addresses)
        torch.testing.assert_close(out, of, rtol=0, atol=0)


class Library:
    """A prepared product that notes what it is told; ``status`` is what its calls return."""

    workspace = 0

    def __init__(self, status: int = 0) -> None:
        self.told: list[tuple[object, ...]] = []
        self.status = status

    def set_bias(self, address: int) -> None:
        self.told.append(("bias", address))

    def set_sums(self, address: int) -> None:
        self.told.append(("sums", address))

    def run(self, *addresses: int) -> int:
        self.told.append(addresses)
        return self.status


@pytest.fixture
def on_library(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[..., None]]:
    guards = types.SimpleNamespace(_empty_strided_cuda=torch.empty_strided)
    monkeypatch.setattr(torch._C._dynamo, "guards", guards)
    return products.on_library


def test_the_addresses_of_a_gelu(on_library: Callable[..., Callable[..., None]]) -> None:
    """What stands in the description is changed before the call, and only where it is another."""
    library = Library()
    run = on_library(library, True, GELU, pytest.fail)
    run(7, 1, 2, 3, 4, 0, 5)
    run(7, 1, 2, 3, 4, 0, 6)
    run(7, 1, 2, 3, 4, 0, 6)
    call = (7, 2, 1, 3, 3, 0)
    assert library.told == [("bias", 4), ("sums", 5), call, ("sums", 6), call, call]


def test_a_gelu_without_a_bias(on_library: Callable[..., Callable[..., None]]) -> None:
    library = Library()
    on_library(library, True, replace(GELU, added=None), pytest.fail)(7, 1, 2, 3, 0, 0, 5)
    assert library.told == [("sums", 5), (7, 2, 1, 3, 3, 0)]


def test_a_gelu_that_the_library_refuses(on_library: Callable[..., Callable[..., None]]) -> None:
    given: list[tuple[int, ...]] = []
    run = on_library(Library(status=15), True, GELU, lambda *addresses: given.append(addresses))
    run(7, 1, 2, 3, 4, 0, 5)
    assert given == [(7, 1, 2, 3, 4, 0, 5)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_aten_in_its_place_rounds_a_matrix_and_a_bias_once(dtype: torch.dtype) -> None:
    a, b = torch.randn(3, 4).to(dtype), torch.randn(5, 4).to(dtype).t()
    c, bias = torch.randn(3, 5).to(dtype), torch.randn(5).to(dtype)
    expected = (a.double() @ b.double() + c.double() + bias.double()).to(dtype)
    problem = Problem(1, 3, 5, 4, dtype, (0, 4, 1), (0, 1, 4), (0, 5, 1), (0, 5, 1), bias=True)
    run = Product(lambda: problem, torch.device("cpu")).run
    out = torch.full((3, 5), float("nan"), dtype=dtype)
    for into in (out, c):  # over what is added, too
        run(0, (), *(tensor.data_ptr() for tensor in (a, b, into, c, bias)))
        torch.testing.assert_close(into, expected)


def test_a_sum_over_nothing_is_zero() -> None:
    out = torch.full((3, 5), float("nan"), dtype=BF16)
    zero = Problem(1, 3, 5, 0, BF16, (0, 1, 1), (0, 5, 1), (0, 5, 1))
    Product(lambda: zero, torch.device("cpu")).run(0, (), 0, 0, out.data_ptr())
    assert (out == 0).all()


def test_sizes_that_go_on_changing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_MOST_SIZES", 3)
    a, b, out = (
        torch.randn(8, 4).to(BF16),
        torch.randn(4, 5).to(BF16),
        torch.empty(8, 5, dtype=BF16),
    )
    product = Product(lambda m: replace(PLAIN, m=m), torch.device("cpu"))
    for m in (1, 2, 3, 4, 1, 5, 8):
        out.fill_(float("nan"))
        product.run(0, (m,), a.data_ptr(), b.data_ptr(), out.data_ptr())
        torch.testing.assert_close(out[:m], a[:m] @ b)
        assert len(product._runs) <= 3


@pytest.fixture
def willing(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """The calls of a library that says yes to everything: names and arguments."""
    found: list[tuple[str, tuple[Any, ...]]] = []

    class Willing:
        def __getattr__(self, name: str) -> Callable[..., int]:
            def call(*arguments: Any) -> int:
                found.append((name, arguments))
                if name.endswith("GetHeuristic"):
                    arguments[-1]._obj.value = 1
                return 0

            return call

    monkeypatch.setattr(cublaslt, "library", Willing)
    monkeypatch.setattr(cublaslt, "_handle", lambda device: ctypes.c_void_p(1))
    return found


@pytest.mark.parametrize("added", [None, (0, 5, 1)])
def test_what_the_library_made_is_given_back(
    added: tuple[int, int, int] | None, willing: list[tuple[str, tuple[Any, ...]]]
) -> None:
    described = describe(replace(PLAIN, added=added), 16)
    assert described is not None
    found = cublaslt.prepared(described[0], 0)
    called = Counter(name for name, _ in willing)
    made = {name: n for name, n in called.items() if name.endswith("Create")}
    assert made["cublasLtMatrixLayoutCreate"] == (3 if added is None else 4)
    assert found.run(0, 1, 2, 3, 3, 0) == 0
    del found
    gc.collect()
    called = Counter(name for name, _ in willing)
    assert {name: called[name.replace("Create", "Destroy")] for name in made} == made


def test_the_dtypes_that_matrices_are_described_in(
    willing: list[tuple[str, tuple[Any, ...]]],
) -> None:
    """NVIDIA's numbers: 14 is bfloat16, 0 is float32. Operands are one thing, what is stored is
    another.
    """
    for stored, expected in ((None, [14, 14, 14]), (torch.float32, [14, 14, 0])):
        willing.clear()
        described = describe(replace(PLAIN, stored=stored), 16)
        assert described is not None
        cublaslt.prepared(described[0], 0)
        dtypes = [given[1] for name, given in willing if name == "cublasLtMatrixLayoutCreate"]
        assert dtypes == expected
