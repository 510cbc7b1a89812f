"""Hand-written programs that need more than a line each; `cases` lists them all."""

from __future__ import annotations

import torch

from iocompiler.plan.data import Schedule
from iocompiler.tile.index import Affine
from iocompiler.tile.philox import uniform
from iocompiler.tile.program import Buffer, Builder
from tests.codegen.programs import (
    BF16,
    BOOL,
    F16,
    F32,
    I64,
    R0,
    X0,
    X1,
    Case,
    M,
    N,
    axes,
    both,
    ins,
    looped,
    number,
    outs,
    persistent,
    pointwise,
)

INF = float("inf")


def broadcasting() -> Case:
    """out[i, j] = a[i, j] * w[j] + b[i], odd sizes."""
    build = Builder()
    a, w, b = build.load("a", X0 * 13 + X1, F32), build.load("w", X1, F32), build.load("b", X0, F32)
    build.store("out", X0 * 13 + X1, build.map("add", build.map("mul", a, w), b))
    buffers = ins(a=(F32, 91), w=(F32, 13), b=(F32, 7)) + outs(out=(F32, 91))
    return Case(
        build.program(axes(7, 13), (), buffers),
        lambda: {"a": torch.randn(91), "w": torch.randn(13), "b": torch.randn(7)},
        lambda t: {"out": t["a"].double().view(7, 13) * t["w"] + t["b"][:, None]},
        pointwise(1, 16, 128),
    )


def transposed() -> Case:
    """out[i, j] = a[j, i]."""
    build = Builder()
    build.store("out", X0 * 19 + X1, build.load("a", X1 * 23 + X0, F32))
    square = (Schedule("pointwise", x_block=8, y_block=4, num_warps=1),)
    return Case(
        build.program(axes(23, 19), (), ins(a=(F32, 437)) + outs(out=(F32, 437))),
        lambda: {"a": torch.randn(437)},
        lambda t: {"out": t["a"].view(19, 23).t()},
        square,
        exact=True,
    )


def column_sum(symbolic: bool = False) -> Case:
    """out[x] = sum of a[r, x], 37 x 11."""
    deep, wide = (M, N) if symbolic else (37, 11)
    build = Builder()
    total = build.reduce("sum", build.load("a", R0 * wide + X0, F32), F32)
    build.store("out", X0, total)
    return Case(
        build.program(
            axes(wide), axes(deep, reduced=True), ins(a=(F32, deep * wide)) + outs(out=(F32, wide))
        ),
        lambda: {"a": torch.randn(407)},
        lambda t: {"out": t["a"].double().view(37, 11).sum(0)},
        looped(8, 4, 16) if symbolic else persistent(64, 4) + looped(8, 4, 16),
        {"s0": 11, "s1": 37} if symbolic else {},
    )


def full_sum() -> Case:
    """out = sum of a, no parallel axis at all."""
    build = Builder()
    build.store("out", Affine(), build.reduce("sum", build.load("a", R0, F32), F32))
    return Case(
        build.program((), axes(75, reduced=True), ins(a=(F32, 75)) + outs(out=(F32, 1))),
        lambda: {"a": torch.randn(75)},
        lambda t: {"out": t["a"].double().sum()},
        persistent(128, 1) + looped(16, 1),
    )


