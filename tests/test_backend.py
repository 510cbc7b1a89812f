"""The walk on the CPU: with plain aten, with Inductor's C++, and when something fails."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import iocompiler as ioc
from iocompiler.compilation import Compilation
from iocompiler.graph import view

aten = torch.ops.aten


@ioc.rewrite(lambda x: aten.relu.default(aten.relu.default(x)))
def relu_of_relu(x: Any) -> Any:
    return aten.relu.default(x)


@ioc.graph_pass
def raises(gm: GraphModule) -> int:
    raise ZeroDivisionError("of course")


def _compiled(
    f: Callable[..., Any], pipeline: ioc.Pipeline = ioc.DEFAULT, **options: Any
) -> tuple[Callable[..., Any], list[Compilation]]:
    """``f`` compiled strictly on plain aten, unless told otherwise; the record of its graphs."""
    records: list[Compilation] = []
    dynamic = options.pop("dynamic", None)
    options = {"engine": "aten", "strict": True, **options}
    backend = ioc.Compiler(pipeline, on_compiled=records.append, **options)
    return torch.compile(f, backend=backend, dynamic=dynamic), records


def _check(f: Callable[..., Any], *inputs: torch.Tensor, **options: Any) -> list[Compilation]:
    """Results, gradients and mutated inputs equal eager's."""
    ours, theirs = ([_copy(x) for x in inputs] for _ in range(2))
    compiled, records = _compiled(f, **options)
    torch.manual_seed(1)
    result = compiled(*ours)
    torch.manual_seed(1)
    expected = f(*theirs)
    torch.testing.assert_close(result, expected)
    if expected.requires_grad:
        result.sum().backward()
        expected.sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(one.grad, other.grad)
    return records


def _copy(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def _grad(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def test_the_entry_point_needs_no_import() -> None:
    code = (
        "import sys, torch\n"
        "f = torch.compile(lambda x: x.sin() + 1,"
        " backend='iocompiler', options={'engine': 'aten'})\n"
        "x = torch.randn(3)\n"
        "assert torch.allclose(f(x), x.sin() + 1)\n"
        "assert 'iocompiler' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_forward_and_backward() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
    records = _check(lambda x: model(x).pow(2).sum(), _grad(3, 4))
    assert len(records) == 1
    assert records[0].graph is not None


def test_parameters_get_gradients() -> None:
    model = torch.nn.Linear(4, 4)
    compiled, _ = _compiled(model)
    compiled(torch.ones(2, 4)).sum().backward()
    torch.testing.assert_close(model.bias.grad, torch.full((4,), 2.0))


def test_buffers_are_updated() -> None:
    model = torch.nn.BatchNorm1d(4)
    other = torch.nn.BatchNorm1d(4)
    x = torch.randn(8, 4)
    compiled, _ = _compiled(model)
    torch.testing.assert_close(compiled(x), other(x))
    torch.testing.assert_close(model.running_mean, other.running_mean)
    assert model.num_batches_tracked == 1


def test_mutation_of_an_input() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        return x + 1

    _check(f, torch.randn(3))


def test_mutation_through_a_view() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        x[1:].add_(1)
        return x.view(-1) * 2

    _check(f, torch.randn(3, 2))


def test_outputs_that_are_views_and_inputs() -> None:
    compiled, _ = _compiled(lambda x: (x, x.t(), x[0]))
    x = torch.randn(2, 3)
    same, transposed, row = compiled(x)
    assert same is x
    assert transposed.data_ptr() == row.data_ptr() == x.data_ptr()


def test_in_place_operators_on_temporaries() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.add_(1).mul_(3)
        y += x
        y.relu_()
        return y.sum()

    _check(f, _grad(5))


def test_no_grad_inside() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = x.exp().sum()
        return (x * scale).sum()

    _check(f, _grad(4))


def test_autocast_inside_and_around() -> None:
    linear = torch.nn.Linear(4, 4)

    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = linear(x).float() + linear(x)
        return (h * x).sum()

    _check(f, _grad(3, 4))

    def g(x: torch.Tensor) -> torch.Tensor:
        return linear(linear(x).relu())

    compiled, _ = _compiled(g)
    x = torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, expected = compiled(x), g(x)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected)


def test_dropout_repeats_under_a_seed() -> None:
    compiled, _ = _compiled(lambda x: torch.nn.functional.dropout(x, 0.5))
    x = torch.ones(1000)
    torch.manual_seed(3)
    first = compiled(x)
    torch.manual_seed(3)
    assert torch.equal(compiled(x), first)
    assert not torch.equal(compiled(x), first)
    assert 300 < int((first == 0).sum()) < 700


def test_checkpointed_regions() -> None:
    linear = torch.nn.Linear(4, 4)

    def block(x: torch.Tensor) -> torch.Tensor:
        return linear(x).sin()

    _check(lambda x: checkpoint(block, x, use_reentrant=False).sum(), _grad(3, 4))


def test_custom_autograd_functions() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * 5

    compiled, _ = _compiled(lambda x: Twice.apply(x).sum())
    x = _grad(3)
    compiled(x).backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 5.0))


def test_dynamic_sizes_do_not_recompile() -> None:
    linear = torch.nn.Linear(4, 4)

    def f(x: torch.Tensor) -> torch.Tensor:
        return (linear(x).reshape(-1, 2) * x.shape[0]).softmax(-1).sum()

    compiled, records = _compiled(f, dynamic=True)
    for rows in (3, 6, 11):
        x = _grad(rows, 4)
        y = _copy(x)
        compiled(x).backward()
        f(y).backward()
        torch.testing.assert_close(x.grad, y.grad)
    assert len(records) == 1


