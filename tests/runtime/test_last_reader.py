"""Gradients written over what the forward saved: only where nobody else reads that again.

The gradient of a head's weight is made in the forward, saved, and multiplied in the backward by
the gradient of the loss. `places` tells whether it is then where it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import iocompiler as ioc
from iocompiler.compilation import Compilation
from iocompiler.plan import inplace
from iocompiler.plan.data import KernelStep
from iocompiler.runtime.last_reader import is_last_reader
from iocompiler.tile.scaling import scaling
from tests.compiling import compiled
from tests.passes.test_linear_cross_entropy import PIPELINE
from tests.runtime.text_engine import TextEngine

T, D, V = 12, 8, 50
Run = Callable[..., Tensor]
Made = Callable[..., tuple[Any, Run, list[Compilation]]]


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.norm(x)), y)


class Tied(nn.Module):
    """The head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, D)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(self.table(y).sin(), self.table.weight), y)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inplace, "LEAST_BYTES", 0)
    torch._dynamo.reset()


@pytest.fixture
def made() -> Made:
    """Compiles a model for what the emitted file does. (The reference writes nothing over.)"""

    def make(model: type[nn.Module] = Head, **options: Any) -> tuple[Any, Run, list[Compilation]]:
        torch.manual_seed(0)
        module = model()
        chosen = {"engine": TextEngine(), "cache": False, **options}
        run, records = compiled(module, PIPELINE, **chosen)
        return module, run, records

    return make


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(T, D), torch.randint(0, V, (T,))


def places(loss: Tensor) -> set[int]:
    return {t.data_ptr() for t in loss.grad_fn.saved_tensors}  # type: ignore[union-attr]


def weight(module: Any) -> Tensor:
    found: Tensor = module.table.weight if isinstance(module, Tied) else module.head.weight
    return found


def expected(module: nn.Module, *losses: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    """Gradients of the sum, by eager."""
    total = sum((loss(module) for loss in losses), torch.zeros(()))
    return list(torch.autograd.grad(total, list(module.parameters())))


def check(module: nn.Module, wanted: list[Tensor]) -> None:
    for parameter, other in zip(module.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, other)


def over(records: list[Compilation]) -> list[tuple[str, str]]:
    steps = [s for r in records for s in r.plans["backward"].steps if isinstance(s, KernelStep)]
    return [pair for step in steps for pair in step.over]


@pytest.mark.parametrize("model", [Head, Tied])
@pytest.mark.parametrize("g", [1.0, 0.37])
def test_a_gradient_is_what_was_saved(made: Made, model: type[nn.Module], g: float) -> None:
    module, run, records = made(model)
    loss = run(*batch())
    saved = places(loss)
    loss.backward(torch.tensor(g))
    assert weight(module).grad.data_ptr() in saved  # type: ignore[union-attr]
    assert over(records)
    check(module, expected(module, lambda m: m(*batch()) * g))


class Both(Head):
    """Returns its logits too, which nobody differentiates: the backward is compiled late."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits, y), logits


def test_beside_logits(made: Made) -> None:
    module, run, _ = made(Both)
    loss, _ = run(*batch())
    saved = places(loss)
    loss.backward()
    assert weight(module).grad.data_ptr() in saved  # type: ignore[union-attr]
    check(module, expected(module, lambda m: m(*batch())[0]))


def mean(z: Tensor, y: Tensor, n: Tensor) -> Tensor:
    return F.cross_entropy(z, y)


def over_a_count(z: Tensor, y: Tensor, n: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="sum") / n


def over_a_number(z: Tensor, y: Tensor, n: Tensor) -> Tensor:
    return F.cross_entropy(z, y, label_smoothing=0.1) / 4


def mean_of_rows(z: Tensor, y: Tensor, n: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none").mean()


def of_weighted_classes(z: Tensor, y: Tensor, n: Tensor) -> Tensor:
    return F.cross_entropy(z, y, weight=torch.arange(1.0, V + 1))


@pytest.mark.parametrize(
    "loss", [mean, over_a_count, over_a_number, mean_of_rows, of_weighted_classes]
)
def test_a_loss_by_itself_has_nothing_to_multiply_by(loss: Callable[..., Tensor]) -> None:
    """The gradient made in the forward meets the loss's own, as it comes, and nothing else."""

    def f(x: Tensor, w: Tensor, y: Tensor, n: Tensor) -> Tensor:
        return loss(F.linear(x, w), y, n)

    x, y = batch()
    w, n = torch.randn(V, D, requires_grad=True), torch.tensor(9)
    run, records = compiled(f, PIPELINE, engine=TextEngine(), cache=False)
    ours, theirs = (torch.autograd.grad(g(x, w, y, n), w)[0] for g in (run, f))
    torch.testing.assert_close(ours, theirs)
    plan = records[0].plans["backward"]
    (step,) = (step for step in plan.steps if isinstance(step, KernelStep))
    assert scaling(step.program) is not None
    assert step.args[1].startswith("tangents")


def test_nothing_over_no_count_is_nan() -> None:
    def f(x: Tensor, w: Tensor, y: Tensor, n: Tensor) -> Tensor:
        return over_a_count(F.linear(x, w), y, n)

    x, y = batch()
    w = torch.randn(V, D, requires_grad=True)
    run, _ = compiled(f, PIPELINE, engine=TextEngine(), cache=False)
    assert run(x, w, torch.full_like(y, -100), torch.tensor(0)).isnan()


def test_numbers_are_those_of_a_new_tensor(made: Made) -> None:
    module, run, _ = made()
    for g in (1.0, 0.37, float("inf"), 0.0):
        loss, leaves = run(*batch()), list(module.parameters())
        kept = torch.autograd.grad(loss, leaves, torch.tensor(g), retain_graph=True)
        last = torch.autograd.grad(loss, leaves, torch.tensor(g))
        for one, other in zip(kept, last, strict=True):
            assert one.data_ptr() != other.data_ptr()
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_a_graph_that_is_freed_cannot_be_run_again(made: Made) -> None:
    module, run, _ = made()
    loss = run(*batch())
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    check(module, expected(module, lambda m: m(*batch())))


def test_a_graph_that_is_kept_is_as_it_was(made: Made) -> None:
    module, run, _ = made()
    run(*batch()).backward()  # one that is not kept comes first
    module.zero_grad()
    loss = run(*batch(1))
    saved = places(loss)
    for _ in range(3):
        loss.backward(retain_graph=True)
        assert weight(module).grad.data_ptr() not in saved  # type: ignore[union-attr]
    loss.backward()
    check(module, expected(module, lambda m: m(*batch(1)) * 4))


@pytest.mark.parametrize("kept", [None, False])
def test_create_graph(made: Made, kept: bool | None) -> None:
    module, run, _ = made()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a cycle
        run(*batch()).backward(create_graph=True, retain_graph=kept)
    wanted = expected(module, lambda m: m(*batch()))
    for parameter, other in zip(module.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad.detach(), other)  # type: ignore[union-attr]
        parameter.grad = None


@pytest.mark.parametrize("model", [Head, Tied])
def test_gradients_add_up(made: Made, model: type[nn.Module]) -> None:
    module, run, _ = made(model)
    for seed in range(3):
        (run(*batch(seed)) / 3).backward()
    check(module, expected(module, *(lambda m, s=s: m(*batch(s)) / 3 for s in range(3))))


def test_two_losses_in_one_backward(made: Made) -> None:
    module, run, _ = made()
    (run(*batch(0)) + 2 * run(*batch(1))).backward()
    check(module, expected(module, lambda m: m(*batch(0)), lambda m: 2 * m(*batch(1))))


def test_hooks_on_a_parameter(made: Made) -> None:
    module, run, _ = made()
    seen: list[Tensor] = []
    module.head.weight.register_hook(seen.append)
    module.head.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad * 1))
    loss = run(*batch())
    saved = places(loss)
    loss.backward()
    # who holds a gradient keeps it from being taken over: it is copied, as eager does
    assert seen[0].data_ptr() in saved
    assert module.head.weight.grad.data_ptr() != seen[0].data_ptr()
    wanted = expected(module, lambda m: m(*batch()))
    check(module, wanted)
    for each in seen:
        torch.testing.assert_close(each, wanted[2])


