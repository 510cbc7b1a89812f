"""Linear + cross-entropy: taken however it is written, declined where it is something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import iocompiler as ioc
from iocompiler.ops.linear_cross_entropy import LINEAR_CROSS_ENTROPY
from iocompiler.passes.linear_cross_entropy import linear_cross_entropy, replace_losses
from tests.accuracy import assert_near_exact, relative_error
from tests.compiling import compiled

B, S, D, V = 2, 9, 8, 50


@ioc.graph_pass
def small(gm: GraphModule) -> int:
    """The pass without its threshold."""
    return replace_losses(gm, 0, ("cpu",))


PIPELINE = ioc.DEFAULT.before("linear_cross_entropy", small).without("linear_cross_entropy")
Model = Callable[[Tensor, Tensor, Tensor, Tensor], Any]


def plain(x, w, b, y):
    return F.cross_entropy(F.linear(x, w).view(-1, V), y.view(-1))


def with_bias(x, w, b, y):
    return F.cross_entropy(F.linear(x, w, b).flatten(0, 1).float(), y.flatten())


def matmul(x, w, b, y):
    return F.cross_entropy((x @ w.t() + b).reshape(-1, V), y.reshape(-1), reduction="sum") / 7


def mm(x, w, b, y):
    return F.cross_entropy(torch.mm(x.view(-1, D), w.T), y.view(-1), label_smoothing=0.1)


def addmm(x, w, b, y):
    return F.cross_entropy(torch.addmm(b, x.view(-1, D), w.T), y.view(-1), ignore_index=3)


def shifted(x, w, b, y):
    logits = F.linear(x, w).float()
    return F.cross_entropy(logits[..., :-1, :].reshape(-1, V), y[..., 1:].reshape(-1))


def shifted_contiguous(x, w, b, y):
    logits = F.linear(x, w)[:, :-1].contiguous()
    return F.cross_entropy(logits.view(-1, logits.size(-1)), y[:, 1:].contiguous().view(-1))


def padded_labels(x, w, b, y):
    logits, labels = F.linear(x, w).float(), F.pad(y, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, V), labels.view(-1))


def classes_second(x, w, b, y):
    return F.cross_entropy(F.linear(x, w).transpose(1, 2), y)


def permuted(x, w, b, y):
    return F.cross_entropy(F.linear(x, w).permute(0, 2, 1), y, reduction="none").square().sum()


def soft_cap(x, w, b, y):
    logits = torch.tanh(F.linear(x, w) / 3.0) * 3.0
    return F.cross_entropy(logits.view(-1, V), y.view(-1))


def scaled(x, w, b, y):
    return F.cross_entropy(F.linear(x, w, b).view(-1, V) * 0.7 / 1.3, y.view(-1))


def log_softmax(x, w, b, y):
    return F.nll_loss(F.log_softmax(F.linear(x, w).view(-1, V), dim=-1), y.view(-1))


def one_row_each(x, w, b, y):
    return F.cross_entropy(F.linear(x, w)[:, -1], y[:, -1])


# the same by hand


def picked(x, w, b, y):
    logp = F.log_softmax(F.linear(x, w).float(), dim=-1)
    return -logp.gather(-1, y.unsqueeze(-1)).squeeze(-1).mean()


def picked_and_masked(x, w, b, y):
    logp = F.linear(x, w, b).log_softmax(-1)
    mask = (y != 3).to(logp.dtype)
    rows = torch.gather(logp, 2, y[..., None])[..., 0]
    return -(rows * mask).sum() / mask.sum()


def picked_row_by_row(x, w, b, y):
    logits = F.linear(x, w)[:, :-1].float()
    rows = torch.take_along_dim(logits.log_softmax(-1), y[:, 1:, None], -1).squeeze(-1)
    return (rows * torch.tensor([1.0, -2.0])[:, None]).exp().sum()


def ratio_of_policies(x, w, b, y):
    """As in policy gradients: the log-probability enters twice, once without a gradient."""
    logp = torch.gather(F.linear(x, w).log_softmax(-1), 2, y.unsqueeze(2)).squeeze(2)
    ratio = (logp - logp.detach()).exp()
    return -torch.min(ratio * 0.5, ratio.clamp(0.8, 1.2) * 0.5).mean()


def lse_minus_chosen(x, w, b, y):
    logits = F.linear(x, w).view(-1, V).float()
    rows = torch.logsumexp(logits, -1) - logits.gather(1, y.view(-1, 1)).squeeze(1)
    return rows.masked_fill(y.view(-1) == 3, 0).sum() / 5


def indexed(x, w, b, y):
    logits = (x.view(-1, D) @ w.t()).float()
    flat = y.view(-1)
    chosen = logits[torch.arange(flat.shape[0]), torch.where(flat == 3, -1, flat)]
    return torch.where(flat > 5, logits.logsumexp(1) - chosen, 0.0).mean()


def softmax_by_hand(x, w, b, y):
    logits = F.linear(x, w).float()
    logp = logits - logits.logsumexp(-1, keepdim=True)
    return F.nll_loss(logp.view(-1, V), y.view(-1), ignore_index=3)


def softmax_and_classes_second(x, w, b, y):
    logp = F.log_softmax(F.linear(x, w, b).float(), -1).transpose(1, 2)
    return F.nll_loss(logp, y, ignore_index=3)


def z_loss(x, w, b, y):
    logits = F.linear(x, w).view(-1, V).float()
    return F.cross_entropy(logits, y.view(-1), ignore_index=3) + 1e-2 * (
        logits.logsumexp(-1).pow(2).mean()
    )


def z_loss_masked(x, w, b, y):
    logits = F.linear(x, w, b).float()
    mask, z = (y != 3).float(), logits.logsumexp(-1)
    rows = F.cross_entropy(logits.view(-1, V), y.view(-1), reduction="none").view(B, -1)
    return ((rows + 1e-2 * z * z) * mask).sum() / mask.sum()


def z_loss_by_hand(x, w, b, y):
    logits = 5.0 * torch.tanh(F.linear(x, w).float() / 5.0)
    z = logits.logsumexp(-1, keepdim=True)
    rows = z - logits.gather(-1, y[..., None]) + 0.01 * z.square()
    return rows.mean()


def weighted(x, w, b, y):
    weights = torch.linspace(0.1, 2, V, dtype=x.dtype)
    return F.cross_entropy(F.linear(x, w).view(-1, V), y.view(-1), weight=weights, ignore_index=3)


def weighted_sum(x, w, b, y):
    logp, weights = F.linear(x, w).log_softmax(-1), torch.linspace(0.1, 2, V, dtype=x.dtype)
    return F.nll_loss(logp.view(-1, V), y.view(-1), weight=weights, reduction="sum")


def weighted_rows(x, w, b, y):
    logits, weights = F.linear(x, w), torch.linspace(0.1, 2, V, dtype=x.dtype)
    rows = F.cross_entropy(logits.transpose(1, 2), y, weight=weights, reduction="none")
    return rows.square().sum()


def contracted(x, w, b, y):
    logits = torch.einsum("bsd,vd->bsv", x, w).float()
    return F.cross_entropy(logits.reshape(-1, V), y.reshape(-1), label_smoothing=0.1)


def contracted_the_other_way(x, w, b, y):
    logits = torch.einsum("dv, bsd -> bsv", w.t(), x) / 1.7
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")


def two_shares(x, w, b, y):
    """Halves of one loss, written apart."""
    logits = F.linear(x, w).view(-1, V)
    loss = F.cross_entropy(logits, y.view(-1), reduction="none")
    return 0.5 * loss.mean() + 0.25 * (loss * (y.view(-1) > 9)).sum()


def learned_shares(x, w, b, y):
    """Weights that have a gradient of their own stay outside of the operator."""
    rows = F.cross_entropy(F.linear(x, w).view(-1, V), y.view(-1), reduction="none")
    return (rows.view(B, -1) * b[:B, None].sigmoid()).sum()


def kept_shares(x, w, b, y):
    rows = F.cross_entropy(F.linear(x, w).view(-1, V), y.view(-1), reduction="none")
    return (rows.view(B, -1) * b[:B, None].detach().sigmoid()).sum() / b.detach().abs().max()


def focal(x, w, b, y):
    loss = F.cross_entropy(F.linear(x, w).view(-1, V), y.view(-1), reduction="none")
    return ((1 - (-loss).exp()) ** 2 * loss).mean()


BY_HAND = [
    learned_shares, kept_shares, focal,
    picked, picked_and_masked, picked_row_by_row, ratio_of_policies, lse_minus_chosen, indexed,
    softmax_by_hand, softmax_and_classes_second, z_loss, z_loss_masked, z_loss_by_hand,
    weighted, weighted_sum, weighted_rows, contracted, contracted_the_other_way, two_shares,
]  # fmt: skip
TAKEN = [
    plain, with_bias, matmul, mm, addmm, shifted, shifted_contiguous, padded_labels, classes_second,
    permuted, soft_cap, scaled, log_softmax, one_row_each,
]  # fmt: skip


def returned(x, w, b, y):
    logits = F.linear(x, w)
    return F.cross_entropy(logits.view(-1, V), y.view(-1)), logits


def returned_wide(x, w, b, y):
    """As Hugging Face has it: cast, then labels that are shifted, not logits."""
    logits = F.linear(x, w, b).float()
    labels = F.pad(y, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, V), labels.view(-1)), logits


def returned_twice(x, w, b, y):
    logits = torch.mm(x.view(-1, D), w.T)
    return F.cross_entropy(logits, y.view(-1)), logits, logits.view(B, -1, V)


def returned_capped(x, w, b, y):
    raw = F.linear(x, w, b)
    logits = torch.tanh(raw / 3.0) * 3.0
    return F.cross_entropy(logits.view(-1, V), y.view(-1)), logits, raw


def returned_with_squares(x, w, b, y):
    logits = x @ w.t() + b
    lse = logits.logsumexp(-1)
    rows = lse - logits.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return rows.mean() + 0.01 * lse.square().mean(), logits


def returned_turned(x, w, b, y):
    logits = F.linear(x, w)
    return F.cross_entropy(logits.view(-1, V), y.view(-1)), logits.transpose(1, 2)


def returned_rows(x, w, b, y):
    logits = F.linear(x, w).reshape(-1, V)
    return F.cross_entropy(logits, y.view(-1), reduction="none"), logits


RETURNED = [
    returned, returned_wide, returned_twice, returned_capped, returned_with_squares,
    returned_turned, returned_rows,
]  # fmt: skip


def returned_whole(x, w, b, y):
    logits = F.linear(x, w)
    return F.cross_entropy(logits[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1)), logits


def returned_other_way(x, w, b, y):
    logits = F.linear(x, w)
    return F.cross_entropy(logits.transpose(1, 2), y), logits


def returned_and_used(x, w, b, y):
    logits = F.linear(x, w).view(-1, V)
    return F.cross_entropy(logits, y.view(-1)), logits.argmax(-1)


def returned_before(x, w, b, y):
    logits = F.linear(x, w)
    seen = logits.view(-1, V) * 2
    return F.cross_entropy(logits.view(-1, V), y.view(-1)), seen


def used_twice(x, w, b, y):
    logits = F.linear(x, w).view(-1, V)
    return F.cross_entropy(logits, y.view(-1)) + logits.square().mean()


def dropped(x, w, b, y):
    return F.cross_entropy(F.relu(F.linear(x, w)).view(-1, V), y.view(-1))


def every_other_class(x, w, b, y):
    return F.cross_entropy(F.linear(x, w)[..., ::2].reshape(-1, V // 2), y.view(-1) % (V // 2))


def over_rows(x, w, b, y):
    return F.cross_entropy(F.linear(x, w), y[:, :1].expand(B, V) % S)


def split_classes(x, w, b, y):
    return F.cross_entropy(F.linear(x, w).view(-1, V // 2), y.repeat_interleave(2) % (V // 2))


def softmax_of_rows(x, w, b, y):
    return F.nll_loss(F.log_softmax(F.linear(x, w).view(-1, V), dim=0), y.view(-1))


def written_between(x, w, b, y):
    logits = F.linear(x, w)
    x.mul_(2)
    return F.cross_entropy(logits.view(-1, V), y.view(-1))


def rounded(x, w, b, y):
    return F.cross_entropy(F.linear(x, w).to(torch.bfloat16).view(-1, V), y.view(-1))


def under_no_grad(x, w, b, y):
    with torch.no_grad():
        logits = F.linear(x, w)
    return F.cross_entropy(logits.view(-1, V), y.view(-1)) + x.sum() + w.sum()


def another_softmax(x, w, b, y):
    logp = F.linear(x, w).log_softmax(1)
    return -logp.gather(-1, y.unsqueeze(-1)).mean()


def other_targets(x, w, b, y):
    logits = F.linear(x, w).view(-1, V)
    return F.cross_entropy(logits, y.view(-1)) + F.cross_entropy(logits, (y.view(-1) + 1) % V)


def cold_z_loss(x, w, b, y):
    """The logsumexp is of other logits than the cross-entropy."""
    logits = F.linear(x, w).view(-1, V)
    return F.cross_entropy(logits * 2, y.view(-1)) + logits.logsumexp(-1).square().mean()


def unshifted_z_loss(x, w, b, y):
    logits = F.linear(x, w)
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1))
    return loss + logits.logsumexp(-1).square().mean()


def rows_turned(x, w, b, y):
    """The rows no longer stand as the targets do."""
    logp = F.linear(x, w).log_softmax(-1).transpose(0, 1)
    return -logp.gather(-1, y.reshape(S, B, 1)).mean()


def several_picked(x, w, b, y):
    logp = F.linear(x, w).log_softmax(-1)
    return -logp.gather(-1, torch.stack([y, (y + 1) % V], -1)).mean()


def entropy(x, w, b, y):
    logp = F.linear(x, w).log_softmax(-1)
    return -logp.gather(-1, y.unsqueeze(-1)).mean() - (logp.exp() * logp).sum(-1).mean()


def margin(x, w, b, y):
    logits = F.linear(x, w)
    return (logits.logsumexp(-1) - 0.9 * logits.gather(-1, y.unsqueeze(-1)).squeeze(-1)).mean()


def smoothed_and_weighted(x, w, b, y):
    return F.cross_entropy(
        F.linear(x, w).view(-1, V),
        y.view(-1),
        weight=torch.linspace(0.1, 2, V),
        label_smoothing=0.1,
    )


def rounded_softmax(x, w, b, y):
    logp = F.linear(x, w).log_softmax(-1).to(torch.bfloat16)
    return -logp.gather(-1, y.unsqueeze(-1)).float().mean()


DECLINED = [
    (another_softmax, "columns"), (other_targets, "several targets"),
    (cold_z_loss, "no sum of cross-entropies"), (unshifted_z_loss, "used elsewhere"),
    (rows_turned, "used elsewhere"), (several_picked, "used elsewhere"),
    (entropy, "used elsewhere"),
    (margin, "no sum of cross-entropies"), (smoothed_and_weighted, "label smoothing"),
    (rounded_softmax, "used elsewhere"),
    (returned_whole, "some of their rows"), (returned_other_way, "another order"),
    (returned_and_used, "used elsewhere"), (returned_before, "returned elsewhere"),
    (used_twice, "used elsewhere"),
    (dropped, "relu"), (every_other_class, "splits or cuts"),
    (over_rows, "columns"), (split_classes, "splits or cuts"), (softmax_of_rows, "another dim"),
    (rounded, "rounded"), (under_no_grad, "grad mode"),
]  # fmt: skip


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, w, b = torch.randn(B, S, D), torch.randn(V, D), torch.randn(V)
    y = torch.randint(0, V, (B, S))
    y[0, 3] = y[1, 5] = 3
    return *(t.to(dtype).requires_grad_() for t in (x, w, b)), y  # type: ignore[return-value]


def results(f: Model, given: tuple[Tensor, ...]) -> list[Tensor | None]:
    loss = f(*given)  # type: ignore[call-arg]
    loss = loss[0] if isinstance(loss, tuple) else loss
    return [loss, *torch.autograd.grad(loss, given[:3], allow_unused=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("f", TAKEN + BY_HAND, ids=lambda f: f.__name__)
def test_is_taken_and_as_accurate_as_eager(f: Model, dynamic: bool, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    given = inputs(dtype)
    wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in given]
    run, records = compiled(f, PIPELINE, dynamic=dynamic)
    assert_near_exact(results(run, given), results(f, given), results(f, tuple(wide)), dtype)
    (record,) = records
    (found,) = (r for r in record.rewrites if r.pattern != "slices")
    assert found.pattern == "linear_cross_entropy"
    assert found.where.startswith("test_linear_cross_entropy.py:")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("through", ["loss", "both"])
@pytest.mark.parametrize("f", RETURNED, ids=lambda f: f.__name__)
def test_logits_may_be_returned(f: Model, through: str, dynamic: bool, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    given = inputs(dtype)
    wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in given]
    run, records = compiled(f, PIPELINE, dynamic=dynamic)

    def everything(f: Model, given: Any) -> list[Tensor | None]:
        found = f(*given)
        value = found[0].sum()
        if through == "both":
            value = value + sum((z.double() ** 2).mean() for z in found[1:])
        return [*found, *torch.autograd.grad(value, given[:3], allow_unused=True)]

    results = zip(everything(run, given), everything(f, given), everything(f, wide), strict=True)
    for place, (mine, theirs, exact) in enumerate(results):
        assert (mine is None) == (theirs is None)
        if mine is None or theirs is None or exact is None:
            continue
        assert (mine.dtype, mine.stride()) == (theirs.dtype, theirs.stride())
        least = torch.finfo(dtype).eps / 2
        allowed = 3 * max(relative_error(theirs, exact), least) + 1e-5
        assert relative_error(mine, exact) <= allowed, place
    (record,) = records
    (rewrite,) = record.rewrites
    assert "logits kept" in rewrite.variant


def test_returned_logits_without_a_gradient() -> None:
    torch._dynamo.reset()
    given = inputs()
    run, records = compiled(returned_wide, PIPELINE)
    with torch.no_grad():
        torch.testing.assert_close(run(*given), returned_wide(*given))
    assert records[0].rewrites


def test_returned_logits_stay_as_they_are_on_the_cpu() -> None:
    torch._dynamo.reset()
    run, records = compiled(returned, ioc.DEFAULT)
    run(*inputs())
    assert "returned too" in records[0].misses[0].reason


@pytest.mark.parametrize(("f", "reason"), DECLINED, ids=lambda f: getattr(f, "__name__", ""))
def test_is_declined_with_its_reason(f: Model, reason: str) -> None:
    torch._dynamo.reset()
    given = inputs()
    run, records = compiled(f, PIPELINE)
    for mine, theirs in zip(results(run, given), results(f, given), strict=True):
        atol = 5e-2 if f is rounded else 1e-5
        torch.testing.assert_close(mine, theirs, atol=atol, rtol=1e-5)
    (record,) = records
    assert not record.rewrites
    assert [m.pattern for m in record.misses] == ["linear_cross_entropy"]
    assert reason in record.misses[0].reason
    assert record.misses[0].where.startswith("test_linear_cross_entropy.py:")


def products(f: Model) -> int:
    """How often the forward makes the gradients too."""
    torch._dynamo.reset()
    run, records = compiled(f, PIPELINE, engine="reference")
    results(run, inputs())
    names = [str(n.target) for n in records[0].flat["forward"].graph.nodes]
    return sum("linear_cross_entropy_gradients" in name for name in names)


@pytest.mark.parametrize(
    "f", [picked, picked_and_masked, z_loss, z_loss_masked, weighted, kept_shares]
)
def test_one_number_has_its_gradients_made_in_the_forward(f: Model) -> None:
    assert products(f) == 1


@pytest.mark.parametrize("f", [ratio_of_policies, learned_shares, focal])
def test_rows_that_go_on_have_them_made_in_the_backward(f: Model) -> None:
    assert products(f) == 0


def accumulated(x, w, b, y):
    return F.cross_entropy(F.linear(x, w, b).view(-1, V), y.view(-1), ignore_index=3) / 4


@pytest.mark.parametrize("f", [accumulated, weighted, z_loss])
def test_a_mean_over_nothing_has_the_gradient_of_eager(f: Model) -> None:
    torch._dynamo.reset()
    x, w, b, y = inputs()
    given = (x, w, b, torch.full_like(y, 3))
    run, records = compiled(f, PIPELINE)
    torch.testing.assert_close(results(run, given), results(f, given), equal_nan=True)
    assert records[0].rewrites


def test_what_is_written_between_is_read_before() -> None:
    torch._dynamo.reset()
    given, again = inputs(), inputs()
    run, records = compiled(written_between, PIPELINE)
    with torch.no_grad():
        torch.testing.assert_close(run(*given), written_between(*again))
    assert not records[0].rewrites
    assert "writes in between" in records[0].misses[0].reason


def test_a_loss_of_no_linear_is_no_miss() -> None:
    torch._dynamo.reset()
    run, records = compiled(lambda x, y: F.cross_entropy(x, y), PIPELINE)
    run(torch.randn(5, 7, requires_grad=True), torch.randint(0, 7, (5,)))
    assert not records[0].rewrites
    assert not records[0].misses


def test_small_logits_stay_as_they_are_and_the_inequality_says_why() -> None:
    torch._dynamo.reset()
    run, records = compiled(plain, ioc.DEFAULT)
    run(*inputs())
    assert not records[0].rewrites
    assert f"{B * S * V * 4} bytes < {32 << 20}" in records[0].misses[0].reason


def test_another_length_does_not_recompile() -> None:
    torch._dynamo.reset()
    x, w, b, y = inputs()
    run, records = compiled(shifted, PIPELINE, dynamic=True)
    for length in (9, 5, 3):
        part = (x[:, :length].detach().clone(), w, b, y[:, :length].clone())
        torch.testing.assert_close(run(*part), shifted(*part))
    assert len(records) == 1


@pytest.mark.parametrize("device", ["cpu"])
def test_under_autocast_and_without_gradients(device: str) -> None:
    torch._dynamo.reset()
    given = inputs()
    run, records = compiled(plain, PIPELINE, engine="reference")
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(run(*given), plain(*given), rtol=1e-2, atol=1e-2)
    assert records[0].rewrites
    calls = [n.target for g in records[0].flat.values() for n in g.graph.nodes]
    assert torch.ops.iocompiler.linear_cross_entropy_losses.default in calls
    assert torch.ops.iocompiler.linear_cross_entropy_gradients.default not in calls


class Tied(nn.Module):
    """A head that shares the embedding's weight, its loss alone returned."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.embedding(tokens))
        logits = x @ self.embedding.weight.t()
        return F.cross_entropy(logits[:, :-1].reshape(-1, V), tokens[:, 1:].reshape(-1))


def test_a_tied_weight_gets_both_gradients() -> None:
    torch._dynamo.reset()
    model, tokens = Tied(), torch.randint(0, V, (B, S))
    run, records = compiled(model, PIPELINE)
    (mine,) = torch.autograd.grad(run(tokens), list(model.parameters()))
    (theirs,) = torch.autograd.grad(model(tokens), list(model.parameters()))
    torch.testing.assert_close(mine, theirs)
    assert len(records[0].rewrites) == 1


def test_the_pass_stands_in_the_pipeline() -> None:
    assert linear_cross_entropy.name in ioc.DEFAULT.names
    assert LINEAR_CROSS_ENTROPY is torch.ops.iocompiler.linear_cross_entropy.default
