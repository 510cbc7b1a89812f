"""What the planner generates computes what the graph says: against eager, on random inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.plan.graphs import Planned, relative_error

X46, W46 = torch.randn(4, 6), torch.randn(4, 6)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


FUNCTIONS = {
    "broadcast": (lambda a, b: a * b + b.exp(), [(5, 1, 7), (3, 1)]),
    "transposed operand": (lambda a, b: a.t() + b, [(6, 9), (9, 6)]),
    "permute then pointwise": (lambda a: a.permute(2, 0, 1).relu() * 2, [(3, 4, 5)]),
    "split heads": (lambda a: a.view(2, 6, 4, 8).transpose(1, 2).contiguous() + 1, [(2, 6, 32)]),
    "merge heads": (lambda a: a.transpose(1, 2).reshape(2, 6, 32).sigmoid(), [(2, 4, 6, 8)]),
    "reshape that regroups": (lambda a: a.reshape(6, 4).exp(), [(3, 8)]),
    "split and joined again": (
        lambda a, b: torch.cat([a, (b * 2).view(3, 2, 2, 5).reshape(3, 4, 5)], 1),
        [(3, 1, 5), (3, 4, 5)],
    ),
    "slice with step": (lambda a: a[:, 1::3] - a[:, :4].mean(), [(5, 12)]),
    "negative slice": (lambda a: a[-3:, :-2] * 3, [(7, 9)]),
    "select and unsqueeze": (lambda a: a[2].unsqueeze(1) * a[:, 0], [(4, 4)]),
    "cat": (lambda a, b: torch.cat([a, b * 2, a[:, :1]], 1).tanh(), [(3, 4), (3, 5)]),
    "rotate half": (
        lambda a, c: a * c + torch.cat([-a[..., 4:], a[..., :4]], -1) * c.sin(),
        [(2, 3, 8), (3, 8)],
    ),
    "pad": (lambda a: F.pad(a, (1, 2, 0, 3), value=1.5) * 2, [(3, 5)]),
    "negative pad": (lambda a: F.pad(a, (-1, 2)).neg(), [(3, 5)]),
    "flip": (lambda a: a.flip(0, 1) + a, [(4, 5)]),
    "diagonal": (lambda a: torch.diagonal(a, 1).exp(), [(5, 5)]),
    "tril mask": (
        lambda a: a.masked_fill(torch.ones(5, 5).tril() == 0, float("-inf")).softmax(-1),
        [(2, 5, 5)],
    ),
    "sum of rows": (lambda a: a.sum(-1), [(7, 33)]),
    "sum of columns": (lambda a: a.sum(0), [(33, 7)]),
    "sum of the middle": (lambda a: (a * 2).sum(1), [(4, 9, 5)]),
    "sum of both ends": (lambda a: a.exp().sum((0, 2)), [(4, 9, 5)]),
    "full sum": (lambda a: a.square().mean(), [(11, 13)]),
    "keepdim": (lambda a: a - a.mean(1, keepdim=True), [(4, 9, 5)]),
    "softmax": (lambda a: a.softmax(-1), [(6, 50)]),
    "softmax over dim 0": (lambda a: a.softmax(0), [(6, 50)]),
    "log softmax": (lambda a: a.log_softmax(-1), [(6, 50)]),
    "logsumexp": (lambda a: a.logsumexp(-1), [(6, 50)]),
    "layer norm": (lambda a, w, b: F.layer_norm(a, (16,), w, b), [(3, 7, 16), (16,), (16,)]),
    "group norm": (lambda a, w, b: F.group_norm(a, 2, w, b), [(2, 6, 5, 5), (6,), (6,)]),
    "rms norm": (
        lambda a, w: a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-6) * w,
        [(4, 5, 24), (24,)],
    ),
    "batch norm": (lambda a: F.batch_norm(a, None, None, training=True), [(8, 3, 5)]),
    "gelu": (lambda a: F.gelu(a) + F.gelu(a, approximate="tanh"), [(5, 6)]),
    "swiglu": (lambda a: F.silu(a[..., :8]) * a[..., 8:], [(5, 16)]),
    "clamp": (lambda a: a.clamp(-0.5, 0.5) + a.clamp(min=0.1), [(5, 6)]),
    "amax amin": (lambda a: a.amax(1) - a.amin(1), [(5, 6)]),
    "cumsum": (lambda a: a.cumsum(1) * 2, [(5, 13)]),
    "two reductions": (lambda a: (a.sum(1), a.amax(1), (a * a).sum(1)), [(5, 13)]),
    "rows and columns": (lambda a: (a.sum(1), a.sum(0)), [(6, 5)]),
    "expand": (lambda a: a.expand(4, 3, 5) * torch.arange(3.0)[None, :, None], [(3, 5)]),
    "remainder": (lambda a: torch.remainder(a, 0.7) + torch.fmod(a, 0.3), [(40,)]),
    "powers": (lambda a: a**2 + a.abs() ** 0.5 + a.abs() ** -0.5 + a.abs() ** 1.7, [(5, 6)]),
    "matmul between": (lambda a, b: (a.relu() @ b).softmax(-1).sum(0), [(5, 6), (6, 7)]),
    "conv between": (
        lambda a, w: F.conv2d(a, w, padding=1).relu().mean((2, 3)),
        [(2, 3, 8, 8), (4, 3, 3, 3)],
    ),
    "unflatten twice": (lambda a: a.view(4, 2, 3, 2).sum(1).reshape(-1) * 2, [(4, 12)]),
    "0-dim": (lambda a, b: a * b.sum(), [(3, 4), ()]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_matches_eager(name: str) -> None:
    fn, shapes = FUNCTIONS[name]
    inputs = [rand(*s) for s in shapes]
    planned = Planned()
    got = planned(fn)(*inputs)
    want = fn(*[i.double() for i in inputs])
    eager = fn(*inputs)
    assert planned.plans, "nothing was compiled"
    for g, w, e in zip(
        *(x if isinstance(x, tuple) else (x,) for x in (got, want, eager)), strict=True
    ):
        assert g.shape == e.shape
        assert g.stride() == e.stride()
        assert g.dtype == e.dtype
        assert relative_error(g, w) <= 2 * relative_error(e, w) + 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "layer norm",
        "softmax",
        "rms norm",
        "rotate half",
        "cat",
        "swiglu",
        "group norm",
        "log softmax",
        "merge heads",
        "matmul between",
        "rows and columns",
        "gelu",
    ],
)
def test_gradients_match_eager(name: str) -> None:
    fn, shapes = FUNCTIONS[name]
    values = [rand(*s) for s in shapes]

    def gradients(run, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [v.to(dtype).requires_grad_() for v in values]
        out = run(*leaves)
        outs = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(1)
        loss = sum((o * torch.randn(o.shape, dtype=torch.float64).to(o.dtype)).sum() for o in outs)
        return list(torch.autograd.grad(loss, leaves))

    want = gradients(fn, torch.float64)
    eager = gradients(fn, torch.float32)
    got = gradients(Planned()(fn), torch.float32)
    for g, w, e in zip(got, want, eager, strict=True):
        assert relative_error(g, w) <= 3 * relative_error(e, w) + 1e-5


@pytest.mark.parametrize(
    "name", ["layer norm", "softmax", "split heads", "merge heads", "cat", "sum of columns", "pad"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_dtypes(name: str, dtype: torch.dtype) -> None:
    fn, shapes = FUNCTIONS[name]
    inputs = [rand(*s, dtype=dtype) for s in shapes]
    got, eager, want = Planned()(fn)(*inputs), fn(*inputs), fn(*[i.double() for i in inputs])
    assert got.dtype == eager.dtype
    assert relative_error(got, want) <= 2 * relative_error(eager, want) + 1e-5


@pytest.mark.parametrize(
    "fn",
    [
        lambda i: i * 3 - 7,
        lambda i: i // 3 + i % 5,
        lambda i: torch.div(i, 3, rounding_mode="trunc"),
        lambda i: (i > 2) & (i < 9) | (i == -4),
        lambda i: i.sum(1),
        lambda i: (i > 0).sum(0),
        lambda i: (i > 5).any(1),
        lambda i: (i > -20).all(),
        lambda i: i.float() / 3,
        lambda i: i.argmax(1),
        lambda i: (i.bool(), ~i, i << 1),
        lambda i: i.to(torch.int8) * 50,
        lambda i: torch.arange(3, 30, 4) + i[0, 0],
        lambda i: (i.cumsum(0), i.amax()),
    ],
)
def test_integers_are_exact(fn) -> None:
    i = torch.randint(-20, 20, (6, 7))
    got, want = Planned()(fn)(i), fn(i)
    for g, w in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want)), strict=True):
        assert g.dtype == w.dtype
        assert torch.equal(g, w)


def test_gathers() -> None:
    table, ids = rand(11, 6), torch.randint(0, 11, (3, 4))
    rows = torch.tensor([-1, 2, 0])

    def fn(t, i, r):
        return (
            F.embedding(i, t) * 2,
            t[r],
            t[:, r],
            t[r, r],
            t.gather(1, i[:, :2] % 6),
            t.index_select(1, r.abs()),
        )

    for g, w in zip(Planned()(fn)(table, ids, rows), fn(table, ids, rows), strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("dim", [0, 1])
def test_the_sum_of_a_one_hot_is_no_sum(dim: int) -> None:
    """As in the gradient of a cross-entropy; a place that does not exist gives 0."""

    def f(a: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        places = torch.arange(7).unsqueeze(1 - dim)
        hot = torch.where(places == where.unsqueeze(dim), a.unsqueeze(dim), 0.0)
        return hot.sum(dim) * 2

    a = torch.tensor([1.5, float("nan"), -2.0, 3.0, float("inf"), 4.0])
    where = torch.tensor([0, 6, -1, 7, 3, 2])
    planned = Planned()
    got = planned(f)(a, where)
    torch.testing.assert_close(got, f(a, where), rtol=0, atol=0, equal_nan=True)
    assert not [op for step in planned.kernels for op in step.program.ops if op.kind == "reduce"]


def test_the_sum_of_what_is_no_one_hot() -> None:
    def f(a: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        places = torch.arange(6)
        left = torch.where(places < where.unsqueeze(1), a.unsqueeze(1), 0.0).sum(1)
        along = torch.where(places == where.unsqueeze(1), a, 0.0).sum(1)
        ones = torch.where(places == where.unsqueeze(1), a.unsqueeze(1), 1.0).sum(1)
        twice = torch.where(2 * places == where.unsqueeze(1), a.unsqueeze(1), 0.0).sum(1)
        return left + 10 * along + 100 * ones + 1000 * twice

    a, where = torch.randn(6), torch.tensor([0, 5, 2, 4, 3, 1])
    torch.testing.assert_close(Planned()(f)(a, where), f(a, where), rtol=1e-5, atol=1e-4)


def test_nan_and_inf_pass_through() -> None:
    a = rand(4, 9)
    a[0, 3], a[1, 2], a[2, 5] = float("nan"), float("inf"), float("-inf")

    def fn(x):
        return (
            x.relu(),
            x.amax(1),
            x.softmax(-1),
            x.clamp(-1, 1),
            torch.maximum(x, -x),
            x.isnan() | x.isinf(),
        )

    for g, w in zip(Planned()(fn)(a), fn(a), strict=True):
        torch.testing.assert_close(g, w, equal_nan=True)


def test_empty_tensors() -> None:
    def fn(x):
        return x.relu() + 1, x.sum(1), x.sum(0)

    for g, w in zip(Planned()(fn)(torch.empty(0, 5)), fn(torch.empty(0, 5)), strict=True):
        assert torch.equal(g, w)
    for g, w in zip(Planned()(fn)(torch.empty(5, 0)), fn(torch.empty(5, 0)), strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize(
    "view", [lambda a: a[::2, 1:], lambda a: a.t(), lambda a: a[:, :1].expand(10, 8)]
)
def test_strided_inputs(view) -> None:
    a = view(rand(10, 8))

    def fn(x):
        return (x * 2).softmax(-1) + x.sum(0)

    torch.testing.assert_close(Planned()(fn)(a), fn(a))


def test_mutated_input() -> None:
    def fn(x, y):
        x.mul_(2)
        y[:, 1:3] = x[:, :2]
        return x + y

    x, y = rand(4, 5), rand(4, 5)
    x2, y2 = x.clone(), y.clone()
    got, want = Planned()(fn)(x, y), fn(x2, y2)
    torch.testing.assert_close(got, want)
    assert torch.equal(x, x2)
    assert torch.equal(y, y2)


def test_swap_in_place_keeps_old_values() -> None:
    def fn(x):
        x.copy_(x.t() + 1)
        return x * 2

    x = rand(5, 5)
    want_x = x.clone()
    want = fn(want_x)
    torch.testing.assert_close(Planned()(fn)(x), want)
    assert torch.equal(x, want_x)


@pytest.mark.parametrize("exchanged", [False, True])
def test_inputs_become_what_others_were(exchanged: bool) -> None:
    def fn(x, w):
        old = x * 1
        x.copy_(w * 2 if exchanged else x + 1)
        w.copy_(old * 5)
        return x.softmax(-1)

    ours, theirs = ([x.clone() for x in (X46, W46)] for _ in range(2))
    torch.testing.assert_close(Planned()(fn)(*ours), fn(*theirs))
    torch.testing.assert_close(ours, theirs)


def test_one_plan_serves_every_size() -> None:
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


def test_a_check_of_values_is_kept() -> None:
    def fn(ids):
        torch._assert_async((ids < 5).all(), "too large")  # torch 2.13 traces a one_hot so
        return F.one_hot(ids % 5, 5).float() * 2

    run = Planned()(fn)
    torch.testing.assert_close(run(torch.tensor([0, 4])), fn(torch.tensor([0, 4])))
    with pytest.raises(RuntimeError):
        run(torch.tensor([0, 7]))
