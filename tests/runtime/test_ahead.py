"""Templates compiled ahead are those that a run of the plan launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

pytest.importorskip("triton")

from iocompiler.backend import Compiler
from iocompiler.ops import (
    embedding_gradient,
    library,
    linear_cross_entropy_copied,
    linear_cross_entropy_head,
    linear_cross_entropy_rows,
    linear_divergence_rows,
    target,
)
from iocompiler.passes.linear_cross_entropy import rewrite
from iocompiler.plan.build import size_hints
from iocompiler.plan.contents import made
from iocompiler.plan.data import AtenStep, Plan, Ref, Step, ViewStep
from iocompiler.runtime import (
    ahead,
    attention_form,
    reference,
    template_images,
    template_launch,
)
from iocompiler.runtime import load as load_module
from iocompiler.runtime.ahead import compile_ahead, launched
from iocompiler.runtime.attention import Run
from iocompiler.runtime.launch import Image
from iocompiler.runtime.module import Module
from iocompiler.runtime.template_form import Form
from iocompiler.runtime.template_launch import Launch, watched
from iocompiler.runtime.values import fresh, input_sizes, resolve
from tests.models.zoo import CASES, Size
from tests.runtime.plans import plan, spec

CPU = torch.device("cpu")
SIZE = Size(hidden=256, layers=2, vocabulary=1013, batch=2, length=300)


def noise(graph: Plan, args: list[Any]) -> list[Any]:
    """Walks a plan and runs, of all its steps, those that launch templates; the others' results are
    memory as the plan has it.
    """
    values = dict(zip((name for name, _ in graph.inputs), args, strict=True))
    sizes = input_sizes(graph, args)
    for step in graph.steps:
        if isinstance(step, ViewStep):
            values[step.name] = reference._view(step, values[step.base], sizes)
        elif isinstance(step, AtenStep) and library.launches(step.target.split(".")[1]):
            reference._aten(step, values, sizes)
        else:
            values |= {name: fresh(spec, sizes, CPU) for name, spec in made(step).items()}
    return [resolve(output, values, sizes, CPU) for output in graph.outputs]


class Engine:
    """Notes what is launched, in place of running it."""

    def __init__(self) -> None:
        self.expected: list[Form] = []
        self.ran: list[Form] = []
        self.counts: Counter[str] = Counter()

    def __call__(self, graph: Plan, gm: torch.fx.GraphModule) -> Callable[[list[Any]], list[Any]]:
        attention_form._forms.clear()  # nothing is known from a run before
        self.expected += launched(graph, CPU, size_hints(gm), 90)

        def run(args: list[Any]) -> list[Any]:
            with watched(self.note):
                return noise(graph, args)

        return run

    def note(self, launch: Launch, tensors: Mapping[str, Any]) -> None:
        self.ran.append(launch.form(tensors, 90))
        self.counts[launch.kernel.__name__] += 1


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """With the choices that a GPU gets."""
    losses = (linear_cross_entropy_rows, linear_divergence_rows, linear_cross_entropy_head)
    for module in (*losses, embedding_gradient):
        monkeypatch.setattr(module, "on_gpu", lambda x: True)
    monkeypatch.setattr(rewrite, "LEAST_BYTES", 0)
    return Engine()


def train(
    model: Callable[..., Any], inputs: Mapping[str, Any], engine: Engine, **options: Any
) -> None:
    torch._dynamo.reset()
    with target.planned_for((9, 0)):
        compiled = torch.compile(model, backend=Compiler(engine=engine, strict=True), **options)
        compiled(**inputs).loss.backward()


@pytest.mark.parametrize(
    ("name", "dtype", "kernels"),
    [
        ("bert-eager", torch.bfloat16, {"attention_forward": 2, "attention_backward": 2}),
        (
            *("gpt2-eager", torch.bfloat16),
            {"cross_entropy_rows": 1, "embedding_sums": 1, "attention_backward": 2},
        ),
        ("t5-eager", torch.bfloat16, {"attention_forward": 6, "operand_diagonals": 4}),
    ],
)
def test_a_training_step(
    name: str, dtype: torch.dtype, kernels: dict[str, int], engine: Engine
) -> None:
    case = CASES[name]
    train(case.module(SIZE, 0.1).to(dtype), case.inputs(SIZE), engine)
    assert kernels.items() <= engine.counts.items(), engine.counts
    assert set(engine.ran) == set(engine.expected)
    made = [x for each in attention_form._forms.values() for x in each._made.values()]
    kept = [each.proved for x in made if isinstance(x, Run) for each in x.visits]
    assert not any(isinstance(x, FakeTensor) for x in kept)
    assert any(x is not None for x in kept) or not kernels.keys() & {"attention_forward"}


def test_a_forward_that_returns_its_logits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch a chunk; the logits of some are made where others will be kept."""
    monkeypatch.setattr(linear_cross_entropy_copied, "SCRATCH_BYTES", 1)
    torch._dynamo.reset()
    case = CASES["gpt2-eager"]
    model = case.module(SIZE, 0.1).bfloat16().eval()
    with target.planned_for((9, 0)), torch.no_grad():
        torch.compile(model, backend=Compiler(engine=engine, strict=True))(**case.inputs(SIZE))
    rows = SIZE.batch * SIZE.length
    chunks = linear_cross_entropy_copied.chunks_of(rows, SIZE.vocabulary, 2)
    assert engine.counts["cross_entropy_rows"] == len(chunks) > 2
    assert set(engine.ran) == set(engine.expected)


