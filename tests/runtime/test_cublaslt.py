"""The library's algorithms: which are proposed, told apart, found again, and what they compute."""

from __future__ import annotations

import ctypes
import gc
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from iocompiler.errors import AlgorithmWarning
from iocompiler.ops.library_product import Algorithm
from iocompiler.runtime import cublaslt, products
from iocompiler.runtime.cublaslt import MOST_PROPOSED, Refused, prepared, proposed
from iocompiler.runtime.products import asked
from tests.runtime.test_products_gpu import BIAS, FORMS, Case, columns, problem, rows

PLAIN = problem(256, 128, 64)
DESCRIBED = asked(PLAIN)
assert DESCRIBED is not None
OF = DESCRIBED[0]


def algorithm(tile: int, split_k: int = 1, reduction: int = 0) -> Algorithm:
    return Algorithm(66, tile, split_k, reduction, 1, 2, 36, 70, 200 + tile)


class Proposing:
    """A library that proposes ``rows``: algorithms and whether they can be run. It keeps the place
    of one in its first word.
    """

    def __init__(self, rows: list[tuple[Algorithm, bool]]) -> None:
        self.rows = rows
        self.called: Counter[str] = Counter()
        self.asked: list[int] = []

    def cublasLtMatmulAlgoGetHeuristic(self, *given: Any) -> int:
        most, results, count = given[-3:]
        self.asked.append(most)
        some = self.rows[:most]
        for place, (_, works) in enumerate(some):
            results[place].algorithm[0] = place
            results[place].state = 0 if works else 15
            results[place].workspace = 100 + place
        count._obj.value = len(some)
        return 0

    def cublasLtMatmulAlgoConfigGetAttribute(
        self, of: Any, attribute: int, number: Any, size: int, written: Any
    ) -> int:
        assert size == (2 if attribute in (7, 8) else 4)
        found = self.rows[of._obj[0]][0]
        number._obj.value = list(vars(found).values())[attribute]
        return 0

    def __getattr__(self, name: str) -> Any:
        self.called[name] += 1
        return lambda *_: 0


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proposing]:
    found = Proposing([(algorithm(tile), True) for tile in range(4)])
    monkeypatch.setattr(cublaslt, "library", lambda: found)
    monkeypatch.setattr(cublaslt, "_handle", lambda device: ctypes.c_void_p(1))
    memory = types.SimpleNamespace(data_ptr=lambda: 8192)
    guards = types.SimpleNamespace(_empty_strided_cuda=lambda size, stride, dtype: memory)
    monkeypatch.setattr(torch._C._dynamo, "guards", guards)
    products._prepare.cache_clear()
    yield found
    products._prepare.cache_clear()


def chosen(found: cublaslt.Prepared) -> int:
    """The place of its algorithm among the proposed ones."""
    return int(ctypes.cast(found.algorithm, ctypes.POINTER(ctypes.c_uint64))[0])


def test_what_is_proposed(library: Proposing) -> None:
    assert proposed(OF, 0) == tuple(algorithm(tile) for tile in range(4))
    assert library.asked == [MOST_PROPOSED]
    made = {n: c for n, c in library.called.items() if n.endswith("Create")}
    assert made
    assert {n: library.called[n.replace("Create", "Destroy")] for n in made} == made


def test_by_default_the_first_is_taken_and_no_other_is_asked_for(library: Proposing) -> None:
    found = prepared(OF, 0)
    assert (chosen(found), found.workspace, found.proposed) == (0, 100, True)
    assert library.asked == [1]


def test_one_is_found_again_wherever_it_stands(library: Proposing) -> None:
    for place in range(4):
        found = prepared(OF, 0, algorithm(place))
        assert (chosen(found), found.workspace, found.proposed) == (place, 100 + place, True)
    library.rows.reverse()
    assert chosen(prepared(OF, 0, algorithm(0))) == 3


def test_of_one_that_is_not_proposed_the_first_takes_the_place(library: Proposing) -> None:
    found = prepared(OF, 0, algorithm(7))
    assert (chosen(found), found.proposed) == (0, False)


def test_algorithms_with_equal_numbers_are_told_apart(library: Proposing) -> None:
    library.rows = [(algorithm(1), True)] * 2 + [(algorithm(2), True), (algorithm(1), True)]
    twins = [replace(algorithm(1), twin=twin) for twin in range(3)]
    assert proposed(OF, 0) == (*twins[:2], algorithm(2), twins[2])
    assert [chosen(prepared(OF, 0, twin)) for twin in twins] == [0, 1, 3]


def test_what_cannot_run_or_rounds_in_between_is_passed_over(library: Proposing) -> None:
    library.rows = [
        (algorithm(0), False),
        (algorithm(1, split_k=4, reduction=1), True),  # in place, in the result's dtype
        (algorithm(2, split_k=4, reduction=4), True),  # in the result's dtype
        (algorithm(3, split_k=4, reduction=2), True),
        (algorithm(4, reduction=1), True),  # no sum in parts
    ]
    wanted = [of for of, _ in library.rows[3:]]
    assert list(proposed(OF, 0)) == wanted
    assert chosen(prepared(OF, 0, library.rows[2][0])) == 3


