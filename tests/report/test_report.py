"""The ledger of a plan built by hand: its numbers, its text, its files."""

import json
from dataclasses import replace

import pytest
import sympy
import torch

from iocompiler.cost_model.device import DEVICES
from iocompiler.errors import ReportFormat
from iocompiler.graph.findings import Miss, Rewrite
from iocompiler.plan.data import (
    AtenStep,
    KernelStep,
    Plan,
    Ref,
    Schedule,
    TensorSpec,
    Unfused,
    ViewStep,
)
from iocompiler.report.build import Part, build_report
from iocompiler.report.ledger import Kernel, Lost, Report, Resources
from iocompiler.report.save import as_json, from_json
from iocompiler.report.text import as_text, grouped, show_bytes, show_time
from iocompiler.report.words import show_schedule, show_spec
from iocompiler.tile.index import Affine, Axis
from iocompiler.tile.program import Buffer, Builder

H200 = DEVICES["h200"]
F32 = torch.float32
ROWS, COLUMNS = 1024, 512


def spec(*shape, dtype=F32, stride=None):
    dense = tuple(torch.empty(shape, device="meta").stride()) if stride is None else stride
    return TensorSpec(tuple(shape), dense, dtype, "cuda:0")


def relu_step(name, source, rows=ROWS):
    """``name = maximum(source, 0)`` over rows x COLUMNS elements."""
    elements = rows * COLUMNS
    builder = Builder()
    place = Affine.of("x0")
    zero = builder.const(0.0, F32)
    builder.store("out0", place, builder.map("maximum", builder.load("in0", place, F32), zero))
    buffers = (Buffer("in0", F32, "in", elements), Buffer("out0", F32, "out", elements))
    program = builder.program((Axis("x0", elements),), (), buffers)
    dense = TensorSpec((rows, COLUMNS), (COLUMNS, 1), F32, "cuda:0")
    return KernelStep(
        f"forward_{name}",
        program,
        Schedule("pointwise", 1024),
        (source, name),
        ((name, dense),),
        (name,),
        ("m.py:7",),
    )


def mm_step(name, left, right, rows=ROWS):
    out = TensorSpec((rows, COLUMNS), (COLUMNS, 1), F32, "cuda:0")
    args = (Ref(left), Ref(right))
    return AtenStep(
        "aten.mm.default", args, (), ((name, out),), False, name, "m.py:8", "contraction: cuBLAS"
    )


def plan(steps=None, outputs=None):
    """relu, then a product with the transposed weight."""
    inputs = (("x", spec(ROWS, COLUMNS)), ("w", spec(COLUMNS, COLUMNS)))
    steps = steps or (
        relu_step("h", "x"),
        ViewStep("wt", "w", spec(COLUMNS, COLUMNS, stride=(1, COLUMNS))),
        mm_step("y", "h", "wt"),
    )
    edge = Unfused("h", "y", 4 * ROWS * COLUMNS, "y is a call: contraction: cuBLAS")
    return Plan(inputs, steps, outputs or (Ref("y"),), "cuda:0", (edge,))


def report(**changes):
    found = build_report([Part("forward", plan())], H200)
    fields = {
        "rewrites": (Rewrite("attention", "m.py:3", "causal"),) * 2,
        "misses": (Miss("softmax", "m.py:4", "over [dim 1], not the last"),),
        "fallbacks": (Lost("graph break", "logger.warning"),),
    }
    return replace(found, **{**fields, **changes})


MIB = 2**20


def test_kernels_are_priced_and_views_are_not():
    relu, mm = report().kernels
    assert (relu.name, relu.generated, relu.bytes, relu.bound) == (
        "forward_h",
        True,
        4 * MIB,
        4 * MIB,
    )
    assert (mm.name, mm.generated, mm.bytes) == ("aten.mm.default", False, 5 * MIB)
    assert mm.flops == 2 * ROWS * COLUMNS**2
    assert mm.tile == "contraction: cuBLAS"
    assert relu.where == ("m.py:7",)
    assert relu.time_us == pytest.approx(2.5 + 4 * MIB / 4.3e6)


