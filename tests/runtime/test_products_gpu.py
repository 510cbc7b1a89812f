"""Products by address: right for every form of operands, nothing written beside the result, on any
stream, in CUDA graphs, from several threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler.ops.library_product import Problem
from iocompiler.runtime.products import Product, describe, supported
from iocompiler.runtime.values import storage_elements
from tests.accuracy import assert_near_exact

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BF16, FP16 = torch.bfloat16, torch.float16
BIAS = (0, 0, 1)
MARGIN = 64
"""Elements around each tensor that nobody may read or write."""


def rows(m: int, n: int, batch: int = 1, apart: int = 0) -> tuple[int, int, int]:
    """Strides of matrices [m, n] by their rows, which are so many elements apart."""
    return (m * (n + apart) if batch > 1 else 0, n + apart, 1)


def columns(m: int, n: int, batch: int = 1, apart: int = 0) -> tuple[int, int, int]:
    return (n * (m + apart) if batch > 1 else 0, 1, m + apart)


def problem(
    m: int, n: int, k: int, dtype: torch.dtype = BF16, batch: int = 1, **strides: Any
) -> Problem:
    """By rows, unless told otherwise."""
    lying = {"a": rows(m, k, batch), "b": rows(k, n, batch), "out": rows(m, n, batch), **strides}
    return Problem(batch, m, n, k, dtype, **lying)


def forms() -> dict[str, Problem]:
    """Every order of operands, of even and of odd extents, in both dtypes; then the others."""
    found = {}
    for m, n, k in ((256, 128, 64), (257, 129, 65), (96, 40, 8)):
        for dtype in (BF16, FP16):
            for a in (rows, columns):
                for b in (rows, columns):
                    name = f"{m} {n} {k} {dtype} {a.__name__} {b.__name__}"
                    found[name] = problem(m, n, k, dtype, a=a(m, k), b=b(k, n))
    plain = problem(128, 96, 64)
    apart = {"a": rows(128, 64, apart=7), "b": columns(64, 96, apart=40)}
    batches = problem(33, 24, 40, batch=5)
    return {
        **found,
        "one term": problem(64, 48, 1),
        "one column": problem(257, 1, 65),
        "one column, by columns": problem(257, 1, 65, a=columns(257, 65)),
        "one row": problem(1, 129, 65),
        "one row of a matrix by columns": problem(1, 129, 65, b=columns(65, 129)),
        "one element": problem(1, 1, 1),
        "a long sum": problem(64, 64, 8192),
        "slices": replace(plain, **apart),
        "slices of odd width": problem(
            33, 17, 9, a=rows(33, 9, apart=2), b=rows(9, 17, apart=4), out=rows(33, 17, apart=6)
        ),
        "a padded result": replace(plain, out=rows(128, 96, apart=32)),
        "batches": batches,
        "batches by columns": replace(batches, a=columns(33, 40, 5), b=columns(40, 24, 5, apart=3)),
        "heads": replace(batches, a=(40, 200, 1), b=(40, 1, 200)),
        "one matrix for all": replace(batches, b=(0, 24, 1)),
        "one left matrix for all": replace(batches, a=(0, 1, 33)),
        "bias": replace(plain, added=BIAS),
        "bias, odd": problem(257, 129, 65, FP16, added=BIAS),
        "bias of batches": replace(batches, added=BIAS),
        "bias of one column": problem(257, 1, 65, added=BIAS),
        "matrix added": replace(plain, added=rows(128, 96)),
        "matrix added, its rows apart": replace(plain, added=rows(128, 96, apart=8)),
        "matrix added, odd": problem(257, 129, 65, b=columns(65, 129), added=rows(257, 129)),
        "matrices added": replace(batches, added=rows(33, 24, 5)),
        "gelu": replace(plain, added=BIAS, sums=rows(128, 96), activation="gelu"),
        "gelu, fp16": replace(plain, dtype=FP16, added=BIAS, sums=rows(128, 96), activation="gelu"),
        "gelu, no bias": replace(plain, sums=rows(128, 96), activation="gelu"),
        "gelu, sums further apart": replace(
            plain, added=BIAS, sums=rows(128, 96, apart=8), activation="gelu"
        ),
        "gelu, activation further apart": replace(
            plain, added=BIAS, out=rows(128, 96, apart=24), sums=rows(128, 96), activation="gelu"
        ),
        "gelu, by columns": replace(
            plain, b=columns(64, 96), added=BIAS, sums=rows(128, 96), activation="gelu"
        ),
        "gelu, one row": problem(1, 96, 64, added=BIAS, sums=rows(1, 96), activation="gelu"),
        "gelu, large": problem(
            2048, 768, 512, b=columns(512, 768), added=BIAS, sums=rows(2048, 768), activation="gelu"
        ),
        "gelu, a long sum": problem(64, 64, 8192, added=BIAS, sums=rows(64, 64), activation="gelu"),
        "gelu alone": replace(plain, added=BIAS, activation="gelu"),
        "gelu alone, fp16, by columns": replace(
            plain, dtype=FP16, b=columns(64, 96), added=BIAS, activation="gelu"
        ),
        "gelu alone, no bias": replace(plain, activation="gelu"),
        "gelu alone, large": problem(2048, 768, 512, added=BIAS, activation="gelu"),
        "relu": replace(plain, added=BIAS, activation="relu"),
        "relu, one row": problem(1, 96, 64, added=BIAS, activation="relu"),
        "stored wide": replace(plain, stored=torch.float32),
        "stored wide, fp16": replace(plain, dtype=FP16, stored=torch.float32),
        "stored wide, odd": problem(257, 129, 65, a=columns(257, 65), stored=torch.float32),
        "stored wide, apart": replace(plain, **apart, out=rows(128, 96, 8), stored=torch.float32),
        "stored wide, batches": replace(batches, stored=torch.float32),
        "stored wide, a long sum": problem(64, 64, 8192, a=columns(64, 8192), stored=torch.float32),
        "both added": replace(plain, added=rows(128, 96), bias=True),
        "both added, odd": problem(257, 129, 65, FP16, b=columns(65, 129),
                                   added=rows(257, 129, apart=8), bias=True),
        "both added to one row": problem(1, 129, 65, added=rows(1, 129), bias=True),
        "both added to one column": problem(257, 1, 65, added=rows(257, 1), bias=True),
        "both added to matrices": replace(batches, added=rows(33, 24, 5), bias=True),
    }  # fmt: skip


FORMS = forms()


@dataclass
class Memory:
    """A tensor with NaN around it, and between its rows."""

    whole: Tensor
    tensor: Tensor
    before: Tensor

    @staticmethod
    def of(
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: torch.dtype,
        device: str,
        offset: int,
        fill: bool = True,
    ) -> Memory:
        """Args: offset: elements from a multiple of 128 bytes; fill: with random numbers."""
        elements = storage_elements(shape, strides) + offset + 2 * MARGIN
        whole = torch.full((elements,), torch.nan, dtype=dtype, device=device)
        tensor = whole.as_strided(shape, strides, MARGIN + offset)
        if fill:
            distinct = [1 if stride == 0 else n for n, stride in zip(shape, strides, strict=True)]
            part = whole.as_strided(distinct, strides, MARGIN + offset)
            part.copy_(torch.randn(distinct).to(dtype))
        return Memory(whole, tensor, whole.clone())

    def is_as_it_was(self, but: Tensor | None = None) -> bool:
        """Bit by bit, but where ``but`` lies."""
        bits = torch.int32 if self.whole.itemsize == 4 else torch.int16
        changed = self.whole.view(bits) != self.before.view(bits)
        if but is not None:
            changed.as_strided(but.shape, but.stride(), but.storage_offset()).fill_(False)
        return not bool(changed.any())


ACTIVATIONS = {"gelu": partial(F.gelu, approximate="tanh"), "relu": F.relu}


class Case:
    """A problem with operands in memory, and what torch makes of them. With an activation, ``out``
    is that of what torch makes.
    """

    def __init__(self, problem: Problem, device: str, offset: int = 0) -> None:
        p, self.device = problem, device
        self.problem, self.dtype = p, p.stored or p.dtype
        shape = (p.batch, p.m, p.n)

        def memory(shape: tuple[int, ...], strides: Any, fill: bool = True) -> Memory:
            dtype = p.dtype if fill else self.dtype
            return Memory.of(shape, strides, dtype, device, offset, fill)

        self.a, self.b = memory((p.batch, p.m, p.k), p.a), memory((p.batch, p.k, p.n), p.b)
        self.out = memory(shape, p.out, fill=False)
        self.added = None if p.added is None else memory(shape, p.added)
        self.bias = memory(shape, BIAS) if p.bias else None
        self.sums = None if p.sums is None else memory(shape, p.sums, fill=False)
        self.run = Product(lambda: p, self.out.whole.device).run

    def launch(self, stream: int | None = None) -> None:
        if stream is None:
            on_gpu = self.device == "cuda"
            stream = torch.cuda.current_stream().cuda_stream if on_gpu else 0
        given = (self.a, self.b, self.out, *self.summands)
        beside = {} if self.sums is None else {"sums": self.sums.tensor.data_ptr()}
        self.run(stream, (), *(memory.tensor.data_ptr() for memory in given), **beside)

    @property
    def summands(self) -> list[Memory]:
        return [each for each in (self.added, self.bias) if each is not None]

    def by_torch(self, dtype: torch.dtype) -> Tensor:
        a, b = self.a.tensor.to(dtype), self.b.tensor.to(dtype)
        if self.added is None:
            return torch.bmm(a, b)
        if self.bias is not None:
            biased = torch.baddbmm(self.bias.tensor.to(dtype), a, b)
            return biased + self.added.tensor.to(dtype)
        return torch.baddbmm(self.added.tensor.to(dtype), a, b)

    def check(self) -> None:
        """The result is as exact as torch's, and nothing else has changed."""
        eager, exact = self.by_torch(self.dtype), self.by_torch(torch.float64)
        found, theirs, wide = [self.out], [eager], [exact]
        if self.problem.activation:
            activation = ACTIVATIONS[self.problem.activation]
            theirs, wide = [activation(eager), eager], [activation(exact), exact]
            found += [self.sums] if self.sums is not None else []
        assert not any(memory.tensor.isnan().any() for memory in found)
        made = [m.tensor for m in found]
        assert_near_exact(made, theirs[: len(made)], wide[: len(made)], self.dtype)
        assert all(memory.is_as_it_was(but=memory.tensor) for memory in found)
        assert all(memory.is_as_it_was() for memory in (self.a, self.b, *self.summands))

    def forget(self) -> None:
        for memory in (self.out, self.sums):
            if memory is not None:
                memory.tensor.fill_(torch.nan)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FORMS)
