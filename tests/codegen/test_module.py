"""Generated module files: their text, and `call` itself run on the CPU with interpreted kernels."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

from iocompiler.codegen.module import emit_module
from iocompiler.codegen.pytext import argument_text, elements_text, size_text
from iocompiler.plan.data import (
    AtenStep,
    ConstantStep,
    KernelStep,
    Plan,
    Ref,
    TensorSpec,
    ViewStep,
)
from iocompiler.runtime import module
from iocompiler.runtime.compile import Job
from iocompiler.runtime.load import load_text, module_file
from iocompiler.runtime.reference import run_plan
from tests.runtime.plans import S0, binary, interpreter, kernel, plan, scaled, spec


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOCOMPILER_CACHE_DIR", str(tmp_path / "cache"))


def call_of(graph: Plan) -> Callable[[list[Any]], list[Any]]:
    return load_text(emit_module(graph, "graph"), "graph", binder=interpreter(graph))


def body(graph: Plan) -> str:
    """The text of `call`."""
    text = emit_module(graph, "graph")
    return text[text.index("def call") : text.index("def example_inputs")].rstrip() + "\n"


def agree(graph: Plan, args: list[Any]) -> list[Any]:
    """Outputs of the module, compared with the reference executor's."""
    expected = run_plan(graph, [a.clone() if isinstance(a, torch.Tensor) else a for a in args])
    given = list(args)
    found = call_of(graph)(given)
    assert given == []
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b, equal_nan=True)
            assert a.stride() == b.stride()
        else:
            assert a == b
    return found


def mm(out: str, a: str, b: str, rows: Any, columns: Any) -> AtenStep:
    result = ((out, spec(rows, columns)),)
    return AtenStep("aten.mm.default", (Ref(a), Ref(b)), (), result, False, out, "model.py:9")


def chain() -> Plan:
    """x + y, times x by mm, scaled through a view of the middle rows, which is also handed out."""
    return plan(
        {"x": spec(4, 4), "y": spec(4, 4), "factor": None},
        [
            kernel("add", binary("add", 16), ("x", "y", "sum_1"), spec(4, 4), "model.py:8"),
            mm("product", "sum_1", "x", 4, 4),
            ViewStep("rows", "product", spec(2, 4), 4),
            kernel("scale", scaled(8), ("rows", "factor", "out"), spec(2, 4), "model.py:10"),
        ],
        (Ref("out"), Ref("rows"), None, 7),
    )


def test_text_of_call() -> None:
    assert body(chain()) == textwrap.dedent(
        """\
        def call(args):
            x, y, factor = args
            args.clear()
            stream = current_stream()
            # model.py:8
            sum_1 = empty((4, 4), (4, 1), torch.float32)
            run_add(stream, 1, 1, 1, x.data_ptr(), y.data_ptr(), sum_1.data_ptr())
            del y
            # model.py:9
            product = torch.mm(sum_1, x, out=empty((4, 4), (4, 1), torch.float32))
            del sum_1, x
            rows = reinterpret(product, (2, 4), (4, 1), 4)
            del product
            # model.py:10
            out = empty((2, 4), (4, 1), torch.float32)
            run_scale(stream, 1, 1, 1, rows.data_ptr(), factor, out.data_ptr())
            return [out, rows, None, 7]
        """
    )


def test_a_product_on_another_device_is_allocated_there() -> None:
    """`empty` gives memory of the plan's own device."""
    there, here = (TensorSpec((4, 4), (4, 1), torch.float32, f"cuda:{i}") for i in (1, 0))
    steps = [
        AtenStep("aten.mm.default", (Ref(x), Ref(x)), (), ((y, s),), False, y, "")
        for x, y, s in (("a", "c", here), ("b", "d", there))
    ]
    graph = Plan((("a", here), ("b", there)), tuple(steps), (Ref("c"), Ref("d")), "cuda:0")
    text = body(graph)
    assert "c = torch.mm(a, a, out=empty(" in text
    assert "d = aten_mm(b, b)" in text


def test_runs_as_the_reference() -> None:
    agree(chain(), [torch.randn(4, 4), torch.randn(4, 4), 0.5])


def test_file_compiles_and_is_cut_at_its_cells() -> None:
    text = emit_module(chain(), "graph")
    compile(text, "graph.py", "exec")
    marks = [line for line in text.splitlines() if line.startswith("# %%")]
    assert marks == ["# %% prelude", "# %% kernel add", "# %% kernel scale", "# %% call"]
    assert text.index("# model.py:8\n") < text.index("def add(")