@pytest.mark.parametrize(("given", "vocabulary"), [(False, 131), (True, 128)])
def test_a_student_beside_its_teacher(given: bool, vocabulary: int, engine: Engine) -> None:
    """In rows that are filled up, and in those of another's logits, which are not."""

    def loss(x: Any, weight: Any, taught: Any, teacher: Any) -> SimpleNamespace:
        student = (x @ weight.t()).log_softmax(-1)
        other = taught if given else taught @ teacher.t()
        each = torch.nn.functional.kl_div(student, other.softmax(-1), reduction="batchmean")
        return SimpleNamespace(loss=each)

    heads = [torch.randn(n, 16).bfloat16().requires_grad_() for n in (300, vocabulary)]
    width = vocabulary if given else 24
    taught = [torch.randn(n, width).bfloat16() for n in (300, vocabulary)]
    names = ("x", "weight", "taught", "teacher")
    train(loss, dict(zip(names, (*heads, *taught), strict=True)), engine)
    assert engine.counts["divergence_rows"] == 1
    assert set(engine.ran) == set(engine.expected)


class Biased(torch.nn.Module):
    """Attention with a window and a bias by head, in lengths that may vary."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(4, 1, 1))

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        q = x.unflatten(-1, (4, 64)).transpose(1, 2)
        i = torch.arange(x.shape[1])
        distance = i[:, None] - i[None, :]
        scores = q @ q.transpose(2, 3) * 0.125 - distance.abs() * self.bias
        scores = scores.masked_fill((distance < 0) | (distance > 20), float("-inf"))
        return SimpleNamespace(loss=(scores.softmax(-1) @ q).sum())


@pytest.mark.parametrize("length", [40, 64])
def test_sizes_that_are_symbols_are_taken_at_their_hints(length: int, engine: Engine) -> None:
    x = torch.randn(2, length, 256, requires_grad=True)
    torch._dynamo.mark_dynamic(x, 1)
    train(Biased(), {"x": x}, engine)
    assert engine.counts["attention_forward"] == 1
    assert set(engine.ran) == set(engine.expected)


class Projected(torch.nn.Module):
    """Odd heads of one projection: the gradients of key and value begin at any element."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(32, 8 * 33)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        heads = self.project(x).unflatten(-1, (8, 33)).transpose(1, 2)
        q, k, v = heads.split([4, 2, 2], 1)
        k, v = (each.repeat_interleave(2, 1) for each in (k, v))
        scores = torch.tanh(q @ k.mT / 30.0) * 30.0
        return SimpleNamespace(loss=(scores.softmax(-1) @ v).sum())


