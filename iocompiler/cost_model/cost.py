"""What an operation costs: bytes read and written in device memory, arithmetic, and the
contractions inside.

Every quantity is a `Size`: an int where shapes are static, a sympy expression where they are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch

from iocompiler.plan.data import TensorSpec
from iocompiler.tile.index import Size, product

DEFAULT_SIZE = 1024
"""What a symbolic size is taken as where no hint is known."""


@dataclass(frozen=True)
class Contraction:
    """``batch`` products of an m x k by a k x n matrix, operands of ``dtype``, in 2*batch*m*n*k
    FLOPs.

    ``aligned``: every operand's and the result's leading stride is a multiple of 16 bytes, as the
    matrix units' loads need. ``kind`` tells what the model of its speed and its lower bound must
    know: a convolution reuses its input beyond the matmul, an attention keeps its scores on the
    chip and may skip the upper triangle; an "activated" matmul stores its GELU beside it.
    """

    batch: Size
    m: Size
    n: Size
    k: Size
    dtype: torch.dtype
    aligned: bool = True
    kind: Literal["matmul", "conv", "attention", "causal attention", "activated"] = "matmul"

    @property
    def flops(self) -> Size:
        whole = 2 * product([self.batch, self.m, self.n, self.k])
        return halved(whole) if self.kind == "causal attention" else whole


@dataclass(frozen=True)
class Cost:
    """Bytes to and from device memory, FLOPs (multiply and add are two), and transcendental
    functions, which ``flops`` leaves out. ``flops`` counts the contractions' too. Of the written
    bytes, ``staged_bytes`` wait in L2 until the arithmetic that makes them is done, and are copied
    from there. ``relaid_bytes`` a library moves before and after, to have its operands in the order
    of storage it computes in. ``further_launches`` come behind the first.
    """

    read_bytes: Size = 0
    written_bytes: Size = 0
    flops: Size = 0
    transcendentals: Size = 0
    contractions: tuple[Contraction, ...] = ()
    staged_bytes: Size = 0
    relaid_bytes: Size = 0
    further_launches: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.read_bytes + other.read_bytes,
            self.written_bytes + other.written_bytes,
            self.flops + other.flops,
            self.transcendentals + other.transcendentals,
            self.contractions + other.contractions,
            self.staged_bytes + other.staged_bytes,
            self.relaid_bytes + other.relaid_bytes,
            self.further_launches + other.further_launches,
        )

    @property
    def bytes(self) -> Size:
        return self.read_bytes + self.written_bytes

    @property
    def vector_flops(self) -> Size:
        """FLOPs outside the contractions."""
        return self.flops - sum((c.flops for c in self.contractions), 0)


def halved(size: Size) -> Size:
    return size // 2 if isinstance(size, int) else size / 2


def least(a: Size, b: Size) -> Size:
    """The smaller of two sizes."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else whole(sympy.Min(a, b))


def greatest(a: Size, b: Size) -> Size:
    """The greater of two sizes."""
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else whole(sympy.Max(a, b))


def whole(size: sympy.Expr) -> Size:
    """A size expression, as an int where it is one."""
    return int(size) if size.is_Integer else size


def value_of(size: Size, hints: Mapping[str, int] | None = None) -> float:
    """A size as a number, each symbol taken at its hint, or at `DEFAULT_SIZE` where it has none."""
    if isinstance(size, (int, float)):
        return size
    known = hints or {}
    return float(size.subs({s: known.get(s.name, DEFAULT_SIZE) for s in size.free_symbols}))


def elements(spec: TensorSpec) -> Size:
    """How many distinct elements a tensor reads: expanded dimensions (stride 0) lie in memory
    once."""
    sizes = zip(spec.shape, spec.stride, strict=True)
    if any(s == 0 for s in spec.shape):
        return 0
    return product([size for size, stride in sizes if stride != 0])


def nbytes(spec: TensorSpec) -> Size:
    """The distinct bytes of a tensor."""
    return elements(spec) * spec.dtype.itemsize


def size_of(value: Any) -> Size:
    """An int or SymInt as a `Size`."""
    if isinstance(value, torch.SymInt):
        expression: sympy.Expr = value.node.expr
        return whole(expression)
    return int(value)


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """The spec of a (fake) tensor; a sparse or nested one counts as contiguous."""
    shape = tuple(size_of(s) for s in tensor.shape)
    if tensor.layout == torch.strided:
        stride = tuple(size_of(s) for s in tensor.stride())
    else:
        stride = tuple(product(shape[i + 1 :]) for i in range(len(shape)))
    return TensorSpec(shape, stride, tensor.dtype, str(tensor.device))