def test_right_and_nothing_beside(name: str, device: str) -> None:
    assert supported(FORMS[name])
    case = Case(FORMS[name], device)
    case.launch()
    case.check()
    case.forget()
    case.launch()
    case.check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["256 128 64 torch.bfloat16 rows columns", "slices", "batches",
                                  "bias", "matrix added", "both added", "gelu",
                                  "gelu alone", "relu", "stored wide"])  # fmt: skip
def test_addresses_that_are_not_aligned(name: str, offset: int, device: str) -> None:
    case = Case(FORMS[name], device, offset)
    case.launch()
    case.check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "of",
    [
        problem(33, 17, 9, added=BIAS, sums=rows(33, 17), activation="gelu"),
        problem(33, 24, 9, sums=rows(33, 24, apart=1), activation="gelu"),
        problem(33, 24, 40, batch=5, added=BIAS, sums=rows(33, 24, 5), activation="gelu"),
        replace(FORMS["matrix added"], sums=rows(128, 96), activation="gelu"),
        problem(33, 17, 9, added=BIAS, activation="gelu"),
        problem(33, 24, 40, batch=5, added=BIAS, activation="relu"),
        problem(33, 24, 0, a=(0, 1, 33), added=BIAS, sums=rows(33, 24), activation="gelu"),
    ],
)
def test_what_the_library_is_not_asked_for(of: Problem, device: str) -> None:
    """A GELU of other forms is aten's."""
    assert not supported(of)
    case = Case(of, device)
    case.launch()
    case.check()


