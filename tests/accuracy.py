"""The accuracy rule: compiled code errs at most 2x (values) or 3x (gradients) what eager errs.

Errors are relative norms, ``|out - ref| / max(|ref|, floor)``, taken per tensor: float64 eager is
the reference, eager in the model's own dtype (on the same weights and inputs) sets what is allowed,
and 1e-5 is added. Two cases in which the ratio alone says nothing:

- a gradient that is zero in exact arithmetic (a key bias under softmax) is pure rounding noise:
  ``floor`` is 1e-4 of the root-mean-square gradient of the whole model times the square root of the
  tensor's size, so noise is not divided by zero; and one rounding of such a root-mean-square
  gradient is always allowed (every fused attention, eager's own included, subtracts the row sum of
  gradient times *rounded* output, and what that rounding leaves adds up over the keys);
- a tensor of fewer than 16 elements (a loss, the bias of a small head) may be nearly exact in eager
  by luck: eager's error counts as at least one rounding (half the dtype's eps) and, for a gradient,
  the median over all gradients of the run.

In bfloat16 one draw of inputs decides by luck in a small model (a ReLU that flips in eager or in
the compiled code, not in both): give several, and errors are root mean squares over them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
SLACK = 1e-5
_FLOOR = 1e-4
_VANISHING = 1e-3  # of the floor: zero but for what a model rounds to float32 in a float64 run too
_FEW = 16

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """One tensor: both relative errors against float64, and the largest error allowed."""

    name: str
    eager: float
    compiled: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.compiled <= self.allowed  # False for NaN

    def __str__(self) -> str:
        errors = f"compiled {self.compiled:.3g}, eager {self.eager:.3g}"
        return f"{self.name}: {errors}, allowed {self.allowed:.3g}"


@dataclass(frozen=True)
class Results:
    """What one run gave: outputs and, after the run, buffers (running statistics); gradients; by
    name."""

    values: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor | None]


def relative_error(out: Tensor, ref: Tensor, floor: float = 0.0) -> float:
    """``|out - ref| / max(|ref|, floor)`` in float64; 0 for two empty tensors, inf where only one
    is NaN or inf."""
    if out.shape != ref.shape:
        raise AssertionError(f"shape {tuple(out.shape)} is not the reference's {tuple(ref.shape)}")
    if out.numel() == 0:
        return 0.0
    out, ref = out.detach().to(ref.device, torch.float64), ref.detach().to(torch.float64)
    finite = torch.isfinite(ref)
    if not finite.all() and not _same_specials(out, ref, finite):
        return math.inf
    error = torch.where(finite, out - ref, 0.0).norm().item()
    scale = max(torch.where(finite, ref, 0.0).norm().item(), floor)
    if error == 0.0:
        return 0.0
    return error / scale if scale > 0 and math.isfinite(error) else math.inf


def assert_near_exact(
    found: Iterable[Tensor | None],
    eager: Iterable[Tensor | None],
    exact: Iterable[Tensor | None],
    dtype: torch.dtype,
) -> None:
    """A result and then its gradients, None where there is none, have eager's dtypes and errors of
    at most twice eager's, gradients three times; half a rounding of ``dtype`` is eager's at least.
    """
    least = torch.finfo(dtype).eps / 2
    for place, (ours, theirs, ref) in enumerate(zip(found, eager, exact, strict=True)):
        assert (ours is None) == (theirs is None), place
        if ours is None or theirs is None or ref is None:
            continue
        assert ours.dtype == theirs.dtype, place
        allowed = (3 if place else 2) * max(relative_error(theirs, ref), least) + 1e-5
        assert relative_error(ours, ref) <= allowed, place


def _same_specials(out: Tensor, ref: Tensor, finite: Tensor) -> bool:
    return bool((finite | (out == ref) | (out.isnan() & ref.isnan())).all())


def compare(
    compiled: Results, eager: Results, reference: Results, dtype: torch.dtype
) -> tuple[Comparison, ...]:
    """One comparison per output, buffer and gradient. A gradient present in one run only is an
    AssertionError."""
    rounding = torch.finfo(dtype).eps / 2
    values = [
        _Errors.of(name, compiled.values[name], eager.values[name], ref)
        for name, ref in reference.values.items()
    ]
    scale = _root_mean_square(reference.gradients)
    gradients = []
    for name, ref in reference.gradients.items():
        ours, theirs = compiled.gradients[name], eager.gradients[name]
        if (ours is None) != (theirs is None):
            raise AssertionError(f"gradient of {name}: compiled {ours}, eager {theirs}")
        if ref is not None and ours is not None and theirs is not None:
            floor = _FLOOR * scale * math.sqrt(ref.numel())
            gradients.append(_Errors.of(f"d {name}", ours, theirs, ref, floor))
    usual = statistics.median([e.eager for e in gradients]) if gradients else 0.0
    return tuple(
        [e.judged(FORWARD_FACTOR, rounding, rounding) for e in values]
        + [e.judged(GRADIENT_FACTOR, max(rounding, usual), rounding) for e in gradients]
    )


@dataclass(frozen=True)
class _Errors:
    """The two errors of one tensor of ``count`` elements, before they are judged."""

    name: str
    eager: float
    compiled: float
    count: int
    vanishes: bool

    @staticmethod
    def of(name: str, ours: Tensor, eager: Tensor, ref: Tensor, floor: float = 0.0) -> _Errors:
        if ours.dtype != eager.dtype:
            raise AssertionError(f"{name}: compiled gives {ours.dtype}, eager {eager.dtype}")
        errors = relative_error(eager, ref, floor), relative_error(ours, ref, floor)
        vanishes = ref.double().norm().item() < _VANISHING * floor
        return _Errors(name, *errors, ref.numel(), vanishes)

    def judged(self, factor: float, least: float, rounding: float) -> Comparison:
        trusted = max(self.eager, least) if self.count < _FEW else self.eager
        allowed = factor * trusted + SLACK
        if self.vanishes:
            allowed = max(allowed, rounding / _FLOOR)
        return Comparison(self.name, self.eager, self.compiled, allowed)


def _root_mean_square(gradients: Mapping[str, Tensor | None]) -> float:
    present = [g for g in gradients.values() if g is not None]
    total = sum(g.double().square().sum().item() for g in present)
    return math.sqrt(total / max(1, sum(g.numel() for g in present)))


def run(
    function: Callable[..., object],
    module: nn.Module,
    inputs: Inputs,
    train: bool,
    cotangent_seed: int = 1,
) -> Results:
    """Call ``function(**inputs)`` (``module`` or its compiled form) and, if ``train``,
    differentiate.

    A scalar first output is taken as the loss. Otherwise every floating output gets a random
    cotangent. Gradients are those of the parameters and of the inputs that require them.
    """
    leaves = dict(module.named_parameters()) | {
        f"input {n}": t for n, t in inputs.items() if t.requires_grad
    }
    for leaf in leaves.values():
        leaf.grad = None
    with torch.set_grad_enabled(train):
        outputs = named_outputs(function(**inputs))
    if train:
        _differentiate(list(outputs.values()), cotangent_seed)
    values = {n: t.detach() for n, t in outputs.items()}
    values |= {f"buffer {n}": b.detach().clone() for n, b in module.named_buffers()}
    gradients = {n: leaf.grad for n, leaf in leaves.items()} if train else {}
    return Results(values, gradients)


def named_outputs(output: object) -> dict[str, Tensor]:
    """The tensors of a tensor, a (possibly nested) tuple or list, or a mapping, each under its
    place's name."""
    if isinstance(output, Tensor):
        return {"out": output}
    if isinstance(output, Mapping):
        places = list(output.items())
    elif isinstance(output, (tuple, list)):
        places = [(str(i), value) for i, value in enumerate(output)]
    else:
        return {}
    found: dict[str, Tensor] = {}
    for place, value in places:
        for name, tensor in named_outputs(value).items():
            found[str(place) if name == "out" else f"{place}.{name}"] = tensor
    return found