def test_a_gradient_halved_by_a_hook(made: Made) -> None:
    module, run, _ = made()
    handle = module.head.weight.register_hook(lambda g: g / 2)
    run(*batch()).backward()
    handle.remove()
    wanted = expected(module, lambda m: m(*batch()))
    torch.testing.assert_close(module.head.weight.grad, wanted[2] / 2)


def test_what_hooks_have_seen_is_left_alone(made: Made) -> None:
    module, run, _ = made()
    held: list[Tensor] = []

    def pack(x: Tensor) -> int:
        held.append(x)
        return len(held) - 1

    with saved_tensors_hooks(pack, lambda at: held[at]):
        loss = run(*batch())
    before = [x.clone() for x in held]
    loss.backward(torch.tensor(0.37))
    assert weight(module).grad.data_ptr() not in {x.data_ptr() for x in held}  # type: ignore[union-attr]
    for one, other in zip(held, before, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    check(module, expected(module, lambda m: m(*batch()) * 0.37))


def test_saved_on_the_cpu(made: Made) -> None:
    module, run, _ = made()
    with save_on_cpu():
        loss = run(*batch())
    loss.backward(torch.tensor(0.37))
    check(module, expected(module, lambda m: m(*batch()) * 0.37))


@pytest.mark.parametrize("reentrant", [False, True])
def test_in_a_checkpoint(made: Made, reentrant: bool) -> None:
    module, run, _ = made()
    x, y = batch()
    x.requires_grad_()
    loss = checkpoint(run, x, y, use_reentrant=reentrant)
    (loss * 0.37).backward()
    check(module, expected(module, lambda m: m(*batch()) * 0.37))


def test_under_compiled_autograd(made: Made) -> None:
    module, run, _ = made()
    loss = run(*batch())

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        return gm

    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend)):
        (loss * 0.37).backward()
    check(module, expected(module, lambda m: m(*batch()) * 0.37))


