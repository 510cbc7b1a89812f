"""Casts move in front of what repeats elements, where nobody can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import iocompiler as ioc
from iocompiler.graph import view
from iocompiler.graph.normalise import normalise
from iocompiler.pipeline import Pipeline
from tests.accuracy import relative_error
from tests.compiling import compiled, grad

aten = torch.ops.aten
X = torch.randn(2, 3, 4)


def repeated(x, dtype=torch.bfloat16):
    return x[:, :, None].expand(2, 3, 5, 4).reshape(2, 15, 4).to(dtype)


def times(x):
    return x @ torch.ones(x.shape[-1], 3, dtype=x.dtype)


def _written(x):
    y = x.sin()
    z = repeated(y)
    y.view(-1)[0] = 3
    return times(z), y


def _under_no_grad(x):
    with torch.no_grad():
        y = x[:, :, None].expand(2, 3, 5, 4).reshape(2, 15, 4)
    return times(y.to(torch.bfloat16))


def _read_twice(x):
    y = x[:, None].expand(2, 6, 3, 4).reshape(12, 3, 4)
    return y + 1, times(y.to(torch.bfloat16))


TAKEN: dict[str, Callable[..., Any]] = {
    "repeated heads": lambda x: times(repeated(x)),
    "widened before": lambda x: times(repeated(x.bfloat16().float())),
    "turned behind": lambda x: times(
        x[:, None].expand(2, 6, 3, 4).reshape(12, 3, 4).transpose(1, 2).to(torch.float64)
    ),
    "turned again": lambda x: times(repeated(x).transpose(1, 2)),
}
LEFT: dict[str, Callable[..., Any]] = {
    "nothing is repeated": lambda x: times(x.reshape(6, 4).to(torch.bfloat16)),
    "lies repeated": lambda x: times(x[:, None].expand(2, 6, 3, 4).to(torch.bfloat16)),
    "no copy between": lambda x: times(x[:, None].expand(2, 1, 3, 4).reshape(2, 3, 4).double()),
    "read twice": _read_twice,
    "to a whole number": lambda x: times(repeated(x * 9, torch.int32)),
    "written": _written,
    "another mode": _under_no_grad,
    "not multiplied": lambda x: repeated(x) + 1,
    "returned too": lambda x: (lambda y: (y, times(y)))(repeated(x)),
}


def normal(captured: Callable[..., GraphModule], f: Callable[..., Any]) -> list[Any]:
    gm = captured(f, X.clone())
    Pipeline(normalise).run(gm)
    expected = f(X.clone())
    expected = expected if isinstance(expected, tuple) else (expected,)
    for mine, wanted in zip(gm(X.clone()), expected, strict=True):
        assert torch.equal(mine, wanted)
        assert mine.stride() == wanted.stride()
    return [node.target for node in view.calls(gm)]


def _is_early(targets: list[Any]) -> bool:
    casts = [at for at, target in enumerate(targets) if target is aten.to.dtype]
    return not casts or max(casts) < targets.index(aten.expand.default)


@pytest.mark.parametrize("name", TAKEN)
def test_stands_before(name: str, captured: Callable[..., GraphModule]) -> None:
    targets = normal(captured, TAKEN[name])
    assert _is_early(targets)


@pytest.mark.parametrize("name", LEFT)
def test_stays(name: str, captured: Callable[..., GraphModule]) -> None:
    targets = normal(captured, LEFT[name])
    assert aten.expand.default not in targets or not _is_early(targets)


def test_gradients_are_as_accurate_as_eager() -> None:
    w, given = torch.randn(4, 32), grad(2, 3, 4)
    f = lambda x: ((repeated(x) @ w.bfloat16()).float().sin() * 3).sum()
    exact = lambda x: (repeated(x, torch.float64) @ w.bfloat16().double()).sin().mul(3).sum()
    run, _ = compiled(f)
    mine, theirs = (torch.autograd.grad(each(given), given)[0] for each in (run, f))
    (ref,) = torch.autograd.grad(exact(given.bfloat16().double()), given)
    assert relative_error(mine, ref) <= 3 * relative_error(theirs, ref) + 1e-5


def test_heads_repeated_under_autocast_are_grouped() -> None:
    def repeat(x):
        return x[:, :, None].expand(2, 2, 3, 8, 16).reshape(2, 6, 8, 16)

    def attend(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.nn.functional.scaled_dot_product_attention(q, repeat(k), repeat(v))

    report = ioc.explain(
        attend, grad(2, 6, 8, 16), grad(2, 2, 8, 16), grad(2, 2, 8, 16), compile_kernels=False
    )
    assert "gqa" in report.rewrites[0].variant
