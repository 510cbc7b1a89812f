"""Whether a program, compiled, computes what float64 eager computes, as well as eager does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

import iocompiler as ioc
from tests.accuracy import Results, compare
from tests.fuzz.program import Program

DRAWS = 5
"""Draws of the inputs; a program is wrong where most of them are: one may be bad luck."""


def verdict(program: Program, engine: Any = "reference", device: str = "cpu") -> str:
    """ "" for a program that is right, else what is wrong with it."""
    torch._dynamo.reset()
    backend = ioc.Compiler(engine=engine, strict=True, cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = torch.compile(program.function(), backend=backend, dynamic=program.dynamic)
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
    bad = _judged(ours, eager, reference)
    # what torch's decompositions change too (a dtype), or aot_eager, is not ours
    other = "aot_eager_decomp_partition" if bad.startswith("differs") else "aot_eager"
    if bad and _judged(_by_torch(program, seed, device, other), eager, reference):
        return ""
    return "" if bad and _as_fused(ours, reference, program, seed, device) else bad


def _as_fused(ours: Results, reference: Results, program: Program, seed: int, device: str) -> bool:
    """Whether ``ours`` errs no more than eager's own fused attention, which is what a spelled-out
    one becomes. Its backward takes the row sum of gradient times *rounded* output where eager's
    softmax sums what it subtracts from; with scores in the thousands that is digits apart.
    """
    fused = program.fused()
    if fused == program:
        return False
    try:
        eager = _run(fused.function(), fused, seed, device)
    except Exception:
        return False  # torch's kernel does not take these operands
    return not _judged(ours, eager, reference)


def _judged(ours: Results, eager: Results, reference: Results) -> str:
    try:
        judged = compare(ours, eager, reference, _coarsest(eager))
    except AssertionError as error:
        return f"differs: {error}"
    return "; ".join(str(c) for c in judged if not c.ok and not _tiny(c.name, ours, reference))


def _by_torch(program: Program, seed: int, device: str, backend: str = "aot_eager") -> Results:
    """What a backend of torch's own without a code generator gives."""
    run = torch.compile(program.function(), backend=backend, dynamic=program.dynamic)
    return _run(run, program, seed, device)


def _tiny(name: str, ours: Results, reference: Results) -> bool:
    """Whether the difference is nothing beside inputs of about one: the deviation of equal values,
    say, which is zero in eager and a rounding error where they were rounded less."""
    gradient = name.startswith("d ")
    a, b = ((r.gradients if gradient else r.values)[name[2:] if gradient else name]
            for r in (ours, reference))  # fmt: skip
    if a is None or b is None or not bool(torch.isfinite(a).all()):
        return False
    eps = torch.finfo(_coarsest(ours)).eps
    return bool(((a.double() - b.double()).abs() <= 4 * eps * (1 + b.double().abs())).all())


def _raises(run: Callable[..., Any], program: Program, seed: int, device: str) -> bool:
    try:
        _run(run, program, seed, device)
    except Exception:
        return True
    return False


def _run(
    function: Callable[..., Any], program: Program, seed: int, device: str, wide: bool = False
) -> Results:
    torch.manual_seed(seed)
    inputs = program.draw(seed, device)
    if wide:
        inputs = [_widened(t) for t in inputs]
    for tensor, (_, given) in zip(inputs, program.given, strict=True):
        tensor.requires_grad_(given.grad)
    outputs = function(*inputs)
    if program.train:
        _differentiate(outputs)
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


def _differentiate(outputs: tuple[Tensor, ...]) -> None:
    wanted = [t for t in outputs if t.requires_grad]
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in wanted]
    if wanted:
        torch.autograd.backward(
            wanted, [d.to(t.device, t.dtype) for d, t in zip(draws, wanted, strict=True)]
        )


def _coarsest(results: Results) -> torch.dtype:
    values = [*results.values.values(), *(g for g in results.gradients.values() if g is not None)]
    dtypes = {t.dtype for t in values if t.is_floating_point()}
    return max(dtypes or {torch.float32}, key=lambda d: torch.finfo(d).eps)
