"""Matrix products of the library by addresses: a call site's `Product`.

What a product needs but addresses is found once for its sizes and how its addresses are aligned;
where cuBLASLt is missing or has no algorithm, aten does it, on tensors made of the addresses.
The algorithm is the first that the library proposes, or one that was measured to be faster.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from iocompiler.errors import AlgorithmWarning
from iocompiler.ops.biased_addmm import biased_addmm
from iocompiler.ops.library_product import Algorithm, Problem
from iocompiler.ops.wide_product import wide_product
from iocompiler.runtime import cublaslt
from iocompiler.runtime.cublaslt import Description, Matrix, Prepared, Refused
from iocompiler.runtime.recording import recorder
from iocompiler.tile.traffic import VECTOR_BYTES

Strides: TypeAlias = tuple[int, int, int]

_ALIGNED = 256
"""Bytes; the library asks for no more."""
_MOST_SIZES = 1024
"""That a product is prepared for at a time: lengths may go on changing for as long as it lives."""


def supported(problem: Problem) -> bool:
    """Whether cuBLASLt can be asked for a product of this form."""
    return describe(problem, _ALIGNED) is not None


def describe(problem: Problem, alignment: int) -> tuple[Description, bool] | None:
    """A product in the library's words, and whether its operands changed places; None where a
    matrix has a form that the library does not know.

    Memory by rows is the transposed matrix by columns, and the library thinks in columns: it is
    asked for out^T = b^T a^T, or, where ``out`` lies by columns, for out = a b.

    Args:
        alignment: of all addresses, in bytes, a power of two of at most 256.
    """
    found = _by_rows(problem, alignment)
    if found is not None or problem.bias:
        return None if found is None else (found, True)
    found = _by_rows(_transposed(problem), alignment)
    return None if found is None else (found, False)


def _transposed(problem: Problem) -> Problem:
    """The same memory as out^T = b^T a^T."""
    a, b, out = (_turned(s) for s in (problem.a, problem.b, problem.out))
    added, sums = (_turned(s) if s else None for s in (problem.added, problem.sums))
    return replace(problem, m=problem.n, n=problem.m, a=b, b=a, out=out, added=added, sums=sums)


def _turned(strides: Strides) -> Strides:
    return strides[0], strides[2], strides[1]


def _by_rows(of: Problem, alignment: int) -> Description | None:
    """Asked for as out^T = b^T a^T."""
    if of.dtype not in cublaslt.TYPES or 0 in (of.batch, of.m, of.n, of.k):
        return None
    out = _by_columns(of.n, of.m, of.out)
    a, b = _by_columns(of.k, of.m, of.a), _by_columns(of.n, of.k, of.b)
    turn_a, turn_b = a is None, b is None
    a = a or _by_columns(of.m, of.k, _turned(of.a))
    b = b or _by_columns(of.k, of.n, _turned(of.b))
    if out is None or a is None or b is None or (of.batch > 1 and out.stride == 0):
        return None
    added = None
    if of.matrix is not None:
        added = _by_columns(of.n, of.m, of.matrix)
        if added is None:
            return None
    elif of.biased and of.added != (0, 0, 1) and of.n > 1:
        return None
    sums = _by_columns(of.n, of.m, of.sums) if of.sums is not None else None
    if of.sums is not None and (sums is None or of.activation != "gelu"):
        return None  # of a ReLU the library stores signs
    if of.activation and not _takes_activation(of, sums or out, alignment):
        return None
    return Description(
        of.dtype, of.batch, b, a, out, added, turn_b, turn_a, of.biased, alignment, sums,
        of.stored, of.activation,
    )  # fmt: skip


def _takes_activation(of: Problem, sums: Matrix, alignment: int) -> bool:
    """Whether the library computes an activation, and stores what that reads, as its documentation
    has it: of vectors of 16 bytes. Of one product, to which no more than a bias is added, as
    nothing else was tried.
    """
    vector = VECTOR_BYTES // of.dtype.itemsize
    alone = of.batch == 1 and of.matrix is None
    aligned = alignment % VECTOR_BYTES == sums.rows % vector == sums.leading % vector == 0
    return alone and aligned


def _by_columns(rows: int, columns: int, strides: Strides) -> Matrix | None:
    """The matrix whose column of ``rows`` elements lies together; strides as of its transpose."""
    batch, leading, step = strides
    if columns == 1:
        leading = max(rows, 1)
    if leading < rows or (step != 1 and rows > 1):
        return None
    return Matrix(rows, columns, leading, batch)


class Product:
    """A call site's product on a device.

    Args:
        problem: it, by the sizes that `run` is given.
        device: the CUDA device it runs on, which is current at every run; a CPU in tests.
        algorithms: of problems, those that were measured to be faster than the library's first one.
    """

    def __init__(
        self,
        problem: Callable[..., Problem],
        device: torch.device,
        algorithms: Mapping[Problem, Algorithm] | None = None,
    ):
        self._problem, self._device = problem, device
        self._algorithms = {} if algorithms is None else algorithms
        self._runs: dict[tuple[int, ...], _Run] = {}

    def run(
        self, stream: int, sizes: tuple[int, ...], a: int, b: int, out: int, added: int = 0,
        bias: int = 0, *, sums: int = 0,
    ) -> None:  # fmt: skip
        """Queue it on a stream.

        Args:
            a, b, out, added, bias, sums: addresses; ``out`` may be that of a matrix ``added``, not
                of an operand.
        """
        low = (a | b | out | added | bias | sums) & (_ALIGNED - 1)
        key = (low & -low, *sizes) if low else sizes
        run = self._runs.get(key) or self._first(key, low & -low or _ALIGNED, sizes)
        run(stream, a, b, out, added, bias, sums)

    def _first(self, key: tuple[int, ...], alignment: int, sizes: tuple[int, ...]) -> _Run:
        if len(self._runs) >= _MOST_SIZES:
            self._runs.clear()
        problem = self._problem(*sizes)
        algorithm = self._algorithms.get(problem)
        run = self._runs[key] = _prepare(problem, alignment, self._device, algorithm)
        return run


def run_with(
    algorithm: Algorithm, problem: Problem, a: Tensor, b: Tensor, out: Tensor, added: Tensor | None
) -> None:
    """Queue a product of tensors by this algorithm, on their device's current stream."""
    first, second, result = a.data_ptr(), b.data_ptr(), out.data_ptr()
    summand = 0 if added is None else added.data_ptr()
    low = (first | second | result | summand) & (_ALIGNED - 1)
    run = _prepare(problem, low & -low or _ALIGNED, out.device, algorithm)
    told = recorder()
    if told is not None:
        told.note(run, (), (a, b, out, added, None, None))
    stream = torch.cuda.current_stream(out.device).cuda_stream
    run(stream, first, second, result, summand, 0, 0)


