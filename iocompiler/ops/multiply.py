"""The matrix products inside of our operators: aten's, or, of problems of which that was measured
to be faster (`runtime/tune_products.py`), another algorithm of the library's than aten takes.

    with using({Problem(1, 2048, 128256, 4096, ...): Algorithm(...)}):
        multiply(x, weight.t(), logits)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from iocompiler.ops.library_product import Algorithm, Problem
from iocompiler.tile.traffic import VECTOR_BYTES

_algorithms: ContextVar[Mapping[Problem, Algorithm] | None] = ContextVar("algorithms", default=None)
_note: ContextVar[Callable[[Problem], object] | None] = ContextVar("note", default=None)


def multiply(
    a: Tensor, b: Tensor, out: Tensor, *, bias: Tensor | None = None, add: bool = False
) -> None:
    """Write a [M, K] @ b [K, N] to ``out`` [M, N], with ``bias`` [N] added or, under ``add``, to
    what is there. Sums are rounded to the dtype once.
    """
    algorithms, note = _algorithms.get(), _note.get()
    if algorithms is not None or note is not None:
        problem = _problem(a, b, out, bias, add)
        if note is not None and problem is not None:
            note(problem)
        found = algorithms.get(problem) if algorithms and problem is not None else None
        if found is not None and problem is not None and out.is_cuda:
            # not before it runs: it knows of operators
            from iocompiler.runtime.products import run_with

            run_with(found, problem, a, b, out, out if add else bias)
            return
    if add:
        out.addmm_(a, b)
    elif bias is not None:
        torch.addmm(bias, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


@contextmanager
def using(algorithms: Mapping[Problem, Algorithm]) -> Iterator[None]:
    """In here, and in this thread, the products of these problems are made by these algorithms."""
    token = _algorithms.set(algorithms)
    try:
        yield
    finally:
        _algorithms.reset(token)


@contextmanager
def noted(note: Callable[[Problem], object]) -> Iterator[None]:
    """In here, and in this thread, ``note(problem)`` is called before each product."""
    token = _note.set(note)
    try:
        yield
    finally:
        _note.reset(token)


def _problem(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, add: bool) -> Problem | None:
    """The product; None where it is not of one dtype, or may be rounded before a bias is added
    (`plan/addressed.py`).
    """
    given = [a, b, out, *([] if bias is None else [bias])]
    left, right, lying = ((0, x.stride(0), x.stride(1)) for x in (a, b, out))
    if len({x.dtype for x in given}) > 1:
        return None
    if bias is not None:
        lines = [stride for stride in (*left, *right, *lying) if stride != 1]
        vector = VECTOR_BYTES // out.element_size()
        if bias.stride(0) != 1 or any(stride % vector for stride in lines):
            return None
    added = lying if add else None if bias is None else (0, 0, 1)
    return Problem(
        1, a.shape[0], b.shape[1], a.shape[1], out.dtype, left, right, lying, added
    )  # fmt: skip
