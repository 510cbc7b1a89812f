"""Whether a program, compiled, computes what float64 eager computes, as well as eager does."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

import iocompiler as ioc
from tests.accuracy import FORWARD_FACTOR, GRADIENT_FACTOR, SLACK, Results, compare
from tests.fuzz.perturbed import Perturbed
from tests.fuzz.program import Program

DRAWS = 5
"""Draws of the inputs; a program is wrong where most of them are: one may be bad luck."""
PERTURBED = 10
"""Runs of eager with other roundings, where a program is not right at once."""


def verdict(program: Program, engine: Any = "reference", device: str = "cpu") -> str:
    """ "" for a program that is right, else what is wrong with it."""
    torch._dynamo.reset()
    backend = ioc.Compiler(engine=engine, strict=True, cache=False)
    run = torch.compile(program.function(), backend=backend, dynamic=program.dynamic)
    return verdict_of(program, run, device)


def verdict_of(program: Program, run: Callable[..., Any], device: str = "cpu") -> str:
    """The same of ``run``, which is said to compute what the program does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [_wrong(program, run, 0, device)]
        if found[0] and not found[0].startswith("raises"):
            found += [_wrong(program, run, seed, device) for seed in range(1, DRAWS)]
    bad = [line for line in found if line]
    return bad[0] if len(bad) > len(found) // 2 else ""


def valid(program: Program) -> bool:
    """Whether eager runs it, in its own dtypes and in float64."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _run(program.function(), program, 0, "cpu")
            _run(program.function(wide=True), program, 0, "cpu", wide=True)
    except Exception:
        return False
    return True


def _wrong(program: Program, run: Callable[..., Any], seed: int, device: str) -> str:
    try:
        eager = _run(program.function(), program, seed, device)
        reference = _run(program.function(wide=True), program, seed, device, wide=True)
    except Exception as error:
        return "" if _raises(run, program, seed, device) else f"eager raises {error!r:.200}"
    try:
        ours = _run(run, program, seed, device)
    except Exception as error:
        try:
            _by_torch(program, seed, device)
        except Exception:
            return ""  # torch.compile cannot take it, whatever the backend
        return f"raises {type(error).__name__}: {str(error).strip()[:400]}"
    moved = cache(lambda: _moved(program, seed, device))
    bad = judged(ours, eager, reference, moved)
    # what torch's decompositions change too (a dtype), or aot_eager, is not ours
    other = "aot_eager_decomp_partition" if bad.startswith("differs") else "aot_eager"
    if bad and judged(_by_torch(program, seed, device, other), eager, reference, moved):
        return ""
    return bad


def judged(
    ours: Results, eager: Results, reference: Results, moved: Callable[[], Sequence[Results]]
) -> str:
    """ "" where ``ours`` errs as eager may: by the rule of tests.accuracy or, where that finds it
    wrong or eager has a NaN or infinity too many, by `_beyond`, for which ``moved`` gives runs of
    eager whose roundings fell differently.
    """
    rounding = torch.finfo(_coarsest(eager)).eps / 2
    try:
        compared = compare(ours, eager, reference, _coarsest(eager))
    except AssertionError as error:
        return f"differs: {error}"
    open_ = [c for c in compared if not c.ok or math.isinf(c.allowed)]
    runs = [eager, *moved()] if open_ else []
    return "; ".join(str(c) for c in open_ if _beyond(c.name, ours, reference, runs, rounding))


def _beyond(
    name: str, ours: Results, reference: Results, runs: Sequence[Results], rounding: float
) -> bool:
    """Whether the error is beyond the factor times the worst of the ``runs``, at least a rounding.

    Errors are absolute norms: where float64 is exactly zero, no ratio says anything. A NaN or an
    infinity must be in float64, as it is rounded, or in one of the runs, at the same place. Where
    eager's own is neither finite nor float64's, its dtype was too narrow, and nothing is asked.
    """
    gradient = name.startswith("d ")
    tensors = [
        (r.gradients if gradient else r.values)[name[2:] if gradient else name]
        for r in (ours, reference, *runs)
    ]
    dtype = next(t.dtype for t in tensors if t is not None)
    out, ref, *eagers = (t.detach().double() for t in tensors if t is not None)
    rounded = ref.to(dtype).double()
    left = ref.isfinite() & ~eagers[0].isfinite()
    finite = out.isfinite() & ref.isfinite() & ~left
    known = finite | left
    for other in (ref, rounded, *eagers):
        known |= (out == other) | (out.isnan() & other.isnan())
    if not bool(known.all()):
        return True

    def error(t: Tensor) -> float:
        return torch.where(finite & t.isfinite(), t - ref, 0.0).norm().item()

    scale = torch.where(finite, ref, 0.0).norm().item()
    worst = max(*map(error, eagers), rounding * scale)
    return error(out) > (GRADIENT_FACTOR if gradient else FORWARD_FACTOR) * worst + SLACK * scale


def _by_torch(program: Program, seed: int, device: str, backend: str = "aot_eager") -> Results:
    """What a backend of torch's own without a code generator gives."""
    run = torch.compile(program.function(), backend=backend, dynamic=program.dynamic)
    return _run(run, program, seed, device)


