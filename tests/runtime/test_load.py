"""Plans to functions: files, cubins and bound kernels, with a GPU and without."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from iocompiler.codegen.module import emit_module
from iocompiler.cost_model.device import DEVICES
from iocompiler.errors import CacheWarning, CompileError
from iocompiler.plan.data import Plan, Ref, ViewStep
from iocompiler.runtime import compile as compiling
from iocompiler.runtime.load import load, load_text, module_file, prepare
from iocompiler.runtime.module import Module
from iocompiler.runtime.reference import run_plan
from tests.runtime.plans import S0, binary, interpreter, kernel, plan, scaled, spec

H200 = DEVICES["h200"]


def on_cuda(graph: Plan) -> Plan:
    """The plan with every tensor on the GPU."""
    moved = [(n, s and dataclasses.replace(s, device="cuda")) for n, s in graph.inputs]
    return dataclasses.replace(graph, inputs=tuple(moved), device="cuda")


def static(size: int = 1024) -> Plan:
    return plan(
        {"x": spec(size), "factor": None},
        [
            kernel("add", binary("add", size), ("x", "x", "a"), spec(size), "model.py:1"),
            ViewStep("tail", "a", spec(size - 4), 4),
            kernel(
                "scale", scaled(size - 4), ("tail", "factor", "b"), spec(size - 4), "model.py:2"
            ),
        ],
        (Ref("b"), Ref("tail")),
    )


def dynamic() -> Plan:
    return plan(
        {"s0": None, "x": spec(S0, 8)},
        [kernel("mul", binary("mul", 8 * S0), ("x", "x", "a"), spec(S0, 8))],
        (Ref("a"),),
    )


def test_prepare_needs_no_gpu() -> None:
    module = prepare(on_cuda(static()), H200, "forward")
    assert set(module.resources) == {"add", "scale"}
    assert module.resources["add"]["registers"] > 0
    assert module.resources["add"]["spills"] == 0
    assert Path(module.path).name == "forward.py"
    assert all(image.cubin.startswith(b"\x7fELF") for image in module.images.values())


def test_dynamic_kernels_come_in_two_versions() -> None:
    module = prepare(on_cuda(dynamic()), H200)
    assert [variant[1:] for variant in module.images] == [(True, True), (True, False)]


def test_prepare_wants_a_gpu_row() -> None:
    with pytest.raises(ValueError, match="not a GPU"):
        prepare(static(), dataclasses.replace(H200, name="cpu", capability=None))


def test_a_second_time_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(on_cuda(static()), H200)

    def forbidden(*_: Any) -> None:
        raise AssertionError("a worker was asked")

    monkeypatch.setattr(compiling, "_compile", forbidden)
    again = prepare(on_cuda(static()), H200)
    assert again.path == first.path
    assert again.resources == first.resources


def test_graphs_share_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(on_cuda(static()), H200)
    asked: list[str] = []
    real = compiling._compile
    monkeypatch.setattr(
        compiling, "_compile", lambda j, p, s: asked.append(j.name) or real(j, p, s)
    )
    other = static()
    steps = [
        dataclasses.replace(s, where=("other.py:7",)) if i == 0 else s
        for i, s in enumerate(other.steps)
    ]  # type: ignore[call-arg]
    prepare(on_cuda(dataclasses.replace(other, steps=tuple(steps[:1]), outputs=(Ref("a"),))), H200)
    assert asked == []


def test_an_error_names_the_users_line() -> None:
    text = emit_module(on_cuda(static()), "graph").replace("tl.load(", "tl.no_such(")
    module = Module(module_file(text, "graph"), "cuda", allocate=False)
    module.execute()
    with pytest.raises(CompileError, match=r"'add'.*(?s:.*)\(at model.py:1\)"):
        module.compile(90)


def test_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IOCOMPILER_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(CacheWarning, match="without a disk cache"):
        module = prepare(on_cuda(static()), H200)
    assert Path(module.path).exists()
    assert module.resources


def test_a_damaged_module_file_is_written_again() -> None:
    text = emit_module(static(), "graph")
    path = Path(module_file(text, "graph"))
    path.write_text(text + "# edited\n")
    with pytest.warns(CacheWarning, match="built again"):
        assert Path(module_file(text, "graph")).read_text() == text


def test_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "graph.py"
    path.write_text(emit_module(on_cuda(static()), "graph"))
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if torch.cuda.is_available():
        assert "median of" in done.stdout
        assert "DIFFERS" not in done.stdout
    else:
        assert done.stdout == "nothing was run: this file needs cuda\n"


def test_check_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    graph = static(64)
    call = load_text(emit_module(graph, "graph"), "graph", binder=interpreter(graph))
    module, namespace = call.module, call.module.namespace
    module.check(call, namespace["example_inputs"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "output 0: torch.float32 (60,)"
    assert lines[-1].startswith("median of 20 calls: ")


def test_the_users_line_of_a_call_is_the_comment_above_it() -> None:
    steps = [
        kernel("first", binary("add", 8), ("x", "x", "a"), spec(8)),
        kernel("second", binary("mul", 8), ("a", "x", "b"), spec(8), "model.py:7"),
    ]
    graph = plan({"x": spec(8)}, list(steps), (Ref("b"),))
    call: Any = load_text(emit_module(graph, "graph"), "graph", binder=interpreter(graph))
    module = call.module
    lines = module.source.splitlines()
    start = lines.index("def call(args):")
    runs = [n for n, line in enumerate(lines, 1) if line.startswith("    run_") and n > start]
    assert [module.users_line(number) for number in runs] == ["", "model.py:7"]


def test_files_that_are_imported_bind_at_the_first_call(tmp_path: Path) -> None:
    code = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import graph
    print(graph.call.__name__, "bound" if graph.module.bound else "unbound")
    """
    (tmp_path / "graph.py").write_text(emit_module(on_cuda(static()), "graph"))
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("call unbound\n"), done.stderr


def agree_on_gpu(graph: Plan, args: list[Any]) -> None:
    expected = run_plan(graph, [a.cpu() if isinstance(a, torch.Tensor) else a for a in args])
    found = load(on_cuda(graph))(list(args))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b)


@pytest.mark.gpu
def test_gpu_runs_as_the_reference() -> None:
    agree_on_gpu(static(), [torch.randn(1024, device="cuda"), 0.5])


@pytest.mark.gpu
def test_gpu_unaligned_input() -> None:
    agree_on_gpu(static(), [torch.randn(1025, device="cuda")[1:], 0.5])


@pytest.mark.gpu
@pytest.mark.parametrize("size", [0, 1, 16, 33])
def test_gpu_dynamic_sizes(size: int) -> None:
    agree_on_gpu(dynamic(), [size, torch.randn(size, 8, device="cuda")])


@pytest.mark.gpu
def test_gpu_in_a_thread_that_never_touched_the_device() -> None:
    import threading

    x = torch.randn(1024, device="cuda")
    call = load(on_cuda(static()))
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call([x, 2.0])))
    thread.start()
    thread.join()
    torch.testing.assert_close(results[0][0], (x + x)[4:] * 2)
