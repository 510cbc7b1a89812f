"""The hand-written programs every engine is held against: name to `Case`."""

from __future__ import annotations

import torch

from tests.codegen.handwritten import (
    broadcasting,
    column_sum,
    compared_random_numbers,
    concatenated,
    counted,
    empty,
    full_sum,
    gather,
    in_place,
    lonely,
    masked_quotient,
    multiplicity,
    norm_backward,
    nothing,
    one_random_number,
    random_numbers,
    scaled,
    scattered_add,
    shared_scan,
    transposed,
    truth,
)
from tests.codegen.programs import (
    BF16,
    BOOL,
    F32,
    F64,
    I32,
    I64,
    Case,
    M,
    both,
    fold,
    logsumexp,
    looped,
    normalise,
    rows,
    scan,
    softmax,
    unary,
    variance,
)
from tests.codegen.quotients import coarsely_divided, divided, known_power

INF, NAN = float("inf"), float("nan")
SPECIAL = torch.tensor([0.5, -1.5, NAN, INF, -INF, 0.0, -0.0, 2.5, 3.0])
INTEGERS = torch.tensor([-7, 7, 0, 5, -1, 2**31 - 1, 12, -12, 3])


def _with_nans() -> torch.Tensor:
    a = torch.randn(5, 9)
    a[0, 3], a[1, 2], a[2, 5], a[3] = NAN, INF, -INF, -INF
    a[0, 6] = NAN
    return a


def _extreme() -> torch.Tensor:
    a = 50 * torch.randn(7, 13)
    a[0, 3], a[1, 2], a[2, 5], a[3] = NAN, INF, -INF, -INF
    a[4, 0], a[4, 1], a[5], a[6, :4] = -3e38, 3e38, -3.4028234663852886e38, -INF
    return a


def _infinite() -> torch.Tensor:
    a = torch.cat([_extreme(), 50 * torch.randn(3, 13)])
    a[7, ::2], a[8, 4], a[8, :4], a[9, 1:6] = INF, INF, -INF, torch.tensor([NAN, INF, INF, 0, -INF])
    return a


