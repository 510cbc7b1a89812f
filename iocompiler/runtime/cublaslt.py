"""cuBLASLt by ctypes: one product described once, then called with addresses.

torch's own call of the same library makes descriptors and asks for an algorithm at every call, some
25 us of a host's time. Names and values are those of NVIDIA's cuBLASLt documentation.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from typing import Any

import torch

TYPES = {torch.float16: 2, torch.bfloat16: 14}
_FLOAT32, _COMPUTE_FLOAT32 = 0, 68
_STORED = {**TYPES, torch.float32: _FLOAT32}
WORKSPACE = 32 * 2**20
"""Bytes an algorithm may ask for: what torch gives the library on a Hopper."""

# attributes of a description, of a matrix, of what is asked of an algorithm
_TRANSPOSE_A, _TRANSPOSE_B, _EPILOGUE, _BIAS_POINTER = 3, 4, 7, 8
_BATCH_COUNT, _BATCH_STRIDE = 5, 6
_MOST_WORKSPACE, _REDUCTIONS, _ALIGNMENTS = 1, 3, (5, 6, 7, 8)
_EPILOGUE_BIAS = 4
_SUMS_POINTER, _SUMS_LEADING = 11, 12  # the epilogue's "auxiliary" matrix
_EPILOGUE_GELU_AND_SUMS = 32 | 128
_REDUCED_IN_FLOAT32 = 2
"""Partial sums are added in float32: half as exact, where the library adds them in the result's
dtype, is not what a float32 sum promises."""


class Refused(Exception):
    """The library has no algorithm for a product, or is not there."""


class _Result(ctypes.Structure):
    """``cublasLtMatmulHeuristicResult_t``."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@dataclass(frozen=True)
class Matrix:
    """A column-major matrix, one or many: ``stride`` elements from one to the next."""

    rows: int
    columns: int
    leading: int
    stride: int = 0


@dataclass(frozen=True)
class Description:
    """``d = op(a) op(b)``, plus ``c`` where it is added, plus a bias of ``d.rows`` elements, in
    column-major matrices; op transposes where it says so. With ``sums``, this goes there, and ``d``
    is its GELU by tanh. ``d`` is of the operands' dtype, or of ``stored``.
    """

    dtype: torch.dtype
    batch: int
    a: Matrix
    b: Matrix
    d: Matrix
    c: Matrix | None = None
    transpose_a: bool = False
    transpose_b: bool = False
    bias: bool = False
    alignment: int = 256
    sums: Matrix | None = None
    stored: torch.dtype | None = None


@dataclass(frozen=True)
class Prepared:
    """A product on a device: ``cublasLtMatmul`` and its arguments but for addresses."""

    matmul: Callable[..., int]
    handle: c_void_p
    description: c_void_p
    a: c_void_p
    b: c_void_p
    c: c_void_p
    d: c_void_p
    beta: c_void_p
    algorithm: c_void_p
    workspace: int
    kept: tuple[Any, ...]
    set_bias: Callable[[int], None]
    set_sums: Callable[[int], None]

    def run(self, stream: int, a: int, b: int, c: int, d: int, workspace: int) -> int:
        """Queue it; returns the library's status, 0 for success. ``c`` is ``d`` where nothing is
        added; ``workspace`` bytes lie at that address.
        """
        return self.matmul(
            self.handle, self.description, _ONE, a, self.a, b, self.b, self.beta, c, self.c,
            d, self.d, self.algorithm, workspace, self.workspace, stream,
        )  # fmt: skip


_numbers = (c_float(1.0), c_float(0.0))
_ONE, _ZERO = (ctypes.cast(byref(number), c_void_p) for number in _numbers)


@functools.cache
def library() -> Any:
    """The library that torch has loaded.

    Raises:
        Refused: this torch has none.
    """
    major = (torch.version.cuda or "").split(".")[0]
    if not major:
        raise Refused("torch was built without CUDA")
    try:
        found = ctypes.CDLL(f"libcublasLt.so.{major}")
    except OSError as error:
        raise Refused(str(error)) from None
    found.cublasLtMatmul.argtypes = [c_void_p] * 14 + [c_size_t, c_void_p]
    found.cublasLtMatrixLayoutCreate.argtypes = [
        POINTER(c_void_p), c_int, ctypes.c_uint64, ctypes.c_uint64, c_int64,
    ]  # fmt: skip
    for name in ("MatmulDesc", "MatrixLayout", "MatmulPreference"):
        set_attribute = getattr(found, f"cublasLt{name}SetAttribute")
        set_attribute.argtypes = [c_void_p, c_int, c_void_p, c_size_t]
    found.cublasLtMatmulAlgoGetHeuristic.argtypes = [c_void_p] * 7 + [
        c_int, POINTER(_Result), POINTER(c_int),
    ]  # fmt: skip
    return found


@functools.cache
def _handle(device: int) -> c_void_p:
    handle = c_void_p()
    with torch.cuda.device(device):
        _succeeded(library().cublasLtCreate(byref(handle)), "creating a handle")
    return handle