_Run: TypeAlias = Callable[[int, int, int, int, int, int, int], None]


@functools.lru_cache(maxsize=4096)
def _prepare(
    problem: Problem, alignment: int, device: torch.device, algorithm: Algorithm | None = None
) -> _Run:
    """What queues a product: ``run(stream, a, b, out, added, bias, sums)``."""
    on_aten = functools.partial(_by_aten, problem, device)
    described = asked(problem, alignment) if device.type == "cuda" else None
    if described is None:
        return on_aten
    try:
        found = cublaslt.prepared(described[0], device_index(device), algorithm)
    except Refused:
        return on_aten
    if not found.proposed and alignment == _ALIGNED:  # as it was measured
        warnings.warn(
            f"iocompiler: cuBLASLt no longer proposes the algorithm that was measured for a "
            f"product, its first one runs: {problem}, {algorithm}",
            AlgorithmWarning,
            stacklevel=2,
        )
    return on_library(found, described[1], problem, on_aten)


def asked(problem: Problem, alignment: int = _ALIGNED) -> tuple[Description, bool] | None:
    """`describe`, of what the library rounds once: it may round a product with lines that begin
    amid a vector before it adds a bias.
    """
    if problem.biased and alignment % VECTOR_BYTES:
        return None
    return describe(problem, alignment)


