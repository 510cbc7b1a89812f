"""Losses without their logits' gradients: the backward is compiled for what comes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar, copy_context
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import iocompiler as ioc
from iocompiler.compilation import Compilation
from iocompiler.errors import FallbackWarning
from iocompiler.plan.data import AtenStep, KernelStep
from iocompiler.runtime.tangents import resumption
from tests.compiling import copy, grad
from tests.runtime.text_engine import TextEngine

VOCABULARY, WIDTH = 7, 5
Program = Callable[..., tuple[Tensor, ...]]


def head(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Loss, logits, and something else that is differentiable."""
    logits = x @ w.t()
    return F.cross_entropy(logits, y), logits, (x * 2).sin()


def compiled(f: Program, **settings: Any) -> tuple[Program, list[Compilation]]:
    records: list[Compilation] = []
    dynamic = settings.pop("dynamic", False)
    settings = {"engine": "reference", "strict": True, **settings}
    torch._dynamo.reset()
    backend = ioc.Compiler(on_compiled=records.append, **settings)
    return torch.compile(f, backend=backend, dynamic=dynamic), records


def inputs(rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return grad(rows, WIDTH), grad(VOCABULARY, WIDTH), torch.randint(VOCABULARY, (rows,))


def gradients(f: Program, given: Sequence[Tensor], which: Sequence[int]) -> list[Tensor]:
    """Of a weighted sum of some results; zero where eager has none."""
    given = [copy(x) for x in given]
    results = f(*given)
    loss = sum((results[at] * (at + 1.5)).sum() for at in which)
    loss.backward()  # type: ignore[union-attr]
    leaves = [x for x in given if x.requires_grad]
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def check(run: Program, f: Program, given: Sequence[Tensor], which: Sequence[int]) -> None:
    ours, theirs = gradients(run, given, which), gradients(f, given, which)
    torch.testing.assert_close(ours, theirs)


SETS = [(0,), (1,), (2,), (0, 1), (0, 2), (0, 1, 2)]


@pytest.mark.parametrize("which", SETS)
def test_the_backward_takes_only_what_comes(which: tuple[int, ...]) -> None:
    run, records = compiled(head)
    given = inputs()
    for _ in range(2):
        check(run, head, given, which)
    (record,) = records
    assert list(record.plans) == ["forward", "backward"]
    names = [name for name, _ in record.plans["backward"].inputs if name.startswith("tangents")]
    assert len(names) == len(which)


@pytest.mark.parametrize("dynamic", [False, True])
def test_each_set_in_its_turn(dynamic: bool) -> None:
    run, records = compiled(head, dynamic=dynamic)
    for rows in (4, 6, 9):
        for which in SETS:
            check(run, head, inputs(rows), which)
    assert len(records) == (1 if dynamic else 3)
    for record in records:
        assert len(record.plans) == 1 + len(SETS)
        assert not record.fallbacks


def test_one_loss_needs_nothing_of_this() -> None:
    def f(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (head(x, w, y)[0],)

    run, records = compiled(f)
    check(run, f, inputs(), (0,))
    assert list(records[0].plans) == ["forward", "backward"]


def test_graph_retained_and_used_twice() -> None:
    run, _ = compiled(head)
    given = inputs()
    x, w, _ = given
    ours, theirs = run(*given), head(*given)
    for which in ((0,), (1,), (0,)):
        found, expected = (
            torch.autograd.grad(
                sum(r[at].sum() for at in which), (x, w), retain_graph=True, allow_unused=True
            )
            for r in (ours, theirs)
        )
        torch.testing.assert_close(found, expected)


def test_differentiated_twice_is_an_error_as_ever() -> None:
    run, _ = compiled(head)
    x, w, y = inputs()
    (dx,) = torch.autograd.grad(run(x, w, y)[0], x, create_graph=True)
    assert dx.requires_grad
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        dx.sum().backward()


def test_overwritten_inputs_and_views() -> None:
    def f(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        hidden = x * 2
        hidden.mul_(w[:1])
        logits = hidden @ w.t()
        return F.cross_entropy(logits, y), logits.view(-1), logits[1:], x.t()

    run, _ = compiled(f)
    for which in ((0,), (1,), (2,), (0, 3), (0, 1, 2, 3)):
        check(run, f, inputs(), which)

    def g(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        z = x * 1
        results = step(z, w, y)
        return (*results, z)

    def overwriting(z: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        z.mul_(2)
        return F.cross_entropy(z @ w.t(), y), (z + 1).sin()

    eager = step = overwriting
    wanted = [gradients(g, inputs_of_one_seed(), which) for which in ((0,), (1,), (2,), (0, 2))]
    step, _ = compiled(eager)
    found = [gradients(g, inputs_of_one_seed(), which) for which in ((0,), (1,), (2,), (0, 2))]
    torch.testing.assert_close(found, wanted)


def returned_twice(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    logits = x @ w.t()
    loss = F.cross_entropy(logits, y)
    return loss, loss, logits, logits.detach(), logits.argmax(-1), x


def parts(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    logits = x @ w.t()
    return logits.chunk(2)[0], F.cross_entropy(logits, y), logits.t()


def rows_of_one(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    grown = (x @ w.t()).exp()
    return grown[0], grown[1], grown.sum(), x.view(-1), torch.zeros(3)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("f", "sets"),
    [
        (returned_twice, [(0,), (1,), (2,), (0, 2), (5,), (0, 5)]),
        (parts, [(0,), (1,), (2,), (0, 1)]),
        (rows_of_one, [(0,), (1,), (2,), (3,), (0, 2)]),
    ],
)
def test_results_that_share_memory(f: Program, sets: list[tuple[int, ...]], dynamic: bool) -> None:
    run, records = compiled(f, dynamic=dynamic)
    for rows in (4, 6):
        for which in sets:
            check(run, f, inputs(rows), which)
    assert not [each for record in records for each in record.fallbacks]


def test_computed_again_in_the_backward() -> None:
    run, _ = compiled(head)

    def step(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = checkpoint(run, x, w, y, use_reentrant=False)
        return results

    for which in ((0,), (1,), (0, 2)):
        check(step, head, inputs(), which)


def inputs_of_one_seed() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(5)
    return inputs()


def test_an_input_with_its_own_autograd_node_is_left_alone() -> None:
    """A result that is an input keeps the node of whoever made it."""

    class NeedsZeros(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return x * 2, x * 3

        @staticmethod
        def backward(ctx: Any, one: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
            return one * 2 + other * 3

    def f(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (h, *head(h, w, y))

    run, _ = compiled(f)
    x, w, y = inputs()
    one, _other = NeedsZeros.apply(x)  # type: ignore[no-untyped-call]
    kept, *_ = run(one, w, y)
    (dx,) = torch.autograd.grad(kept.sum(), x)
    torch.testing.assert_close(dx, torch.full_like(x, 2))


def test_under_functorch() -> None:
    """The transform stays in Dynamo's graph, which then has one result with a gradient."""
    _, w, y = inputs()

    def f(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        dx, (logits, _) = torch.func.grad(
            lambda x: (lambda loss, *rest: (loss, rest))(*head(x, w, y)), has_aux=True
        )(x)
        return dx, logits

    run, _ = compiled(f, strict=False)
    x = torch.randn(4, WIDTH)
    with pytest.warns(FallbackWarning, match=r"torch\.func"):
        found = run(x, w, y)
    torch.testing.assert_close(found, f(x, w, y))
    found[1].sum().backward()  # type: ignore[no-untyped-call]
    assert w.grad is not None


def test_under_compiled_autograd() -> None:
    run, _ = compiled(head)
    given = inputs()
    expected = gradients(head, given, (0,))
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        found = gradients(run, given, (0,))
    torch.testing.assert_close(found, expected)


def test_what_cannot_be_guarded_any_more_runs_on_aten() -> None:
    """The forward has run when the backward is compiled: its sizes are guarded already."""

    @ioc.graph_pass(stage="flat")
    def assuming(gm: GraphModule) -> int:
        for node in gm.graph.find_nodes(op="placeholder"):
            if node.name.startswith("tangents") and node.meta["val"].dim():
                bool(node.meta["val"].shape[0] > 3)
        return 0

    records: list[Compilation] = []
    pipeline = ioc.Pipeline(*ioc.DEFAULT.stage("graph"), *ioc.DEFAULT.stage("flat"), assuming)
    backend = ioc.Compiler(pipeline, engine="reference", on_compiled=records.append)
    run = torch.compile(head, backend=backend, dynamic=True)
    with pytest.warns(FallbackWarning, match="too late to be checked"):
        check(run, head, inputs(6), (1,))
    check(run, head, inputs(3), (1,))
    check(run, head, inputs(3), (0,))  # where no tangent has rows, nothing is assumed
    assert [f.region for f in records[0].fallbacks] == ["backward"]


def test_settings_of_who_asks_for_gradients_hold_where_a_backward_is_compiled() -> None:
    """Autograd runs it in a thread of the device's."""
    setting, seen = ContextVar("setting", default=0), list[int]()
    setting.set(1)
    variables = copy_context()
    resumed = resumption()

    def run() -> None:
        torch._C._stash_obj_in_tls("context", variables)
        variables.run(lambda: resumed(lambda: seen.append(setting.get())))  # as AOTAutograd has it
        resumed(lambda: seen.append(setting.get()))
        forget = getattr(torch._C, "_remove_obj_from_tls", None)
        forget("context") if forget else torch._C._stash_obj_in_tls("context", None)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [1, 1]


# from the cache


def test_found_again_with_every_set_it_had() -> None:
    given = inputs()
    for what in ("stored", "found"):
        run, records = compiled(head, engine=TextEngine())
        for which in ((0,), (0, 1), (0,)):
            check(run, head, given, which)
        assert [r.cache for r in records] == [what]
        assert not records[0].fallbacks


def test_found_with_more_missing_than_it_was_compiled_for() -> None:
    given = inputs()
    for sets in ([(0, 1, 2)], [(0,), (1,), (2,)]):
        run, records = compiled(head, engine=TextEngine())
        for which in sets:
            check(run, head, given, which)
    assert records[0].cache == "found"
    assert not records[0].fallbacks


def test_found_for_another_loss_runs_on_aten_once() -> None:
    given = inputs()
    run, _ = compiled(head, engine=TextEngine())
    check(run, head, given, (0,))
    run, records = compiled(head, engine=TextEngine())
    with pytest.warns(FallbackWarning, match="other results are differentiated"):
        check(run, head, given, (1,))
    check(run, head, given, (0, 1))
    assert records[0].cache == "found"
    assert [f.region for f in records[0].fallbacks] == ["backward"]
    run, records = compiled(head, engine=TextEngine())
    check(run, head, given, (1,))
    assert records[0].cache == "stored"


def test_found_with_sizes_that_vary() -> None:
    for what in ("stored", "found"):
        run, records = compiled(head, engine=TextEngine(), dynamic=True)
        for rows in (4, 6):
            check(run, head, inputs(rows), (0,))
        assert [r.cache for r in records] == [what]


# what it is for


def test_gpt2_reads_no_gradient_of_its_logits() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=32, vocab_size=97, n_positions=32, bos_token_id=0,
        eos_token_id=0, use_cache=False,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    run, records = compiled(model)
    ids = torch.randint(97, (2, 8))
    run(input_ids=ids, labels=ids).loss.backward()
    (record,) = records
    plan = record.plans["backward"]
    size = 2 * 8 * 97

    def large(specs: Any) -> list[str]:
        return [name for name, spec in specs if spec is not None and elements(spec) == size]

    # the logits themselves come in, and their gradient is made, once each
    (logits,) = large(plan.inputs)
    assert not logits.startswith("tangents")
    made = [(step, large(step.outputs)) for step in plan.steps if hasattr(step, "outputs")]
    ((step, _),) = [(step, names) for step, names in made if names]
    assert isinstance(step, KernelStep)
    assert logits in step.args
    for call in plan.steps:
        assert not (
            isinstance(call, AtenStep) and call.target.startswith(("aten.zeros", "aten.full"))
        )


def test_operators_of_what_nobody_differentiates_do_not_run() -> None:
    """Attention, a convolution and an embedding of the result without a gradient."""

    def f(q: Tensor, w: Tensor, table: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        attended = F.scaled_dot_product_attention(q, q, q)
        return F.conv2d(attended, w).sum(), F.embedding(tokens, table), q.sin()

    q, w, table = grad(2, 4, 8, 16), grad(3, 4, 3, 3), grad(11, 5)
    given = (q, w, table, torch.randint(11, (6,)))
    targets = {}
    for which in ((2,), (0,), (1,), (0, 1, 2)):
        run, records = compiled(f)
        check(run, f, given, which)
        steps = records[0].plans["backward"].steps
        targets[which] = [s.target.split(".")[1] for s in steps if isinstance(s, AtenStep)]
    assert not targets[(2,)]
    assert {"attention_backward", "convolution_backward"} <= set(targets[(0,)])
    assert targets[(1,)] == ["embedding_dense_backward"]
    assert len(targets[(0, 1, 2)]) == len(targets[(0,)]) + 1


def elements(spec: Any) -> int:
    count = 1
    for extent in spec.shape:
        count *= extent
    return count


@pytest.mark.gpu
def test_on_a_gpu_no_zeros_of_the_size_of_logits_are_made() -> None:
    torch._dynamo.reset()
    rows, classes = 4096, 16384
    x = torch.randn(rows, 64, device="cuda", requires_grad=True)
    w = torch.randn(classes, 64, device="cuda", requires_grad=True)
    y = torch.randint(classes, (rows,), device="cuda")
    run = torch.compile(head, backend=ioc.Compiler(strict=True))
    run(x, w, y)[0].backward()
    loss, logits, _ = run(x, w, y)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss.backward()
    torch.cuda.synchronize()
    size = logits.numel() * logits.element_size()
    assert torch.cuda.max_memory_allocated() - before < 1.5 * size  # the logits' own gradient


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_on_a_gpu(mode: str) -> None:
    torch._dynamo.reset()
    run = torch.compile(head, backend=ioc.Compiler(strict=mode == "default", mode=mode))
    for turn in range(9):
        torch.compiler.cudagraph_mark_step_begin()
        given = [x.detach().cuda().requires_grad_(x.requires_grad) for x in inputs(64)]
        check(run, head, given, SETS[turn % 3])
