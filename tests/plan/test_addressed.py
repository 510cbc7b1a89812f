"""Which calls are products that a library makes of addresses, and what of."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch

from iocompiler.ops.biased_addmm import BIASED_ADDMM
from iocompiler.ops.library_product import LibraryProduct, Problem
from iocompiler.plan.addressed import addressed, library_product
from iocompiler.plan.data import AtenStep, Plan, Ref, Region, Step, TensorSpec
from iocompiler.runtime.products import Product, supported
from iocompiler.runtime.values import size_value, storage_elements
from iocompiler.tile.index import Size, product
from tests.accuracy import assert_near_exact

BF16, GPU = torch.bfloat16, "cuda:0"
S = sympy.Symbol("s", integer=True, positive=True)
T = sympy.Symbol("t", integer=True, positive=True)


def spec(
    *shape: Size,
    stride: tuple[Size, ...] | None = None,
    dtype: torch.dtype = BF16,
    device: str = GPU,
) -> TensorSpec:
    rows = tuple(product(shape[dim + 1 :]) for dim in range(len(shape)))
    return TensorSpec(shape, stride or rows, dtype, device)


def call(target: str, *given: TensorSpec, out: TensorSpec | None = None, **kwargs: Any) -> Any:
    """A call, and the specs of its operands: a and b, or what is added and these."""
    left, right = given[-2:]
    result = out or spec(*left.shape[:-1], right.shape[-1], dtype=left.dtype)
    names = ["added", "a", "b"][-len(given) :]
    step = AtenStep(
        f"aten.{target}.default", tuple(map(Ref, names)), tuple(kwargs.items()),
        (("out", result),), False,
    )  # fmt: skip
    return step, {**dict(zip(names, given, strict=True)), "out": result}


def of(target: str, *given: TensorSpec, **keywords: Any) -> LibraryProduct | None:
    return library_product(*call(target, *given, **keywords), GPU)


def test_rows_and_columns() -> None:
    turned = spec(6, 8, stride=(1, 6))
    assert of("mm", turned, spec(8, 4)) == LibraryProduct(
        1, 6, 4, 8, BF16, (0, 1, 6), (0, 4, 1), (0, 4, 1)
    )
    sliced = spec(8, 4, stride=(40, 1))
    assert of("mm", spec(6, 8), sliced) == LibraryProduct(
        1, 6, 4, 8, BF16, (0, 8, 1), (0, 40, 1), (0, 4, 1)
    )
    padded = spec(6, 4, stride=(64, 1))
    assert of("mm", spec(6, 8), spec(8, 4), out=padded) == LibraryProduct(
        1, 6, 4, 8, BF16, (0, 8, 1), (0, 4, 1), (0, 64, 1)
    )


def test_batches() -> None:
    heads = spec(3, 6, 8, stride=(8, 24, 1))
    once = spec(3, 8, 4, stride=(0, 4, 1))
    assert of("bmm", heads, once) == LibraryProduct(
        3, 6, 4, 8, BF16, (8, 24, 1), (0, 4, 1), (24, 4, 1)
    )


@pytest.mark.parametrize(("target", "added", "strides"), [
    ("addmm", spec(8), (0, 0, 1)),
    ("addmm", spec(1, 8), (0, 0, 1)),
    ("addmm", spec(6, 8, stride=(0, 1)), (0, 0, 1)),
    ("addmm", spec(6, 8), (0, 8, 1)),
    ("addmm", spec(6, 8, stride=(9, 1)), (0, 9, 1)),
    ("addmm", spec(8, stride=(2,)), None),
    ("addmm", spec(6, 1), None),  # a number a row
    ("addmm", spec(), None),
    ("addmm", spec(1), None),
    ("addmm", spec(6, 8, stride=(1, 6)), None),
    ("addmm", spec(8, dtype=torch.float32), None),
    ("addmm", spec(8, device="cpu"), None),
    ("baddbmm", spec(3, 6, 8), (48, 8, 1)),
    ("baddbmm", spec(8), (0, 0, 1)),
    ("baddbmm", spec(6, 8), None),  # one matrix for all
    ("baddbmm", spec(3, 1, 8), None),  # a bias a matrix
])  # fmt: skip
def test_what_is_added(target: str, added: TensorSpec, strides: tuple[int, ...] | None) -> None:
    operands = (spec(6, 8), spec(8, 8))
    if target == "baddbmm":
        operands = (spec(3, 6, 8), spec(3, 8, 8))
    found = of(target, added, *operands, beta=1, alpha=1)
    assert (found is None) == (strides is None)
    assert found is None or found.added == strides


@pytest.mark.parametrize(("given", "taken"), [
    ((spec(S, 8), spec(8, 8)), True),
    ((spec(S, 8), spec(8, 16, stride=(1, 8))), True),
    ((spec(6, 8, stride=(20, 1)), spec(8, 8)), False),
    ((spec(6, 12), spec(12, 8)), False),
    ((spec(6, 8), spec(8, 12)), False),
    ((spec(6, 8), spec(8, T)), False),
    ((spec(6, 8), spec(8, 8 * T)), True),
    ((spec(6, 8, stride=(1, 6)), spec(8, 8)), False),
])  # fmt: skip
def test_a_bias_is_added_to_lines_of_whole_vectors(
    given: tuple[TensorSpec, TensorSpec], taken: bool
) -> None:
    """Of others the library rounds the product first."""
    bias, matrix = spec(given[1].shape[1]), spec(given[0].shape[0], given[1].shape[1])
    assert (of("addmm", bias, *given) is not None) == taken
    assert of("addmm", matrix, *given) is not None
    step, specs = call("addmm", matrix, *given)
    both = replace(step, target=str(BIASED_ADDMM), args=(Ref("added"), Ref("bias"), *step.args[1:]))
    assert (library_product(both, {**specs, "bias": bias}, GPU) is not None) == taken
    apart = spec(*matrix.shape, stride=(matrix.shape[1] + 4, 1))
    assert library_product(both, {**specs, "bias": bias, "added": apart}, GPU) is None


@pytest.mark.parametrize("given", [
    [spec(6, 8, dtype=torch.float32), spec(8, 4, dtype=torch.float32)],
    [spec(6, 8, dtype=torch.float64), spec(8, 4, dtype=torch.float64)],
    [spec(6, 8, stride=(16, 2)), spec(8, 4)],
    [spec(6, 8, stride=(1, 1)), spec(8, 4)],  # windows
    [spec(6, 8, stride=(0, 1)), spec(8, 4)],  # one row, several times
    [spec(6, 8), spec(8, 4, stride=(7, 2))],
    [spec(6, 0), spec(0, 4)],
    [spec(0, 8), spec(8, 4)],
    [spec(6, 8, device="cuda:1"), spec(8, 4, device="cuda:1")],
    [spec(6, 8), spec(8, 4, device="cpu")],
    [spec(6, 8), spec(8, 4, dtype=torch.float16)],
])  # fmt: skip
def test_declined(given: list[TensorSpec]) -> None:
    device = given[0].device if given[0].device != "cuda:1" else "cuda:1"
    out = spec(given[0].shape[0], 4, dtype=given[0].dtype, device=device)
    assert of("mm", *given, out=out) is None


@pytest.mark.parametrize("out", [
    spec(6, 4, stride=(1, 6)), spec(6, 4, dtype=torch.float32), spec(6, 4, device="cuda:1"),
])  # fmt: skip
def test_results_declined(out: TensorSpec) -> None:
    assert of("mm", spec(6, 8), spec(8, 4), out=out) is None


@pytest.mark.parametrize("kwargs", [{"beta": 2}, {"alpha": 0.5}, {"beta": 0}])
def test_factors_declined(kwargs: dict[str, float]) -> None:
    assert of("addmm", spec(4), spec(6, 8), spec(8, 4), **kwargs) is None


@pytest.mark.parametrize("gelu", [True, False])
def test_an_activation(gelu: bool) -> None:
    given = spec(32), spec(6, 8), spec(8, 32)
    plain = of("addmm", *given)
    assert plain is not None
    found = of("_addmm_activation", *given, use_gelu=gelu)
    assert found == replace(plain, activation="gelu" if gelu else "relu")
    assert of("_addmm_activation", *given) == replace(plain, activation="relu")
    assert of("_addmm_activation", spec(6, 32), *given[1:], use_gelu=gelu) is None
    assert of("_addmm_activation", spec(4), spec(6, 8), spec(8, 4), use_gelu=gelu) is None
    assert of("_addmm_activation", *given, alpha=0.5) is None


@pytest.mark.parametrize("target", ["convolution", "add"])
def test_other_calls_declined(target: str) -> None:
    assert of(target, spec(4), spec(6, 8), spec(8, 4)) is None


def test_nobody_reads_the_result() -> None:
    step, specs = call("mm", spec(6, 8), spec(8, 4))
    unread = AtenStep(step.target, step.args, (), ((None, spec(6, 4)),), False)
    assert library_product(unread, specs, GPU) is None


def test_sizes_that_are_not_known() -> None:
    found = of("mm", spec(S, 8), spec(8, 4))
    assert found is not None
    assert (found.m, found.size_symbols) == (S, ("s",))
    turned = of("mm", spec(8, S, stride=(1, 8)), spec(S, T))
    assert turned is not None
    assert (turned.a, turned.b, turned.out) == ((0, 1, 8), (0, T, 1), (0, T, 1))
    assert turned.size_symbols == ("s", "t")
    assert of("mm", spec(S, 8, stride=(T, 1)), spec(8, 4)) is None  # t may be less than 8
    assert of("mm", spec(S, T, stride=(3 * T, 1)), spec(T, 4)) is not None
    assert of("mm", spec(S, 8, stride=(8, T)), spec(8, 4)) is None


def plan_of(step: AtenStep, specs: dict[str, TensorSpec], device: str = GPU) -> Plan:
    inputs = tuple((name, each) for name, each in specs.items() if name != "out")
    return Plan(inputs, (step,), (Ref("out"),), device)


def test_a_plan_for_the_cpu_has_none() -> None:
    step, specs = call(
        "mm", spec(6, 8, device="cpu"), spec(8, 4, device="cpu"), out=spec(6, 4, device="cpu")
    )
    plan = plan_of(step, specs, "cpu")
    assert addressed(plan) == plan


def test_functions_that_operators_call_have_none() -> None:
    inner = Region("branch", plan_of(*call("mm", spec(6, 8), spec(8, 4))), "value")
    step: Step = AtenStep(
        "higher_order.cond", (Ref("p"), inner, inner, (Ref("a"), Ref("b"))), (),
        (("out", spec(6, 4)),), False,
    )  # fmt: skip
    inputs = (("p", spec(dtype=torch.bool)), ("a", spec(6, 8)), ("b", spec(8, 4)))
    plan = Plan(inputs, (step,), (Ref("out"),), GPU)
    assert addressed(plan) == plan
    marked = addressed(plan_of(*call("mm", spec(6, 8), spec(8, 4))))
    assert marked.steps[0].product is not None  # type: ignore[union-attr]


def wide(*given: TensorSpec, out: TensorSpec | None = None) -> LibraryProduct | None:
    left, right = given
    result = out or spec(*left.shape[:-1], right.shape[-1], dtype=torch.float32)
    step, specs = call("mm", *given, out=result)
    return library_product(
        replace(step, target="iocompiler.wide_product.default"), specs, GPU
    )  # fmt: skip


def test_results_in_float32() -> None:
    plain = of("mm", spec(6, 8, stride=(1, 6)), spec(8, 4))
    assert plain is not None
    assert wide(spec(6, 8, stride=(1, 6)), spec(8, 4)) == replace(plain, stored=torch.float32)
    batches = of("bmm", spec(3, 6, 8), spec(3, 8, 4))
    assert batches is not None
    assert wide(spec(3, 6, 8), spec(3, 8, 4)) == replace(batches, stored=torch.float32)
    known = wide(spec(6, S, stride=(1, 6)), spec(S, 4))
    assert known is not None
    assert known.size_symbols == ("s",)


def test_results_in_float32_declined() -> None:
    by_columns = spec(6, 4, stride=(1, 6), dtype=torch.float32)
    assert wide(spec(6, 8), spec(8, 4), out=by_columns) is None
    assert wide(spec(6, 8), spec(8, 4, dtype=torch.float16)) is None
    floats = [spec(6, 8, dtype=torch.float32), spec(8, 4, dtype=torch.float32)]
    assert wide(*floats) is None
    elsewhere = spec(6, 4, dtype=torch.float32, device="cuda:1")
    assert wide(spec(6, 8), spec(8, 4), out=elsewhere) is None


# --- what is marked is what the call computes


def _numbers(found: LibraryProduct, sizes: dict[str, int]) -> Problem:
    def of(strides: tuple[Size, Size, Size]) -> tuple[int, int, int]:
        batch, row, column = (size_value(each, sizes) for each in strides)
        return batch, row, column

    batch, m, n, k = (size_value(s, sizes) for s in (found.batch, found.m, found.n, found.k))
    added = None if found.added is None else of(found.added)
    return Problem(batch, m, n, k, found.dtype, of(found.a), of(found.b), of(found.out), added)


def _layout(rng: random.Random, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a layout at random: in some order, with rows or elements apart, broadcast."""
    order = rng.sample(range(len(shape)), len(shape))
    stride, step = [0] * len(shape), rng.choice((1, 1, 1, 1, 2))
    for dim in order:
        stride[dim] = step
        step *= shape[dim] + rng.choice((0, 0, 0, 3))
    if rng.random() < 0.2:
        stride[rng.randrange(len(shape))] = 0
    return tuple(stride)