def device_index(device: torch.device) -> int:
    """The number of a CUDA device; of the current one where it has none."""
    return int(torch.cuda._utils._get_device_index(device, True))


def on_library(found: Prepared, swapped: bool, problem: Problem, on_aten: _Run) -> _Run:
    """What queues a prepared product as `describe` has it; ``on_aten``: what the library refuses at
    a call is given to.
    """
    size, queue, lock = found.workspace, found.run, threading.Lock()
    memory: Callable[..., Tensor] = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]
    adds_matrix, biased = problem.matrix is not None, problem.biased
    row_of = sums_at = 0  # the addresses that stand in the description

    def run(stream: int, a: int, b: int, out: int, added: int, bias: int, sums: int) -> None:
        first, second = (b, a) if swapped else (a, b)
        c = added if adds_matrix else out
        # freed at once: what gets it next is queued behind
        workspace = memory((size,), (1,), torch.uint8) if size else None
        at = 0 if workspace is None else workspace.data_ptr()
        if queue(stream, first, second, c, out, at):
            on_aten(stream, a, b, out, added, bias, sums)

    def run_described(
        stream: int, a: int, b: int, out: int, added: int, bias: int, sums: int
    ) -> None:
        nonlocal row_of, sums_at
        row = bias if adds_matrix else added
        with lock:
            if biased and row_of != row:
                found.set_bias(row)
                row_of = row
            if sums_at != sums:
                found.set_sums(sums)
                sums_at = sums
            run(stream, a, b, out, added, bias, sums)

    return run_described if biased or problem.sums is not None else run


def _by_aten(
    problem: Problem, device: torch.device, stream: int, a: int, b: int, out: int, added: int,
    bias: int, sums: int,
) -> None:  # fmt: skip
    """The product as torch does it, on the current stream, which is the given one."""
    told = recorder()
    if told is not None:
        told.unseen()  # of tensors that are made of these addresses
    p = problem
    if 0 in (p.batch, p.m, p.n):
        return
    stored = p.stored or p.dtype

    def at(address: int, rows: int, columns: int, strides: Strides) -> Tensor:
        return _tensor(address, (p.batch, rows, columns), strides, p.dtype, device)

    left, right = at(a, p.m, p.k, p.a), at(b, p.k, p.n, p.b)
    result = _tensor(out, (p.batch, p.m, p.n), p.out, stored, device)
    summed = result if p.sums is None else at(sums, p.m, p.n, p.sums)
    if p.stored is not None:
        summed.copy_(wide_product(left, right))
    elif p.added is None:
        torch.bmm(left, right, out=summed)
    elif not p.bias:
        torch.baddbmm(at(added, p.m, p.n, p.added), left, right, out=summed)
    else:
        matrix, row = at(added, p.m, p.n, p.added), at(bias, p.m, p.n, (0, 0, 1))
        summed.copy_(biased_addmm(matrix, row, left, right))
    if p.activation == "gelu":
        torch.ops.aten.gelu.out(summed, approximate="tanh", out=result)
    elif p.activation == "relu":
        torch.clamp(summed, min=0, out=result)


class _Memory:
    """Memory on a GPU, as other libraries offer theirs."""

    def __init__(self, address: int, elements: int, itemsize: int):
        self.__cuda_array_interface__ = {
            "shape": (elements,), "typestr": f"<i{itemsize}", "data": (address, False),
            "version": 3,
        }  # fmt: skip


def _tensor(
    address: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """A tensor of elements of two or four bytes over memory that somebody else owns."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype, device=device)
    elements = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if device.type == "cuda":
        flat = torch.as_tensor(_Memory(address, elements, dtype.itemsize), device=device)
    else:
        owned = (ctypes.c_int16 * (elements * dtype.itemsize // 2)).from_address(address)
        flat = torch.frombuffer(owned, dtype=torch.int16)
    return flat.view(dtype).as_strided(shape, strides)