def test_where_none_is_left_the_product_is_refused(library: Proposing) -> None:
    library.rows = [(algorithm(0), False)]
    for ask in (prepared, proposed):
        with pytest.raises(Refused, match="1 algorithms, none that can be run"):
            ask(OF, 0)
    gc.collect()
    made = {n: c for n, c in library.called.items() if n.endswith("Create")}
    assert {n: library.called[n.replace("Create", "Destroy")] for n in made} == made


def test_addresses_in_a_description(library: Proposing) -> None:
    """Each is there when the library is called, however often that was before."""
    put = list[tuple[int, int]]()

    def note(description: Any, attribute: int, at: Any, size: int) -> int:
        if attribute in (bias, sums):
            assert size == 8
            put.append((attribute, at._obj.value))
        return 0

    bias, sums = cublaslt._BIAS_POINTER, cublaslt._SUMS_POINTER

    library.cublasLtMatmulDescSetAttribute = note  # type: ignore[attr-defined]
    found = prepared(OF, 0)
    put.clear()
    for address in (4096, 8192, 4096):
        found.set_bias(address)
        found.set_sums(address + 16)
    assert put == [
        (bias, 4096), (sums, 4112), (bias, 8192), (sums, 8208), (bias, 4096), (sums, 4112)
    ]  # fmt: skip


def test_a_product_uses_the_algorithm_of_its_problem(
    library: Proposing, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    seen: list[int] = []
    library.cublasLtMatmul = lambda *given: (  # type: ignore[attr-defined]
        seen.append(int(ctypes.cast(given[12], ctypes.POINTER(ctypes.c_uint64))[0])) or 0
    )
    gpu = torch.device("cuda", 0)
    algorithms = {PLAIN: algorithm(2)}
    sizes = products.Product(lambda m: replace(PLAIN, m=m), gpu, algorithms)
    for m in (256, 257, 256):
        sizes.run(0, (m,), 1024, 2048, 4096)
    products.Product(lambda: PLAIN, gpu).run(0, (), 1024, 2048, 4096)
    a, b, out = (
        types.SimpleNamespace(data_ptr=lambda at=at: at, device=gpu) for at in (1024, 2048, 4096)
    )
    products.run_with(algorithm(3), PLAIN, a, b, out, None)  # type: ignore[arg-type]
    assert seen == [2, 0, 2, 0, 3]


def test_what_is_not_proposed_any_more_is_said(library: Proposing) -> None:
    """But for addresses that are less aligned than those it was measured on."""
    gpu = torch.device("cuda", 0)
    with pytest.warns(AlgorithmWarning, match="no longer proposes .*m=256, n=128.* tile=9"):
        products._prepare(PLAIN, 256, gpu, algorithm(9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        products._prepare(PLAIN, 16, gpu, algorithm(9))
        products._prepare(PLAIN, 256, gpu, algorithm(1))


# --- the real thing


OTHERS = {
    "large": problem(2048, 768, 3072, b=columns(3072, 768)),
    "large, bias": problem(2048, 3072, 768, b=columns(768, 3072), added=BIAS),
    "large, added": problem(2048, 768, 3072, b=columns(3072, 768), added=rows(2048, 768)),
    "of a weight": problem(768, 3072, 2048, a=columns(768, 2048)),
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name",
    [*OTHERS, "a long sum", "slices", "batches", "bias", "matrix added", "both added", "gelu",
     "gelu, large", "gelu, a long sum", "stored wide", "stored wide, a long sum",
     "257 129 65 torch.float16 columns rows"],
)  # fmt: skip
def test_every_proposed_algorithm_is_right_and_repeats_its_bits(name: str) -> None:
    of = OTHERS.get(name) or FORMS[name]
    described = asked(of)
    assert described is not None
    found = proposed(described[0], 0)
    assert len(set(found)) == len(found) > 0
    assert proposed(described[0], 0) == found
    assert proposed(described[0], 0)[0] == found[0]
    case = Case(of, "cuda")
    for each in found:
        assert prepared(described[0], 0, each).proposed
        case.run = products.Product(lambda: of, case.out.whole.device, {of: each}).run
        case.forget()
        case.launch()
        case.check()
        first = case.out.tensor.clone()
        for _ in range(3):
            case.forget()
            case.launch()
            assert torch.equal(case.out.tensor, first)


@pytest.mark.gpu
def test_the_first_of_several_is_the_one_that_is_taken_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for of in OTHERS.values():
        described = asked(of)
        assert described is not None
        monkeypatch.setattr(cublaslt, "MOST_PROPOSED", 6)
        several = proposed(described[0], 0)
        monkeypatch.setattr(cublaslt, "MOST_PROPOSED", 1)
        assert proposed(described[0], 0) == several[:1]


@pytest.mark.gpu
def test_the_library_has_a_version() -> None:
    assert cublaslt.version() > 100000
