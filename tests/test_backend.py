"""The walk on the CPU: with plain aten, with Inductor's C++, and when something fails."""

from __future__ import annotations

import logging
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
from tests.compiling import check, compiled, grad

aten = torch.ops.aten
logger = logging.getLogger("a.library")


@ioc.rewrite(lambda x: aten.relu.default(aten.relu.default(x)))
def relu_of_relu(x: Any) -> Any:
    return aten.relu.default(x)


@ioc.graph_pass
def raises(gm: GraphModule) -> int:
    raise ZeroDivisionError("of course")


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


def test_rewrites_are_recorded() -> None:
    pipeline = ioc.DEFAULT.after("normalise", relu_of_relu)
    records = check(lambda x: x.relu().relu().sum(), grad(3), pipeline=pipeline)
    (found,) = records[0].rewrites
    assert found.pattern == "relu_of_relu"
    assert found.where.startswith("test_backend.py:")
    assert records[0].changed == 1


def test_rewrites_inside_a_checkpointed_region() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = checkpoint(lambda t: (t @ t).relu().relu(), x, use_reentrant=False)
        return y.float().sum()

    pipeline = ioc.DEFAULT.after("normalise", relu_of_relu)
    records = check(f, grad(3, 3), pipeline=pipeline)
    assert [found.pattern for found in records[0].rewrites] == ["relu_of_relu"]


def test_the_callback_gets_the_table_of_passes() -> None:
    records = check(lambda x: x.sin(), torch.randn(3))
    assert records[0].passes is not None
    assert [row[0] for row in records[0].passes.rows] == [
        "capture",
        *ioc.DEFAULT.stage("graph").names,
    ]


def test_dump(tmp_path: Path) -> None:
    check(lambda x: x.view(3).sin(), torch.randn(3), dump=str(tmp_path))
    assert (tmp_path / "00_capture.txt").exists()
    assert (tmp_path / "summary.txt").exists()


def test_dump_of_several_graphs(tmp_path: Path) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        return y.cos()

    check(f, torch.randn(3), dump=str(tmp_path), engine="reference")
    assert "sin" in (tmp_path / "00_capture.txt").read_text()
    assert "cos" in (tmp_path / "graph_1" / "00_capture.txt").read_text()
    assert "aten.cos" in (tmp_path / "graph_1" / "inference.txt").read_text()


def test_options_of_torch_compile_override() -> None:
    f = torch.compile(lambda x: x + 1, backend=ioc.Compiler(), options={"enginee": "aten"})
    with pytest.raises(Exception, match=r"unknown option 'enginee' \(did you mean 'engine'\?\)"):
        f(torch.randn(2))


def test_a_pass_that_raises_does_not_break_the_program() -> None:
    pipeline = ioc.DEFAULT.after("normalise", raises)
    with pytest.warns(
        ioc.FallbackWarning, match=r"ZeroDivisionError: of course \(in pass 'raises'"
    ):
        records = check(lambda x: x.sin().sum(), grad(3), pipeline=pipeline, strict=False)
    assert records[0].fallbacks[0].region == "rewriting"
    assert records[0].graph is None


def test_strict_raises_instead() -> None:
    run, _ = compiled(lambda x: x.sin(), ioc.DEFAULT.after("normalise", raises))
    with pytest.raises(Exception, match="strict: rewriting failed: ZeroDivisionError: of course"):
        run(torch.randn(3))


def test_an_engine_that_fails_runs_on_aten_with_one_warning_each() -> None:
    def engine(plan: Any, gm: GraphModule) -> Any:
        raise RuntimeError("no such engine")

    with pytest.warns(ioc.FallbackWarning, match="the graph runs on aten: Runtime") as caught:
        records = check(lambda x: x.sin().sum(), grad(3), engine=engine, strict=False)
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
    check(lambda x: x.sin().sum(), grad(3), pipeline=pipeline, engine=engine)
    assert aten.sin.default in seen[0]
    assert aten.cos.default in seen[1]


@pytest.mark.slow
def test_inductor_on_the_cpu() -> None:
    records = check(lambda x: x.sin().sum(), grad(3), engine="auto")
    assert records[0].fallbacks == []
    pipeline = ioc.DEFAULT.after("normalise", relu_of_relu)
    records = check(lambda x: x.relu().relu().sum(), grad(3), pipeline=pipeline, engine="auto")
    assert records[0].changed == 1


def test_no_compiler_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.warns(ioc.FallbackWarning, match="InvalidCxxCompiler") as caught:
        check(lambda x: x.sin().sum(), grad(3), engine="auto", strict=False)
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


def test_compile_skips_logger_calls() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        logger.warning("a guess")
        return y.cos()

    records: list[Compilation] = []
    x = torch.randn(3)
    run = ioc.compile(f, engine="aten", on_compiled=records.append)
    torch.testing.assert_close(run(x), x.sin().cos())
    assert len(records) == 1


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
