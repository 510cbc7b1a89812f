"""The planner's kernels as Triton text, run by Triton's interpreter.

``tests/codegen/test_interpreted.py`` starts these tests.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

from iocompiler.plan.data import KernelStep
from iocompiler.runtime import reference
from iocompiler.tile.rows import reads_again
from tests.codegen.kernels import run_kernel
from tests.plan import graphs
from tests.plan.graphs import Planned, relative_error
from tests.plan.test_lower import FUNCTIONS, rand

# libdevice has no interpreter
NOT_INTERPRETED = {"powers", "remainder", "gelu"}


def two_layer_norms(x, shape, w, b):
    """The second's gradient is what the first's rows wait for: reductions on reductions."""
    return F.layer_norm(F.layer_norm(x, shape, w, b), shape, w, b)


pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, of NaN that is meant
    # Triton's interpreter in loops
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def through_triton(monkeypatch: pytest.MonkeyPatch):
    """Every kernel of a plan, so that a test without one fails."""
    ran = []

    def run(program, buffers, sizes, schedule):
        ran.append(program)
        run_kernel(program, buffers, sizes, schedule)

    monkeypatch.setattr(reference, "run", run)
    yield ran
    assert ran


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in NOT_INTERPRETED])
def test_forward(name: str) -> None:
    fn, shapes = FUNCTIONS[name]
    inputs = [rand(*s) for s in shapes]
    got, want, eager = Planned()(fn)(*inputs), fn(*[i.double() for i in inputs]), fn(*inputs)
    for g, w, e in zip(
        *(x if isinstance(x, tuple) else (x,) for x in (got, want, eager)), strict=True
    ):
        assert relative_error(g, w) <= 2 * relative_error(e, w) + 1e-5


@pytest.mark.parametrize(
    "name", ["layer norm", "softmax", "rms norm", "rotate half", "group norm", "rows and columns"]
)
def test_gradients(name: str) -> None:
    fn, shapes = FUNCTIONS[name]
    leaves = [rand(*s).requires_grad_() for s in shapes]
    outs = fn(*leaves)
    weights = [torch.randn_like(o) for o in (outs if isinstance(outs, tuple) else (outs,))]

    def gradients(run):
        out = run(*leaves)
        return torch.autograd.grad(out if isinstance(out, tuple) else (out,), leaves, weights)

    for got, want in zip(gradients(Planned()(fn)), gradients(fn), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "programs"), [(2, 2), (3, 3), (4, 4), (7, 4), (9, 5), (64, 8), (500, 8)]
)
def test_sums_down_the_columns_by_few_programs(
    rows: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer than rows, as many, one a multiprocessor and two, where there are four."""
    monkeypatch.setattr(graphs, "H200", replace(graphs.H200, sm_count=4))
    (walk,) = norm_backward(F.layer_norm, rows, 24)
    assert walk.schedule.programs == programs


@pytest.mark.parametrize("rows", [2, 5, 300])
@pytest.mark.parametrize(("norm", "registers"), [(F.layer_norm, 220), (two_layer_norms, 320)])
def test_rows_read_again(norm, registers: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at 16384 columns, with as much less to hold them: a row of 24 in a tile of 32."""
    monkeypatch.setattr("iocompiler.tile.rows._REGISTERS", registers)
    (walk,) = norm_backward(norm, rows, 24)
    assert reads_again(walk.program)


def norm_backward(norm, rows: int, width: int) -> list[KernelStep]:
    """Hold the gradients of a norm against float64; the kernels with sums both ways."""
    x, w, b = (rand(*shape).requires_grad_() for shape in ((rows, width), (width,), (width,)))
    weights = torch.randn(rows, width)

    def gradients(run, *leaves):
        return torch.autograd.grad((run(*leaves) * weights.to(leaves[0])).sum(), leaves)

    def normed(x, w, b):
        return norm(x, (width,), w, b)

    planned = Planned()
    found = gradients(planned(normed), x, w, b)
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    for got, want in zip(found, gradients(normed, *wide), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    return [step for step in planned.kernels if step.schedule.kind == "rows"]


@pytest.mark.parametrize(
    "name",
    [
        "layer norm",
        "softmax",
        "log softmax",
        "sum of rows",
        "two reductions",
        "cumsum",
        "sum of columns",
        "keepdim",
        "sum of the middle",
    ],
)
@pytest.mark.parametrize("block", [4, 8])
def test_rows_in_pieces(
    name: str, block: int, through_triton: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same programs as loops over the row, with a block that does not divide it."""

    def run(program, buffers, sizes, schedule):
        through_triton.append(program)
        if program.reduced:
            schedule = replace(schedule, kind="looped", r_block=block, x_block=2)
        run_kernel(program, buffers, sizes, schedule)

    monkeypatch.setattr(reference, "run", run)
    fn, shapes = FUNCTIONS[name]
    inputs = [rand(*s) for s in shapes]
    torch.testing.assert_close(Planned()(fn)(*inputs), fn(*inputs), rtol=1e-4, atol=1e-5)


def test_integers_and_bools() -> None:
    i = torch.randint(-20, 20, (6, 7))

    def fn(i):
        return (
            (i > 2) & (i < 9),
            i.sum(1),
            (i > 0).sum(0),
            (i > 5).any(1),
            (i > -30).all(),
            i.argmax(1),
            i * 3 // 4 % 5,
        )

    for got, want in zip(Planned()(fn)(i), fn(i), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_nan_and_inf() -> None:
    a = rand(4, 9)
    a[0, 3], a[1, 2], a[2, 5] = float("nan"), float("inf"), float("-inf")

    def fn(x):
        return x.relu(), x.amax(1), x.softmax(-1), x.clamp(-1, 1), x.argmax(1)

    for got, want in zip(Planned()(fn)(a), fn(a), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_gathers() -> None:
    table, ids, rows = rand(11, 6), torch.randint(0, 11, (3, 4)), torch.tensor([-1, 2, 0])

    def fn(t, i, r):
        return F.embedding(i, t) * 2, t[r], t[r, r], t.gather(1, i[:, :2] % 6)

    for got, want in zip(Planned()(fn)(table, ids, rows), fn(table, ids, rows), strict=True):
        assert torch.equal(got, want)


def test_split_reduction() -> None:
    a = rand(1000, 70)
    planned = Planned()

    def fn(x):
        return x.sum() * 2, x.abs().amax(0)

    for got, want in zip(planned(fn)(a), fn(a), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert any(s.name.endswith("_fold") for s in planned.kernels)


def test_dynamic_sizes() -> None:
    def fn(x, w):
        y = F.layer_norm(x, (16,), w)
        return (
            torch.cat([y, x[:, 1:]], 1)
            .softmax(1)
            .view(x.shape[0], -1, 4, 4)
            .transpose(1, 2)
            .contiguous()
        )

    planned = Planned()
    run = planned(fn, dynamic=True)
    for batch, length in [(3, 7), (5, 3), (2, 31)]:
        x, w = rand(batch, length, 16), rand(16)
        torch.testing.assert_close(run(x, w), fn(x, w))
    assert len(planned.plans) == 1
