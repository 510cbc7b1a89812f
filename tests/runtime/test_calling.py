"""A graph compiled here, called by AOTAutograd's function and by ours; and one that was found."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import iocompiler as ioc
from iocompiler.compilation import Compilation
from iocompiler.runtime.last_reader import is_last_reader
from tests.compiling import OLD_TORCH, copy, grad
from tests.runtime.test_graph_cache import assert_alike, mlp, outcome
from tests.runtime.text_engine import TextEngine

Program = Callable[..., Any]
WAYS = ("theirs", "ours", "found")


def compiled(f: Program, **settings: Any) -> tuple[Program, list[Compilation]]:
    records: list[Compilation] = []
    dynamic = settings.pop("dynamic", False)
    settings = {"engine": TextEngine(), "strict": True, **settings}
    torch._dynamo.reset()
    backend = ioc.Compiler(on_compiled=records.append, **settings)
    return torch.compile(f, backend=backend, dynamic=dynamic), records


def called(way: str, f: Program, inputs: tuple[Any, ...], **settings: Any) -> Program:
    """``f`` compiled, so that its next call goes that way."""
    runs = {"theirs": (), "ours": (False,), "found": (False, True)}[way]
    run, records = compiled(f, **settings)
    for again in runs:
        if again:
            run, records = compiled(f, **settings)
        outcome(run, inputs)
    if way == "found":
        assert [record.cache for record in records] == ["found"]
    return run


def node_of(result: Tensor) -> str:
    assert result.grad_fn is not None
    return result.grad_fn.name()


OURS = "CompiledGraphBackward"


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# equal results


def several(x: Tensor, w: Tensor) -> tuple[Any, ...]:
    hidden = x @ w
    return hidden.sin(), hidden.argmax(-1), x, hidden.detach() * 2, hidden.t(), hidden.shape[0]


def overwriting(x: Tensor, counter: Tensor) -> Tensor:
    counter.add_(1)
    return x.exp() * counter


def normalised(x: Tensor, w: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return F.batch_norm(x, mean, var, w, training=True).relu()


def scaled(x: Tensor) -> Tensor:
    return (x * torch.tensor([1.0, 2.0, 3.0])).cumsum(-1)


PROGRAMS: dict[str, tuple[Program, tuple[Tensor, ...]]] = {
    "mlp": (mlp, (grad(4, 8), grad(8, 6), grad(6))),
    "several results": (several, (grad(4, 3), grad(3, 5))),
    "an overwritten input": (overwriting, (grad(3), torch.zeros(()))),
    "batch norm": (normalised, (grad(4, 3, 5), grad(3), torch.zeros(3), torch.ones(3))),
    "constants": (scaled, (grad(4, 3),)),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
def test_each_way_is_eager(way: str, name: str, dynamic: bool) -> None:
    f, inputs = PROGRAMS[name]
    run = called(way, f, inputs, dynamic=dynamic)
    assert_alike(outcome(run, inputs), outcome(f, inputs))


def test_which_way() -> None:
    inputs = (grad(4, 8), grad(8, 6), grad(6))
    assert node_of(called("theirs", mlp, inputs)(*inputs)) != OURS
    for way in ("ours", "found"):
        assert node_of(called(way, mlp, inputs)(*inputs)) == OURS


@pytest.mark.parametrize("settings", [{"cache": False}, {"engine": "reference"}])
def test_the_way_does_not_depend_on_the_cache(settings: dict[str, Any]) -> None:
    inputs = (grad(4, 8), grad(8, 6), grad(6))
    assert node_of(called("ours", mlp, inputs, **settings)(*inputs)) == OURS


def test_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call alone is AOTAutograd's."""
    from iocompiler import walk

    calls = []
    differentiated = walk.differentiated

    def counting(*args: Any, **how: Any) -> Program:
        run = differentiated(*args, **how)
        return lambda *inputs: calls.append(1) or run(*inputs)  # type: ignore[func-returns-value]

    monkeypatch.setattr(walk, "differentiated", counting)
    run, _ = compiled(mlp)
    inputs = (torch.randn(4, 8), torch.randn(8, 6), torch.randn(6))
    for _ in range(3):
        torch.testing.assert_close(run(*inputs), mlp(*inputs))
    assert len(calls) == 1