def test_tracebacks_name_the_files_own_lines() -> None:
    graph = chain()
    call = call_of(graph)
    with pytest.raises(ValueError, match="str") as error:
        call([torch.randn(4, 4), torch.randn(4, 4), "no number"])
    frame = [entry for entry in error.traceback if str(entry.path) == call.path]
    line = Path(call.path).read_text().splitlines()[frame[0].lineno]
    assert "run_scale(" in line


def test_equal_programs_are_one_kernel() -> None:
    steps = [kernel("add", binary("add", 8), ("x", "x", "a"), spec(8))]
    steps += [
        kernel(f"add_{i}", binary("add", 8), (p, "x", q), spec(8))
        for i, p, q in ((1, "a", "b"), (2, "b", "c"))
    ]
    graph = plan({"x": spec(8)}, steps, (Ref("c"),))
    text = emit_module(graph, "graph")
    assert text.count("@triton.jit\ndef add") == 1
    assert text.count("    run_add(") == 3
    agree(graph, [torch.randn(8)])


def test_equal_names_of_unequal_programs() -> None:
    steps = [
        kernel("f", binary("add", 8), ("x", "x", "a"), spec(8)),
        kernel("f", binary("mul", 8), ("a", "x", "b"), spec(8)),
    ]
    text = emit_module(plan({"x": spec(8)}, steps, (Ref("b"),)), "graph")
    assert "def f(" in text
    assert "def f_2(" in text


def test_views_read_by_kernels_only_are_pointers() -> None:
    graph = plan(
        {"x": spec(24)},
        [
            ViewStep("tail", "x", spec(8), 16),
            ViewStep("inner", "tail", spec(4), 3),
            kernel("add", binary("add", 4), ("tail", "inner", "out"), spec(4)),
        ],
        (Ref("out"),),
    )
    assert "reinterpret(" not in body(graph)
    assert "x.data_ptr() + 64, x.data_ptr() + 76, out" in body(graph)
    # 76 bytes is no multiple of 16: that pointer must not be promised to be one
    assert '"a_ptr:*fp32:16 b_ptr:*fp32 out_ptr:*fp32:16"' in emit_module(graph, "graph")
    agree(graph, [torch.randn(40)[5:29]])


def test_a_view_equal_to_its_base_is_its_base() -> None:
    graph = plan(
        {"x": spec(2, 8)},
        [
            kernel("add", binary("add", 16), ("x", "x", "a"), spec(2, 8)),
            ViewStep("flat", "a", spec(16)),
            ViewStep("back", "flat", spec(2, 8)),
            mm("p", "back", "back_t", 2, 2),
        ],
        (Ref("p"), Ref("back")),
    )
    graph = plan(
        dict(graph.inputs),
        [*graph.steps[:3], ViewStep("back_t", "back", spec(8, 2, stride=(1, 8))), graph.steps[3]],
        graph.outputs,
    )
    text = body(graph)
    assert "back =" not in text
    assert "return [p, a]" in text
    agree(graph, [torch.randn(2, 8)])


def test_buffers_die_after_their_last_use() -> None:
    seen: list[int] = []
    made: list[weakref.ref[Any]] = []
    graph = plan(
        {"x": spec(8), "unused": spec(8)},
        [
            kernel("add", binary("add", 8), ("x", "x", "a"), spec(8)),
            kernel("mul", binary("mul", 8), ("a", "a", "b"), spec(8)),
            kernel("sub", binary("sub", 8), ("b", "b", "c"), spec(8)),
        ],
        (Ref("c"),),
    )
    call = call_of(graph)
    namespace = call.module.namespace

    def counting(*arguments: Any) -> torch.Tensor:
        gc.collect()
        seen.append(sum(ref() is not None for ref in made))
        tensor = torch.empty_strided(arguments[0], arguments[1], dtype=arguments[2])
        made.append(weakref.ref(tensor))
        return tensor

    namespace["empty"] = counting
    args = [torch.randn(8), torch.randn(8)]
    made += [weakref.ref(a) for a in args]
    call(args)
    # before a: x only (unused died at once); before b: a only; before c: b only
    assert seen == [1, 1, 1]


def test_a_view_keeps_its_storage_after_the_base_is_gone() -> None:
    graph = plan(
        {"x": spec(8)},
        [
            kernel("add", binary("add", 8), ("x", "x", "a"), spec(8)),
            ViewStep("tail", "a", spec(4), 4),
            kernel("mul", binary("mul", 8), ("x", "x", "b"), spec(8)),
        ],
        (Ref("tail"), Ref("b")),
    )
    assert "del a\n" in body(graph)
    x = torch.randn(8)
    tail, _ = agree(graph, [x])
    torch.testing.assert_close(tail, (x + x)[4:])


