"""Linear + divergence: distillation and soft targets however written; look-alikes declined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import iocompiler as ioc
from iocompiler.passes.linear_cross_entropy import replace_losses
from tests.accuracy import assert_near_exact
from tests.compiling import compiled

B, S, D, C, V = 2, 9, 8, 6, 50


@ioc.graph_pass
def small(gm: GraphModule) -> int:
    """The pass without its threshold."""
    return replace_losses(gm, 0, ("cpu",))


PIPELINE = ioc.DEFAULT.before("linear_cross_entropy", small).without("linear_cross_entropy")


class Given(NamedTuple):
    """A student's head; a teacher's; what a loader gives."""

    x: Tensor
    w: Tensor
    b: Tensor
    xt: Tensor
    wt: Tensor
    bt: Tensor
    y: Tensor
    t: Tensor
    p: Tensor
    mask: Tensor


Model = Callable[[Given], Any]


def batchmean(g):
    with torch.no_grad():
        teacher = F.linear(g.xt, g.wt, g.bt)
    student = F.linear(g.x, g.w, g.b)
    divergence = nn.KLDivLoss(reduction="batchmean")
    return divergence(F.log_softmax(student / 2, -1), F.softmax(teacher / 2, -1)) * 4


def summed_logs(g):
    student, teacher = F.linear(g.x, g.w).log_softmax(-1), F.linear(g.xt, g.wt).log_softmax(-1)
    return F.kl_div(student, teacher.detach(), reduction="sum", log_target=True) / 7


def trained_together(g):
    """Both heads have a gradient."""
    student, teacher = F.linear(g.x, g.w, g.b) / 3, F.linear(g.xt, g.wt, g.bt) / 3
    loss = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    return 9 * loss


def distilled(g):
    """As the recipes of Hugging Face have it."""
    student, teacher = F.linear(g.x, g.w).float(), (g.xt @ g.wt.t()).detach().float()
    hard = F.cross_entropy(student.view(-1, V), g.y.view(-1))
    soft = F.kl_div(
        F.log_softmax(student / 4.0, dim=-1),
        F.softmax(teacher / 4.0, dim=-1),
        reduction="batchmean",
    )
    return 0.3 * hard + (1.0 - 0.3) * (4.0**2) * soft


def distilled_softly_first(g):
    logits = F.linear(g.x, g.w)
    with torch.no_grad():
        target = F.softmax(F.linear(g.xt, g.wt) / 2, -1).view(-1, V)
    soft = F.kl_div(F.log_softmax(logits / 2, -1).view(-1, V), target, reduction="sum")
    hard = F.cross_entropy(logits.view(-1, V), g.y.view(-1), ignore_index=3, label_smoothing=0.1)
    return hard + soft * 0.1


def masked_rows(g):
    teacher = F.linear(g.xt, g.wt).detach()
    each = F.kl_div(F.linear(g.x, g.w).log_softmax(-1), teacher.softmax(-1), reduction="none").sum(
        -1
    )
    return (each * g.mask).sum() / g.mask.sum()


def masked_summands(g):
    teacher = F.linear(g.xt, g.wt).detach().log_softmax(-1)
    each = F.kl_div(F.linear(g.x, g.w).log_softmax(-1), teacher, reduction="none", log_target=True)
    return (each * g.mask[..., None] * 4).sum() / g.mask.sum()


def hidden_summands(g):
    teacher = F.softmax(F.linear(g.xt, g.wt).detach(), -1)
    each = F.kl_div(F.linear(g.x, g.w).log_softmax(-1), teacher, reduction="none")
    return each.masked_fill((g.mask < 0.5).unsqueeze(-1), 0).mean(-1).mean()


def row_by_row(g):
    student, teacher = F.linear(g.x, g.w), F.linear(g.xt, g.wt)
    each = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)
    return each.square().sum()


def by_hand(g):
    logp = F.log_softmax(F.linear(g.xt, g.wt).detach() / 2, -1)
    logq = F.log_softmax(F.linear(g.x, g.w) / 2, -1)
    return (logp.exp() * (logp - logq)).sum(-1).mean() * 4


def by_the_tutorial(g):
    """PyTorch's own."""
    with torch.no_grad():
        teacher = F.linear(g.xt, g.wt)
    p = F.softmax(teacher / 2, dim=-1)
    logq = F.log_softmax(F.linear(g.x, g.w) / 2, dim=-1)
    return torch.sum(p * (p.log() - logq)) / logq.size()[0] * (2**2)


