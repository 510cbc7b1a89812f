"""What is computed around products: functions, and the sizes at which they are timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler.ops.sum_of_products import SUM_OF_PRODUCTS

Layout: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides."""

Results: TypeAlias = Tensor | tuple[Tensor, ...]

ROWS = 8192
WIDTHS = (768, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Product:
    """One row: ``function`` of tensors of these layouts; ``library`` is the product alone, with
    what the library adds in its own epilogue. m, n, k and how many products there are.
    """

    name: str
    group: str
    function: Callable[..., Results]
    library: Callable[..., Results]
    layouts: tuple[Layout, ...]
    sizes: tuple[int, int, int]
    products: int = 1

    @property
    def flops(self) -> int:
        return 2 * math.prod(self.sizes) * self.products

    @property
    def bytes(self) -> int:
        """Operands and the result, each once, in bfloat16."""
        m, n, _ = self.sizes
        return 2 * (sum(_elements(layout) for layout in self.layouts) + m * n)


def _elements(layout: Layout) -> int:
    shape, strides = layout
    return math.prod(n for n, stride in zip(shape, strides, strict=True) if stride)


def dense(*shape: int) -> Layout:
    """Row-major."""
    return shape, tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def transposed(rows: int, columns: int) -> Layout:
    """Column-major."""
    return (rows, columns), (1, rows)


def bias_gelu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(F.linear(x, w, b))


def linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, b)


def residual(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    return torch.mm(x, w) + r


def gated(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.silu(torch.mm(x, w)) * torch.mm(x, v)


def gelu_gated(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.gelu(torch.mm(x, w)) * torch.mm(x, v)


def gelu_halves(x: Tensor, w: Tensor) -> Tensor:
    value, gate = F.linear(x, w).chunk(2, -1)
    return value * F.gelu(gate)


def whole(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


def product(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    return torch.mm(x, w)


def both(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    torch.mm(x, w)
    return torch.mm(x, v)


def epilogues() -> Iterator[Product]:
    """A linear layer with GELU and one with a residual, over all widths."""
    for k in WIDTHS:
        for n in WIDTHS:
            size = (ROWS, n, k)
            layouts = (dense(ROWS, k), dense(n, k), dense(n))
            yield Product(f"bias gelu {n} {k}", "bias + GELU", bias_gelu, linear, layouts, size)
            layouts = (dense(ROWS, k), transposed(k, n), dense(ROWS, n))
            yield Product(f"residual {n} {k}", "residual", residual, product, layouts, size)


def gates() -> Iterator[Product]:
    """Both halves of a gated layer: of Llama's and of others' shapes, of two weights or of one."""
    shapes = ((8192, 2048, 8192), (8192, 4096, 14336), (2048, 1024, 4096))
    for rows, width, hidden in shapes:
        layouts = (dense(rows, width), dense(2 * hidden, width))
        title = f"geglu halves {rows} {width} {hidden}"
        sizes = (rows, hidden, width)
        yield Product(title, "gated", gelu_halves, whole, layouts, sizes, products=2)
    for name, function in (("swiglu", gated), ("geglu", gelu_gated)):
        for rows, width, hidden in shapes:
            weight = transposed(width, hidden)
            layouts = (dense(rows, width), weight, weight)
            sizes = (rows, hidden, width)
            title = f"{name} {rows} {width} {hidden}"
            yield Product(title, "gated", function, both, layouts, sizes, products=2)


# arguments in the order in which they are used: a graph has them so


def layers(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Results:
    """Of one input."""
    return F.linear(x, q), F.linear(x, k), F.linear(x, v)


def weight_gradients(dq: Tensor, x: Tensor, dk: Tensor, dv: Tensor) -> Results:
    return torch.mm(dq.t(), x), torch.mm(dk.t(), x), torch.mm(dv.t(), x)


def input_gradient(
    dq: Tensor, dk: Tensor, dv: Tensor, wq: Tensor, wk: Tensor, wv: Tensor
) -> Tensor:
    summed: Tensor = SUM_OF_PRODUCTS([dq, dk, dv], [wq, wk, wv])
    return summed


def gradient_parts(
    dq: Tensor, dk: Tensor, dv: Tensor, wq: Tensor, wk: Tensor, wv: Tensor
) -> Results:
    """Before they are added."""
    return torch.mm(dq, wq), torch.mm(dk, wk), torch.mm(dv, wv)


def inputs() -> Iterator[Product]:
    """Q, K and V of one input: the layers, and the gradients of the input and of their weights. The
    input's is "apart" as a chain of the library's products, each added to those before; "library"
    are its products with nothing added.
    """
    models = {
        "BERT-base": (768, (768, 768, 768), (1024, 4096, 8192)),
        "BERT-large": (1024, (1024, 1024, 1024), (512, 1024, 4096)),
        "Llama": (4096, (4096, 1024, 1024), (2048, 8192)),
    }
    for name, (width, heads, many) in models.items():
        for rows in many:
            title = f"{name} {rows}"
            sizes = (rows, sum(heads), width)
            weights = tuple(dense(n, width) for n in heads)
            tangents = tuple(dense(rows, n) for n in heads)
            x = dense(rows, width)
            yield Product(f"forward {title}", "layers", layers, layers, (x, *weights), sizes)
            yield Product(
                f"dx {title}", "input gradient", input_gradient, gradient_parts,
                (*tangents, *weights), (rows, width, sum(heads)),
            )  # fmt: skip
            yield Product(
                f"dw {title}", "weight gradients", weight_gradients, weight_gradients,
                (tangents[0], x, *tangents[1:]), (sum(heads), width, rows),
            )  # fmt: skip


# m, n, k; each with the right operand as rows and as columns
_SHAPES = (
    *((n, n, n) for n in (512, 1024, 2048, 4096, 8192)),
    *((8192, n, k) for n, k in ((1024, 4096), (4096, 1024), (768, 3072), (3072, 768))),
    *((m, 4096, 4096) for m in (16, 64, 128, 256, 512)),
    *((16384, n, 512) for n in (64, 128, 256)),
    *((256, 256, k) for k in (4096, 16384)),
    *((1024, 50304, 768), (4096, 32000, 1024), (2048, 128256, 512)),
    # odd rows, columns and inner extents
    *((1000, 1000, 1000), (4097, 4096, 4096), (4096, 4104, 4096), (4096, 4096, 4104)),
    *((1021, 1023, 1025), (8191, 768, 768), (3000, 5000, 700), (333, 7777, 555)),
)


def shapes() -> Iterator[Product]:
    """Sixty products and more: square, tall, wide, deep, odd; operands as rows and as columns."""
    for m, n, k in _SHAPES:
        for word, right in (("nn", dense(k, n)), ("nt", transposed(k, n))):
            layouts = (dense(m, k), right, dense(m, n))
            name = f"{word} {m} {n} {k}"
            yield Product(name, "shapes", residual, product, layouts, (m, n, k))
    for m, n, k in _SHAPES[2:4]:
        layouts = (transposed(m, k), dense(k, n), dense(m, n))
        yield Product(f"tn {m} {n} {k}", "shapes", residual, product, layouts, (m, n, k))


PARTS: dict[str, Callable[[], Iterator[Product]]] = {
    "epilogues": epilogues,
    "gates": gates,
    "shapes": shapes,
    "inputs": inputs,
}