def test_gradients_in_one_tensor(engine: Engine) -> None:
    train(Projected().bfloat16(), {"x": torch.randn(2, 40, 32).bfloat16()}, engine)
    for launches in (engine.ran, engine.expected):
        forms = {form.kernel.name: dict(form.arguments) for form in launches}
        given = forms["attention_backward"]
        assert [given[name].aligned for name in ("DQ", "DK", "DV")] == [True, False, False]


def call(name: str, **changed: Any) -> Plan:
    """An embedding's gradient, twice with equal arguments, once behind 4 elements."""
    grad, indices = spec(6, 32), spec(6, dtype=torch.int64)
    steps: list[Step] = [ViewStep("late", "memory", grad, 1)]
    for place, source in enumerate(("grad", "other", "late")):
        args = (Ref(source), Ref("indices"), 50, -1)
        out = ((f"out{place}", spec(50, 32)),)
        target = f"iocompiler.{name}.default"
        steps.append(AtenStep(target, args, (), out, is_tuple=False, **changed))
    inputs = {"grad": grad, "other": grad, "memory": spec(400), "indices": indices}
    return plan(inputs, steps, (Ref("out0"), Ref("out1"), Ref("out2")))


def test_equal_calls_are_looked_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    accumulate = embedding_gradient._launch
    monkeypatch.setattr(
        embedding_gradient, "_launch", lambda *a, **k: calls.append(1) or accumulate(*a, **k)
    )
    found = launched(call("embedding_gradient"), CPU, {}, 90)
    assert len(calls) == 2
    names = [form.kernel.name for form in found]
    assert names == ["embedding_order", "embedding_sums", "embedding_sums"]
    aligned = [dict(form.arguments)["grad"].aligned for form in found[1:]]
    assert aligned == [True, False]


def test_a_call_that_fails_is_left_out(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any, **named: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(embedding_gradient, "_launch", fail)
    assert launched(call("embedding_gradient"), CPU, {}, 90) == []


def test_calls_of_other_operators_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "get_device_capability")
    compile_ahead(call("aligned_mm"), torch.device("cuda"), {})
    with pytest.raises(AttributeError):
        compile_ahead(call("embedding_gradient"), torch.device("cuda"), {})


def test_loading_a_plan_sends_its_templates_to_the_workers(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Form] = []
    graph = call("embedding_gradient")
    expected = launched(graph, CPU, {}, 80)
    monkeypatch.setattr(ahead, "prepare", sent.extend)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for name in ("begin", "bind"):  # for which a GPU would have to be there
        monkeypatch.setattr(Module, name, lambda module: None)
    run: Any = load_module.load(graph, torch.device("cuda", 0))
    assert run.module.device.type == "cuda"
    assert sent == expected != []
    load_module.load(graph)
    assert sent == expected


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bert-eager", "gpt2-eager", "t5-eager"])
def test_a_step_on_the_gpu_finds_its_templates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, launches, late = CASES[name], list[Form](), list[Form]()
    image = template_launch.image

    def noted(form: Form) -> Image:
        launches.append(form)
        if form not in template_images._images:
            late.append(form)
        return image(form)

    monkeypatch.setattr(template_launch, "image", noted)
    monkeypatch.setattr(rewrite, "LEAST_BYTES", 0)
    monkeypatch.setattr(attention_form, "_forms", {})
    template_launch._loaded.cache_clear()
    torch._dynamo.reset()
    model = case.module(SIZE, 0.1).to("cuda", torch.bfloat16)
    inputs = {key: x.cuda() for key, x in case.inputs(SIZE).items()}
    compiled = torch.compile(model, backend=Compiler(strict=True))
    for _ in range(2):
        compiled(**inputs).loss.backward()
    assert launches
    assert not late
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