def test_the_bound_counts_what_crosses_and_nothing_in_between():
    found = report()
    assert found.bytes_moved == 9 * MIB
    assert found.bytes_bound == 5 * MIB  # x and y of 2 MiB, w of 1 MiB; h is in between
    assert 0 < found.time_bound_us < found.time_us


def test_an_input_that_is_not_read_or_only_handed_on_does_not_count():
    steps = (relu_step("y", "x"),)
    found = build_report([Part("forward", plan(steps, (Ref("y"), Ref("w"))))], H200)
    assert found.bytes_bound == 4 * MIB


def test_of_a_table_only_the_rows_picked_count():
    table, positions = spec(100_000, COLUMNS), spec(4, dtype=torch.int64)
    step = AtenStep(
        "aten.embedding.default", (Ref("t"), Ref("i")), (), (("y", spec(4, COLUMNS)),), False, "y"
    )
    picked = Plan((("t", table), ("i", positions)), (step,), (Ref("y"),), "cuda:0")
    assert build_report([Part("forward", picked)], H200).bytes_bound == 2 * 4 * 4 * COLUMNS + 32


def test_what_the_forward_hands_to_the_backward_does_not_count():
    forward = plan(outputs=(Ref("y"), Ref("h"), Ref("w")))
    inputs = (
        ("h", spec(ROWS, COLUMNS)),
        ("w", spec(COLUMNS, COLUMNS)),
        ("tangent", spec(ROWS, COLUMNS)),
    )
    backward = Plan(inputs, (mm_step("g", "tangent", "w"),), (Ref("g"),), "cuda:0")
    found = build_report([Part("forward", forward), Part("backward", backward)], H200)
    assert (
        found.bytes_bound == 5 * MIB + 4 * MIB
    )  # the tangent and the gradient; h and w were counted
    assert [k.graph for k in found.kernels] == ["forward", "forward", "backward"]


def test_an_updated_input_is_read_and_written():
    elements = ROWS * COLUMNS
    builder = Builder()
    place = Affine.of("x0")
    builder.store("inout0", place, builder.map("neg", builder.load("inout0", place, F32)))
    program = builder.program(
        (Axis("x0", elements),), (), (Buffer("inout0", F32, "inout", elements),)
    )
    step = KernelStep("k", program, Schedule("pointwise", 1024), ("x",), ())
    found = build_report(
        [Part("forward", Plan((("x", spec(ROWS, COLUMNS)),), (step,), (), "cuda:0"))], H200
    )
    assert found.bytes_bound == found.bytes_moved == 4 * MIB
    assert found.kernels[0].bound == 4 * MIB


def test_symbolic_plans_are_priced_at_their_hints_and_keep_their_formula():
    rows = sympy.Symbol("s0", integer=True, positive=True)
    steps = (relu_step("y", "x", rows),)
    symbolic = Plan(
        (("x", TensorSpec((rows, COLUMNS), (COLUMNS, 1), F32, "cuda:0")),),
        steps,
        (Ref("y"),),
        "cuda:0",
    )
    found = build_report([Part("forward", symbolic, {"s0": 64})], H200)
    (kernel,) = found.kernels
    assert kernel.bytes == 2 * 4 * 64 * COLUMNS
    assert kernel.formula == "4096*s0"
    assert found.sizes == (("s0", 64),)
    assert found.bytes_bound == kernel.bytes


def test_reports_add_up():
    both = report() + report()
    assert both.bytes_moved == 18 * MIB
    assert both.bytes_bound == 10 * MIB
    assert len(both.kernels) == 4


# --- text


def test_the_text_says_everything_within_its_width():
    text = as_text(report())
    assert max(map(len, text.splitlines())) <= 120
    sections = ["bytes moved", "least possible", "modeled time", "kernels, most time first"]
    sections += ["recognised", "near misses", "not fused", "not compiled"]
    places = [text.index(section) for section in sections]
    assert places == sorted(places)
    for said in (" h ", "aten.mm ", "attention", "over [dim 1], not the last"):
        assert said in text
    assert "y is a call" in text
    assert "logger.warning" in text
    assert "9.44 MB" in text
    assert "1.80 x the least possible" in text
    assert str(report()) == text