def test_a_graph_break_gives_two_graphs() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        return y.cos().sum()

    assert len(_check(f, _grad(3))) == 2


def test_rewrites_are_recorded() -> None:
    pipeline = ioc.DEFAULT.after("normalise", relu_of_relu)
    records = _check(lambda x: x.relu().relu().sum(), _grad(3), pipeline=pipeline)
    (found,) = records[0].rewrites
    assert found.pattern == "relu_of_relu"
    assert found.where.startswith("test_backend.py:")
    assert records[0].changed == 1


def test_the_callback_gets_the_table_of_passes() -> None:
    records = _check(lambda x: x.sin(), torch.randn(3))
    assert records[0].passes is not None
    assert [row[0] for row in records[0].passes.rows] == [
        "capture",
        *ioc.DEFAULT.stage("graph").names,
    ]


def test_dump(tmp_path: Path) -> None:
    _check(lambda x: x.view(3).sin(), torch.randn(3), dump=str(tmp_path))
    assert (tmp_path / "00_capture.txt").exists()
    assert (tmp_path / "summary.txt").exists()


def test_options_of_torch_compile_override() -> None:
    f = torch.compile(lambda x: x + 1, backend=ioc.Compiler(), options={"enginee": "aten"})
    with pytest.raises(Exception, match=r"unknown option 'enginee' \(did you mean 'engine'\?\)"):
        f(torch.randn(2))


def test_a_pass_that_raises_does_not_break_the_program() -> None:
    pipeline = ioc.DEFAULT.after("normalise", raises)
    with pytest.warns(
        ioc.FallbackWarning, match=r"ZeroDivisionError: of course \(in pass 'raises'"
    ):
        records = _check(lambda x: x.sin().sum(), _grad(3), pipeline=pipeline, strict=False)
    assert records[0].fallbacks[0].region == "rewriting"
    assert records[0].graph is None


def test_strict_raises_instead() -> None:
    compiled, _ = _compiled(lambda x: x.sin(), ioc.DEFAULT.after("normalise", raises))
    with pytest.raises(Exception, match="strict: rewriting failed: ZeroDivisionError: of course"):
        compiled(torch.randn(3))


def test_an_engine_that_fails_runs_on_aten_with_one_warning_each() -> None:
    def engine(plan: Any, gm: GraphModule) -> Any:
        raise RuntimeError("no such engine")

    pytest.importorskip("iocompiler.plan.build")
    with pytest.warns(
        ioc.FallbackWarning, match="forward failed, the graph runs on aten"
    ) as caught:
        records = _check(lambda x: x.sin().sum(), _grad(3), engine=engine, strict=False)
    assert [f.region for f in records[0].fallbacks] == ["forward", "backward"]
    assert len([w for w in caught if issubclass(w.category, ioc.FallbackWarning)]) == 2


def test_a_pass_on_the_flat_graphs_sees_forward_and_backward() -> None:
    seen: list[list[Any]] = []

    @ioc.graph_pass(stage="flat")
    def look(gm: GraphModule) -> int:
        seen.append([node.target for node in view.calls(gm)])
        return 0

    def engine(plan: Any, gm: GraphModule) -> Callable[[list[Any]], Any]:
        return lambda args: torch.fx.Interpreter(gm).boxed_run(args)

    pipeline = ioc.DEFAULT.after("normalise", look)
    _check(lambda x: x.sin().sum(), _grad(3), pipeline=pipeline, engine=engine)
    assert aten.sin.default in seen[0]
    assert aten.cos.default in seen[1]


@pytest.mark.slow
def test_inductor_on_the_cpu() -> None:
    records = _check(lambda x: x.sin().sum(), _grad(3), engine="auto")
    assert records[0].fallbacks == []
    pipeline = ioc.DEFAULT.after("normalise", relu_of_relu)
    records = _check(lambda x: x.relu().relu().sum(), _grad(3), pipeline=pipeline, engine="auto")
    assert records[0].changed == 1


def test_no_compiler_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.warns(ioc.FallbackWarning, match="InvalidCxxCompiler") as caught:
        _check(lambda x: x.sin().sum(), _grad(3), engine="auto", strict=False)
    assert len([w for w in caught if issubclass(w.category, ioc.FallbackWarning)]) == 1


def test_compile_scopes_dynamos_settings() -> None:
    def expert(x: torch.Tensor) -> torch.Tensor:
        (chosen,) = torch.where(x > 0)
        return x[chosen] * 2

    records: list[Compilation] = []
    f = ioc.compile(expert, engine="aten", on_compiled=records.append)
    x = torch.randn(8)
    assert torch.equal(f(x), expert(x))
    assert len(records) == 1
    assert not torch._dynamo.config.capture_dynamic_output_shape_ops


def test_compile_keeps_a_module_a_module() -> None:
    model = torch.nn.Linear(3, 3)
    compiled = ioc.compile(model, engine="aten")
    assert isinstance(compiled, torch.nn.Module)
    assert [id(p) for p in compiled.parameters()] == [id(p) for p in model.parameters()]
    torch.testing.assert_close(compiled(torch.ones(2, 3)), model(torch.ones(2, 3)))


def test_importing_changes_no_setting() -> None:
    code = (
        "import torch, torch._dynamo, torch._inductor.config\n"
        "def settings():\n"
        "    return {**torch._dynamo.config.get_config_copy(),"
        " **torch._inductor.config.get_config_copy()}\n"
        "before = settings()\n"
        "import iocompiler\n"
        "assert settings() == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