def _differentiate(outputs: list[Tensor], seed: int) -> None:
    if outputs[0].dim() == 0:
        outputs[0].backward()  # type: ignore[no-untyped-call]
        return
    wanted = [out for out in outputs if out.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    cotangents = [
        torch.randn(out.shape, generator=generator).to(out.device, out.dtype) for out in wanted
    ]
    torch.autograd.backward(wanted, cotangents)


def compare_with_eager(
    model_fn: Callable[[], nn.Module],
    inputs: Inputs | Sequence[Inputs],
    compile_fn: Callable[[nn.Module], Callable[..., object]],
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    train: bool = True,
    autocast: torch.dtype | None = None,
    widen: Callable[[nn.Module], nn.Module] = nn.Module.double,
) -> tuple[Comparison, ...]:
    """Run float64 eager, eager and compiled on equal weights and (one or several) inputs;
    ``model_fn`` gives equal weights every call.

    Weights and floating inputs are rounded to ``dtype`` first and only then widened, so that the
    reference computes on exactly what the others do. ``train`` chooses between a step
    (``.train()``, gradients) and ``.eval()`` without gradients. Under ``autocast`` weights stay in
    ``dtype`` and the rounding unit is that of the autocast dtype. ``widen`` makes the float64
    module (a large model may need gradient checkpointing there).
    """

    draws = [inputs] if isinstance(inputs, Mapping) else list(inputs)

    def once(wide: bool, compiled: bool) -> list[Results]:
        module = model_fn().to(device, dtype).train(train)
        if wide:
            module = widen(module)
        function = compile_fn(module) if compiled else module
        with torch.autocast(device, autocast or dtype, enabled=autocast is not None and not wide):
            return [run(function, module, _fed(draw, dtype, device, wide), train) for draw in draws]

    reference, eager, ours = once(True, False), once(False, False), once(False, True)
    return over_draws(
        [
            compare(*results, autocast or dtype)
            for results in zip(ours, eager, reference, strict=True)
        ]
    )


def over_draws(found: Sequence[tuple[Comparison, ...]]) -> tuple[Comparison, ...]:
    """Errors and allowances as root mean squares over the draws."""

    def mean(values: Sequence[float]) -> float:
        return math.sqrt(sum(v * v for v in values) / len(values))

    return tuple(
        Comparison(
            same[0].name,
            mean([c.eager for c in same]),
            mean([c.compiled for c in same]),
            mean([c.allowed for c in same]),
        )
        for same in zip(*found, strict=True)
    )


def _fed(inputs: Inputs, dtype: torch.dtype, device: str, wide: bool) -> dict[str, Tensor]:
    return {name: _rounded(tensor, dtype, device, wide) for name, tensor in inputs.items()}


def _rounded(tensor: Tensor, dtype: torch.dtype, device: str, wide: bool) -> Tensor:
    given = tensor.detach().to(device)
    if given.is_floating_point():
        given = given.to(dtype).to(torch.float64 if wide else dtype)
        given = given.clone().requires_grad_(tensor.requires_grad)
    return given


def assert_as_accurate_as_eager(
    model_fn: Callable[[], nn.Module],
    inputs: Inputs | Sequence[Inputs],
    compile_fn: Callable[[nn.Module], Callable[..., object]],
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    train: bool = True,
    autocast: torch.dtype | None = None,
) -> None:
    """`compare_with_eager`, and an AssertionError that names every tensor outside the rule."""
    comparisons = compare_with_eager(
        model_fn, inputs, compile_fn, dtype=dtype, device=device, train=train, autocast=autocast
    )
    if not comparisons:
        raise AssertionError("nothing was compared")
    bad = [str(c) for c in comparisons if not c.ok]
    if bad:
        raise AssertionError("less accurate than eager:\n  " + "\n  ".join(bad))
