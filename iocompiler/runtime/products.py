"""Matrix products by address, as a generated module launches them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from iocompiler.runtime.values import storage_elements

Strides = tuple[int, int, int]
"""In elements: along the batch, down rows, along a row."""

_BIAS = (0, 0, 1)


@dataclass(frozen=True)
class Problem:
    """out[b, i, j] = sum_k a[b, i, k] b[b, k, j] + added[b, i, j], sums in float32.

    ``dtype`` (bfloat16 or float16) is that of all four; ``added`` is (0, 0, 1) for a bias of n
    elements, else the strides of a tensor of out's shape.
    """

    batch: int
    m: int
    n: int
    k: int
    dtype: torch.dtype
    a: Strides
    b: Strides
    out: Strides
    added: Strides | None = None


def supported(problem: Problem) -> bool:
    """Whether strides have the form a library takes: those of each operand are 1 one way, and the
    other way reach over it; results are by rows, each matrix in a place of its own.
    """
    p = problem
    operands = ((p.a, p.m, p.k), (p.b, p.k, p.n))
    forms = all(
        (column == 1 and row >= columns) or (row == 1 and column >= rows)
        for (_, row, column), rows, columns in operands
    )
    results = [p.out] if p.added in (None, _BIAS) else [p.out, p.added]
    return forms and all(
        s is not None and s[2] == 1 and s[1] >= p.n and (p.batch == 1 or s[0] >= p.m * s[1])
        for s in results
    )


class Product:
    """A product of one place of a module.

    Args:
        problem: gives the problem from the sizes that it depends on.
        device: where the addresses are.
    """

    def __init__(self, problem: Callable[..., Problem], device: torch.device) -> None:
        self._problem, self._device = problem, device

    def run(
        self, stream: int, sizes: tuple[int, ...], a: int, b: int, out: int, added: int = 0
    ) -> None:
        """Launch it on a stream, operands and result by their addresses."""
        p = self._problem(*sizes)
        if 0 in (p.batch, p.m, p.n):
            return
        left, right, result = (
            self._tensor(address, shape, strides, p.dtype)
            for address, shape, strides in (
                (a, (p.batch, p.m, p.k), p.a),
                (b, (p.batch, p.k, p.n), p.b),
                (out, (p.batch, p.m, p.n), p.out),
            )
        )
        if p.added is None:
            torch.bmm(left, right, out=result)
        else:
            more = self._tensor(added, (p.batch, p.m, p.n), p.added, p.dtype)
            torch.baddbmm(more, left, right, out=result)

    def _tensor(
        self, address: int, shape: tuple[int, ...], strides: Strides, dtype: torch.dtype
    ) -> Tensor:
        """What lies at an address, which must outlive the tensor."""
        elements = storage_elements(shape, strides)
        if elements == 0:
            return torch.empty(shape, dtype=dtype, device=self._device)
        if self._device.type == "cpu":
            memory = (ctypes.c_char * (elements * dtype.itemsize)).from_address(address)
            flat = torch.frombuffer(memory, dtype=dtype)
        else:
            flat = torch.as_tensor(_Memory(address, elements), device=self._device).view(dtype)
        return flat.as_strided(shape, strides)


class _Memory:
    """16-bit elements at an address of a GPU."""

    def __init__(self, address: int, elements: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (elements,), "typestr": "<i2", "data": (address, False), "version": 3,
        }  # fmt: skip