def _moved(program: Program, seed: int, device: str) -> list[Results]:
    """Runs of eager whose roundings fall differently, and such runs of its own fused attention,
    which a spelled-out one becomes: its backward recomputes probabilities from the log of their
    sum, of which one rounding counts with scores in the thousands; eager's softmax has none."""

    def runs(one: Program) -> list[Results]:
        run = one.function()
        return [_run(run, one, seed, device, mode=Perturbed(i)) for i in range(PERTURBED)]

    found, fused = runs(program), program.fused()
    if fused != program:
        with suppress(RuntimeError):  # torch's kernel does not take all operands, vectors as rows
            found += [run for run in runs(fused) if _shapes(run) == _shapes(found[0])]
    return found


def _shapes(results: Results) -> list[torch.Size]:
    return [t.shape for t in results.values.values()]


def _raises(run: Callable[..., Any], program: Program, seed: int, device: str) -> bool:
    try:
        _run(run, program, seed, device)
    except Exception:
        return True
    return False


def _run(
    function: Callable[..., Any],
    program: Program,
    seed: int,
    device: str,
    wide: bool = False,
    mode: AbstractContextManager[Any] | None = None,
) -> Results:
    """Outputs, inputs after the run and gradients; forward and backward run under ``mode``. If
    ``wide``, what is float by default (a quotient of integers) is float64."""
    usual, mode = torch.get_default_dtype(), mode or nullcontext()
    torch.manual_seed(seed)
    inputs = program.draw(seed, device)
    if wide:
        inputs = [_widened(t) for t in inputs]
    for tensor, (_, given) in zip(inputs, program.given, strict=True):
        tensor.requires_grad_(given.grad)
    torch.set_default_dtype(torch.float64 if wide else usual)
    try:
        with mode:
            outputs = function(*inputs)
    finally:
        torch.set_default_dtype(usual)
    if program.train:
        _differentiate(outputs, mode)
    names = [name for name, _ in program.given]
    values = {
        f"{i} {n}": t.detach()
        for i, (n, t) in enumerate(zip(program.outputs, outputs, strict=True))
    }
    values |= {f"input {n}": t.detach() for n, t in zip(names, inputs, strict=True)}
    return Results(values, {n: t.grad for n, t in zip(names, inputs, strict=True)})


def _widened(t: Tensor) -> Tensor:
    """In float64, laid out alike (an expanded one stays so: writing to it must still fail)."""
    if not t.is_floating_point():
        return t
    if 0 in t.stride() and t.numel():
        return t.as_strided([1 if s == 0 else n for n, s in zip(t.shape, t.stride(), strict=True)],
                            t.stride()).double().expand(t.shape)  # fmt: skip
    return t.double()


def _differentiate(outputs: tuple[Tensor, ...], mode: AbstractContextManager[Any]) -> None:
    wanted = [t for t in outputs if t.requires_grad]
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in wanted]
    given = [d.to(t.device, t.dtype) for d, t in zip(draws, wanted, strict=True)]
    if wanted:
        with mode:
            torch.autograd.backward(wanted, given)


def _coarsest(results: Results) -> torch.dtype:
    values = [*results.values.values(), *(g for g in results.gradients.values() if g is not None)]
    dtypes = {t.dtype for t in values if t.is_floating_point()}
    return max(dtypes or {torch.float32}, key=lambda d: torch.finfo(d).eps)