def density(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(-x.double().square() / 2).div((2 * torch.pi) ** 0.5).to(x.dtype)


def _far_from_zero() -> torch.Tensor:
    """Rows with a mean far above their deviation, and one of equal elements."""
    a = torch.randn(6, 29) + 100 * torch.randn(6, 1)
    a[3] = 0.1
    return a


def _ties() -> torch.Tensor:
    return torch.randint(-3, 3, (5, 9))


CASES: dict[str, Case] = {
    "broadcasting": broadcasting(),
    "transposed": transposed(),
    "column sum": column_sum(),
    "column sum, any size": column_sum(symbolic=True),
    "full sum": full_sum(),
    "norm backward": norm_backward(),
    "gather": gather(),
    "cat": concatenated(),
    "masked quotient": masked_quotient(),
    "rand": random_numbers(),
    "rand, one": one_random_number(),
    **{f"rand against {p}": compared_random_numbers(p) for p in (0.0, 0.1, 0.5, 1.0)},
    "in place": in_place(),
    "atomic add": in_place("atomic_add"),
    "scaled": scaled(),
    "scattered add": scattered_add(),
    "bool": truth(),
    "scan of a constant": counted(),
    "scan of what rows share": shared_scan(),
    "sum of a constant row": multiplicity(),
    "empty rows": empty(),
    "no points": nothing(),
    "one element": lonely(),
    "softmax": rows(softmax, lambda a: a.softmax(1), (5, 13), both(4, 16)),
    "softmax bf16": rows(softmax, lambda a: a.softmax(1), (5, 13), both(4, 16), BF16),
    "softmax of extreme values": rows(
        softmax, lambda a: a.softmax(1), (7, 13), both(4, 16), values=_extreme
    ),
    "softmax float64": rows(softmax, lambda a: a.softmax(1), (5, 13), both(4, 16), F64),
    "softmax, any size": rows(
        softmax, lambda a: a.softmax(1), (5, 13), looped(4, 1, 4), symbolic=True
    ),
    "logsumexp of extreme values": rows(
        logsumexp,
        lambda a: a.logsumexp(1),
        (10, 13),
        both(4, 16),
        row_result=True,
        values=_infinite,
    ),
    "layer norm": rows(normalise(13), lambda a: torch.layer_norm(a, (13,)), (6, 13), both(4, 16)),
    "layer norm, any size": rows(
        normalise(M), lambda a: torch.layer_norm(a, (13,)), (6, 13), looped(4, 1, 4), symbolic=True
    ),
    "variance": rows(
        variance(29),
        lambda a: a.var(1, correction=0),
        (6, 29),
        both(4, 32),
        row_result=True,
        values=_far_from_zero,
    ),
    "variance, any size": rows(
        variance(M),
        lambda a: a.var(1, correction=0),
        (6, 3),
        looped(4, 1, 4),
        row_result=True,
        symbolic=True,
    ),
    "max with NaN": rows(
        fold("max", F32),
        lambda a: a.amax(1),
        (5, 9),
        both(4, 16),
        row_result=True,
        values=_with_nans,
    ),
    "min with NaN": rows(
        fold("min", F32),
        lambda a: a.amin(1),
        (5, 9),
        both(4, 16),
        row_result=True,
        values=_with_nans,
    ),
    "prod": rows(fold("prod", F32), lambda a: a.prod(1), (5, 9), both(4, 16), row_result=True),
    "int64 sum": rows(
        fold("sum", I64),
        lambda a: a.sum(1),
        (5, 9),
        both(4, 16),
        I64,
        row_result=True,
        values=lambda: torch.randint(-(2**40), 2**40, (5, 9)),
        exact=True,
    ),
    "int64 max": rows(
        fold("max", I64),
        lambda a: a.amax(1),
        (5, 9),
        both(4, 16),
        I64,
        row_result=True,
        values=lambda: torch.randint(-(2**40), 2**40, (5, 9)),
        exact=True,
    ),
    "argmax": rows(
        fold("argmax", I64),
        lambda a: a.argmax(1),
        (5, 9),
        both(4, 16),
        out=I64,
        row_result=True,
        values=_with_nans,
        exact=True,
    ),
    "argmin": rows(
        fold("argmin", I64),
        lambda a: a.argmin(1),
        (5, 9),
        both(4, 16),
        out=I64,
        row_result=True,
        values=_with_nans,
        exact=True,
    ),
    "argmax of ties": rows(
        fold("argmax", I64),
        lambda a: a.argmax(1),
        (5, 9),
        both(4, 16),
        I64,
        row_result=True,
        values=_ties,
        exact=True,
    ),
    "cumsum": rows(scan("cumsum"), lambda a: a.cumsum(1), (5, 13), both(4, 16)),
    "cumprod": rows(scan("cumprod"), lambda a: a.cumprod(1), (5, 13), both(4, 16)),
    "cumsum int64": rows(
        scan("cumsum"), lambda a: a.cumsum(1), (5, 9), both(4, 16), I64, values=_ties, exact=True
    ),
    **{
        f"{fn} of special values": unary(fn, F32, getattr(torch, fn), SPECIAL)
        for fn in (
            "exp",
            "log",
            "sqrt",
            "rsqrt",
            "sin",
            "cos",
            "erf",
            "sigmoid",
            "tanh",
            "floor",
            "ceil",
            "neg",
            "abs",
        )
    },
    **{
        f"{fn} of special values": unary(fn, F32, getattr(torch, fn), SPECIAL, libdevice=True)
        for fn in ("expm1", "log1p", "trunc", "round")
    },
    **{
        f"divided by {divisor}": divided(divisor)
        for divisor in (4096.0, 0.125, 3.0, -2.0, 2.0**-126, 0.0)
    },
    "coarse_sqrt of special values": unary("coarse_sqrt", F32, torch.sqrt, SPECIAL),
    **{
        f"coarsely divided by {kind}": coarsely_divided(kind)
        for kind in ("an element", "one number", "an argument", "0.3", "0.0")
    },
    **{f"powers of {base}": known_power(base) for base in (0.9, 0.999, 2.0, 10000.0, 1.0, 0.0)},
    "normal_cdf of special values": unary("normal_cdf", F32, torch.special.ndtr, SPECIAL),
    "normal_cdf": unary("normal_cdf", F32, torch.special.ndtr, torch.linspace(-6, 6, 97)),
    "normal_pdf": unary("normal_pdf", F32, density, torch.linspace(-6, 6, 97)),
    "normal_pdf float64": unary("normal_pdf", F64, density, SPECIAL.double()),
    "tanh": unary("tanh", F32, torch.tanh, torch.linspace(-2, 2, 97)),
    **{
        f"{fn} float64": unary(fn, F64, reference, SPECIAL.double(), libdevice=True)
        for fn, reference in (("tanh", torch.tanh), ("normal_cdf", torch.special.ndtr))
    },
    **{
        f"{fn} float64": unary(fn, F64, getattr(torch, fn), SPECIAL.double())
        for fn in ("exp", "log", "sqrt", "rsqrt", "sin", "erf", "sigmoid", "floor")
    },
    **{
        f"tiny {fn}": unary(
            fn,
            F32,
            getattr(torch, fn),
            torch.tensor([1e-30, -1e-7, 3e-4, -0.01, 0.2]),
            libdevice=fn != "tanh",
        )
        for fn in ("tanh", "expm1", "log1p")
    },
    "isnan": unary("isnan", F32, torch.isnan, SPECIAL, result=BOOL),
    "isinf": unary("isinf", F32, torch.isinf, SPECIAL, result=BOOL),
    "negated int32": unary("neg", I32, torch.neg, INTEGERS.int()),
    "inverted int64": unary("bitwise_not", I64, torch.bitwise_not, INTEGERS),
    "logical_not of int64": unary("logical_not", I64, torch.logical_not, INTEGERS, result=BOOL),
}
