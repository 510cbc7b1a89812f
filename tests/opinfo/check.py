"""One call, compiled, held against eager.

Several calls share one compilation (it is what takes the time); where they fail together, each is
tried alone, so that a problem names the call it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.utils import _pytree as pytree

import iocompiler as ioc
from iocompiler.compilation import Compilation
from tests.accuracy import Comparison, Results, compare
from tests.opinfo.exceptions import NO_GRAPH, expected

SEED = 5

# fewer graph breaks: what can be handed over is
_CAPTURE = {
    "capture_scalar_outputs": True,
    "capture_dynamic_output_shape_ops": True,
    "allow_rnn": True,
}


@dataclass(frozen=True)
class Call:
    """``function(*args, **kwargs)``; ``label`` names it in a problem.

    ``random``: its results are drawn, so that only shapes and dtypes can be compared.
    """

    label: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: bool = False

    def inputs(self, wide: bool = False) -> tuple[Any, Any]:
        """The arguments as fresh leaves of the same layout; floats as float64 if ``wide``."""
        return pytree.tree_map_only(Tensor, lambda t: _copied(t, wide), (self.args, self.kwargs))

    def run(self, inputs: tuple[Any, Any]) -> Any:
        return self.function(*inputs[0], **inputs[1])


@dataclass(frozen=True)
class Outcome:
    """What one run gave: leaves of the result, the inputs afterwards, gradients; or what it
    raised. ``lost``: why some of it ran on aten."""

    results: list[Any]
    after: list[Tensor]
    gradients: list[Tensor | None]
    error: Exception | None = None
    lost: str = ""


def problems(calls: Sequence[Call], differentiate: bool, engine: str = "reference") -> list[str]:
    """One line for each call whose compiled form does not do what eager does."""
    eager = [_eager(call, differentiate) for call in calls]
    good = [(c, e) for c, e in zip(calls, eager, strict=True) if e.error is None]
    found = _together(good, differentiate, engine)
    for call, outcome in zip(calls, eager, strict=True):
        if outcome.error is not None and not _raises(call, differentiate, engine):
            found.append(f"{call.label}: eager raises {outcome.error!r:.120}, compiled does not")
    return found


def _raises(call: Call, differentiate: bool, engine: str) -> bool:
    """Whether the compiled call raises too, or torch.compile takes the check out by itself."""
    ours, torchs = (_compiled([call], differentiate, e)[0].error for e in (engine, ""))
    return ours is not None or torchs is None


def _together(good: Sequence[tuple[Call, Outcome]], differentiate: bool, engine: str) -> list[str]:
    if not good:
        return []
    ours = _compiled([call for call, _ in good], differentiate, engine)
    found = [
        f"{call.label}: {problem}"
        for (call, eager), outcome in zip(good, ours, strict=True)
        if (problem := _difference(call, outcome, eager, differentiate))
    ]
    if found and len(good) == 1 and not good[0][0].random and not ours[0].lost:
        return found if _agrees(good[0][0], good[0][1], differentiate) else []
    if not found or len(good) == 1:
        return found
    return [line for one in good for line in _together([one], differentiate, engine)]


def _compiled(calls: Sequence[Call], differentiate: bool, engine: str) -> list[Outcome]:
    """The calls as one program; by torch's own aot_eager where ``engine`` is ""."""
    torch._dynamo.reset()
    graphs: list[Compilation] = []
    backend: Any = "aot_eager"
    if engine:
        backend = ioc.Compiler(engine=engine, cache=False, on_compiled=graphs.append)

    def program(given: list[tuple[Any, Any]]) -> list[Any]:
        return [call.run(one) for call, one in zip(calls, given, strict=True)]

    inputs = [call.inputs() for call in calls]
    try:
        torch.manual_seed(SEED)
        with torch._dynamo.config.patch(_CAPTURE):
            results = torch.compile(program, backend=backend, dynamic=False)(inputs)
        done = [_finished(r, i, differentiate) for r, i in zip(results, inputs, strict=True)]
        lost = [f.cause for graph in graphs for f in graph.fallbacks if not expected(f.cause)]
        if engine and not graphs:
            lost = [] if expected(NO_GRAPH) else [NO_GRAPH]
        return [replace(outcome, lost="; ".join(lost)) for outcome in done]
    except Exception as error:
        return [Outcome([], [], [], error)] * len(calls)


def _eager(call: Call, differentiate: bool, wide: bool = False) -> Outcome:
    inputs = call.inputs(wide)
    try:
        torch.manual_seed(SEED)
        return _finished(call.run(inputs), inputs, differentiate)
    except Exception as error:
        return Outcome([], [], [], error)


def _finished(result: Any, inputs: tuple[Any, Any], differentiate: bool) -> Outcome:
    leaves = [_plain(leaf) for leaf in pytree.tree_leaves(result)]
    given = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    if differentiate:
        _differentiate(leaves)
    results = [t.detach() if isinstance(t, Tensor) else t for t in leaves]
    return Outcome(results, [t.detach() for t in given], [t.grad for t in given])