def test_under_a_transform() -> None:
    module = Head()
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def gradients(p: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        def loss(q: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(module, q, (x, y))

        return torch.func.grad(loss)(p)

    run, _ = compiled(gradients, PIPELINE, engine=TextEngine(), cache=False, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ioc.errors.FallbackWarning)  # on a transform
        found = run(parameters, *batch())
    torch.testing.assert_close(found, gradients(parameters, *batch()))


def test_it_is_nobodys_last_outside_of_autograd() -> None:
    assert not is_last_reader(torch.empty(1))


def test_a_backward_by_hand(made: Made) -> None:
    _, run, _ = made()
    loss = run(*batch())
    saved = [t.clone() for t in loss.grad_fn.saved_tensors]  # type: ignore[union-attr]
    first = loss.grad_fn.apply(torch.tensor(0.37))  # type: ignore[union-attr]
    for one, other in zip(loss.grad_fn.saved_tensors, saved, strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert any(isinstance(each, Tensor) for each in first)


def test_what_a_graph_returns_too_is_left_alone() -> None:
    def f(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = (x @ w).exp()  # its own derivative: saved
        return y, y.sum()

    run, records = compiled(f, ioc.DEFAULT, engine=TextEngine(), cache=False)
    x, w = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    y, total = run(x, w)
    before = y.detach().clone()
    (total * 3).backward()
    torch.testing.assert_close(y.detach(), before, rtol=0, atol=0)
    assert not over(records)


def test_activations_are_written_over_too() -> None:
    def f(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return ((x @ w).exp() @ v).square().mean()

    given = [torch.randn(6, 6, requires_grad=True) for _ in range(3)]
    run, records = compiled(f, ioc.DEFAULT, engine=TextEngine(), cache=False)
    ours = torch.autograd.grad(run(*given), given)
    assert over(records)
    torch.testing.assert_close(ours, torch.autograd.grad(f(*given), given))


def test_a_graph_from_the_cache(made: Made) -> None:
    """It runs under an autograd function of ours."""
    for _ in range(2):
        torch._dynamo.reset()
        module, run, records = made(engine=TextEngine(), cache=True)
        loss = run(*batch())
        saved = places(loss)
        loss.backward(torch.tensor(0.37), retain_graph=True)
        assert weight(module).grad.data_ptr() not in saved  # type: ignore[union-attr]
        module.zero_grad()
        loss.backward(torch.tensor(0.37))
        assert weight(module).grad.data_ptr() in saved  # type: ignore[union-attr]
        check(module, expected(module, lambda m: m(*batch()) * 0.37))
    assert records[0].cache == "found"


def test_cuda_graphs_keep_what_is_theirs(made: Made) -> None:
    module, run, records = made(mode="reduce-overhead")
    run(*batch()).backward()
    assert not over(records)
    check(module, expected(module, lambda m: m(*batch())))


class Wide(nn.Module):
    """A head whose weight takes 32 MiB in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(512), nn.Linear(512, 1 << 15, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.norm(x)).float(), y)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> tuple[Wide, Run, tuple[Tensor, Tensor]]:
    """On a GPU, as it is used."""
    monkeypatch.undo()
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = Wide().to("cuda", torch.bfloat16)
    run, _ = compiled(module, engine="auto")
    x = torch.randn(4096, 512, device="cuda", dtype=torch.bfloat16)
    return module, run, (x, torch.randint(0, 1 << 15, (4096,), device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("g", [1.0, 0.37])
def test_the_same_bits_on_a_gpu(wide: tuple[Wide, Run, tuple[Tensor, Tensor]], g: float) -> None:
    module, run, given = wide
    leaves, number = list(module.parameters()), torch.tensor(g, device="cuda")
    loss = run(*given)
    saved = places(loss)
    kept = torch.autograd.grad(loss, leaves, number, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, number, retain_graph=True)
    assert not saved & {each.data_ptr() for each in (*kept, *again)}
    loss.backward(number)
    assert module.head.weight.grad is not None
    assert module.head.weight.grad.data_ptr() in saved
    for parameter, one, other in zip(leaves, kept, again, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, one)
        assert torch.equal(parameter.grad, other)


@pytest.mark.gpu
def test_a_weights_gradient_less_on_a_gpu(wide: tuple[Wide, Run, tuple[Tensor, Tensor]]) -> None:
    module, run, given = wide

    def peak(kept: bool) -> int:
        module.zero_grad()
        loss = run(*given)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss.backward(retain_graph=kept)
        return torch.cuda.max_memory_allocated() - before

    size = module.head.weight.numel() * 2
    for kept in (False, True):
        peak(kept)  # what is loaded once
    assert peak(True) - peak(False) >= size


@pytest.mark.gpu
def test_while_a_cuda_graph_is_recorded(wide: tuple[Wide, Run, tuple[Tensor, Tensor]]) -> None:
    module, run, given = wide
    leaves = list(module.parameters())
    wanted = torch.autograd.grad(run(*given), leaves)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.autograd.grad(run(*given), leaves)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(run(*given), leaves)
    for _ in range(2):
        graph.replay()
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)