def prepared(of: Description, device: int, choice: int = 0) -> Prepared:
    """A product ready to be called on CUDA device ``device``. What the library made for it is given
    back with it.

    Args:
        choice: which of the algorithms the library proposes, best first by its own estimate.

    Raises:
        Refused: the library is missing or has no such algorithm.
    """
    lib, handle = library(), _handle(device)
    description = c_void_p()
    code = lib.cublasLtMatmulDescCreate(byref(description), _COMPUTE_FLOAT32, _FLOAT32)
    _succeeded(code, "describing a product")

    def describe(attribute: int, value: Any) -> None:
        code = lib.cublasLtMatmulDescSetAttribute(
            description, attribute, byref(value), ctypes.sizeof(value)
        )
        _succeeded(code, "describing a product")

    describe(_TRANSPOSE_A, c_int32(of.transpose_a))
    describe(_TRANSPOSE_B, c_int32(of.transpose_b))
    epilogue = of.bias * _EPILOGUE_BIAS | (of.sums is not None) * _EPILOGUE_GELU_AND_SUMS
    some = c_void_p(of.alignment)  # an address as aligned as all will be
    if epilogue:
        describe(_EPILOGUE, c_uint32(epilogue))
    if of.bias:
        describe(_BIAS_POINTER, some)
    if of.sums is not None:
        describe(_SUMS_POINTER, some)
        describe(_SUMS_LEADING, c_int64(of.sums.leading))
    a, b = (_layout(lib, m, of, of.dtype) for m in (of.a, of.b))
    d = _layout(lib, of.d, of, of.stored or of.dtype)
    c = _layout(lib, of.c, of, of.dtype) if of.c is not None else d
    result = _algorithm(lib, handle, (description, a, b, c, d), of.alignment, choice)
    set_bias = functools.partial(_set_address, lib, description, _BIAS_POINTER)
    set_sums = functools.partial(_set_address, lib, description, _SUMS_POINTER)
    beta = _ONE if of.c is not None else _ZERO
    algorithm = ctypes.cast(byref(result.algorithm), c_void_p)
    found = Prepared(
        lib.cublasLtMatmul, handle, description, a, b, c, d, beta, algorithm, result.workspace,
        (result,), set_bias, set_sums,
    )  # fmt: skip
    layouts = [a, b, d] if c is d else [a, b, c, d]
    # not when the process ends: the library may be gone by then
    weakref.finalize(found, _destroy, lib, description, layouts).atexit = False
    return found


def _destroy(lib: Any, description: c_void_p, layouts: Sequence[c_void_p]) -> None:
    lib.cublasLtMatmulDescDestroy(description)
    for layout in layouts:
        lib.cublasLtMatrixLayoutDestroy(layout)


def _set_address(lib: Any, description: c_void_p, attribute: int, address: int) -> None:
    lib.cublasLtMatmulDescSetAttribute(description, attribute, byref(c_void_p(address)), 8)


def _layout(lib: Any, matrix: Matrix, of: Description, dtype: torch.dtype) -> c_void_p:
    layout = c_void_p()
    code = lib.cublasLtMatrixLayoutCreate(
        byref(layout), _STORED[dtype], matrix.rows, matrix.columns, matrix.leading
    )
    _succeeded(code, "describing a matrix")
    if of.batch > 1:
        for attribute, value in (
            (_BATCH_COUNT, c_int32(of.batch)),
            (_BATCH_STRIDE, c_int64(matrix.stride)),
        ):
            code = lib.cublasLtMatrixLayoutSetAttribute(
                layout, attribute, byref(value), ctypes.sizeof(value)
            )
            _succeeded(code, "describing a batch")
    return layout


def _algorithm(
    lib: Any, handle: c_void_p, described: tuple[c_void_p, ...], alignment: int, choice: int
) -> _Result:
    preference = c_void_p()
    _succeeded(lib.cublasLtMatmulPreferenceCreate(byref(preference)), "asking for an algorithm")
    asked: list[tuple[int, Any]] = [
        (_MOST_WORKSPACE, c_size_t(WORKSPACE)),
        (_REDUCTIONS, c_uint32(_REDUCED_IN_FLOAT32)),
        *((attribute, c_uint32(alignment)) for attribute in _ALIGNMENTS),
    ]
    try:
        for attribute, value in asked:
            code = lib.cublasLtMatmulPreferenceSetAttribute(
                preference, attribute, byref(value), ctypes.sizeof(value)
            )
            _succeeded(code, "asking for an algorithm")
        results, count = (_Result * (choice + 1))(), c_int()
        code = lib.cublasLtMatmulAlgoGetHeuristic(
            handle, *described, preference, choice + 1, results, byref(count)
        )
    finally:
        lib.cublasLtMatmulPreferenceDestroy(preference)
    _succeeded(code, "asking for an algorithm")
    if count.value <= choice or results[choice].state:
        raise Refused(f"{count.value} algorithms")
    return _Result.from_buffer_copy(results[choice])


def _succeeded(code: int, action: str) -> None:
    if code:
        raise Refused(f"{action}: status {code}")