def _differentiate(leaves: Sequence[Any]) -> None:
    wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    generator = torch.Generator().manual_seed(SEED)
    # drawn in float64: the same for every dtype of the result
    draws = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in wanted]
    if wanted:
        cotangents = [d.to(t) for d, t in zip(draws, wanted, strict=True)]
        torch.autograd.backward(wanted, cotangents)


def _difference(call: Call, ours: Outcome, eager: Outcome, differentiate: bool) -> str:
    """ "" where the two agree."""
    if ours.error is not None:
        return f"raises {type(ours.error).__name__}: {str(ours.error).strip()[:300]}"
    try:
        _same_kind(ours.results, eager.results)
        _same_kind(ours.gradients, eager.gradients)
        if call.random:
            return ours.lost and f"runs on aten: {ours.lost}"
        bad = [*_unequal(ours.results, eager.results), *_unequal(ours.after, eager.after)]
        bad += _unequal(ours.gradients, eager.gradients)
    except AssertionError as error:
        return str(error).strip().splitlines()[0]
    if not bad:
        return ours.lost and f"runs on aten: {ours.lost}"
    reference = _eager(call, differentiate, wide=True)
    try:
        judged = _judged(ours, eager, reference)
    except (AssertionError, KeyError) as error:
        return f"{bad[0]} (no float64 to judge by: {error})"
    return "; ".join(str(c) for c in judged if not c.ok) or ours.lost


def _agrees(call: Call, eager: Outcome, differentiate: bool) -> bool:
    """Whether torch's own aot_eager gives what eager gives: else the difference is not ours."""
    torchs = _compiled([call], differentiate, "")[0]
    return torchs.error is None and not _unequal(
        [*torchs.results, *torchs.gradients], [*eager.results, *eager.gradients]
    )


def _same_kind(ours: Sequence[Any], eager: Sequence[Any]) -> None:
    assert len(ours) == len(eager), f"{len(ours)} results, eager {len(eager)}"
    for one, other in zip(ours, eager, strict=True):
        assert isinstance(one, Tensor) == isinstance(other, Tensor), f"{one!r} for {other!r}"
        if isinstance(one, Tensor):
            kinds = [(tuple(t.shape), t.dtype, t.layout) for t in (one, other)]
            assert kinds[0] == kinds[1], f"{kinds[0]} for {kinds[1]}"


def _unequal(ours: Sequence[Any], eager: Sequence[Any]) -> list[str]:
    found = []
    for one, other in zip(ours, eager, strict=True):
        try:
            torch.testing.assert_close(one, other, equal_nan=True)
        except AssertionError as error:
            found.append(str(error).replace("\n", " ")[:200])
    return found


def _judged(ours: Outcome, eager: Outcome, reference: Outcome) -> tuple[Comparison, ...]:
    """The rule of `tests.accuracy`, on the real floating tensors; all else must be equal."""
    if reference.error is not None:
        raise AssertionError(f"{reference.error!r:.100}")
    runs = [_named(o) for o in (ours, eager, reference)]
    dtypes = {t.dtype for t in runs[1].values.values() if t.is_floating_point()}
    if not dtypes or max(torch.finfo(d).bits for d in dtypes) > 32:
        raise AssertionError("not float32 or shorter")
    for name, other in runs[1].values.items():
        if not other.is_floating_point() and not torch.equal(runs[0].values[name], other):
            raise AssertionError(f"{name} differs")
    return compare(runs[0], runs[1], runs[2], max(dtypes, key=lambda d: torch.finfo(d).eps))


def _named(outcome: Outcome) -> Results:
    tensors = [*outcome.results, *outcome.after]
    values = {str(i): t for i, t in enumerate(tensors) if isinstance(t, Tensor)}
    gradients = {str(i): g for i, g in enumerate(outcome.gradients)}
    return Results(values, gradients)


def _plain(leaf: Any) -> Any:
    """Results as dense tensors, which can be compared."""
    return leaf.to_dense() if isinstance(leaf, Tensor) and leaf.layout != torch.strided else leaf


def _copied(t: Tensor, wide: bool) -> Tensor:
    """A leaf with the values and the strides of ``t``."""
    if t.layout != torch.strided or type(t) is not Tensor:
        copy = t.detach().clone()
    else:
        room = t.untyped_storage().nbytes() // t.itemsize
        flat = t.detach().resolve_conj().resolve_neg().as_strided((room,), (1,), 0).clone()
        copy = flat.as_strided(t.shape, t.stride(), t.storage_offset())
        if t.is_conj() or t.is_neg():
            copy = t.detach().resolve_conj().resolve_neg().clone()
    if wide and copy.is_floating_point():
        copy = copy.double()
    if wide and copy.dtype == torch.complex64:
        copy = copy.to(torch.complex128)
    return copy.requires_grad_(t.requires_grad)