def norm_backward() -> Case:
    """dx and, in a row for each of three programs, partial column sums of dy and dy * x."""
    build, at = Builder(), X0 * 10 + R0
    x, dy, w = build.load("x", at, F32), build.load("dy", at, F32), build.load("w", R0, F32)
    scaled = build.map("mul", dy, w)
    build.store(
        "dx", at, build.map("sub", scaled, build.reduce("sum", build.map("mul", scaled, x), F32))
    )
    for name, value in (("dw", build.map("mul", dy, x)), ("db", dy)):
        build.store(name, R0, build.reduce("sum", value, F32, over="parallel"), fn="partial")
    buffers = ins(x=(F32, 130), dy=(F32, 130), w=(F32, 10)) + outs(
        dx=(F32, 130), dw=(F32, 30), db=(F32, 30)
    )

    def expected(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x, dy = t["x"].double().view(13, 10), t["dy"].double().view(13, 10)
        scaled = dy * t["w"]
        dx = scaled - (scaled * x).sum(1, keepdim=True)
        return {"dx": dx, "dw": (dy * x).sum(0), "db": dy.sum(0)}

    return Case(
        build.program(axes(13), axes(10, reduced=True), buffers),
        lambda: {"x": torch.randn(130), "dy": torch.randn(130), "w": torch.randn(10)},
        expected,
        tuple(
            Schedule("rows", x_block=b, r_block=16, programs=3, num_warps=1, num_stages=stages)
            for b, stages in ((1, 2), (2, 2), (2, 3))
        ),
    )


def gather() -> Case:
    """out[i, j] = table[ids[i], j]."""
    build = Builder()
    row = build.load("ids", X0, I64)
    build.store("out", X0 * 6 + X1, build.load("table", Affine.of(f"%{row}") * 6 + X1, BF16))
    buffers = ins(ids=(I64, 7), table=(BF16, 30)) + outs(out=(BF16, 42))
    return Case(
        build.program(axes(7, 6), (), buffers),
        lambda: {"ids": torch.tensor([4, 0, 3, 3, 1, 2, 4]), "table": torch.randn(30).bfloat16()},
        lambda t: {"out": t["table"].view(5, 6)[t["ids"]]},
        pointwise(8, 64),
        exact=True,
    )


def concatenated() -> Case:
    """out = cat(a, b): each loaded under a mask, nothing outside either buffer."""
    build = Builder()
    first = build.map("lt", build.iota(X0), number(build, 5, I64), dtype=BOOL)
    second = build.map("logical_not", first, dtype=BOOL)
    a = build.load("a", X0, F32, first)
    b = build.load("b", X0 - 5, F32, second, other=9.0)
    build.store("out", X0, build.map("where", first, a, b, dtype=F32))
    build.store("filled", X0, b)
    return Case(
        build.program(
            axes(11), (), ins(a=(F32, 5), b=(F32, 6)) + outs(out=(F32, 11), filled=(F32, 11))
        ),
        lambda: {"a": torch.randn(5), "b": torch.randn(6)},
        lambda t: {
            "out": torch.cat([t["a"], t["b"]]),
            "filled": torch.cat([torch.full((5,), 9.0), t["b"]]),
        },
        pointwise(1, 4, 16),
        exact=True,
    )


def masked_quotient() -> Case:
    """out = a // b where b != 0 else -1: lanes nobody selects divide by zero."""
    build = Builder()
    a, b = build.load("a", X0, I64), build.load("b", X0, I64)
    some = build.map("ne", b, number(build, 0, I64), dtype=BOOL)
    build.store(
        "out",
        X0,
        build.map("where", some, build.map("int_trunc_div", a, b), number(build, -1, I64)),
    )
    divisor = torch.tensor([2, 0, -3, 4])
    return Case(
        build.program(axes(4), (), ins(a=(I64, 4), b=(I64, 4)) + outs(out=(I64, 4))),
        lambda: {"a": torch.tensor([7, 1, 7, -9]), "b": divisor},
        lambda t: {"out": torch.tensor([3, -1, -2, -2])},
        pointwise(4),
        exact=True,
    )


def random_numbers() -> Case:
    """out[i] = uniform(seed, i + 2**32 - 4): over the edge of a 32-bit counter."""
    build = Builder()
    draw = build.rand(build.load("seed", Affine(), I64), X0 + (2**32 - 4))
    build.store("out", X0, draw)
    counter = torch.arange(9) + 2**32 - 4
    return Case(
        build.program(axes(9), (), ins(seed=(I64, 1)) + outs(out=(F32, 9))),
        lambda: {"seed": torch.tensor([12345678901234])},
        lambda t: {"out": uniform(t["seed"], counter)},
        pointwise(4, 16),
        exact=True,
    )


def one_random_number() -> Case:
    """out[i, j] = a[i, j] * uniform(seed, 3): a counter no axis moves."""
    build = Builder()
    draw = build.rand(build.load("seed", Affine(), I64), Affine.constant(3))
    build.store("out", X0 * 5 + X1, build.map("mul", build.load("a", X0 + X1 * 7, F32), draw))
    buffers = ins(seed=(I64, 1), a=(F32, 35)) + outs(out=(F32, 35))
    tiled = (Schedule("pointwise", x_block=8, y_block=4, num_warps=1),)
    return Case(
        build.program(axes(7, 5), (), buffers),
        lambda: {"seed": torch.tensor([2**62 + 3]), "a": torch.randn(35)},
        lambda t: {"out": t["a"].view(5, 7).t() * uniform(t["seed"], torch.tensor(3))},
        pointwise(4) + tiled,
        exact=True,
    )


def compared_random_numbers(p: float) -> Case:
    """out[i, j] = uniform(seed, 5 i + j) >= p: where that is one comparison of bits, and beyond."""
    build, at = Builder(), X0 * 5 + X1
    draw = build.rand(build.load("seed", Affine(), I64), at)
    kept = build.map("ge", draw, build.const(p, F32), dtype=torch.bool)
    build.store("out", at, kept)
    build.store("scaled", at, build.map("mul", draw, build.load("w", X1, F32)))
    buffers = ins(seed=(I64, 1), w=(F32, 5)) + outs(out=(torch.bool, 2000), scaled=(F32, 2000))
    drawn = lambda t: uniform(t["seed"], torch.arange(2000))
    return Case(
        build.program(axes(400, 5), (), buffers),
        lambda: {"seed": torch.tensor([2**40 + 3]), "w": torch.randn(5)},
        lambda t: {"out": drawn(t) >= p, "scaled": drawn(t) * t["w"].repeat(400)},
        pointwise(4, 512),
        exact=True,
    )


def in_place(fn: str = "") -> Case:
    """a += factor * b, the factor passed by value."""
    build = Builder()
    step = build.map("mul", build.load("factor", Affine(), F32), build.load("b", X0, F32))
    old = build.load("a", X0, F32)
    build.store("a", X0, step if fn else build.map("add", old, step), fn=fn)
    role = Buffer("a", F32, "inout", 10)
    buffers = (role, Buffer("factor", F32, "scalar", 1), *ins(b=(F32, 10)))
    return Case(
        build.program(axes(10), (), buffers),
        lambda: {"a": torch.arange(10.0), "factor": torch.tensor([0.5]), "b": torch.randn(10)},
        lambda t: {"a": t["a"].double() + 0.5 * t["b"]},
        pointwise(4, 16),
    )


def scaled() -> Case:
    """out = a * factor, in float16 by way of float32, by programs that walk the tiles."""
    build = Builder()
    wide = build.cast(build.load("a", X0, F16), F32)
    product = build.map("mul", wide, build.load("factor", Affine(), F32))
    build.store("out", X0, build.cast(product, F16))
    return Case(
        build.program(axes(37), (), ins(a=(F16, 37), factor=(F32, 1)) + outs(out=(F16, 37))),
        lambda: {"a": torch.randn(37).half(), "factor": torch.tensor([0.37])},
        lambda t: {"out": (t["a"].float() * t["factor"]).half()},
        (Schedule("pointwise", x_block=8, num_warps=1, programs=2), *pointwise(8)),
        exact=True,
    )


def scattered_add() -> Case:
    """sums[ids[i]] += a[i, j] for every j: places many lanes share."""
    build = Builder()
    place = build.load("ids", X0, I64)
    build.store("sums", Affine.of(f"%{place}"), build.load("a", X0 * 5 + X1, F32), fn="atomic_add")
    buffers = ins(ids=(I64, 6), a=(F32, 30)) + (Buffer("sums", F32, "inout", 3),)
    ids = torch.tensor([0, 2, 2, 0, 0, 1])
    return Case(
        build.program(axes(6, 5), (), buffers),
        lambda: {"ids": ids, "a": torch.randn(30), "sums": torch.ones(3)},
        lambda t: {
            "sums": torch.ones(3).double().index_add(0, ids, t["a"].double().view(6, 5).sum(1))
        },
        pointwise(8, 32),
    )


def truth() -> Case:
    """out = a & ~b over bools, and their any along a row."""
    build, at = Builder(), X0 * 9 + R0
    value = build.map(
        "and", build.load("a", at, BOOL), build.map("logical_not", build.load("b", at, BOOL))
    )
    build.store("out", at, value)
    build.store("some", X0, build.reduce("any", value, BOOL))
    buffers = ins(a=(BOOL, 45), b=(BOOL, 45)) + outs(out=(BOOL, 45), some=(BOOL, 5))

    def expected(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        value = (t["a"] & ~t["b"]).view(5, 9)
        return {"out": value, "some": value.any(1)}

    return Case(
        build.program(axes(5), axes(9, reduced=True), buffers),
        lambda: {"a": torch.rand(45) > 0.8, "b": torch.rand(45) > 0.5},
        expected,
        both(4, 16),
        exact=True,
    )


def counted() -> Case:
    """A scan over what does not vary along the row: out[x, r] = r + 1."""
    build = Builder()
    build.store("out", X0 * 9 + R0, build.scan("cumsum", number(build, 1.0)))
    return Case(
        build.program(axes(3), axes(9, reduced=True), outs(out=(F32, 27))),
        dict,
        lambda t: {"out": torch.arange(1.0, 10.0).expand(3, 9)},
        both(4, 16),
        exact=True,
    )


def shared_scan() -> Case:
    """A scan of what is the same for every row, and its sum: both stored for each row."""
    build = Builder()
    scanned = build.scan("cumsum", build.load("a", R0, F32))
    build.store("out", X0 * 9 + R0, scanned)
    build.store("total", X0, build.reduce("sum", scanned, F32))
    return Case(
        build.program(
            axes(3), axes(9, reduced=True), ins(a=(F32, 9)) + outs(out=(F32, 27), total=(F32, 3))
        ),
        lambda: {"a": torch.randn(9)},
        lambda t: {
            "out": t["a"].double().cumsum(0).expand(3, 9),
            "total": t["a"].double().cumsum(0).sum().expand(3),
        },
        both(4, 16),
    )


def multiplicity() -> Case:
    """A sum along the row of what does not vary along it: out[x] = 9 * a[x]."""
    build = Builder()
    build.store("out", X0, build.reduce("sum", build.load("a", X0, F32), F32))
    return Case(
        build.program(axes(5), axes(9, reduced=True), ins(a=(F32, 5)) + outs(out=(F32, 5))),
        lambda: {"a": torch.randn(5)},
        lambda t: {"out": 9 * t["a"].double()},
        both(4, 16),
    )


def empty() -> Case:
    """Rows of no elements: each sum is zero, each maximum lowest."""
    build = Builder()
    a = build.load("a", X0 * 0 + R0, F32)
    build.store("total", X0, build.reduce("sum", a, F32))
    build.store("top", X0, build.reduce("max", a, F32))
    return Case(
        build.program(
            axes(5), axes(0, reduced=True), ins(a=(F32, 0)) + outs(total=(F32, 5), top=(F32, 5))
        ),
        lambda: {"a": torch.empty(0)},
        lambda t: {"total": torch.zeros(5), "top": torch.full((5,), -INF)},
        persistent(1, 1, 4) + looped(4, 1, 4),
        exact=True,
    )


def lonely() -> Case:
    """Folds of one element, without an axis."""
    build = Builder()
    a = build.load("a", Affine(), F32)
    for fn, dtype in (("sum", F32), ("max", F32), ("argmax", I64)):
        build.store(fn, Affine(), build.reduce(fn, a, dtype))
    program = build.program(
        (), (), ins(a=(F32, 1)) + outs(sum=(F32, 1), max=(F32, 1), argmax=(I64, 1))
    )
    return Case(
        program,
        lambda: {"a": torch.randn(1)},
        lambda t: {"sum": t["a"], "max": t["a"], "argmax": torch.zeros(1, dtype=I64)},
        persistent(1, 1),
        exact=True,
    )


def nothing() -> Case:
    """No point at all: nothing is written."""
    build = Builder()
    build.store("out", X0, build.load("a", X0, F32))
    return Case(
        build.program(axes(0), (), ins(a=(F32, 0)) + outs(out=(F32, 0))),
        lambda: {"a": torch.empty(0)},
        lambda t: {"out": torch.empty(0)},
        pointwise(4),
        exact=True,
    )
