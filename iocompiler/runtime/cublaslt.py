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
from dataclasses import dataclass, replace
from typing import Any

import torch

from iocompiler.ops.library_product import Activation, Algorithm

TYPES = {torch.float16: 2, torch.bfloat16: 14}
_FLOAT32, _COMPUTE_FLOAT32 = 0, 68
_STORED = {**TYPES, torch.float32: _FLOAT32}
MOST_PROPOSED = 6
"""Algorithms that the library is asked for, where it is asked for more than one."""
WORKSPACE = 32 * 2**20
"""Bytes an algorithm may ask for: what torch gives the library on a Hopper."""

# attributes of a description, of a matrix, of what is asked of an algorithm
_TRANSPOSE_A, _TRANSPOSE_B, _EPILOGUE, _BIAS_POINTER = 3, 4, 7, 8
_BATCH_COUNT, _BATCH_STRIDE = 5, 6
_MOST_WORKSPACE, _REDUCTIONS, _ALIGNMENTS = 1, 3, (5, 6, 7, 8)
_EPILOGUE_BIAS, _EPILOGUE_SUMS = 4, 128
_ACTIVATIONS = {None: 0, "relu": 2, "gelu": 32}
_SUMS_POINTER, _SUMS_LEADING = 11, 12  # the epilogue's "auxiliary" matrix
_REDUCED_IN_FLOAT32 = 2
"""Partial sums are added in float32: half as exact, where the library adds them in the result's
dtype, is not what a float32 sum promises. (By NVIDIA's word, whatever the algorithm, one version
gives the same bits each time on one kind of GPU.)"""
_CONFIGURATION = (*(c_uint32,) * 7, *(ctypes.c_uint16,) * 2)
"""Types of an algorithm's attributes, which count from 0, in the order of `Algorithm`'s fields."""


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
    column-major matrices; op transposes where it says so. With an ``activation``, ``d`` is that of
    it; with ``sums`` too, the sums go there. ``d`` is of the operands' dtype, or of ``stored``.
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
    activation: Activation | None = None


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
    proposed: bool
    """Whether the algorithm is the one that was asked for, if one was."""

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
    found.cublasLtMatmulAlgoConfigGetAttribute.argtypes = [
        c_void_p, c_int, c_void_p, c_size_t, POINTER(c_size_t),
    ]  # fmt: skip
    found.cublasLtGetVersion.restype = c_size_t
    return found


def version() -> int:
    """The library's, as it counts them.

    Raises:
        Refused: there is none.
    """
    return int(library().cublasLtGetVersion())


@functools.cache
def _handle(device: int) -> c_void_p:
    handle = c_void_p()
    with torch.cuda.device(device):
        _succeeded(library().cublasLtCreate(byref(handle)), "creating a handle")
    return handle


def prepared(of: Description, device: int, algorithm: Algorithm | None = None) -> Prepared:
    """A product ready to be called on CUDA device ``device``. What the library made for it is given
    back with it.

    Args:
        algorithm: of those that the library proposes; by default, and where it does not propose
            that, its first one, which is the best by its own estimate. `Prepared.proposed` says so.

    Raises:
        Refused: the library is missing or has no algorithm.
    """
    lib, handle = library(), _handle(device)
    described, results, made = _asked(of, device, 1 if algorithm is None else MOST_PROPOSED)
    chosen = results.get(algorithm) if algorithm is not None else None
    result = chosen or next(iter(results.values()))
    description, a, b, c, d = described
    found = Prepared(
        lib.cublasLtMatmul, handle, description, a, b, c, d, _ONE if of.c is not None else _ZERO,
        ctypes.cast(byref(result.algorithm), c_void_p), result.workspace, (result,),
        _setting(lib, description, _BIAS_POINTER), _setting(lib, description, _SUMS_POINTER),
        algorithm is None or chosen is not None,
    )  # fmt: skip
    # not when the process ends: the library may be gone by then
    weakref.finalize(found, _destroy, lib, made).atexit = False
    return found


def proposed(of: Description, device: int) -> tuple[Algorithm, ...]:
    """The algorithms that the library proposes for a product, best first by its own estimate.

    Raises:
        Refused: the library is missing or has no algorithm.
    """
    _, results, made = _asked(of, device, MOST_PROPOSED)
    _destroy(library(), made)
    return tuple(results)


def _asked(
    of: Description, device: int, most: int
) -> tuple[tuple[c_void_p, ...], dict[Algorithm, _Result], list[c_void_p]]:
    """`_described`, at most so many algorithms for it, and what is to be given back (`_destroy`).

    Raises:
        Refused: the library is missing or has no algorithm.
    """
    lib, handle = library(), _handle(device)
    made: list[c_void_p] = []
    try:
        described = _described(lib, of, made)
        return described, _proposed(lib, handle, described, of.alignment, most), made
    except Exception:
        _destroy(lib, made)
        raise


