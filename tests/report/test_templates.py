"""The templates that calls launch, as `explain` reports them with no GPU: which they are, what they
take, and those that do not compile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from iocompiler.cost_model.device import DEVICES
from iocompiler.errors import CompileError
from iocompiler.ops.target import planned_for
from iocompiler.passes.linear_cross_entropy import rewrite
from iocompiler.plan.data import AtenStep, Plan, Ref
from iocompiler.report import kernels as report_kernels
from iocompiler.report.build import Part, build_report
from iocompiler.report.explain import explain
from iocompiler.report.kernels import Kernels
from iocompiler.report.ledger import Kernel, Lost, Report, Resources, Template
from iocompiler.report.save import as_json, from_json
from iocompiler.report.text import as_text
from iocompiler.runtime import template_images
from iocompiler.runtime.attention import Problem
from iocompiler.runtime.launch import Image
from iocompiler.runtime.template_form import Form
from iocompiler.tile.score import ScoreProgram
from iocompiler.tile.score_builder import ScoreBuilder
from tests.models.zoo import CASES, Size
from tests.runtime.plans import plan, spec

BF16 = torch.bfloat16


@dataclass
class Compiler:
    """In place of Triton: of templates; generated kernels are not compiled at all."""

    failing: str = ""
    asked: list[Form] = field(default_factory=list)

    def __call__(self, form: Form) -> Image:
        self.asked.append(form)
        if form.kernel.name == self.failing:
            raise CompileError(kernel=form.kernel.name, cause="too many registers\nand more")
        return Image(b"", {"registers": 40, "spills": 8, "shared": 1024})


TAKEN = Resources(40, 8, 1024)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = Compiler()
    monkeypatch.setattr(template_images, "_compiled", made)
    monkeypatch.setattr(template_images, "_images", {})
    monkeypatch.setattr(report_kernels, "compiled_resources", lambda plan, device: {})
    monkeypatch.setattr(rewrite, "LEAST_BYTES", 0)
    return made


def launched(report: Report) -> dict[str, list[str]]:
    """The templates of each operator, by its name."""
    return {
        kernel.name.removeprefix("iocompiler.").removesuffix(".default"): [
            each.name for each in kernel.templates
        ]
        for kernel in report.kernels
        if kernel.templates
    }


def heads(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=BF16, requires_grad=True)


def test_a_training_step_of_gpt2(compiler: Compiler) -> None:
    size, case = (
        Size(hidden=256, layers=1, vocabulary=1013, batch=2, length=300),
        CASES["gpt2-eager"],
    )
    report = explain(
        case.module(size, 0.1).to(BF16), device="h100", training=True, **case.inputs(size)
    )
    assert report.fallbacks == ()
    assert launched(report) == {
        "scored_attention": ["attention_forward"],
        "scored_attention_backward_packed_summed": [
            "attention_delta",
            "attention_backward",
        ],
        "linear_cross_entropy_gradients": ["cross_entropy_rows"],
        "embedding_gradient_": ["embedding_order", "embedding_sums", "embedding_fold"],
    }
    assert {t.resources for k in report.kernels for t in k.templates} == {TAKEN}
    assert len(set(compiler.asked)) == len(compiler.asked)


def sunk(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """A soft-cap and a sink."""
    places = torch.arange(q.shape[2])
    distance = places[:, None] - places[None, :]
    scores = torch.tanh(q @ k.mT / 8 / 30) * 30
    scores = scores.masked_fill(distance < 0, -math.inf)
    beside = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, beside], -1).softmax(-1)[..., :-1] @ v


def test_attention_whose_template_does_not_compile(compiler: Compiler) -> None:
    compiler.failing = "attention_backward"
    given = [heads(2, 4, 100, 64) for _ in range(3)]
    report = explain(sunk, *given, heads(4), device="h100", training=True)
    found = launched(report)
    assert found["scored_attention"] == ["attention_forward"]
    assert found["scored_attention_backward"] == [
        "attention_delta",
        "attention_backward",
    ]
    assert {t.name for k in report.kernels for t in k.templates if t.resources is None} == {
        "attention_backward"
    }
    (lost,) = report.fallbacks
    assert lost.region == "iocompiler.scored_attention_backward"
    assert lost.cause.endswith("kernel 'attention_backward' does not compile: too many registers")
    assert lost.where.startswith("test_templates.py:")


def test_a_decode_step(compiler: Compiler) -> None:
    def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (torch.tanh(q @ k.mT / 8 / 30) * 30).softmax(-1) @ v

    given = [heads(2, 4, n, 64).detach() for n in (1, 4000, 4000)]
    report = explain(capped, *given, device="a100")
    assert launched(report) == {"scored_attention": ["attention_split", "attention_combine"]}
    assert {form.capability for form in compiler.asked} == {80}


# --- a plan by hand


def gradients() -> Plan:
    """Of one table, from two lookups."""
    grad, indices = spec(600, 32), spec(600, dtype=torch.int64)
    steps = [
        AtenStep(
            "iocompiler.embedding_gradient.default",
            *((Ref(source), Ref("indices"), 50, -1), (), ((f"out_{source}", spec(50, 32)),), False),
            where=f"model.py:{line}",
        )
        for line, source in enumerate(("a", "b"), 1)
    ]
    inputs = {"a": grad, "b": grad, "indices": indices}
    made = plan(inputs, list(steps), tuple(Ref(step.outputs[0][0] or "") for step in steps))
    return replace(made, device="cuda:0")


def described(device: str, compile_kernels: bool = True) -> tuple[tuple[Kernel, ...], list[Lost]]:
    part = Part("inference", gradients())
    kernels = Kernels([part], DEVICES[device], compile_kernels)
    report = build_report([part], DEVICES[device], kernels.describe, kernels.templates)
    return report.kernels, kernels.lost


def test_equal_calls_are_compiled_once_and_lost_each(compiler: Compiler) -> None:
    compiler.failing = "embedding_sums"
    kernels, lost = described("h100")
    names = ["embedding_order", "embedding_sums", "embedding_fold"]
    taken = [Template(n, None if n == "embedding_sums" else TAKEN) for n in names]
    assert [list(k.templates) for k in kernels] == [taken] * 2
    assert sorted(form.kernel.name for form in compiler.asked) == sorted(names)
    assert [each.where for each in lost] == ["model.py:1", "model.py:2"]


@pytest.mark.parametrize(("device", "compiled"), [("cpu", True), ("h100", False)])
def test_nothing_is_compiled(device: str, compiled: bool, compiler: Compiler) -> None:
    kernels, lost = described(device, compiled)
    assert not any(kernel.templates for kernel in kernels)
    assert not compiler.asked
    assert not lost


@pytest.mark.slow
@pytest.mark.parametrize("device", ["a100", "h200"])
def test_what_they_take(device: str) -> None:
    kernels, lost = described(device)
    assert not lost
    for each in kernels[0].templates:
        assert each.resources is not None
        assert 16 <= each.resources.registers <= 255
        assert each.resources.spills == 0


def test_the_form_of_an_attention_is_that_of_the_device_planned_for() -> None:
    builder = ScoreBuilder()
    program = builder.program(builder.score())
    inputs = [torch.empty(1, 2, 300, 64, dtype=BF16) for _ in range(3)]
    with planned_for((8, 0)):
        older = Problem(*inputs, program).form
    with planned_for((9, 0)):
        newer = Problem(*inputs, program).form
    assert older.row != newer.row
    assert Problem(*inputs, program).form.row == newer.row, "without a GPU"


def _window(length: int | None) -> ScoreProgram:
    build = ScoreBuilder()
    i, j = build.index("i"), build.index("j")
    keep = build.map("le", j, i)
    if length is not None:
        keep = build.map("and", keep, build.map("lt", build.map("sub", i, j), build.const(length)))
    return build.program(build.score(), keep)


def _capped() -> ScoreProgram:
    build = ScoreBuilder()
    return build.program(build.map("tanh", build.score()))


@pytest.mark.parametrize(
    ("program", "setting", "crowded"),
    [
        (_window(None), {}, False),
        (_window(512), {}, True),
        (_window(3000), {}, False),
        (_capped(), {}, True),
        (_capped(), {"dropout_p": 0.1}, False),
    ],
    ids=["causal", "window", "wide window", "soft-cap", "soft-cap with dropout"],
)
def test_what_more_programs_hide(
    program: ScoreProgram, setting: dict[str, float], crowded: bool
) -> None:
    inputs = [torch.empty(1, 1, 4096, 64, dtype=BF16) for _ in range(3)]
    with planned_for((9, 0)):
        row = Problem(*inputs, program, **setting).form.row
    assert row.crowded is not None
    assert (row.forward == row.crowded) == crowded
    assert (row.forward.m, row.forward.n) == (row.crowded.m, row.crowded.n)


# --- text and files


def with_templates(*templates: Template, line: str = "m.py:1") -> Kernel:
    named = ("iocompiler.scored_attention.default", "forward", ("a",), (line,))
    return Kernel(*named, 1000, 1000, 0, 5.0, "ours", "", "", templates=templates)


def test_a_line_each_below_the_call() -> None:
    both = Template("attention_backward", Resources(168, 0, 41984))
    sums = Template("attention_delta")
    equal = [with_templates(both, sums, line=f"m.py:{line}") for line in (1, 2)]
    text = as_text(Report("h100", kernels=(*equal, with_templates(sums))))
    lines = [line.split() for line in text.splitlines() if "attention_" in line]
    assert lines == [
        ["attention_backward", "168/0/41984"],
        ["attention_delta"],
        ["attention_delta"],
    ]
    assert text.index("attention_backward") > text.index("m.py:1 +1")


def test_json_reads_back_equal() -> None:
    kernel = with_templates(Template("t", Resources(1, 2, 3)), Template("u"))
    report = Report("h100", kernels=(kernel, with_templates()))
    assert from_json(as_json(report)) == report
