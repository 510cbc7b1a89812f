"""Linear + cross-entropy beside its three matrix products alone by cuBLAS, and by size of chunks.

``python -m benchmarks.linear_cross_entropy`` prints, for each shape: time and peak memory (above
inputs and weights) of a compiled forward and backward; the time of the three products; the ratio.
``--chunks`` repeats it for scratches of 64 MiB to 1 GiB.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import iocompiler as ioc
from benchmarks.timing import steps
from iocompiler.ops import linear_cross_entropy_chunks as chunks

SHAPES = ((8192, 2048, 128256), (8192, 768, 50257), (8192, 1024, 30522))
SCRATCHES = (64, 128, 256, 512, 1024)  # MiB


def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """What a user writes."""
    return F.cross_entropy(F.linear(x, weight).float(), target)


def step(
    run: Callable[..., Tensor], x: Tensor, weight: Tensor, target: Tensor
) -> Callable[[], None]:
    """Forward and backward, gradients made anew."""

    def call() -> None:
        x.grad = weight.grad = None
        run(x, weight, target).backward()  # type: ignore[no-untyped-call]

    return call


def products(x: Tensor, weight: Tensor) -> Callable[[], None]:
    """The three matrix products alone, the gradient of the logits being given."""
    x, weight = x.detach(), weight.detach()
    logits = x @ weight.t()

    def call() -> None:
        torch.mm(x, weight.t(), out=logits)
        logits @ weight
        logits.t() @ x

    return call


def peak(call: Callable[[], None]) -> float:
    """GiB above what was allocated before."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def measure(shape: tuple[int, int, int], scratches: tuple[int, ...]) -> None:
    """Print the rows of one shape."""
    rows, width, vocabulary = shape
    torch.manual_seed(0)
    made: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(rows, width, **made).requires_grad_()
    weight = (torch.randn(vocabulary, width, **made) / width**0.5).requires_grad_()
    target = torch.randint(0, vocabulary, (rows,), device="cuda")
    alone = steps(products(x, weight), 50, 3.0).ms
    print(f"{rows} x {width} x {vocabulary}: three products {alone:.2f} ms")
    for scratch in scratches:
        chunks.SCRATCH_BYTES = scratch << 20
        torch._dynamo.reset()
        call = step(torch.compile(loss, backend=ioc.Compiler()), x, weight, target)
        taken = steps(call, 50, 3.0).ms
        x.grad = weight.grad = None
        size = chunks.chunk_rows(rows, vocabulary, 2, chunks.SCRATCH_BYTES)
        print(
            f"  scratch {scratch:5d} MiB, {size:5d} rows: {taken:.2f} ms, "
            f"{taken / alone:.3f}x, peak {peak(call):.2f} GiB"
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", action="store_true", help="sweep the size of the scratch")
    sweep = SCRATCHES if parser.parse_args().chunks else (chunks.SCRATCH_BYTES >> 20,)
    for shape in SHAPES:
        measure(shape, sweep)


if __name__ == "__main__":
    main()