@pytest.mark.parametrize("seed", range(20))
def test_the_problem_is_the_call(seed: int) -> None:
    """Operands in layouts at random: what is taken has a form that is supported, and is right."""
    rng, generator, taken = random.Random(seed), torch.Generator().manual_seed(seed), 0
    for _ in range(80):
        batch, m, n, k = (rng.choice((1, 2, 3, 8)) for _ in range(4))
        target = rng.choice(("mm", "bmm", "addmm", "baddbmm"))
        lead = (batch,) if "bmm" in target else ()
        shapes = [(*lead, m, k), (*lead, k, n)]
        if "add" in target:
            shapes = [rng.choice(((n,), (*lead, m, n), (1, n), (m, 1), (1,))), *shapes]
        specs = [spec(*shape, stride=_layout(rng, shape)) for shape in shapes]
        found = of(target, *specs)
        if found is None:
            continue
        taken += 1
        problem = _numbers(found, {})
        assert supported(problem)
        given = [
            torch.randn(storage_elements(s.shape, s.stride), generator=generator)
            .to(BF16)
            .as_strided(s.shape, s.stride)
            for s in specs
        ]
        out = torch.full((*lead, m, n), torch.nan, dtype=BF16)
        *added, a, b = (x.data_ptr() for x in given)
        run = Product(lambda problem=problem: problem, torch.device("cpu")).run
        run(0, (), a, b, out.data_ptr(), *added)
        operator = getattr(torch, target)
        exact = operator(*(x.double() for x in given))
        assert_near_exact([out], [operator(*given)], [exact], BF16)
    assert taken >= 10