@pytest.mark.gpu
def test_the_library_takes_a_gelu() -> None:
    """Else all of these forms would be aten's, which is right and slow."""
    from iocompiler.runtime import cublaslt

    described = describe(FORMS["gelu, large"], 256)
    assert described is not None
    assert cublaslt.prepared(described[0], 0).algorithm


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["bias", "both added", "gelu"])
def test_one_product_at_aligned_and_other_addresses(name: str, device: str) -> None:
    """What was prepared for one alignment is not used for another, nor one bias for another."""
    first, second = Case(FORMS[name], device), Case(FORMS[name], device, 1)
    second.run = first.run
    for case in (first, second, first):
        case.forget()
        case.launch()
        case.check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["matrix added", "both added"])
def test_what_is_added_may_be_written_over(name: str, device: str) -> None:
    case = Case(FORMS[name], device)
    assert case.added is not None
    exact, eager = case.by_torch(torch.float64), case.by_torch(BF16)
    case.out = case.added
    case.launch()
    assert_near_exact([case.out.tensor], [eager], [exact], BF16)
    assert case.out.is_as_it_was(but=case.out.tensor)


@pytest.mark.parametrize("device", DEVICES)
def test_sizes_decide(device: str) -> None:
    """One product of any number of rows, none among them."""

    def of(m: int) -> Problem:
        return problem(m, 40, 24, added=BIAS)

    run = Product(of, torch.empty(0, device=device).device).run
    for m in (8, 257, 8, 1, 0):
        case = Case(of(m), device)
        case.run = lambda stream, _, *addresses, m=m: run(stream, (m,), *addresses)
        case.launch()
        case.check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("added", [None, BIAS, rows(9, 40)])