def soft_cross_entropy(g):
    p = F.softmax(F.linear(g.xt, g.wt).detach(), -1)
    return -(p * F.log_softmax(F.linear(g.x, g.w), -1)).sum(-1).mean()


def negative_weights(g):
    p = F.softmax(F.linear(g.xt, g.wt), -1).detach()
    rows = torch.sum(-p * F.log_softmax(F.linear(g.x, g.w) / 0.5, -1), dim=-1)
    return (rows * g.mask).mean()


def soft_targets_of_a_head(g):
    target = F.softmax(F.linear(g.xt, g.wt), -1).detach()
    return F.cross_entropy(F.linear(g.x, g.w).view(-1, V), target.view(-1, V))


def shifted(g):
    student, teacher = F.linear(g.x, g.w)[:, :-1], F.linear(g.xt, g.wt).detach()[:, :-1]
    return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")


def shifted_at_each_place(g):
    student, teacher = F.linear(g.x, g.w), F.linear(g.xt, g.wt).detach()
    hard = F.cross_entropy(student[:, :-1].reshape(-1, V), g.y[:, 1:].reshape(-1))
    logp, logq = (F.log_softmax(z[:, :-1] / 2, -1) for z in (teacher, student))
    return hard + (F.softmax(teacher[:, :-1] / 2, -1) * (logp - logq)).sum(-1).mean()


def classes_second(g):
    student, teacher = F.linear(g.x, g.w), F.linear(g.xt, g.wt).detach()
    return F.cross_entropy(student.transpose(1, 2), teacher.softmax(-1).transpose(1, 2))


def capped(g):
    student = torch.tanh(F.linear(g.x, g.w) / 3) * 3
    teacher = torch.tanh(F.linear(g.xt, g.wt) / 5) * 5
    soft = F.kl_div(F.log_softmax(student / 2, -1), F.softmax(teacher / 2, -1), reduction="sum")
    return soft + F.cross_entropy(student.view(-1, V), g.y.view(-1))


def mean_over_everything(g):
    teacher = F.linear(g.xt, g.wt).detach().softmax(-1)
    return F.kl_div(F.linear(g.x, g.w).log_softmax(-1), teacher, reduction="none").mean()


HEADS = [
    batchmean, summed_logs, trained_together, distilled, distilled_softly_first, masked_rows,
    masked_summands, hidden_summands, row_by_row, by_hand, soft_cross_entropy,
    by_the_tutorial, negative_weights,
    soft_targets_of_a_head, shifted, shifted_at_each_place, classes_second, capped,
    mean_over_everything,
]  # fmt: skip


def given_logits(g):
    student = F.linear(g.x, g.w, g.b)
    soft = F.kl_div(F.log_softmax(student / 2, -1), F.softmax(g.t / 2, -1), reduction="batchmean")
    return 0.5 * F.cross_entropy(student.flatten(0, 1), g.y.flatten()) + 0.5 * soft * 4


def given_probabilities(g):
    return F.kl_div(F.linear(g.x, g.w).log_softmax(-1), g.p, reduction="batchmean")


def given_logs(g):
    logp = g.t.log_softmax(-1) * 1.0
    return F.kl_div(F.linear(g.x, g.w).log_softmax(-1), logp, reduction="sum", log_target=True)


def soft_targets(g):
    return F.cross_entropy(F.linear(g.x, g.w).view(-1, V), g.p.view(-1, V))


def smoothed_targets(g):
    logits = F.linear(g.x, g.w).transpose(1, 2)
    rows = F.cross_entropy(logits, g.p.transpose(1, 2), label_smoothing=0.1, reduction="none")
    return (rows * g.mask).sum()


def soft_targets_by_hand(g):
    return -(g.p * F.log_softmax(F.linear(g.x, g.w, g.b), -1)).sum(-1).mean()


def one_hot(g):
    target = F.one_hot(g.y, V).to(g.x.dtype)
    return F.cross_entropy(F.linear(g.x, g.w).view(-1, V), target.view(-1, V))


def logarithm_of_given(g):
    return (g.p * (g.p.log() - F.linear(g.x, g.w).log_softmax(-1))).sum()


