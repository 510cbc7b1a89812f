"""Where quotients and roots may err by more than float32's last bit, and where they may not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from iocompiler.tile.coarse import may_be_coarse, settled
from iocompiler.tile.program import Builder, TileProgram
from tests.codegen.programs import BF16, BOOL, F16, F32, F64, I32, R0, X0, axes, ins, number, outs

Body = Callable[[Builder, int, int], int]


def program(fn: str, body: Body, out: torch.dtype = BF16) -> TileProgram:
    """``out = body(fn(x, y), x)``, a row of eight to eight elements or to one."""
    build = Builder()
    x, y = (build.cast(build.load(name, X0 * 8 + R0, BF16), F32) for name in ("a", "b"))
    operands = (x, y) if fn.endswith("div") else (y,)
    made = build.cast(body(build, build.map(fn, *operands), x), out)
    at = X0 * 8 + R0 if "r0" in _varies(build, made) else X0
    build.store("out", at, made)
    buffers = ins(a=(BF16, 32), b=(BF16, 32)) + outs(out=(out, 32))
    return build.program(axes(4), axes(8, reduced=True), buffers)


def _varies(build: Builder, value: int) -> frozenset[str]:
    whole = TileProgram(axes(4), axes(8, reduced=True), (), tuple(build.ops))
    return whole.varies[value]


def coarse(found: TileProgram) -> bool:
    """Whether the quotient or root is that ``body`` was given: the first there is."""
    return next(op.fn for op in found.ops if op.fn.endswith(("div", "sqrt"))).startswith("coarse")


def _as_it_is(b: Builder, q: int, x: int) -> int:
    return q


def _through(*fns: str) -> Body:
    """Functions of one operand, "sub" and so on from one, "mul" with x."""

    def body(b: Builder, q: int, x: int) -> int:
        for fn in fns:
            if fn in ("add", "sub", "maximum", "div"):
                q = b.map(fn, number(b, 1.0), q)
            else:
                q = b.map(fn, q, x) if fn == "mul" else b.map(fn, q)
        return q

    return body


def _sum(fn: str, dtype: torch.dtype = F32) -> Body:
    return lambda b, q, x: b.reduce(fn, q, dtype)


def _as_mask(fn: str, dtype: torch.dtype = F32) -> Body:
    """x where what was rounded to a dtype compares with 1."""

    def body(b: Builder, q: int, x: int) -> int:
        q = b.cast(b.cast(q, dtype), F32)
        kept = b.map(fn, q, number(b, 1.0), dtype=BOOL)
        return b.map("where", kept, x, number(b, 0.0), dtype=F32)

    return body


def _through_int(b: Builder, q: int, x: int) -> int:
    return b.cast(b.cast(q, I32), F32)


def _stored(b: Builder, q: int, x: int) -> int:
    b.store("out", X0 * 8 + R0, q)
    return q


SMOOTH: dict[str, Body] = {
    "as it is": _as_it_is,
    "of a product": _through("mul", "neg", "abs"),
    "1 - q": _through("sub"),
    "exp(1 - q)": _through("sub", "exp"),
    "tanh": _through("tanh"),
    "log": _through("log"),
    "1 / sqrt": _through("sqrt", "div"),
    "1 / (1 + sqrt)": _through("sqrt", "add", "div"),
    "sum of a row": _sum("sum"),
}
SEEN: dict[str, Body] = {
    "floor": _through("floor"),
    "floor behind a product": _through("mul", "floor"),
    "sqrt(1 - q)": _through("sub", "sqrt"),
    "log(1 - q)": _through("sub", "log"),
    "1 / (1 - q)": _through("sub", "div"),
    "log of an exp": _through("exp", "log"),
    "asin": _through("asin"),
    "log1p": _through("log1p"),
    "pow": lambda b, q, x: b.map("pow", x, q),
    "fmod": lambda b, q, x: b.map("fmod", q, x),
    "an integer": _through_int,
    "compared": _as_mask("lt"),
    "compared when rounded": _as_mask("eq", BF16),
    "maximum of a row": _sum("max"),
    "maximum of a product": lambda b, q, x: b.reduce("max", b.map("mul", q, x), F32),
    "place of the maximum": lambda b, q, x: b.cast(b.reduce("argmax", q, torch.int64), F32),
    "stored as it is": _stored,
}


@pytest.mark.parametrize("fn", ["coarse_div", "coarse_sqrt"])
@pytest.mark.parametrize("name", SMOOTH)
def test_a_result_that_eager_rounds_stays_coarse(name: str, fn: str) -> None:
    assert coarse(settled(program(fn, SMOOTH[name])))


@pytest.mark.parametrize("fn", ["coarse_div", "coarse_sqrt"])
@pytest.mark.parametrize("name", SEEN)
def test_what_would_be_noticed_is_exact(name: str, fn: str) -> None:
    before = program(fn, SEEN[name])
    assert coarse(before)
    assert not coarse(settled(before))


@pytest.mark.parametrize("fn", ["div", "sqrt"])
@pytest.mark.parametrize("short", [BF16, F16])
@pytest.mark.parametrize("name", ["as it is", "of a product", "1 / sqrt", "1 / (1 + sqrt)"])
def test_float32_that_is_rounded_becomes_coarse(name: str, short: torch.dtype, fn: str) -> None:
    found = settled(program(fn, SMOOTH[name], short))
    assert not any(op.fn in ("div", "sqrt") for op in found.ops)


@pytest.mark.parametrize("fn", ["div", "sqrt"])
@pytest.mark.parametrize("name", ["1 - q", "exp(1 - q)", "tanh", "log", "sum of a row", *SEEN])
def test_float32_stays_exact_where_its_error_may_grow(name: str, fn: str) -> None:
    assert not coarse(settled(program(fn, SMOOTH.get(name) or SEEN[name])))


@pytest.mark.parametrize("out", [F32, F64])
@pytest.mark.parametrize("fn", ["div", "sqrt", "coarse_div", "coarse_sqrt"])
def test_what_is_not_rounded_is_exact(fn: str, out: torch.dtype) -> None:
    assert not coarse(settled(program(fn, _as_it_is, out)))


def test_a_long_chain_of_factors_has_errors_that_add_up() -> None:
    assert coarse(settled(program("div", _through(*["neg"] * 8))))
    assert not coarse(settled(program("div", _through(*["neg"] * 9))))


@pytest.mark.parametrize(("behind", "is_coarse"), [("add", True), ("floor", False)])
def test_float32_by_which_is_divided_coarsely(behind: str, is_coarse: bool) -> None:
    """x / sqrt(y) + 1: eager rounds the quotient; not where that is exact in the end."""
    body = lambda b, q, x: _through(behind)(b, b.map("coarse_div", x, q), x)
    assert coarse(settled(program("sqrt", body))) == is_coarse


def test_one_of_two_readers_decides() -> None:
    both = lambda b, q, x: b.map("mul", q, b.map("floor", q))
    assert not coarse(settled(program("coarse_div", both)))


def test_which_dtypes_round_more() -> None:
    short = {dtype for dtype in (BF16, F16, F32, F64, I32, BOOL) if may_be_coarse(dtype)}
    assert short == {BF16, F16}
