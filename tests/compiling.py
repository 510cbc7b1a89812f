"""Compile a program and hold it against eager: results, gradients, mutated inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import iocompiler as ioc
from iocompiler.compilation import Compilation
from iocompiler.versions import version_tuple

OLD_TORCH = version_tuple(torch.__version__) < (2, 13)
"""Where torch itself, with any backend, traces less or compiles more often."""


def compiled(
    f: Callable[..., Any], pipeline: ioc.Pipeline = ioc.DEFAULT, **options: Any
) -> tuple[Callable[..., Any], list[Compilation]]:
    """``f`` compiled strictly on plain aten, unless told otherwise; the record of its graphs."""
    records: list[Compilation] = []
    return compiler(records, pipeline, **{"engine": "aten", **options})(f), records


def compiler(
    records: list[Compilation], pipeline: ioc.Pipeline = ioc.DEFAULT, **options: Any
) -> Callable[[Callable[..., Any]], Any]:
    """What compiles strictly, for the reference unless told otherwise; graphs are recorded."""
    dynamic = options.pop("dynamic", None)
    options = {"engine": "reference", "strict": True, **options}

    def compile_(f: Callable[..., Any]) -> Any:
        backend = ioc.Compiler(pipeline, on_compiled=records.append, **options)
        return torch.compile(f, backend=backend, dynamic=dynamic)

    return compile_


def check(f: Callable[..., Any], *inputs: torch.Tensor, **options: Any) -> list[Compilation]:
    """Results, gradients and mutated inputs equal eager's."""
    ours, theirs = ([copy(x) for x in inputs] for _ in range(2))
    run, records = compiled(f, **options)
    torch.manual_seed(1)
    result = run(*ours)
    torch.manual_seed(1)
    expected = f(*theirs)
    torch.testing.assert_close(result, expected)
    if expected.requires_grad:
        result.sum().backward()
        expected.sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(one.grad, other.grad)
    return records


def copy(x: torch.Tensor) -> torch.Tensor:
    """A leaf with the same values."""
    return x.detach().clone().requires_grad_(x.requires_grad)


def grad(*shape: int) -> torch.Tensor:
    """A random leaf that needs a gradient."""
    return torch.randn(*shape, requires_grad=True)