def whole_anyway(g):
    """The teacher's logits are read elsewhere."""
    teacher = F.linear(g.xt, g.wt).detach()
    soft = F.kl_div(F.linear(g.x, g.w).log_softmax(-1), teacher.softmax(-1), reduction="sum")
    return soft * teacher.square().mean()


def reversed_(g):
    """The student's own probabilities are the weights; its labels are learned too."""
    student, teacher = F.linear(g.x, g.w), F.linear(g.xt, g.wt).detach()
    soft = F.kl_div(teacher.log_softmax(-1), student.softmax(-1), reduction="batchmean")
    return soft + F.cross_entropy(student.view(-1, V), g.y.view(-1))


def reversed_by_hand(g):
    logq, logp = F.linear(g.x, g.w).log_softmax(-1), F.log_softmax(g.t / 2, -1)
    return (logq.exp() * (logq - logp)).sum(-1).mean()


def reversed_and_given(g):
    logp = g.t.log_softmax(-1)
    return F.kl_div(logp, F.linear(g.x, g.w).softmax(-1), reduction="batchmean")


OTHERS = [
    given_logits, given_probabilities, given_logs, soft_targets, smoothed_targets,
    soft_targets_by_hand, one_hot, logarithm_of_given, whole_anyway, reversed_, reversed_by_hand,
    reversed_and_given,
]  # fmt: skip


def inputs(dtype: torch.dtype = torch.float32) -> Given:
    torch.manual_seed(0)
    shapes = ((B, S, D), (V, D), (V,), (B, S, C), (V, C), (V,))
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    y = torch.randint(0, V, (B, S))
    y[0, 3] = 3
    t, mask = torch.randn(B, S, V).to(dtype), (torch.rand(B, S) > 0.3).to(dtype)
    return Given(*leaves, y, t, torch.rand(B, S, V).softmax(-1).to(dtype), mask)


def results(f: Any, given: Given) -> list[Tensor | None]:
    loss = f(given)
    return [loss, *torch.autograd.grad(loss, given[:6], allow_unused=True)]


def check(f: Model, dtype: torch.dtype, dynamic: bool) -> Any:
    """As accurate as eager; the record."""
    torch._dynamo.reset()
    given = inputs(dtype)
    wide = [
        t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for t in given
    ]
    run, records = compiled(f, PIPELINE, dynamic=dynamic)
    assert_near_exact(results(run, given), results(f, given), results(f, Given(*wide)), dtype)
    (record,) = records
    return record


# what has most of the rules in it, half in one dtype, half in the other; all where it may be slow
_FEW = [
    distilled, by_the_tutorial, trained_together, masked_summands, row_by_row,
    shifted_at_each_place, capped,
    negative_weights, given_logits, smoothed_targets, whole_anyway, reversed_,
]  # fmt: skip
_WAYS = ((torch.float32, True), (torch.bfloat16, False))
_PROGRAMS = [
    pytest.param(f, *_WAYS[way], marks=[] if few else [pytest.mark.slow], id=f.__name__)
    for f in HEADS + OTHERS
    for way in (0, 1)
    for few in [f in _FEW and _FEW.index(f) % 2 == way]
]


@pytest.mark.parametrize(("f", "dtype", "dynamic"), _PROGRAMS)
def test_is_taken_and_as_accurate_as_eager(f: Model, dtype: torch.dtype, dynamic: bool) -> None:
    record = check(f, dtype, dynamic)
    (found,) = (r for r in record.rewrites if r.pattern != "slices")
    assert found.pattern == "linear_cross_entropy"
    assert found.where.startswith("test_linear_divergence.py:")
    assert not record.misses
    assert ("another head" in found.variant) == (f in HEADS or f is reversed_), found.variant


def two_teachers(g):
    logq = F.linear(g.x, g.w).log_softmax(-1)
    first = F.kl_div(logq, F.linear(g.xt, g.wt).detach().softmax(-1), reduction="sum")
    return first + F.kl_div(logq, g.p, reduction="sum")


def both_ways(g):
    logq, logp = F.linear(g.x, g.w).log_softmax(-1), g.t.log_softmax(-1)
    there = F.kl_div(logq, logp, reduction="sum", log_target=True)
    return there + F.kl_div(logp, logq, reduction="sum", log_target=True)


