"""Products that a library makes of addresses, as modules have them: their text, and the text itself
run on the CPU.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

import iocompiler as ioc
from iocompiler.codegen.module import emit_module
from iocompiler.plan.addressed import addressed
from iocompiler.plan.build import size_hints
from iocompiler.plan.data import AtenStep, Plan, Ref, Step, TensorSpec, ViewStep
from iocompiler.plan.memory import shared_memory
from iocompiler.plan.place import Place
from iocompiler.report.build import Part, build_report
from iocompiler.runtime.load import load_text
from iocompiler.runtime.reference import run_plan
from iocompiler.tile.index import Size
from tests.accuracy import assert_near_exact
from tests.compiling import compiler
from tests.plan.graphs import H200
from tests.runtime.plans import S0, binary, interpreter, kernel, on_a_gpu, plan, spec

BF16 = torch.bfloat16


def half(*shape: Size, stride: tuple[Size, ...] | None = None) -> TensorSpec:
    return spec(*shape, stride=stride, dtype=BF16)


def product(target: str, out: str, *read: str, of: TensorSpec, where: str = "") -> AtenStep:
    args = tuple(map(Ref, read))
    return AtenStep(f"aten.{target}.default", args, (), ((out, of),), False, out, where)


def settled(graph: Plan, hints: dict[str, int] | None = None) -> Plan:
    """The plan as it would run on a GPU."""
    return shared_memory(addressed(on_a_gpu(replace(graph, placed=()))), hints or {})


def run_of(graph: Plan) -> Callable[[list[Any]], list[Any]]:
    """The module of a plan for a GPU, on the CPU."""
    return load_text(emit_module(graph, "graph"), "graph", "cpu", interpreter(graph))


def body(text: str) -> str:
    return text[text.index("def call") : text.index("def example_inputs")].rstrip() + "\n"


def chain() -> Plan:
    """Both operands of products are views that nobody else reads; the second takes the memory of
    the kernel's result, and its first operand begins within the first's.
    """
    return plan(
        {"x": half(4, 8), "w": half(8, 8), "c": half(8)},
        [
            kernel("add", binary("add", 32, BF16), ("x", "x", "twice"), half(4, 8), "model.py:7"),
            ViewStep("wt", "w", half(8, 8, stride=(1, 8))),
            product("addmm", "y", "c", "twice", "wt", of=half(4, 8), where="model.py:8"),
            ViewStep("rows", "y", half(2, 8), 16),
            product("mm", "z", "rows", "w", of=half(2, 8)),
            kernel("add_1", binary("add", 16, BF16), ("z", "z", "out"), half(2, 8)),
        ],
        (Ref("out"),),
    )


def test_text() -> None:
    text = emit_module(settled(chain()), "graph")
    assert body(text) == textwrap.dedent(
        """\
        def call(args):
            x, w, c = args
            args.clear()
            stream = current_stream()
            # model.py:7
            twice = empty((4, 8), (8, 1), torch.bfloat16)
            run_add(stream, 1, 1, 1, x.data_ptr(), x.data_ptr(), twice.data_ptr())
            del x
            # model.py:8
            y = empty((4, 8), (8, 1), torch.bfloat16)
            run_addmm(stream, (), twice.data_ptr(), w.data_ptr(), y.data_ptr(), c.data_ptr())
            del c, twice
            z = empty((2, 8), (8, 1), torch.bfloat16)
            run_mm(stream, (), y.data_ptr() + 32, w.data_ptr(), z.data_ptr())
            del w, y
            out = empty((2, 8), (8, 1), torch.bfloat16)
            run_add_1(stream, 1, 1, 1, z.data_ptr(), z.data_ptr(), out.data_ptr())
            del z
            return [out]
        """
    )
    assert "2 launches, 0 aten calls, 2 products of a library on cuda:0." in text
    assert "from iocompiler.ops.library_product import Problem\n" in text
    registered = """\
        run_addmm = module.product(
            lambda: Problem(
                batch=1, m=4, n=8, k=8, dtype=torch.bfloat16,
                a=(0, 8, 1), b=(0, 1, 8), out=(0, 8, 1), added=(0, 0, 1),
            ),
        )
        """
    assert textwrap.dedent(registered) in text
    compile(text, "graph.py", "exec")


def agree(graph: Plan, *args: Any, hints: dict[str, int] | None = None) -> None:
    """The module's outputs are those of the reference, rounded alike."""
    (expected,) = run_plan(graph, [*args])
    (found,) = run_of(settled(graph, hints))([*args])
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected)


