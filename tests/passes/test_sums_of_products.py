"""Products that are added up: one call for those whose operands are there at one time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from iocompiler.graph.findings import Miss, Rewrite, findings
from iocompiler.ops import target
from iocompiler.ops.sum_of_products import SUM_OF_PRODUCTS
from iocompiler.passes.sums_of_products import sums_of_products
from tests.accuracy import FORWARD_FACTOR, SLACK, relative_error

HALF = torch.bfloat16
ROWS, WIDTH = 24, 32
Function = Callable[..., Any]


def flat(f: Function, *given: Tensor, on_gpu: bool = True, mode: str = "fake") -> GraphModule:
    """The graph of a function after the pass, as for a GPU."""
    gm: GraphModule = make_fx(f, tracing_mode=mode)(*given)
    with target.planned_for((9, 0) if on_gpu else None):
        sums_of_products(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def sums(gm: GraphModule) -> list[int]:
    """How many products each sum has."""
    calls = gm.graph.find_nodes(op="call_function", target=SUM_OF_PRODUCTS)
    return [len(call.args[0]) for call in calls]


def operands(*depths: int, dtype: torch.dtype = HALF) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [shape for k in depths for shape in ((ROWS, k), (k, WIDTH))]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def three(a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor) -> Tensor:
    return a @ b + c @ d + e @ f


def other_way(a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor) -> Tensor:
    return a @ b + (c @ d + e @ f)


def residual(r: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return (r + a @ b) + c @ d


def residual_between(r: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return (a @ b + r.tanh()) + c @ d


def viewed(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return (a @ b).view(2, -1, 4, 8) + (c @ d).view(2, -1, 4, 8)


def from_one_kernel(x: Tensor, w: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """The gradients of a gate and its value are computed from one product."""
    h = x @ w
    return torch.tanh(h) @ b + torch.sigmoid(h) @ d


def two_sums(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    return a @ b + c @ d, (a * 2) @ b + (c * 2) @ d


TAKEN: dict[str, tuple[Function, Sequence[Tensor], list[int]]] = {
    "three": (three, operands(16, 48, 8), [3]),
    "in another order": (other_way, operands(16, 48, 8), [3]),
    "with a residual": (residual, [*operands(WIDTH)[:1], *operands(16, 24)], [2]),
    "a residual between": (residual_between, [*operands(WIDTH)[:1], *operands(16, 24)], [2]),
    "seen in other dims": (viewed, operands(16, 24), [2]),
    "of one kernel": (from_one_kernel, [*operands(32)[:1], *(operands(32)[1],) * 3], [2]),
    "two sums": (two_sums, operands(16, 24), [2, 2]),
    "float32": (three, operands(7, 9, 5, dtype=torch.float32), [3]),
    "strided": (lambda a, b, c, d: a @ b + c.t() @ d.t(),
                [*operands(16), torch.randn(8, ROWS).to(HALF), torch.randn(WIDTH, 8).to(HALF)],
                [2]),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str) -> None:
    f, given, expected = TAKEN[name]
    gm = flat(f, *given)
    assert sums(gm) == expected
    assert [r.variant for r in findings(gm) if isinstance(r, Rewrite)] == [
        f"{count} products" for count in expected
    ]
    ours, eager, exact = (
        found if isinstance(found, tuple) else (found,)
        for found in (gm(*given), f(*given), f(*(x.double() for x in given)))
    )
    for got, theirs, wanted in zip(ours, eager, exact, strict=True):
        assert got.dtype == theirs.dtype
        allowed = FORWARD_FACTOR * relative_error(theirs, wanted) + SLACK
        assert relative_error(got, wanted) <= allowed


def test_a_symbolic_size() -> None:
    gm = flat(viewed, *operands(16, 24), mode="symbolic")
    assert sums(gm) == [2]
    a, b, c, d = operands(16, 24)
    wider = (a.repeat(2, 1), b, c.repeat(2, 1), d)
    torch.testing.assert_close(gm(*wider), viewed(*wider), rtol=2e-2, atol=0.3)


def read_twice(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    y = a @ b
    return y + c @ d, y


def scaled(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.add(a @ b, c @ d, alpha=2)


def difference(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return a @ b - c @ d


def widened(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return (a @ b).float() + (c @ d).float()


def broadcast(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return a @ b + (c @ d)[:1]


def itself(a: Tensor, b: Tensor) -> Tensor:
    y = a @ b
    return y + y


def sums_of_itself(a: Tensor, b: Tensor, r: Tensor) -> Tensor:
    y = a @ b + r
    return y + y


def activated(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return a @ b + torch.tanh(c @ d)


def at_other_times(x: Tensor, w: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """Two layers of a network: the first operand would be held until the second is there."""
    h = torch.tanh(x @ w)
    return h @ b + torch.tanh(h @ w) @ d


def written_between(r: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    y = a @ b
    a.add_(1)
    return y + c @ d


SQUARE = [operands(32)[0], *(operands(32)[1],) * 3]
DECLINED: dict[str, tuple[Function, Sequence[Tensor]]] = {
    "read by another": (read_twice, operands(16, 24)),
    "with a factor": (scaled, operands(16, 24)),
    "a difference": (difference, operands(16, 24)),
    "a wider sum": (widened, operands(16, 24)),
    "broadcast": (broadcast, operands(16, 24)),
    "an operand is written": (written_between, [*operands(WIDTH)[:1], *operands(16, 24)]),
    "twice the same": (itself, operands(16)),
    "a sum twice": (sums_of_itself, [*operands(16), operands(WIDTH)[0]]),
    "an activation": (activated, operands(16, 24)),
    "at other times": (at_other_times, SQUARE),
    "odd extents": (lambda a, b, c, d: a @ b + c @ d, operands(17, 24)),
    "float64": (lambda a, b, c, d: a @ b + c @ d, operands(16, 24, dtype=torch.float64)),
    "batched": (lambda a, b, c, d: a[None] @ b[None] + c[None] @ d[None], operands(16, 24)),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined(name: str) -> None:
    f, given = DECLINED[name]
    gm = flat(f, *given)
    assert sums(gm) == []
    ours, theirs = (tree_leaves(run(*(x.clone() for x in given))) for run in (gm, f))
    for got, wanted in zip(ours, theirs, strict=True):
        assert torch.equal(got, wanted)


def test_why_not_is_said() -> None:
    f, given = DECLINED["at other times"]
    (miss,) = findings(flat(f, *given))
    assert isinstance(miss, Miss)
    assert "from different calls" in miss.reason


def test_the_cpu_keeps_its_own() -> None:
    assert sums(flat(three, *operands(16, 48, 8), on_gpu=False)) == []


def test_of_what_is_there_at_other_times_each_part_is_taken() -> None:
    def f(x: Tensor, w: Tensor, b: Tensor, d: Tensor) -> Tensor:
        h = x @ w
        one = torch.tanh(h) @ b + torch.sigmoid(h) @ d
        g = torch.tanh(x @ b)
        return (one + g @ d) + (g * 2) @ w

    gm = flat(f, *SQUARE)
    assert sums(gm) == [2, 2]
    exact = f(*(x.double() for x in SQUARE))
    allowed = FORWARD_FACTOR * relative_error(f(*SQUARE), exact) + SLACK
    assert relative_error(gm(*SQUARE), exact) <= allowed