def test_under_autocast_then_without() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).float().sin()

    inputs = (grad(4, 8), grad(8, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = outcome(f, inputs)
        run = called("ours", f, inputs)
        torch.testing.assert_close(outcome(run, inputs), expected, rtol=1e-2, atol=1e-2)
        result = run(*inputs)
        assert node_of(result) == OURS
    result.sum().backward()  # outside, as users do
    torch.testing.assert_close(outcome(run, inputs), outcome(f, inputs), rtol=1e-2, atol=1e-2)


# what autograd asks of it


def product(x: Tensor, w: Tensor) -> Tensor:
    return (x * w).sin() * w


def test_twice_through_the_backward(way: str) -> None:
    x, w = inputs = grad(3), grad(3)
    result = called(way, product, inputs)(x, w)
    first = torch.autograd.grad(result.sum(), (x, w), retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(product(x, w).sum(), (x, w)))
    torch.testing.assert_close(torch.autograd.grad(result.sum(), (x, w)), first)
    with pytest.raises(RuntimeError, match="second time"):
        result.sum().backward()


def test_a_second_derivative_is_refused_whatever_it_is_taken_by(way: str) -> None:
    x, w = inputs = grad(3), grad(3)
    result = called(way, product, inputs)(x, w)
    (slope,) = torch.autograd.grad(result.sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(product(x, w).sum(), x)
    torch.testing.assert_close(slope, expected)
    refused = pytest.raises(RuntimeError, match="does not currently support double backward")
    with refused:
        torch.autograd.grad(slope.sum(), x, allow_unused=True, retain_graph=True)
    with refused:  # a penalty on the slope, beside a loss that can be differentiated
        torch.autograd.grad(slope.norm() + product(x, w).sum(), w, retain_graph=True)
    with refused:
        slope.sum().backward()


def test_what_was_saved_is_watched(way: str) -> None:
    x, w = inputs = torch.randn(3), grad(3)
    result = called(way, product, inputs)(x, w)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_hooks_on_what_is_saved(way: str) -> None:
    x, w = inputs = grad(3), grad(3)
    run = called(way, product, inputs)
    packed: list[Tensor] = []

    def pack(saved: Tensor) -> Tensor:
        packed.append(saved)
        return saved.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        result = run(x, w)
        assert (node_of(result) == OURS) == (way != "theirs")
        assert len(packed) >= 2
        expected = product(x, w)
    found = torch.autograd.grad(result.sum(), (x, w))
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), (x, w)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_computed_again(way: str, reentrant: bool) -> None:
    inputs = (grad(4, 8), grad(8, 6), grad(6))
    run = called(way, mlp, inputs)
    again = lambda *given: checkpoint(run, *given, use_reentrant=reentrant)
    torch.testing.assert_close(outcome(again, inputs), outcome(mlp, inputs), rtol=1e-4, atol=1e-5)


def test_a_gradient_of_a_class_of_its_own(way: str) -> None:
    x, w = inputs = grad(3), grad(3)
    result = called(way, product, inputs)(x, w)
    with pytest.raises(RuntimeError, match=r"plain tensors|metadata incorrectly"):
        result.backward(TwoTensor(torch.ones(3), torch.ones(3)))


def test_deterministic_algorithms_asked_for_later(way: str) -> None:
    x, w = inputs = grad(3), grad(3)
    result = called(way, product, inputs)(x, w)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match=r"[Dd]eterministic"):
            result.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


class Watched(TextEngine):
    """Notes of the tensors that a call is given which it is the last to read, and at its end which
    of those that were watched still are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watches = False
        self.watched: list[weakref.ref[Tensor]] = []
        self.alive: list[bool] = []
        self.last_reads: list[bool] = []

    def load_text(self, text: str, name: str, device: str) -> Any:
        run: Any = super().load_text(text, name, device)

        def call(args: list[Any]) -> Any:
            if not self.watches:  # it stays as it is, and is found
                return run(args)
            items, given = list(args), list[Any]()
            args.clear()
            self.last_reads.clear()
            while items:
                x = items.pop(0)
                self.last_reads.append(is_last_reader(x))
                given.append(x)
            del x
            results = run(given)
            self.alive += [each() is not None for each in self.watched]
            return results

        vars(call).update(vars(run))
        return call


class Handed(torch.autograd.Function):
    """Hands on a gradient that nobody else has."""

    watch: Callable[[Tensor], None]

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        made = gradient.clone()
        Handed.watch(made)
        return made


@pytest.mark.skipif(
    not hasattr(torch.autograd.Function, "boxed_grads_call"), reason="this torch holds them"
)
def test_a_gradient_dies_when_it_is_dead(way: str) -> None:
    engine = Watched()
    Handed.watch = lambda made: engine.watched.append(weakref.ref(made))
    x, w = inputs = grad(3), grad(3)
    run = called(way, product, inputs, engine=engine)
    result = Handed.apply(run(x, w))  # type: ignore[no-untyped-call]
    engine.watches = True
    result.backward(torch.ones(3))
    assert engine.alive == [False]


def test_what_was_saved_alone_may_be_written_over(way: str) -> None:
    engine = Watched()
    x, w = inputs = grad(3, 3), grad(3, 3)
    run = called(way, lambda x, w: (x @ w).sin() @ w, inputs, engine=engine)
    result = run(x, w)
    engine.watches = True
    result.sum().backward(retain_graph=True)
    assert not any(engine.last_reads)
    result.sum().backward()
    *saved, tangent = engine.last_reads
    assert tangent
    assert saved.count(False) == 2  # the inputs
    assert saved.count(True) >= 1  # what was computed


def test_from_several_threads(way: str) -> None:
    if OLD_TORCH and way == "theirs":
        pytest.skip("an old torch may crash where several threads compile, with aot_eager too")
    inputs = (grad(4, 8), grad(8, 6), grad(6))
    run, expected, wrong = called(way, mlp, inputs), mlp(*inputs), list[BaseException]()
    wanted = torch.autograd.grad(expected.sum(), inputs)

    def step() -> None:
        try:
            for _ in range(5):
                found = torch.autograd.grad(run(*inputs).sum(), inputs)
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=step) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# compiled autograd


def head(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    logits = x @ w
    return logits.logsumexp(-1).sum().reshape(1), logits


@pytest.fixture
def compiled_autograd() -> Iterator[Any]:
    yield lambda: torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager"))
    torch._dynamo.reset()


@pytest.mark.parametrize("f", [product, head])
@pytest.mark.parametrize("inside", [False, True])
def test_under_compiled_autograd(
    way: str, f: Program, inside: bool, compiled_autograd: Any
) -> None:
    if way == "theirs" and f is head and not inside:
        pytest.skip("AOTAutograd's own cannot do without a gradient there")
    x, w = inputs = grad(3, 3), grad(3, 3)
    run = called(way, f, inputs)
    first = lambda results: results[0] if isinstance(results, tuple) else results
    expected = torch.autograd.grad(first(f(x, w)).sum(), (x, w))
    for _ in range(2):
        x.grad = w.grad = None
        if inside:
            with compiled_autograd():
                first(run(x, w)).sum().backward()
        else:
            loss = first(run(x, w)).sum()
            with compiled_autograd():
                loss.backward()
        torch.testing.assert_close((x.grad, w.grad), expected)


# what stays AOTAutograd's


def alias_of_input(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sin(), x.view(-1)


def alias_of_result(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.sin()
    return y, y.view(-1)


def through_an_input(x: Tensor, y: Tensor) -> Tensor:
    y.copy_(x * 2)  # a gradient flows through it
    return y * 3


@pytest.mark.parametrize("f", [alias_of_input, alias_of_result, through_an_input])
def test_what_no_convention_says(f: Program) -> None:
    inputs = (grad(2, 3),) if f is not through_an_input else (grad(3), torch.zeros(3))
    run = called("ours", f, inputs)
    for ours, theirs in zip(outcome(run, inputs), outcome(f, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)
    result = run(*(copy(x) for x in inputs))
    assert node_of(result[0] if isinstance(result, tuple) else result) != OURS


def test_inputs_that_overlap() -> None:
    def f(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        a.add_(1)
        return (b * 2 + a) * w

    for places in ((slice(4), slice(2, 6)), (slice(4), slice(4)), (slice(4), slice(4, 8))):
        run, _ = compiled(f)  # torch's guards take one overlap for the other, in any backend
        for _ in range(3):
            ours, theirs, w = torch.arange(8.0), torch.arange(8.0), grad(4)
            result = run(ours[places[0]], ours[places[1]], w)
            torch.testing.assert_close(result, f(theirs[places[0]], theirs[places[1]], w))
            torch.testing.assert_close(ours, theirs)
            result.sum().backward()


def test_each_set_of_gradients_is_compiled() -> None:
    """Under our function as under AOTAutograd's: with no zeros, and no aten."""

    def f(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x @ w, (x * 2).sin(), w.exp()

    x, w = inputs = grad(3, 3), grad(3, 3)
    run, records = compiled(f)
    outcome(run, inputs)
    for which in ((0,), (1,), (0, 2), (0,), (0, 1, 2)):
        found, expected = (
            torch.autograd.grad(
                sum((results[at] * (at + 1.5)).sum() for at in which),
                (x, w),
                allow_unused=True,
                materialize_grads=True,
            )
            for results in (run(*inputs), f(*inputs))
        )
        torch.testing.assert_close(found, expected)
        assert node_of(run(*inputs)[0]) == OURS
    (record,) = records
    assert len([name for name in record.plans if name.startswith("backward")]) == 4
    assert not record.fallbacks