def dynamic() -> Plan:
    return plan(
        {"s0": None, "x": spec(S0, 4)},
        [
            kernel("add", binary("add", 4 * S0), ("x", "x", "a"), spec(S0, 4)),
            ViewStep("half", "a", spec(FloorDiv(S0, 2), 4), 4 * (S0 - FloorDiv(S0, 2))),
            mm("p", "half", "w", FloorDiv(S0, 2), 4),
        ],
        (Ref("p"), S0, 2 * S0 + 1),
    )


@pytest.mark.parametrize("size", [1, 2, 7, 33])
def test_dynamic_sizes(size: int) -> None:
    graph = dynamic()
    graph = plan({**dict(graph.inputs), "w": spec(4, 4)}, list(graph.steps), graph.outputs)
    found = agree(graph, [size, torch.randn(size, 4), torch.randn(4, 4)])
    assert found[1:] == [size, 2 * size + 1]


def test_a_size_no_input_names_is_read_off_a_shape() -> None:
    graph = plan(
        {"x": spec(S0, 4)},
        [kernel("add", binary("add", 4 * S0), ("x", "x", "a"), spec(S0, 4))],
        (Ref("a"),),
    )
    assert "s0 = x.shape[0]" in body(graph)
    agree(graph, [torch.randn(5, 4)])


def test_empty_tensors() -> None:
    graph = plan(
        {"x": spec(0)}, [kernel("add", binary("add", 0), ("x", "x", "a"), spec(0))], (Ref("a"),)
    )
    assert agree(graph, [torch.randn(0)])[0].shape == (0,)


def test_aten_arguments() -> None:
    graph = plan(
        {"x": spec(3, 5)},
        [
            AtenStep(
                "aten.topk.default",
                (Ref("x"), 2),
                (("largest", False),),
                (("v", spec(3, 2)), ("i", spec(3, 2, dtype=torch.int64))),
                True,
            ),
            AtenStep(
                "aten.cat.default", ([Ref("v"), Ref("v")], -1), (), (("c", spec(3, 4)),), False
            ),
            AtenStep(
                "aten.full.default",
                ([2, 2], float("-inf")),
                (("dtype", torch.float64), ("device", torch.device("cpu")), ("pin_memory", None)),
                (("f", spec(2, 2, dtype=torch.float64)),),
                False,
            ),
            AtenStep(
                "aten.max.dim",
                (Ref("x"), 1),
                (),
                ((None, None), ("where", spec(3, dtype=torch.int64))),
                True,
            ),
        ],
        (Ref("c"), Ref("i"), Ref("f"), Ref("where")),
    )
    agree(graph, [torch.randn(3, 5)])