def jensen_shannon(g):
    q, p = F.linear(g.x, g.w).softmax(-1), F.linear(g.xt, g.wt).detach().softmax(-1)
    middle = ((p + q) / 2).log()
    return (F.kl_div(middle, p, reduction="sum") + F.kl_div(middle, q, reduction="sum")) / 2


def taught_by_itself(g):
    logits = F.linear(g.x, g.w)
    return F.kl_div(logits.log_softmax(-1), (logits.detach() / 2).softmax(-1), reduction="sum")


def learned_targets(g):
    p = (F.linear(g.xt, g.wt) + 1).square().softmax(-1)
    return F.kl_div(F.linear(g.x, g.w).log_softmax(-1), p, reduction="sum")


def learned_teacher_with_a_loss(g):
    teacher = F.linear(g.xt, g.wt)
    soft = F.kl_div(F.linear(g.x, g.w).log_softmax(-1), teacher.softmax(-1), reduction="sum")
    return soft + teacher.square().mean()


def returned(g):
    logits = F.linear(g.x, g.w)
    return F.cross_entropy(logits.view(-1, V), g.p.view(-1, V)), logits


def weighted_soft_targets(g):
    weight = torch.linspace(0.1, 2, V, dtype=g.x.dtype)
    return F.cross_entropy(F.linear(g.x, g.w).view(-1, V), g.p.view(-1, V), weight=weight)


def smoothed_teacher(g):
    target = F.linear(g.xt, g.wt).detach().softmax(-1).view(-1, V)
    return F.cross_entropy(F.linear(g.x, g.w).view(-1, V), target, label_smoothing=0.1)


def other_rows(g):
    logits = F.linear(g.x, g.w)
    hard = F.cross_entropy(logits[:, :-1].reshape(-1, V), g.y[:, 1:].reshape(-1))
    return hard + F.kl_div(logits.log_softmax(-1), g.p, reduction="sum")


def repeated_targets(g):
    return -(g.p[:1] * F.linear(g.x, g.w).log_softmax(-1)).sum()


def no_logarithms(g):
    """The classic mistake."""
    return F.kl_div(F.linear(g.x, g.w).softmax(-1), g.p, reduction="sum")


def over_other_classes(g):
    return F.kl_div(F.linear(g.x, g.w).log_softmax(1), g.p, reduction="sum")


def some_classes(g):
    each = F.kl_div(F.linear(g.x, g.w).log_softmax(-1), g.p, reduction="none")
    return each.masked_fill(g.p < 0.02, 0).sum()


def wider_teacher(g):
    teacher = F.linear(g.xt.double(), g.wt.double()).detach().softmax(-1)
    return F.kl_div(F.linear(g.x, g.w).log_softmax(-1), teacher, reduction="sum")


def targets_and_logits(g):
    logits = F.linear(g.x, g.w)
    return -(g.p * logits.log_softmax(-1)).sum(-1).mean() + logits.square().mean()


DECLINED = [
    (targets_and_logits, "used elsewhere"),
    (two_teachers, "several distributions"), (both_ways, "in several ways"),
    (jensen_shannon, "hangs on them"), (taught_by_itself, "hangs on them"),
    (learned_targets, "is learned"), (learned_teacher_with_a_loss, "used elsewhere"),
    (returned, "returned too"), (weighted_soft_targets, "class weights"),
    (smoothed_teacher, "label smoothing"), (other_rows, "divergence between"),
    (no_logarithms, "divergence between"), (over_other_classes, "columns"),
    (some_classes, "used elsewhere"), (wider_teacher, "float64"),
]  # fmt: skip


@pytest.mark.parametrize(("f", "reason"), DECLINED, ids=lambda f: getattr(f, "__name__", ""))
def test_is_declined_with_its_reason(f: Model, reason: str) -> None:
    torch._dynamo.reset()
    given = inputs()
    run, records = compiled(f, PIPELINE)
    found = run(given), f(given)
    torch.testing.assert_close(*found)
    (record,) = records
    assert not record.rewrites
    # of two heads at most
    assert {m.pattern for m in record.misses} == {"linear_cross_entropy"}
    assert len(record.misses) == (2 if f in (jensen_shannon, learned_targets) else 1)
    assert any(reason in m.reason for m in record.misses)