def test_an_empty_sum(added: tuple[int, int, int] | None, device: str) -> None:
    case = Case(problem(9, 40, 0, a=(0, 1, 9), added=added), device)
    case.launch()
    assert torch.equal(case.out.tensor, case.by_torch(BF16))


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_infinity(device: str) -> None:
    """Also where the sums are multiplied by what is not finite elsewhere."""
    case = Case(FORMS["matrix added"], device)
    case.a.tensor[0, 3, 5] = torch.inf
    case.b.tensor[0, 7, 9] = torch.nan
    for memory in (case.a, case.b):
        memory.before = memory.whole.clone()
    case.launch()
    torch.testing.assert_close(case.out.tensor.isnan(), case.by_torch(BF16).isnan(), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["257 129 65 torch.bfloat16 columns rows", "a long sum", "bias",
                                  "matrix added", "both added", "batches",
                                  "gelu, large"])  # fmt: skip
def test_in_a_cuda_graph(name: str) -> None:
    """Recorded after one call and without one, and replayed on what its operands have then."""
    for warm in (True, False):
        case = Case(FORMS[name], "cuda")
        if warm:
            case.launch()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            case.launch()
        for _ in range(3):
            case.forget()
            case.a.tensor.copy_(torch.randn(case.a.tensor.shape))
            case.a.before = case.a.whole.clone()
            graph.replay()
            torch.cuda.synchronize()
            case.check()


@pytest.mark.gpu
def test_two_graphs_replayed_at_once() -> None:
    """What a product needs beside its operands is not shared by streams that run at once."""
    cases = [Case(FORMS["a long sum"], "cuda") for _ in range(2)]
    graphs, streams = [], [torch.cuda.Stream() for _ in cases]
    for case, stream in zip(cases, streams, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(20):
                case.launch()
        graphs.append(graph)
    for _ in range(10):
        for case in cases:
            case.forget()
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for case in cases:
            case.check()


@pytest.mark.gpu
def test_on_another_stream() -> None:
    """In the order of the stream it is given, whichever is current."""
    case, stream = Case(FORMS["bias"], "cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        case.a.tensor.copy_(torch.randn(case.a.tensor.shape, device="cuda"))
    case.launch(stream.cuda_stream)
    stream.synchronize()
    case.a.before = case.a.whole.clone()
    case.check()


@pytest.mark.gpu
@pytest.mark.parametrize("shared", ["a long sum", "gelu, large", ""])
def test_several_threads_at_once(shared: str) -> None:
    """Threads with one product, or each with its own, each on a stream of its own."""
    names = [shared] * 4 if shared else ["a long sum", "bias", "gelu", "matrix added"]
    cases = [Case(FORMS[name], "cuda") for name in names]
    if shared:
        for case in cases:
            case.run = cases[0].run
    torch.cuda.synchronize()
    failed: list[BaseException] = []

    def work(case: Case) -> Callable[[], None]:
        def run() -> None:
            try:
                with torch.cuda.stream(torch.cuda.Stream()):
                    for _ in range(200):
                        case.launch()
                    torch.cuda.current_stream().synchronize()
            except BaseException as error:
                failed.append(error)

        return run

    threads = [threading.Thread(target=work(case)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for case in cases:
        case.check()


@pytest.mark.gpu
def test_twice_the_same_bits() -> None:
    case = Case(FORMS["a long sum"], "cuda")
    case.launch()
    first = case.out.tensor.clone()
    for _ in range(5):
        case.forget()
        case.launch()
        assert torch.equal(case.out.tensor, first)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_another_device() -> None:
    """A module's call makes its device the current one."""
    with torch.cuda.device(1):
        case = Case(FORMS["bias"], "cuda")
        case.launch()
        case.check()