def test_equal_kernels_are_one_line_with_a_count():
    steps = (relu_step("a", "x"), relu_step("b", "a"))
    steps = tuple(
        KernelStep("layer", *[getattr(s, f) for f in ("program", "schedule", "args", "outputs")])
        for s in steps
    )
    found = build_report([Part("forward", plan(steps, (Ref("b"),)))], H200)
    (group,) = grouped(found.kernels)
    assert len(group.members) == 2
    assert group.bytes == 8 * MIB
    assert grouped(report().kernels)[0].first.name == "aten.mm.default"  # most time first


def test_long_reports_are_cut_and_say_so():
    kernels = tuple(
        Kernel(f"k{i}", "forward", (), (), 1000, 1000, 0, 1.0 + i, "", "", "") for i in range(60)
    )
    text = as_text(Report("h200", kernels=kernels))
    assert "and 20 more kernels" in text
    assert text.index("k59") < text.index("k30")


def test_resources_appear_once_something_was_compiled():
    found = report()
    assert "regs/spill" not in as_text(found)
    first = replace(found.kernels[0], resources=Resources(32, 0, 1024))
    assert "32/0/1024" in as_text(replace(found, kernels=(first, found.kernels[1])))


def test_an_empty_report_prints():
    assert "bytes moved" in as_text(Report("h200"))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (999_999, "1 MB"), (4.2e12, "4.2 TB")],
)
def test_bytes_in_words(count, text):
    assert show_bytes(count) == text


def test_times_in_words():
    assert [show_time(t) for t in (0.5, 999, 1500, 2.5e6)] == [
        "0.5 us",
        "999 us",
        "1.5 ms",
        "2.5 s",
    ]


def test_schedules_and_specs_in_words():
    assert (
        show_schedule(Schedule("persistent", 4, r_block=1024, num_warps=8))
        == "persistent 4 x 1024, 8 warps"
    )
    assert show_schedule(Schedule("rows", 2, r_block=64, programs=264)).endswith("264 programs")
    assert show_schedule(Schedule("pointwise", 64, 32)) == "pointwise 32 x 64, 4 warps"
    assert show_spec(spec(8, 4, dtype=torch.bfloat16)) == "bf16[8, 4]"
    assert show_spec(spec(8, 4, stride=(1, 8))) == "f32[8, 4] by (1, 8)"
    assert show_spec(spec(1, 4, stride=(99, 1))) == "f32[1, 4]"


# --- files


def test_json_reads_back_equal():
    found = report()
    data = json.loads(as_json(found))
    assert data["bytes_moved"] == 9 * MIB
    assert from_json(as_json(found)) == found


def test_another_schema_is_refused():
    with pytest.raises(ReportFormat, match="schema"):
        from_json('{"schema": 99}')


@pytest.mark.parametrize("suffix", ["json", "txt", "svg"])
def test_saving_by_suffix(tmp_path, suffix):
    path = tmp_path / "deep" / f"report.{suffix}"
    report().save(path)
    content = path.read_text()
    assert {"json": "{", "txt": "iocompiler", "svg": "<svg"}[suffix] in content[:200]
    assert str(tmp_path) not in content


def test_an_unknown_suffix_names_those_that_work(tmp_path):
    with pytest.raises(ReportFormat, match=r"\.json, \.txt, \.svg, \.mlir"):
        report().save(tmp_path / "report.docx")
    assert not list(tmp_path.iterdir())


def test_mlir_says_what_is_missing(tmp_path):
    try:
        import torch_mlir  # noqa: F401
    except ImportError:
        match = "torch-mlir is not installed"
    else:
        match = "no graphs"
    with pytest.raises(ReportFormat, match=match):
        report().save(tmp_path / "report.mlir")
