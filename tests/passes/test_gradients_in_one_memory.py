"""Three weights' gradients that are slices of one tensor, as autograd and optimizers use them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from tests.accuracy import relative_error
from tests.passes.test_packed_gradients import packings, trained
from tests.passes.test_packed_projections import Apart, weights


def storages(module: Apart) -> int:
    return len({w.grad.untyped_storage().data_ptr() for w in weights(module)})  # type: ignore[union-attr]


def steps(run: Callable[[Tensor], Tensor], module: nn.Module, dtype: torch.dtype) -> None:
    """Gradients added up in place, clipped in place, left in place and set to zero; momentum."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, foreach=True)
    generator = torch.Generator().manual_seed(7)
    for step in range(3):
        for _ in range(2):
            run(torch.randn(3, 7, 16, generator=generator).to(dtype)).square().mean().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad(set_to_none=step == 1)


def test_gradients_are_added_up_in_place() -> None:
    """As float64 adds and steps, though the three share their memory."""
    module = Apart()
    exact = copy.deepcopy(module).double()
    start = parameters_to_vector(exact.parameters()).detach()
    run, records = trained(module)
    run(torch.randn(3, 7, 16)).sum().backward()
    assert packings(records) == ["bs|hd:qkv"]
    assert storages(module) == 1
    assert all(w.grad.is_contiguous() for w in weights(module))  # type: ignore[union-attr]
    module.zero_grad()
    steps(run, module, torch.float32)
    steps(exact, exact, torch.float64)
    ours, theirs = (parameters_to_vector(each.parameters()) - start for each in (module, exact))
    assert relative_error(ours, theirs) < 1e-3


def test_a_gradient_written_in_place_leaves_the_others() -> None:
    module = Apart()
    run, _ = trained(module)
    run(torch.randn(3, 7, 16)).square().sum().backward()
    assert storages(module) == 1
    before = [w.grad.clone() for w in weights(module)]  # type: ignore[union-attr]
    weights(module)[1].grad.fill_(5.0)  # type: ignore[union-attr]
    for at in (0, 2):
        assert torch.equal(weights(module)[at].grad, before[at])  # type: ignore[arg-type]


def test_a_result_that_is_kept() -> None:
    """Gradients of one call are not those of the next."""
    module = Apart()
    run, _ = trained(module)
    x, y = torch.randn(2, 3, 7, 16)
    first = torch.autograd.grad(run(x).square().sum(), weights(module))
    kept = [each.clone() for each in first]
    torch.autograd.grad(run(y).square().sum(), weights(module))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
