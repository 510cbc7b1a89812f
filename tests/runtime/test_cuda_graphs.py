"""mode="reduce-overhead" on a GPU: what may go wrong where memory belongs to a pool of graphs.

Each step is held against eager on the same inputs; parameters, so gradients too, are shared.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iocompiler import Compiler
from iocompiler.compilation import Compilation
from iocompiler.runtime import kept

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


class Block(nn.Module):
    """A norm, two products, a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def block(width: int = 48) -> Block:
    return Block(width).to(DEVICE)


def rows(number: int = 33, width: int = 48) -> Tensor:
    return torch.randn(number, width, device=DEVICE)


@pytest.fixture
def records() -> list[Compilation]:
    """Of what the test compiles."""
    return []


def graphed(
    f: Callable[..., Any], records: list[Compilation], dynamic: bool | None = None
) -> Callable[..., Any]:
    backend = Compiler(mode="reduce-overhead", strict=True, on_compiled=records.append)
    compiled: Callable[..., Any] = torch.compile(f, backend=backend, dynamic=dynamic)
    return compiled


def all_recorded(records: list[Compilation]) -> bool:
    return bool(records) and all(record.recorded and not record.fallbacks for record in records)


def step(f: Callable[..., Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    """The loss and every gradient, of memory that no graph owns."""
    torch.compiler.cudagraph_mark_step_begin()
    module.zero_grad(set_to_none=True)
    loss = f(x).square().mean()
    loss.backward()
    return [loss.detach().clone(), *(p.grad.clone() for p in module.parameters())]


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_shapes_that_change_and_come_back(records: list[Compilation]) -> None:
    module = block()
    run = graphed(module, records, dynamic=True)
    for number in (33, 7, 64, 33, 7, 64, 33, 7):
        x = rows(number)
        same(step(run, module, x), step(module, module, x))
    assert all_recorded(records)


def test_training_and_inference_in_turns(records: list[Compilation]) -> None:
    module = block()
    run = graphed(module, records)
    for _ in range(5):
        x, y = rows(), rows()
        same(step(run, module, x), step(module, module, x))
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            same(run(y), module(y))
        with torch.inference_mode():
            torch.compiler.cudagraph_mark_step_begin()
            same(run(y), module(y))
    assert all_recorded(records)


def test_an_inference_between_a_forward_and_its_backward(records: list[Compilation]) -> None:
    module = block()
    run = graphed(module, records)
    for _ in range(5):
        x, y = rows(), rows()
        torch.compiler.cudagraph_mark_step_begin()
        module.zero_grad(set_to_none=True)
        loss = run(x).square().mean()
        with torch.no_grad():
            same(run(y), module(y))
        loss.backward()
        found = [p.grad.clone() for p in module.parameters()]
        same(found, step(module, module, x)[1:])


def test_models_that_share_the_pool_train_in_turns(records: list[Compilation]) -> None:
    modules = [block(), block(64), block()]
    runs = [graphed(module, records) for module in modules]
    for _ in range(5):
        for module, run in zip(modules, runs, strict=True):
            x = rows(width=module.norm.normalized_shape[0])
            same(step(run, module, x), step(module, module, x))
    assert all_recorded(records)


def test_one_model_reads_what_another_made(records: list[Compilation]) -> None:
    """Both graphs of one step: the second's input lies in the pool."""
    first, second = block(), block()
    both = nn.Sequential(first, second)
    one, two = graphed(first, records), graphed(second, records)
    for _ in range(6):
        x = rows()
        same(step(lambda x: two(one(x)), both, x), step(both, both, x))
    assert all_recorded(records)


def test_two_forwards_then_two_backwards(records: list[Compilation]) -> None:
    module = block()
    run = graphed(module, records)
    for _ in range(5):
        x, y = rows(), rows()
        grads = []
        for f in (run, module):
            torch.compiler.cudagraph_mark_step_begin()
            module.zero_grad(set_to_none=True)
            losses = [f(x).square().mean(), f(y).sin().mean()]
            for loss in losses:
                loss.backward()
            grads.append([p.grad.clone() for p in module.parameters()])
        same(*grads)


def test_outputs_within_one_step_stay(records: list[Compilation]) -> None:
    module = block()
    run = graphed(module, records)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        inputs = [rows() for _ in range(4)]
        with torch.no_grad():
            found = [run(x) for x in inputs]
            for x, y in zip(inputs, found, strict=True):
                same(y, module(x))


@pytest.fixture(params=[0, kept.SMALL])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs that are moved when a step begins, and such as have memory of their own."""
    monkeypatch.setattr(kept, "SMALL", request.param)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_outputs_of_earlier_steps_stay(records: list[Compilation], mode: Callable[[], Any]) -> None:
    """Through warm-up, recording and replays."""
    module = block()
    run = graphed(module, records)
    outputs: list[tuple[Tensor, Tensor]] = []
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        x = rows()
        with mode():
            outputs.append((run(x), module(x)))
    for found, expected in outputs:
        same(found, expected)
    assert all_recorded(records)


def test_losses_of_earlier_steps_stay(records: list[Compilation]) -> None:
    """What is made of them too."""

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x).square().mean()

    module = Loss().cuda()
    run = graphed(module, records)
    found, expected = [], []
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        x = rows()
        loss = run(x)
        loss.backward()
        found += [loss.detach(), loss.detach()[None]]
        expected += [module(x).detach(), module(x).detach()[None]]
    same(found, expected)
    assert all_recorded(records)


def test_views_of_outputs_that_are_little_beside_their_graph(records: list[Compilation]) -> None:
    module = nn.Sequential(nn.Linear(128, 8192), nn.Tanh(), nn.Linear(8192, 128)).cuda()
    run = graphed(module, records)
    found, expected = [], []
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(512, 128, device="cuda")
        with torch.no_grad():
            out = run(x)
            assert out.untyped_storage().nbytes() > kept.SMALL
            found.append(out[:, -1])
            expected.append(module(x)[:, -1])
            del out
    same(found, expected)
    assert all_recorded(records)


@pytest.mark.usefixtures("small")
def test_what_later_steps_are_given(records: list[Compilation]) -> None:
    """Outputs kept in a list, read by the same graph again."""
    module = block()
    run = graphed(module, records)
    x = rows()
    found, expected = [x], [x]
    with torch.no_grad():
        for _ in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            found.append(run(found[-1]))
            expected.append(module(expected[-1]))
    same(found, expected)
    assert all_recorded(records)


@pytest.mark.parametrize("mark", [True, False])
def test_gradients_accumulate_over_steps(records: list[Compilation], mark: bool) -> None:
    """A gradient that is kept must not lie where the next step writes."""
    module = block()
    run = graphed(module, records)
    for _ in range(3):
        inputs = [rows() for _ in range(4)]
        grads = []
        for f in (run, module):
            module.zero_grad(set_to_none=True)
            for x in inputs:
                if mark:
                    torch.compiler.cudagraph_mark_step_begin()
                f(x).square().mean().backward()
            grads.append([p.grad.clone() for p in module.parameters()])
        same(*grads)
    assert all_recorded(records)


def test_an_optimizer_moves_the_parameters(records: list[Compilation]) -> None:
    ours, theirs = block(), block()
    theirs.load_state_dict(ours.state_dict())
    run = graphed(ours, records)
    steps = []
    for module, f in ((ours, run), (theirs, theirs)):
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        losses = []
        for _ in range(8):
            losses.append(step(f, module, rows())[0])
            optimizer.step()
        steps.append(torch.stack(losses))
    same(*steps)


def test_a_buffer_is_written_in_place(records: list[Compilation]) -> None:
    """Running statistics, over recorded and replayed steps."""
    ours, theirs = (nn.Sequential(nn.Linear(48, 24), nn.BatchNorm1d(24)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = ours.to(DEVICE), theirs.to(DEVICE)
    run = graphed(ours, records)
    for _ in range(6):
        x = rows()
        same(step(run, ours, x), step(theirs, theirs, x))
    same(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def test_inputs_that_move_and_inputs_that_stay(records: list[Compilation]) -> None:
    module = block()
    run = graphed(module, records)
    still = rows()
    with torch.no_grad():
        for number in range(8):
            torch.compiler.cudagraph_mark_step_begin()
            still.normal_()
            x = still if number % 2 else rows()
            same(run(x), module(x))
    assert all_recorded(records)


def test_dropout_draws_anew_in_every_replay(records: list[Compilation]) -> None:
    run = graphed(lambda x: nn.functional.dropout(x.exp(), 0.5, True), records)
    x = rows(257)
    masks = []
    with torch.no_grad():
        for _ in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            masks.append((run(x) == 0).clone())
    assert all(not torch.equal(a, b) for a, b in pairwise(masks))


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_what_cannot_be_recorded_runs_without(records: list[Compilation]) -> None:
    def f(x: Tensor) -> Tensor:
        return x.flatten().index_select(0, (x > 0).flatten().nonzero().squeeze(1)).sum() * 2

    run = graphed(f, records)
    with torch.no_grad():
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            x = rows()
            same(run(x), f(x))
    assert not any(record.recorded for record in records)
    causes = [lost.cause for record in records for lost in record.fallbacks]
    assert any("hands a value or a shape to the host" in cause for cause in causes)
