"""Linear + cross-entropy beside its three matrix products alone by cuBLAS, and by size of chunks;
distillation from another head beside its four, and beside eager and Inductor.

``python -m benchmarks.linear_cross_entropy`` prints, for each shape: time and peak memory (above
inputs and weights) of a compiled forward and backward; the time of the products; the ratio.
``--chunks`` repeats it for scratches of 64 MiB to 1 GiB. ``--part`` runs one of both alone.
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
DISTILLED = (8192, 2048, 32000, 2048)  # rows, the student's width, classes, the teacher's width
TEMPERATURE = 2.0
SCRATCHES = (64, 128, 256, 512, 1024)  # MiB


def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """What a user writes."""
    return F.cross_entropy(F.linear(x, weight).float(), target)


def distilled(x: Tensor, weight: Tensor, target: Tensor, taught: Tensor, teacher: Tensor) -> Tensor:
    """The same beside a divergence from the teacher's softmax of ``taught``."""
    student = F.linear(x, weight).float()
    with torch.no_grad():
        logits = F.linear(taught, teacher).float()
    soft = F.kl_div(
        F.log_softmax(student / TEMPERATURE, -1),
        F.softmax(logits / TEMPERATURE, -1),
        reduction="batchmean",
    )
    return 0.5 * F.cross_entropy(student, target) + 0.5 * TEMPERATURE**2 * soft


def step(
    run: Callable[..., Tensor], x: Tensor, weight: Tensor, *rest: Tensor
) -> Callable[[], None]:
    """Forward and backward, gradients made anew."""

    def call() -> None:
        x.grad = weight.grad = None
        run(x, weight, *rest).backward()  # type: ignore[no-untyped-call]

    return call


def products(x: Tensor, weight: Tensor, *teacher: Tensor) -> Callable[[], None]:
    """The three matrix products alone, the gradient of the logits being given; that of the
    ``teacher``'s rows and weight too.
    """
    x, weight = x.detach(), weight.detach()
    logits = x @ weight.t()

    def call() -> None:
        torch.mm(x, weight.t(), out=logits)
        logits @ weight
        logits.t() @ x
        for rows, other in zip(teacher[::2], teacher[1::2], strict=True):
            torch.mm(rows, other.t(), out=logits)

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


def measure_distilled() -> None:
    """Print the rows of the distillation."""
    rows, width, vocabulary, taught = DISTILLED
    torch.manual_seed(0)
    made: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(rows, width, **made).requires_grad_()
    weight = (torch.randn(vocabulary, width, **made) / width**0.5).requires_grad_()
    target = torch.randint(0, vocabulary, (rows,), device="cuda")
    teacher = torch.randn(rows, taught, **made), torch.randn(vocabulary, taught, **made)
    teacher[1].div_(taught**0.5)
    alone = steps(products(x, weight, *teacher), 50, 3.0).ms
    shape = f"{rows} x {width} x {vocabulary}, teacher {taught}"
    print(f"distilled {shape}: four products {alone:.2f} ms")
    runs = {
        "eager": distilled,
        "inductor": torch.compile(distilled),
        "iocompiler": torch.compile(distilled, backend=ioc.Compiler()),
    }
    for name, run in runs.items():
        call = step(run, x, weight, target, *teacher)
        taken = steps(call, 50, 3.0).ms
        x.grad = weight.grad = None
        print(f"  {name:10} {taken:.2f} ms, {taken / alone:.3f}x, peak {peak(call):.2f} GiB")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", action="store_true", help="sweep the size of the scratch")
    parser.add_argument("--part", choices=("plain", "distilled"), help="alone")
    given = parser.parse_args()
    sweep = SCRATCHES if given.chunks else (chunks.SCRATCH_BYTES >> 20,)
    for shape in SHAPES if given.part != "distilled" else ():
        measure(shape, sweep)
    if given.part != "plain":
        measure_distilled()


if __name__ == "__main__":
    main()