def test_runs_as_the_reference() -> None:
    agree(chain(), *(torch.randn(*shape).to(BF16) for shape in ((4, 8), (8, 8), (8,))))


def test_a_plan_for_the_cpu_calls_aten() -> None:
    graph = chain()
    text = emit_module(addressed(graph), "graph")
    assert "torch.addmm(c, twice, wt, out=" in text
    assert "products" not in text


def test_equal_products_are_registered_once() -> None:
    square = half(8, 8)
    steps: list[Step] = [product("mm", "y", "x", "w", of=square)]
    steps += [ViewStep("yt", "y", half(8, 8, stride=(1, 8)))]
    steps += [product("mm", "z", "y", "w", of=square), product("mm", "out", "yt", "z", of=square)]
    graph = plan({"x": square, "w": square}, steps, (Ref("out"),))
    text = emit_module(settled(graph), "graph")
    assert text.count("module.product(") == 2
    assert text.count("run_mm(stream") == 2
    assert text.count("run_mm_2(stream") == 1
    agree(graph, *(torch.randn(8, 8).to(BF16) for _ in range(2)))


def test_memory_of_another_dtype_and_shape_is_taken_without_a_view() -> None:
    """A product's result, like a kernel's, is an address."""
    words = spec(32)
    steps: list[Step] = [
        kernel("add", binary("add", 32), ("x", "x", "a"), words),
        kernel("add_1", binary("add", 32), ("a", "a", "b"), words),
        product("mm", "y", "w", "w", of=half(8, 8)),
        product("mm", "z", "y", "w", of=half(8, 8)),
        kernel("add_2", binary("add", 32), ("b", "b", "c"), words),
        product("mm", "out", "z", "w", of=half(8, 8)),
    ]
    graph = plan({"x": words, "w": half(8, 8)}, steps, (Ref("c"), Ref("out")))
    found = settled(graph)
    assert dict(found.placed)["y"] == Place("a")
    text = body(emit_module(found, "graph"))
    assert "    y = a\n" in text
    assert "reinterpret" not in text
    x, w = torch.randn(32), torch.randn(8, 8).to(BF16)
    for ours, theirs in zip(run_of(found)([x, w]), run_plan(graph, [x, w]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_result_lies_in_memory_of_its_operands() -> None:
    steps: list[Step] = [
        product("mm", f"y{i + 1}", f"y{i}", f"y{i}", of=half(8, 8)) for i in range(6)
    ]
    graph = plan({"y0": half(8, 8)}, steps, (Ref("y6"),))
    found = settled(graph)
    assert found.placed
    memory = {name: name for name in (f"y{i}" for i in range(7))}
    for name, place in found.placed:
        memory[name] = memory[place.root]
    assert all(memory[f"y{i}"] != memory[f"y{i + 1}"] for i in range(6))
    agree(graph, torch.randn(8, 8).to(BF16) / 3)


def test_a_product_stored_in_float32() -> None:
    """It may lie where something of as many bytes died."""
    wide = spec(8, 8, dtype=torch.float32)
    call = AtenStep(
        "iocompiler.wide_product.default", (Ref("y"), Ref("v")), (), (("z", wide),), False, "z"
    )
    steps: list[Step] = [
        kernel("add", binary("add", 128, BF16), ("x", "x", "twice"), half(8, 16)),
        product("mm", "y", "twice", "w", of=half(8, 8)),
        call,
        kernel("add_1", binary("add", 64, torch.float32), ("z", "z", "out"), wide),
    ]
    given = {"x": half(8, 16), "w": half(16, 8), "v": half(8, 8)}
    graph = plan(given, steps, (Ref("out"),))
    found = settled(graph)
    assert dict(found.placed)["z"] == Place("twice")
    text = emit_module(found, "graph")
    assert "run_wide_product(stream, (), y.data_ptr(), v.data_ptr(), z.data_ptr())" in text
    assert "b=(0, 8, 1), out=(0, 8, 1), stored=torch.float32,\n" in text
    assert "2 launches, 0 aten calls, 2 products of a library on cuda:0." in text
    agree(graph, *(torch.randn(*s.shape).to(BF16) for s in given.values()))


@pytest.mark.parametrize("bias", [True, False])
def test_a_gelu_beside_its_product(bias: bool) -> None:
    """Its results are ours to allocate, and may lie where something died."""
    square = half(8, 8)
    both = (("z", square), ("y", square))
    args = (Ref("c") if bias else None, Ref("twice"), Ref("w"))
    steps: list[Step] = [
        kernel("add", binary("add", 64, BF16), ("x", "x", "twice"), square),
        AtenStep("iocompiler.addmm_gelu.default", args, (), both, True, "y", "model.py:8"),
        product("mm", "u", "z", "y", of=square),
        kernel("add_1", binary("add", 64, BF16), ("u", "y", "out"), square),
    ]
    graph = plan({"x": square, "w": square, "c": half(8)}, steps, (Ref("out"),))
    found = settled(graph)
    assert dict(found.placed)["u"] == Place("twice")
    text = emit_module(found, "graph")
    added = ", c.data_ptr()" if bias else ""
    launch = f"twice.data_ptr(), w.data_ptr(), z.data_ptr(){added}, sums=y.data_ptr())"
    assert f" run_addmm_gelu(stream, (), {launch} del " in " ".join(text.split())
    for name in "zy":
        assert f"    {name} = empty((8, 8), (8, 1), torch.bfloat16)\n" in text
    assert 'sums=(0, 8, 1), activation="gelu",\n' in text
    assert "2 launches, 0 aten calls, 2 products of a library on cuda:0." in text
    agree(graph, *(torch.randn(*shape).to(BF16) for shape in ((8, 8), (8, 8), (8,))))


@pytest.mark.parametrize("rows", [5, 0])
def test_a_gelu_of_any_number_of_rows(rows: int) -> None:
    shown = half(S0, 8)
    args = (Ref("c"), Ref("x"), Ref("w"))
    both = (("z", shown), ("y", shown))
    steps = [AtenStep("iocompiler.addmm_gelu.default", args, (), both, True)]
    graph = plan({"x": half(S0, 8), "w": half(8, 8), "c": half(8)}, steps, (Ref("z"), Ref("y")))
    text = emit_module(settled(graph, {"s0": 5}), "graph")
    assert "run_addmm_gelu(stream, (s0,), " in text
    given = [torch.randn(*shape).to(BF16) for shape in ((rows, 8), (8, 8), (8,))]
    for ours, theirs in zip(
        run_of(settled(graph, {"s0": 5}))([*given]), run_plan(graph, given), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("gelu", [True, False])
def test_an_activation_alone(gelu: bool) -> None:
    square = half(8, 8)
    args, kwargs = (Ref("c"), Ref("x"), Ref("w")), (("use_gelu", gelu),)
    step = AtenStep("aten._addmm_activation.default", args, kwargs, (("z", square),), False)
    graph = plan({"x": square, "w": square, "c": half(8)}, [step], (Ref("z"),))
    text = emit_module(settled(graph), "graph")
    assert f'activation="{"gelu" if gelu else "relu"}",\n' in text
    assert "0 aten calls, 1 products of a library" in text
    x, w, c = (torch.randn(*shape).to(BF16) for shape in ((8, 8), (8, 8), (8,)))
    (found,) = run_of(settled(graph))([x, w, c])
    sums = torch.addmm(c, x, w)
    # on a CPU the operator's GELU is the exact one; on a GPU it is that by tanh, which is asked for
    expected = torch.nn.functional.gelu(sums, approximate="tanh") if gelu else sums.relu()
    torch.testing.assert_close(found, expected)


def test_what_is_no_gelu_by_address_is_a_call() -> None:
    """A matrix that is added, and results of which one is not read."""
    square = half(8, 8)
    for args, both in (
        (("x", "x", "w"), (("z", square), ("y", square))),
        (("c", "x", "w"), (("z", square), (None, None))),
        (("c", "x", "w"), ((None, None), ("z", square))),
    ):
        step = AtenStep("iocompiler.addmm_gelu.default", tuple(map(Ref, args)), (), both, True)
        graph = plan({"x": square, "w": square, "c": half(8)}, [step], (Ref("z"),))
        text = emit_module(settled(graph), "graph")
        assert 'addmm_gelu = function("addmm_gelu")' in text
        assert "module.product(" not in text
        agree(graph, *(torch.randn(*shape).to(BF16) for shape in ((8, 8), (8, 8), (8,))))


@pytest.mark.parametrize(("rows", "size"), [(5, 5), (1, 1), (5, S0), (1, S0), (0, S0)])
def test_a_matrix_and_a_bias(rows: int, size: Size) -> None:
    """Both by their addresses."""
    step = AtenStep(
        "iocompiler.biased_addmm.default", tuple(map(Ref, "rcxw")), (),
        (("y", half(size, 8)),), False,
    )  # fmt: skip
    given = {"x": half(size, 8), "w": half(8, 8), "c": half(8), "r": half(size, 8)}
    graph = plan(given, [step], (Ref("y"),))
    text = emit_module(settled(graph, {"s0": 5}), "graph")
    sizes = "(s0,)" if size == S0 else "()"
    addresses = ", ".join(f"{name}.data_ptr()" for name in "xwyrc")
    one_line = " ".join(text.split()).replace("( ", "(").replace(", )", ")")
    assert f"run_biased_addmm(stream, {sizes}, {addresses})" in one_line
    assert "bias=True,\n" in text
    tensors = (torch.randn(*shape).to(BF16) for shape in ((rows, 8), (8, 8), (8,), (rows, 8)))
    agree(graph, *tensors, hints={"s0": 5})


@pytest.mark.parametrize("read", ["crxw", "rrxw", "ccxw"])
def test_a_matrix_and_a_bias_in_other_forms_are_aten_s(read: str) -> None:
    """Which our operator then is, in memory of its own."""
    of = (("y", half(4, 8)),)
    step = AtenStep("iocompiler.biased_addmm.default", tuple(map(Ref, read)), (), of, False)
    given = {"x": half(4, 8), "w": half(8, 8), "c": half(8), "r": half(4, 8)}
    graph = plan(given, [step], (Ref("y"),))
    assert "products" not in emit_module(settled(graph), "graph")
    agree(graph, *(torch.randn(*shape).to(BF16) for shape in ((4, 8), (8, 8), (8,), (4, 8))))


def test_what_aten_reads_too_is_a_tensor() -> None:
    turned = half(8, 4, stride=(1, 8))
    steps: list[Step] = [
        ViewStep("xt", "x", turned),
        product("mm", "y", "xt", "x", of=half(8, 8)),
        AtenStep("aten.sin.default", (Ref("xt"),), (), (("z", turned),), False),
        AtenStep("aten.mm.default", (Ref("z"), Ref("x")), (), (("u", half(8, 8)),), False),
        AtenStep("aten.add.Tensor", (Ref("u"), Ref("y")), (), (("out", half(8, 8)),), False),
    ]
    graph = plan({"x": half(4, 8)}, steps, (Ref("out"),))
    text = body(emit_module(settled(graph), "graph"))
    assert "xt = reinterpret(x, (8, 4), (1, 8), 0)" in text
    assert "xt.data_ptr()" in text
    agree(graph, torch.randn(4, 8).to(BF16))


@pytest.mark.parametrize("rows", [5, 0])
def test_sizes_that_are_not_known(rows: int) -> None:
    steps: list[Step] = [
        ViewStep("xt", "x", half(8, S0, stride=(1, 8))),
        product("mm", "y", "xt", "x", of=half(8, 8)),
        product("addmm", "out", "c", "x", "y", of=half(S0, 8)),
    ]
    graph = plan({"x": half(S0, 8), "c": half(8)}, steps, (Ref("out"),))
    text = emit_module(settled(graph, {"s0": 5}), "graph")
    assert "    lambda s0: Problem(\n        batch=1, m=8, n=8, k=s0, dtype=torch.bfloat16," in text
    assert "run_mm(stream, (s0,), x.data_ptr(), x.data_ptr(), y.data_ptr())" in text
    agree(graph, torch.randn(rows, 8).to(BF16), torch.randn(8).to(BF16), hints={"s0": 5})


def test_an_empty_sum_is_what_is_added() -> None:
    steps: list[Step] = [product("mm", "y", "x", "w", of=half(4, 8))]
    graph = plan({"x": half(4, S0), "w": half(S0, 8)}, steps, (Ref("y"),))
    agree(graph, torch.randn(4, 0).to(BF16), torch.randn(0, 8).to(BF16), hints={"s0": 5})


def test_constants_and_inputs_are_read_where_they_lie() -> None:
    graph = plan(
        {"x": half(4, 8)},
        [
            ViewStep("xt", "x", half(8, 4, stride=(1, 8))),
            product("bmm", "y", "x3", "xt3", of=half(1, 4, 4)),
        ],
        (Ref("y"),),
    )
    views = (
        ViewStep("x3", "x", half(1, 4, 8)),
        ViewStep("xt3", "xt", half(1, 8, 4, stride=(32, 1, 8))),
    )
    graph = replace(graph, steps=(graph.steps[0], *views, graph.steps[1]))
    text = body(emit_module(settled(graph), "graph"))
    assert "run_bmm(stream, (), x.data_ptr(), x.data_ptr(), y.data_ptr())" in text
    agree(graph, torch.randn(4, 8).to(BF16))


def test_a_report_counts_them_as_the_calls_they_are() -> None:
    marked, plain = settled(chain()), on_a_gpu(chain())
    ours, theirs = (build_report([Part("forward", p, {})], H200).kernels for p in (marked, plain))
    calls = [k for k in ours if k.name.startswith("aten.")]
    assert [k.name for k in calls] == ["aten.addmm.default", "aten.mm.default"]
    assert [replace(k, source="") for k in ours] == [replace(k, source="") for k in theirs]
    assert all(k.source.endswith(", by addresses") for k in calls)


# --- whole programs


class Addressed:
    """``Compiler(engine=Addressed())``: plans as they would be for a GPU, their text on the CPU."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, graph: Plan, gm: GraphModule) -> Callable[[list[Any]], list[Any]]:
        found = settled(graph, size_hints(gm))
        run = run_of(found)
        self.texts.append(emit_module(found, "graph"))
        return run


def layer(x: Tensor, w: Tensor, v: Tensor, c: Tensor) -> Tensor:
    return x + F.gelu(F.linear(x, w, c)) @ v


def heads(x: Tensor, w: Tensor, v: Tensor, c: Tensor) -> Tensor:
    q = F.linear(x, w, c).unflatten(-1, (2, -1)).transpose(-3, -2)
    return (q @ q.mT).relu() @ q


def halves(x: Tensor, w: Tensor, v: Tensor, c: Tensor) -> Tensor:
    a, b = F.linear(x, w, c).chunk(2, -1)
    return a @ v[: v.shape[0] // 2] + b.sin() @ v[v.shape[0] // 2 :]


def branch(x: Tensor, w: Tensor, v: Tensor, c: Tensor) -> Tensor:
    y = x @ v
    return torch.cond(y.sum() > 0, lambda y: y @ y, lambda y: (y @ y).sin(), (y,))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("f", [layer, heads, halves])
def test_training(f: Callable[..., Tensor], dynamic: bool) -> None:
    torch.manual_seed(0)
    given = [torch.randn(s).to(BF16) for s in ((3, 5, 8), (8, 8), (8, 8), (8,))]
    engine = Addressed()
    run = compiler([], engine=engine, cache=False)(f)

    def step(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in given]
        if dynamic:
            for dim in (0, 1):
                torch._dynamo.mark_dynamic(leaves[0], dim)
        out = function(*leaves)
        out.float().square().sum().backward()
        return [out, *(x.grad for x in leaves if x.grad is not None)]

    ours, eager, exact = step(run, BF16), step(f, BF16), step(f, torch.float64)
    assert_near_exact(ours, eager, exact, BF16)
    assert len(engine.texts) == 2
    assert all("module.product(" in text for text in engine.texts)
    assert all("    lambda s" in text for text in engine.texts) == dynamic
    assert not any("torch.mm(" in text or "torch.addmm(" in text for text in engine.texts)


def test_functions_of_operators_call_aten() -> None:
    given = [torch.randn(s).to(BF16) for s in ((8, 8), (8, 8), (8, 8), (8,))]
    engine = Addressed()
    with torch.no_grad():
        found = compiler([], engine=engine, cache=False)(branch)(*given)
    assert_near_exact([found], [branch(*given)], [branch(*(x.double() for x in given))], BF16)
    (text,) = engine.texts
    assert text.count("module.product(") == 1
    assert text.count("= torch.mm(") == 2


def test_explained_for_a_gpu() -> None:
    """What is planned for a GPU that is not here has them, in bfloat16, and in float32 not."""
    for dtype, kind in ((BF16, True), (torch.float32, False)):
        model = torch.nn.Linear(64, 64).to(dtype)
        report = ioc.explain(model, torch.randn(32, 64, dtype=dtype), device="h100", training=True)
        calls = [k for k in report.kernels if k.name.startswith("aten.")]
        assert calls
        assert all(k.source.endswith("by addresses") == kind for k in calls)