@pytest.mark.parametrize("f", [repeated_targets])
def test_is_no_near_miss(f: Model) -> None:
    torch._dynamo.reset()
    run, records = compiled(f, PIPELINE)
    torch.testing.assert_close(run(inputs()), f(inputs()))
    assert not records[0].rewrites
    assert not records[0].misses


def expanded_mask(g):
    each = F.kl_div(F.linear(g.x, g.w).log_softmax(-1), g.p, reduction="none")
    return (each * g.mask.unsqueeze(-1).expand_as(each)).sum()


def test_a_mask_that_is_expanded() -> None:
    assert check(expanded_mask, torch.float32, False).rewrites


@pytest.mark.parametrize("f", [masked_rows, distilled_softly_first])
def test_masks_and_labels_that_leave_nothing_are_as_eager(f: Model) -> None:
    torch._dynamo.reset()
    given = inputs()
    given = given._replace(mask=torch.zeros(B, S), y=torch.full_like(given.y, 3))
    run, records = compiled(f, PIPELINE)
    torch.testing.assert_close(run(given), f(given), equal_nan=True)
    assert records[0].rewrites


def test_another_length_does_not_recompile() -> None:
    torch._dynamo.reset()
    given = inputs()
    run, records = compiled(distilled, PIPELINE, dynamic=True)
    for length in (9, 5, 3):
        part = [
            t[:, :length].detach().clone().requires_grad_(t.requires_grad)
            if t.shape[:2] == (B, S)
            else t
            for t in given
        ]
        torch.testing.assert_close(run(Given(*part)), distilled(Given(*part)))
    assert len(records) == 1


def test_what_is_written_between_is_read_before() -> None:
    def f(g):
        teacher = F.linear(g.xt, g.wt)
        g.xt.mul_(2)
        return F.kl_div(
            F.linear(g.x, g.w).log_softmax(-1), teacher.softmax(-1), reduction="batchmean"
        )

    torch._dynamo.reset()
    run, records = compiled(f, PIPELINE)
    with torch.no_grad():
        torch.testing.assert_close(run(inputs()), f(inputs()))
    assert not records[0].rewrites
    assert "writes in between" in records[0].misses[0].reason


def test_without_gradients_only_losses_are_computed() -> None:
    torch._dynamo.reset()
    given = inputs()
    run, records = compiled(distilled, PIPELINE, engine="reference")
    with torch.no_grad():
        torch.testing.assert_close(run(given), distilled(given))
    calls = [n.target for g in records[0].flat.values() for n in g.graph.nodes]
    assert torch.ops.iocompiler.linear_divergence_losses.default in calls
    assert torch.ops.iocompiler.linear_divergence_gradients.default not in calls


def test_one_number_has_its_gradients_made_in_the_forward() -> None:
    torch._dynamo.reset()
    run, records = compiled(distilled, PIPELINE, engine="reference")
    given = inputs()
    for mine, theirs in zip(results(run, given), results(distilled, given), strict=True):
        torch.testing.assert_close(mine, theirs)
    calls = [n.target for n in records[0].flat["forward"].graph.nodes]
    (made,) = (n for n in calls if "linear_divergence" in str(n))
    assert made == torch.ops.iocompiler.linear_divergence_gradients.default


def test_shares_that_are_known_at_run_time() -> None:
    """Numbers of Python that change are symbols in the graph."""

    def f(g: Given, share: float) -> Tensor:
        return share * distilled(g) + (1 - share) * soft_targets(g)

    torch._dynamo.reset()
    given = inputs()
    run, records = compiled(f, PIPELINE, dynamic=True)
    for share in (0.25, 0.75):
        torch.testing.assert_close(run(given, share), f(given, share))
    assert len(records) == 1


def one_slice_of_two_views(g):
    """The same call, behind another view, chooses other rows, as many."""
    logits = F.linear(g.x, g.w)
    hard = F.cross_entropy(logits.view(3, 2, 3, V)[:, :1].reshape(-1, V), g.y[0])
    return hard + F.cross_entropy(logits.view(9, 2, V)[:, :1].reshape(-1, V), g.p[0])


def test_slices_of_other_rows_are_not_the_same() -> None:
    torch._dynamo.reset()
    given = inputs()
    run, _ = compiled(one_slice_of_two_views, PIPELINE)
    found = results(run, given), results(one_slice_of_two_views, given)
    torch.testing.assert_close(*found)
