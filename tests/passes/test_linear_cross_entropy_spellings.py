"""Linear + cross-entropy in the spellings of particular programs, and what looks like them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.accuracy import assert_near_exact
from tests.compiling import OLD_TORCH, compiled
from tests.passes.test_linear_cross_entropy import PIPELINE, B, D, Model, S, V, inputs

K = 40  # classes that are left of V


def chosen(matrix, y):
    return matrix.gather(-1, y.unsqueeze(-1)).squeeze(-1)


# heads: a vocabulary that was filled up, rows chosen, biases, bounds


def filled_up_vocabulary(x, w, b, y):
    logits = F.linear(x, w)[..., :K].float()
    logits = 15 * torch.tanh(logits / 15)
    return F.cross_entropy(logits.view(-1, K), y.view(-1) % K, ignore_index=3)


def cut_at_both_ends(x, w, b, y):
    return F.cross_entropy((x @ w.t() + b)[:, :, 5:-5].transpose(1, 2), y % (V - 10))


def cut_in_another_order(x, w, b, y):
    return F.cross_entropy(F.linear(x, w).transpose(1, 2)[:, :K], y % K)


def cut_and_shifted(x, w, b, y):
    logits = F.linear(x, w, b)[:, :-1, :K]
    return F.cross_entropy(logits.reshape(-1, K), y[:, 1:].reshape(-1) % K)


def cut_and_compared(x, w, b, y):
    student, teacher = F.linear(x, w)[..., :K], F.linear(x.detach() * 2, w.detach())[..., :K]
    return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")


def narrowed(x, w, b, y):
    logits = F.linear(x, w).narrow(1, 0, S - 1)
    return F.cross_entropy(logits.reshape(-1, V), y[:, 1:].reshape(-1))


def one_batch(x, w, b, y):
    return F.cross_entropy(F.linear(x[:1], w).squeeze(0), y[0])


def one_more_dim(x, w, b, y):
    return F.cross_entropy(F.linear(x, w).unsqueeze(1).flatten(0, 2), y.flatten())


def rows_by_index(x, w, b, y):
    rows = torch.tensor([4, 4, 0])
    return F.cross_entropy(F.linear(x, w).view(-1, V)[rows], y.view(-1)[rows])


def rows_by_two_indices(x, w, b, y):
    one, two = torch.tensor([0, 1, 1]), torch.tensor([2, 5, 8])
    return F.cross_entropy(F.linear(x, w)[one, two], y[one, two])


def selected_rows(x, w, b, y):
    rows = torch.tensor([0, 2, 4])
    return F.cross_entropy(F.linear(x, w).index_select(1, rows).flatten(0, 1), y[:, rows].flatten())


def bias_as_a_row(x, w, b, y):
    """As the sequence-to-sequence models of Hugging Face have it."""
    return F.cross_entropy((F.linear(x, w) + b[None]).view(-1, V), y.view(-1))


def wider_bias_first(x, w, b, y):
    return F.cross_entropy((b.float() + F.linear(x, w)).view(-1, V), y.view(-1))


def bounded_by_a_sigmoid(x, w, b, y):
    logits = 30 * torch.sigmoid(F.linear(x, w) / 7.5)
    return F.cross_entropy(logits.view(-1, V), y.view(-1))


def contracted_with_an_ellipsis(x, w, b, y):
    logits = torch.einsum("...d,vd->...v", x, w)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


# losses: label smoothing as a sum, one-hot targets, places as indices, logarithms of a softmax


def smoothed_by_hand(x, w, b, y):
    logp = F.linear(x, w).view(-1, V).log_softmax(-1)
    return (-0.9 * chosen(logp, y.view(-1)) - 0.1 * logp.mean(-1)).mean()


def smoothed_as_in_fairseq(x, w, b, y):
    logp, target = F.log_softmax(F.linear(x, w), -1).view(-1, V), y.view(-1, 1)
    of_target, of_all = -logp.gather(dim=-1, index=target), -logp.sum(dim=-1, keepdim=True)
    padding, each = target.eq(3), 0.1 / (V - 1)
    of_target.masked_fill_(padding, 0.0)
    of_all.masked_fill_(padding, 0.0)
    return (1.0 - 0.1 - each) * of_target.sum() + each * of_all.sum()


def smoothed_as_in_transformers(x, w, b, y):
    logp, target = -F.log_softmax(F.linear(x, w).view(-1, V), dim=-1), y.view(-1, 1)
    padding = target.eq(3)
    of_target = logp.gather(dim=-1, index=torch.clamp(target, min=0))
    of_all = logp.sum(dim=-1, keepdim=True, dtype=torch.float32)
    of_target.masked_fill_(padding, 0.0)
    of_all.masked_fill_(padding, 0.0)
    count = padding.numel() - padding.long().sum()
    return 0.9 * of_target.sum() / count + 0.1 * of_all.sum() / (count * logp.shape[-1])


def smoothed_logits(x, w, b, y):
    z = F.linear(x, w, b).float()
    rows = z.logsumexp(-1) - 0.9 * chosen(z, y) - 0.1 * z.mean(-1)
    return rows.mean() + 1e-3 * z.logsumexp(-1).square().mean()


def one_hot(x, w, b, y):
    logp = F.linear(x, w).log_softmax(-1)
    return -(F.one_hot(y, V) * logp).sum(-1).mean()


def one_hot_and_masked(x, w, b, y):
    logp, mask = F.linear(x, w).log_softmax(-1), (y != 3).unsqueeze(-1)
    return -(logp * F.one_hot(y, V).to(logp.dtype) * mask).sum() / mask.sum()


def one_hot_targets(x, w, b, y):
    targets = F.one_hot(y.view(-1), V).to(x.dtype)
    return F.cross_entropy(F.linear(x, w).view(-1, V), targets, label_smoothing=0.1)


def every_place(x, w, b, y):
    logp = F.linear(x, w).log_softmax(-1)
    return -logp[torch.arange(B)[:, None], torch.arange(S), torch.where(y == 3, -1, y)].mean()


def places_in_a_list(x, w, b, y):
    logp = F.linear(x, w).view(-1, V).log_softmax(-1)
    return -logp[range(B * S), y.view(-1)].mean()


def logarithm_of_a_softmax(x, w, b, y):
    return -chosen(torch.log(F.softmax(F.linear(x, w), -1)), y).mean()


def logarithm_of_what_is_picked(x, w, b, y):
    return -torch.log(chosen(F.linear(x, w).softmax(-1), y)).mean()


def rows_chosen_late(x, w, b, y):
    logp = F.linear(x, w).log_softmax(-1)[:, :-1]
    return -chosen(logp, y[:, 1:]).sum(-1).mean()


def batch_by_batch(x, w, b, y):
    """As trainers with reinforcement learning write it, to spare memory."""
    logits = F.linear(x, w) / 0.9
    lse = torch.stack([torch.logsumexp(each, dim=-1) for each in logits])
    return -(chosen(logits, y) - lse).mean()


def batch_by_batch_in_bfloat16(x, w, b, y):
    rows = []
    for each, labels in zip(F.linear(x, w), y, strict=True):
        logp = F.log_softmax(each, dim=-1)
        rows.append(logp.gather(dim=-1, index=labels.unsqueeze(-1)).squeeze(-1))
    return -torch.stack(rows).mean()


def divided_by_a_size_of_the_logits(x, w, b, y):
    student = F.linear(x, w).view(-1, V)
    teacher = F.linear(x.detach() * 2, w.detach()).view(-1, V)
    how = {"reduction": "batchmean"}
    divergence = F.kl_div(F.log_softmax(student / 2, 1), F.softmax(teacher / 2, 1), **how)
    return divergence * 4 + F.cross_entropy(student, y.view(-1))


TAKEN = [
    filled_up_vocabulary, cut_at_both_ends, cut_in_another_order, cut_and_shifted,
    cut_and_compared, narrowed, one_batch, one_more_dim, rows_by_index, rows_by_two_indices,
    selected_rows, bias_as_a_row, wider_bias_first, bounded_by_a_sigmoid,
    contracted_with_an_ellipsis, smoothed_by_hand, smoothed_as_in_fairseq,
    smoothed_as_in_transformers, smoothed_logits, one_hot, one_hot_and_masked, one_hot_targets,
    every_place, places_in_a_list, logarithm_of_a_softmax, logarithm_of_what_is_picked,
    rows_chosen_late, batch_by_batch, batch_by_batch_in_bfloat16, divided_by_a_size_of_the_logits,
]  # fmt: skip


# parts of a loss that are read too


def parts_for_a_log(x, w, b, y):
    logits = F.linear(x, w).float().view(-1, V)
    loss, z = F.cross_entropy(logits, y.view(-1)), logits.logsumexp(-1).square().mean()
    return loss + 1e-3 * z, loss.detach(), z.detach()


def parts_with_gradients(x, w, b, y):
    logits = F.linear(x, w, b).float().view(-1, V)
    loss = F.cross_entropy(logits, y.view(-1), ignore_index=3)
    z = logits.logsumexp(-1).square()
    return loss + 1e-3 * z.mean(), loss, z


def parts_of_a_distillation(x, w, b, y):
    student, teacher = F.linear(x, w), F.linear(x.detach() * 2, w.detach())
    how = {"reduction": "batchmean"}
    divergence = F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), **how)
    loss = F.cross_entropy(student.view(-1, V), y.view(-1), label_smoothing=0.1)
    return 0.5 * divergence + 0.5 * loss, divergence, loss


def part_of_a_smoothed_one(x, w, b, y):
    logp = F.linear(x, w).log_softmax(-1)
    loss = -chosen(logp, y).mean()
    return 0.9 * loss - 0.1 * logp.mean(), loss


def parts_of_nothing(x, w, b, y):
    logits = F.linear(x, w).view(-1, V)
    loss = F.cross_entropy(logits, torch.full_like(y, -100).view(-1))
    z = logits.logsumexp(-1).square().mean()
    return loss + z, loss, z


PARTS = [
    parts_for_a_log, parts_with_gradients, parts_of_a_distillation, part_of_a_smoothed_one,
    parts_of_nothing,
]  # fmt: skip


# what looks like them


def smoothed_elsewhere(x, w, b, y):
    logp = F.linear(x, w).log_softmax(-1)
    return -(0.9 * chosen(logp, y) * (y != 3)).sum() - (0.1 * logp.mean(-1)).sum()


def weighted_twice(x, w, b, y):
    logp, weights = F.linear(x, w).log_softmax(-1), y / V
    return -(0.9 * chosen(logp, y) * weights * weights).sum() - (logp.mean(-1) * weights).sum() / 10


def too_much_of_all(x, w, b, y):
    z = F.linear(x, w)
    return (z.logsumexp(-1) - 0.9 * chosen(z, y) - 0.2 * z.mean(-1)).mean()


def averaged_over_rows(x, w, b, y):
    logp = F.linear(x, w).log_softmax(-1)
    return (-0.9 * chosen(logp, y) - 0.1 * logp.mean(1).mean(-1, keepdim=True)).mean()


def smoothed_twice(x, w, b, y):
    logits, targets = F.linear(x, w).view(-1, V), F.one_hot(y.view(-1), V).to(x.dtype)
    first = F.cross_entropy(logits, targets, label_smoothing=0.1)
    return first + F.cross_entropy(logits, targets, label_smoothing=0.3)


def one_hot_and_more(x, w, b, y):
    z = F.linear(x, w)
    return -(F.one_hot(y, V) * z - z.logsumexp(-1, keepdim=True)).sum(-1).mean()


def one_hot_over_rows(x, w, b, y):
    logp = F.linear(x, w).log_softmax(-1)
    return -(F.one_hot(y, V) * logp).sum(1).square().mean()


def picked_of_one_hot(x, w, b, y):
    logp = F.linear(x, w).log_softmax(-1)
    return chosen(F.one_hot(y, V) * logp, (y + 1) % V).mean() - chosen(logp, y).mean()


def places_turned(x, w, b, y):
    logp = F.linear(x, w).log_softmax(-1)
    return -logp[torch.arange(B)[:, None], torch.arange(S).flip(0), y].mean()


def places_in_another_order(x, w, b, y):
    logp = F.linear(x, w).view(-1, V).log_softmax(-1)
    return -logp[list(reversed(range(B * S))), y.view(-1)].mean()


def squared_behind_a_sigmoid(x, w, b, y):
    z = 30 * torch.sigmoid(F.linear(x, w) / 7)
    return F.cross_entropy(z.view(-1, V), y.view(-1)) + 0.1 * z.logsumexp(-1).square().mean()


def two_bounds(x, w, b, y):
    z = F.linear(x, w)
    one, two = 30 * torch.sigmoid(z / 7), 15 * torch.tanh(z / 14)
    return (one.logsumexp(-1) - chosen(two, y)).mean()


def cut_in_two(x, w, b, y):
    z = F.linear(x, w)
    one = F.cross_entropy(z[..., :K].reshape(-1, K), y.view(-1) % K)
    return one + F.cross_entropy(z[..., K:].reshape(-1, V - K), y.view(-1) % (V - K))


def squares_of_the_whole(x, w, b, y):
    z = F.linear(x, w)
    loss = F.cross_entropy(z[..., :K].reshape(-1, K), y.view(-1) % K)
    return loss + z.logsumexp(-1).square().mean()


def cut_and_returned(x, w, b, y):
    z = F.linear(x, w)[..., :K]
    return F.cross_entropy(z.reshape(-1, K), y.view(-1) % K), z


def classes_by_index(x, w, b, y):
    some = torch.tensor([4, 1, 2, 0])
    return F.cross_entropy(F.linear(x, w)[..., some].view(-1, 4), y.view(-1) % 4)


def bias_of_each_batch(x, w, b, y):
    z = F.linear(x, w) + torch.stack([b, 2 * b])[:, None]
    return F.cross_entropy(z.view(-1, V), y.view(-1))


def chosen_without_gradients(x, w, b, y):
    z = F.linear(x, w)
    with torch.no_grad():
        logp = z.log_softmax(-1)
    return -chosen(logp[:, :-1], y[:, 1:]).mean() + x.sum() + w.sum()


def parts_and_logits(x, w, b, y):
    logits = F.linear(x, w).view(-1, V)
    loss, z = F.cross_entropy(logits, y.view(-1)), logits.logsumexp(-1).square().mean()
    return loss + 1e-3 * z, loss, logits


def three_parts(x, w, b, y):
    logits = F.linear(x, w).view(-1, V)
    loss = F.cross_entropy(logits, y.view(-1), reduction="none")
    z = logits.logsumexp(-1).square()
    return loss.mean() + z.mean(), loss.sum(), z.sum(), loss.max()


def part_that_is_no_loss(x, w, b, y):
    logits = F.linear(x, w).view(-1, V)
    lse = logits.logsumexp(-1)
    return (lse - chosen(logits, y.view(-1))).mean() + 0.1 * lse.square().mean(), lse.mean()


def batches_turned(x, w, b, y):
    logits = F.linear(x, w)
    lse = torch.stack([torch.logsumexp(logits[each], dim=-1) for each in (1, 0)])
    return -((chosen(logits, y) - lse) * y).mean()


def one_batch_twice(x, w, b, y):
    logits = F.linear(x, w)
    lse = torch.stack([torch.logsumexp(logits[each], dim=-1) for each in (0, 0)])
    return -((chosen(logits, y) - lse) * y).mean()


def batches_over_rows(x, w, b, y):
    logits = F.linear(x, w)
    lse = torch.stack([torch.logsumexp(each, dim=0) for each in logits])
    return lse.mean() - chosen(logits, y).mean()


def batches_in_two_ways(x, w, b, y):
    logits = F.linear(x, w)
    lse = torch.stack([torch.logsumexp(logits[0], -1), torch.logsumexp(logits[1] * 2, -1)])
    return -(chosen(logits, y) - lse).mean()


def stacked_behind(x, w, b, y):
    logits = F.linear(x, w)
    lse = torch.stack([torch.logsumexp(each, dim=-1) for each in logits], dim=1)
    return -(chosen(logits, y).t() - lse).square().mean()


_SUM, _USED = "no sum of cross-entropies", "used elsewhere"
DECLINED = [
    (smoothed_elsewhere, _SUM), (weighted_twice, _SUM), (too_much_of_all, _SUM),
    (averaged_over_rows, _USED), (smoothed_twice, "smooth differently"), (one_hot_and_more, _USED),
    (one_hot_over_rows, _USED), (picked_of_one_hot, _USED), (places_turned, _USED),
    (places_in_another_order, _USED), (squared_behind_a_sigmoid, "a sigmoid bounds"),
    (two_bounds, _USED), (cut_in_two, _USED), (squares_of_the_whole, _USED),
    (cut_and_returned, "of their classes only"), (classes_by_index, "splits or cuts"),
    (bias_of_each_batch, "between the head and the loss"), (chosen_without_gradients, _USED),
    (batches_turned, _USED), (one_batch_twice, _USED), (batches_over_rows, ""),
    (batches_in_two_ways, _USED), (stacked_behind, _USED),
    (parts_and_logits, "parts of the loss"), (part_that_is_no_loss, _SUM),
]  # fmt: skip


def everything(f: Model, given: tuple[Tensor, ...]) -> list[Tensor | None]:
    """All results of a program, and the gradients of a sum of them."""
    found: Any = f(*given)  # type: ignore[call-arg]
    found = found if isinstance(found, tuple) else (found,)
    total = sum((place + 1) * each.double().sum() for place, each in enumerate(found))
    return [*found, *torch.autograd.grad(total, given[:3], allow_unused=True)]  # type: ignore[type-var, list-item]


def wide(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(
        t.detach().double().requires_grad_() if t.is_floating_point() else t for t in given
    )


@pytest.mark.parametrize(
    ("dtype", "dynamic"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)],
)
@pytest.mark.parametrize("f", TAKEN, ids=lambda f: f.__name__)
def test_is_taken_and_as_accurate_as_eager(f: Model, dynamic: bool, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    given = inputs(dtype)
    run, records = compiled(f, PIPELINE, dynamic=dynamic)
    exact = everything(f, wide(given))
    assert_near_exact(everything(run, given), everything(f, given), exact, dtype)
    (record,) = records
    assert [r.pattern for r in record.rewrites].count("linear_cross_entropy") == 1
    assert not record.misses


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("f", PARTS, ids=lambda f: f.__name__)
def test_parts_of_a_loss_are_read_too(f: Model, dynamic: bool) -> None:
    torch._dynamo.reset()
    given = inputs()
    run, records = compiled(f, PIPELINE, dynamic=dynamic)
    mine, theirs = everything(run, given), everything(f, given)
    torch.testing.assert_close(mine, theirs, equal_nan=True)
    (record,) = records
    (rewrite,) = (r for r in record.rewrites if r.pattern == "linear_cross_entropy")
    assert "parts read" in rewrite.variant


@pytest.mark.parametrize(("f", "reason"), DECLINED, ids=lambda f: getattr(f, "__name__", ""))
def test_is_declined_with_its_reason(f: Model, reason: str) -> None:
    torch._dynamo.reset()
    given = inputs()
    run, records = compiled(f, PIPELINE)
    torch.testing.assert_close(everything(run, given), everything(f, given))
    (record,) = records
    assert not record.rewrites
    assert reason in " ".join(miss.reason for miss in record.misses)


def test_what_is_made_of_rows_that_are_a_part_is_no_part() -> None:
    torch._dynamo.reset()
    given = inputs()
    run, records = compiled(three_parts, PIPELINE)
    torch.testing.assert_close(everything(run, given), everything(three_parts, given))
    (rewrite,) = (r for r in records[0].rewrites if r.pattern == "linear_cross_entropy")
    assert "parts read: 2" in rewrite.variant


def test_rows_that_a_mask_chooses() -> None:
    torch._dynamo.reset()
    given = inputs()

    def masked(x, w, b, y):
        logits, kept = F.linear(x, w)[..., :-1, :], y[..., 1:]
        return F.cross_entropy(logits[kept != 3], kept[kept != 3])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run, records = compiled(masked, PIPELINE)
        torch.testing.assert_close(everything(run, given), everything(masked, given))
    (record,) = records
    if not OLD_TORCH:  # which breaks the graph before the loss
        assert "a mask chooses" in record.misses[0].reason


def test_a_head_in_bfloat16_with_a_wider_bias_returns_wide_logits() -> None:
    torch._dynamo.reset()
    x, w, b, y = inputs(torch.bfloat16)
    b = b.detach().float().requires_grad_()

    def model(x, w, b, y):
        logits = F.linear(x, w) + b
        return F.cross_entropy(logits.view(-1, V), y.view(-1)), logits

    run, records = compiled(model, PIPELINE)
    given = (x, w, b, y)
    mine, theirs = everything(run, given), everything(model, given)
    torch.testing.assert_close(mine, theirs, rtol=3e-2, atol=3e-2)
    assert "logits kept" in records[0].rewrites[0].variant


def test_a_cut_head_is_as_wide_as_what_is_left() -> None:
    """The operator never sees the classes that nobody reads."""
    torch._dynamo.reset()
    run, records = compiled(filled_up_vocabulary, PIPELINE, engine="reference")
    everything(run, inputs())
    heads = [
        n.args[1].meta["val"].shape
        for n in records[0].flat["forward"].graph.nodes
        if "linear_cross_entropy_gradients" in str(n.target)
    ]
    assert heads == [torch.Size([K, D])]


@pytest.mark.parametrize("f", [smoothed_by_hand, one_hot, one_hot_targets, parts_for_a_log])
def test_a_mean_over_no_rows_is_nan(f: Model) -> None:
    torch._dynamo.reset()
    x, w, b, y = inputs()
    given = (x[:0].detach().requires_grad_(), w, b, y[:0])
    run, records = compiled(f, PIPELINE)
    mine, theirs = everything(run, given), everything(f, given)
    assert theirs[0].isnan()  # type: ignore[union-attr]
    torch.testing.assert_close(mine, theirs, equal_nan=True)
    assert "linear_cross_entropy" in [r.pattern for r in records[0].rewrites]