def test_operators_of_ours_in_a_process_that_knows_none(tmp_path: Path) -> None:
    """As a module from the disk cache runs: nothing has registered them but the file itself."""
    step = AtenStep(
        "iocompiler.aligned_mm.default",
        (Ref("x"), Ref("w"), None, 8),
        (),
        (("y", TensorSpec((3, 5), (8, 1), torch.float32, "cpu")),),
        False,
    )
    graph = plan({"x": spec(3, 4), "w": spec(4, 5)}, [step], (Ref("y"),))
    (tmp_path / "graph.txt").write_text(emit_module(graph, "graph"))
    script = (
        "import torch\n"
        "from iocompiler.runtime.load import load_text\n"
        "call = load_text(open('graph.txt').read(), 'graph', 'cpu', lambda spec: None)\n"
        "x, w = torch.randn(3, 4), torch.randn(4, 5)\n"
        "torch.testing.assert_close(call([x, w])[0], x @ w)\n"
    )
    root = str(Path(__file__).parents[2])
    subprocess.run(
        [sys.executable, "-c", script],
        check=True, timeout=120, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip


def test_results_get_the_planned_strides() -> None:
    step = AtenStep(
        "aten.relu.default", (Ref("x"),), (), (("r", spec(3, 5, stride=(1, 3))),), False
    )
    graph = plan({"x": spec(3, 5)}, [step], (Ref("r"),))
    x = torch.randn(3, 5)
    torch.testing.assert_close(agree(graph, [x])[0], x.relu())


def test_inputs_written_in_place() -> None:
    copy = AtenStep("aten.copy_.default", (Ref("x"), Ref("a")), (), ((None, None),), False)
    graph = plan(
        {"x": spec(8)},
        [kernel("add", binary("add", 8), ("x", "x", "a"), spec(8)), copy],
        (Ref("a"),),
    )
    x = torch.arange(8.0)
    call_of(graph)([x])
    torch.testing.assert_close(x, 2 * torch.arange(8.0))


def test_constants_are_made_once_and_not_handed_out() -> None:
    steps = [
        ConstantStep("c", spec(4), (1.0, 2.0, float("inf"), -4.0)),
        kernel("mul", binary("mul", 4), ("x", "c", "out"), spec(4)),
        ConstantStep("d", spec(2, dtype=torch.int64), (3, 5)),
    ]
    graph = plan({"x": spec(4)}, steps, (Ref("out"), Ref("d")))
    call = call_of(graph)
    x = torch.ones(4)
    call([x])[1].zero_()
    out, d = call([x])
    assert out.tolist() == [1.0, 2.0, float("inf"), -4.0]
    assert d.tolist() == [3, 5]


def test_scalars_by_value() -> None:
    for factor in (2.5, torch.tensor(2.5)):
        given = spec() if isinstance(factor, torch.Tensor) else None
        graph = plan(
            {"x": spec(4), "factor": given},
            [kernel("scale", scaled(4), ("x", "factor", "out"), spec(4))],
            (Ref("out"),),
        )
        agree(graph, [torch.randn(4), factor])


def test_long_lines_are_broken() -> None:
    inputs = {f"input_{i}": spec(4) for i in range(40)}
    step = AtenStep("aten.cat.default", ([Ref(n) for n in inputs],), (), (("c", spec(160)),), False)
    many = kernel("add", binary("add", 160), ("c", "c", "out"), spec(160))
    graph = plan(inputs, [step, many], (Ref("out"), *(Ref(n) for n in list(inputs)[:20])))
    text = emit_module(graph, "graph")
    assert max(len(line) for line in text.splitlines()) <= 100
    agree(graph, [torch.randn(4) for _ in inputs])


def test_names_that_are_taken() -> None:
    names = {"stream": spec(4), "torch": spec(4), "empty": spec(4), "run_add": spec(4)}
    graph = plan(
        names,
        [
            kernel("add", binary("add", 4), ("stream", "torch", "args"), spec(4)),
            kernel("add", binary("add", 4), ("args", "empty", "b"), spec(4)),
            kernel("add", binary("add", 4), ("b", "run_add", "class"), spec(4)),
        ],
        (Ref("class"),),
    )
    agree(graph, [torch.randn(4) for _ in names])


def test_boxed_and_attributes() -> None:
    call = call_of(chain())
    assert call._boxed_call
    assert Path(call.path).read_text() == call.source
    assert call.resources == {}


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (7, "7"),
        (S0, "s0"),
        (2 * S0 + 1, None),
        (FloorDiv(S0, 3) * 5, None),
        (sympy.ceiling(S0 / 128), None),
        (sympy.ceiling((S0 + 3) / 7) * S0, None),
        (sympy.floor((S0 + 63) / 64) * sympy.floor((S0 + 15) / 16), None),
        (5 * sympy.ceiling(S0 / 64) * sympy.ceiling(S0 / 3) - sympy.floor(S0 / 7), None),
        (sympy.floor(S0 / 3) + 1, None),
        (S0 * (S0 + 1) / 2, None),
        (sympy.Max(S0, 4), None),
        (-S0, None),
    ],
)
def test_sizes_as_text(size: Any, text: str | None) -> None:
    if text is not None:
        assert size_text(size) == text
    for value in (1, 2, 7, 128, 2**40 + 1):
        expected = size if isinstance(size, int) else int(size.subs({S0: value}))
        found = eval(size_text(size), {"s0": value})
        assert found == expected
        assert isinstance(found, int)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((), "[]"),
        ((1, 2), "[1, 2]"),
        ((float("nan"), -0.0), '[float("nan"), -0.0]'),
        ((0.5,) * 20, "[0.5] * 20"),
        (tuple(range(3, 40)), "list(range(3, 40))"),
        ((0.0,) * 10 + (-0.0,), f"[{'0.0, ' * 10}-0.0]"),
        ((True,) * 9, "[True] * 9"),
    ],
)
def test_elements_as_text(values: Any, text: str) -> None:
    assert elements_text(values) == text


def test_arguments_that_cannot_be_written() -> None:
    with pytest.raises(TypeError, match="Generator"):
        argument_text(torch.Generator(), {})


def test_a_bound_on_registers_reaches_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    bounded = chain().steps[0]
    assert isinstance(bounded, KernelStep)
    bounded = replace(bounded, schedule=replace(bounded.schedule, registers=48))
    text = emit_module(replace(chain(), steps=(bounded, *chain().steps[1:])), "graph")
    assert text.count("registers=") == 1
    jobs: list[Job] = []

    def compiled(wanted: dict[str, Job], cache: Any) -> dict[str, Any]:
        jobs.extend(wanted.values())
        return dict.fromkeys(wanted)

    monkeypatch.setattr(module, "compiled_images", compiled)
    loaded = module.Module(module_file(text, "graph"))
    loaded.execute()
    loaded.compile(90)
    assert {job.name: job.registers for job in jobs} == {"add": 48, "scale": 0}