def _described(lib: Any, of: Description, made: list[c_void_p]) -> tuple[c_void_p, ...]:
    """The descriptions of a product and of a, b, c, d; ``made``: what the library makes for it, the
    product's first.
    """
    description = c_void_p()
    code = lib.cublasLtMatmulDescCreate(byref(description), _COMPUTE_FLOAT32, _FLOAT32)
    _succeeded(code, "describing a product")
    made.append(description)

    def describe(attribute: int, value: Any) -> None:
        code = lib.cublasLtMatmulDescSetAttribute(
            description, attribute, byref(value), ctypes.sizeof(value)
        )
        _succeeded(code, "describing a product")

    describe(_TRANSPOSE_A, c_int32(of.transpose_a))
    describe(_TRANSPOSE_B, c_int32(of.transpose_b))
    epilogue = of.bias * _EPILOGUE_BIAS | _ACTIVATIONS[of.activation]
    epilogue |= (of.sums is not None) * _EPILOGUE_SUMS
    some = c_void_p(of.alignment)  # an address as aligned as all will be
    if epilogue:
        describe(_EPILOGUE, c_uint32(epilogue))
    if of.bias:
        describe(_BIAS_POINTER, some)
    if of.sums is not None:
        describe(_SUMS_POINTER, some)
        describe(_SUMS_LEADING, c_int64(of.sums.leading))

    a, b = (_layout(lib, m, of, of.dtype, made) for m in (of.a, of.b))
    d = _layout(lib, of.d, of, of.stored or of.dtype, made)
    c = _layout(lib, of.c, of, of.dtype, made) if of.c is not None else d
    return description, a, b, c, d


def _destroy(lib: Any, made: Sequence[c_void_p]) -> None:
    for place, each in enumerate(made):
        (lib.cublasLtMatrixLayoutDestroy if place else lib.cublasLtMatmulDescDestroy)(each)


def _setting(lib: Any, description: c_void_p, attribute: int) -> Callable[[int], None]:
    """What puts an address into a description; for one thread at a time."""
    place = c_void_p()
    at, size, put = byref(place), ctypes.sizeof(place), lib.cublasLtMatmulDescSetAttribute

    def set_address(address: int) -> None:
        place.value = address
        put(description, attribute, at, size)

    return set_address


def _layout(
    lib: Any, matrix: Matrix, of: Description, dtype: torch.dtype, made: list[c_void_p]
) -> c_void_p:
    layout = c_void_p()
    code = lib.cublasLtMatrixLayoutCreate(
        byref(layout), _STORED[dtype], matrix.rows, matrix.columns, matrix.leading
    )
    _succeeded(code, "describing a matrix")
    made.append(layout)
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


def _proposed(
    lib: Any, handle: c_void_p, described: tuple[c_void_p, ...], alignment: int, most: int
) -> dict[Algorithm, _Result]:
    """Of at most so many algorithms, best first, those that the library can run.

    Raises:
        Refused: there is none.
    """
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
        results, count = (_Result * most)(), c_int()
        code = lib.cublasLtMatmulAlgoGetHeuristic(
            handle, *described, preference, most, results, byref(count)
        )
    finally:
        lib.cublasLtMatmulPreferenceDestroy(preference)
    _succeeded(code, "asking for an algorithm")
    found: dict[Algorithm, _Result] = {}
    for result in results[: count.value]:
        algorithm = _configuration(lib, result)
        asked_for = algorithm.split_k < 2 or algorithm.reduction in (0, _REDUCED_IN_FLOAT32)
        if not result.state and asked_for:
            while algorithm in found:
                algorithm = replace(algorithm, twin=algorithm.twin + 1)
            found[algorithm] = _Result.from_buffer_copy(result)
    if not found:
        raise Refused(f"{count.value} algorithms, none that can be run")
    return found


def _configuration(lib: Any, result: _Result) -> Algorithm:
    """Attributes that this version of the library does not have are 0."""
    numbers = [kind() for kind in _CONFIGURATION]
    for attribute, number in enumerate(numbers):
        lib.cublasLtMatmulAlgoConfigGetAttribute(
            byref(result.algorithm), attribute, byref(number), ctypes.sizeof(number),
            byref(c_size_t()),
        )  # fmt: skip
    return Algorithm(*(number.value for number in numbers))


def _succeeded(code: int, action: str) -> None:
    if code:
        raise Refused(f"{action}: status {code}")
