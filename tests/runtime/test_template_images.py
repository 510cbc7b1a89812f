"""Cubins of templates: compiled once, ahead where somebody asks ahead, and found again on disk."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from iocompiler.codegen.kernels.embedding_gradient import embedding_keys
from iocompiler.errors import CompileError
from iocompiler.runtime import compile as compiling
from iocompiler.runtime import kernels, template_images
from iocompiler.runtime.cache import default_cache
from iocompiler.runtime.compile import Compiled
from iocompiler.runtime.load import imported
from iocompiler.runtime.template_form import Form, form_of
from iocompiler.runtime.template_images import image, prepare

SOURCE = """\
import triton
import triton.language as tl


@triton.jit
def scaled(x, factors, body: tl.constexpr):
    i = tl.arange(0, 32)
    tl.store(x + i, body(tl.load(x + i), factors))


@triton.jit
def twice(value, factors):
    return value * 2 + factors[1]


@triton.jit
def wrong(value, factors):
    return tl.no_such(value)
"""


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_images, "_images", {})


@pytest.fixture
def user(tmp_path: Path) -> Any:
    """The module of somebody's kernels."""
    path = tmp_path / "user.py"
    path.write_text(SOURCE)
    return imported(path, "user")


def keys(count: int = 5, **options: Any) -> Form:
    indices, result = torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int32)
    given = {"indices": indices, "keys": result, "count": count, "rows": 3, "padding": -1}
    return form_of(embedding_keys, {**given, "BLOCK": 1024, "num_warps": 4, **options}, 90)


def form(user: Any, body: str) -> Form:
    given = {"x": torch.zeros(32), "factors": (1, 3.5), "body": getattr(user, body)}
    return form_of(user.scaled, given, 90)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of kernels that went to the workers."""
    names: list[str] = []
    compile_kernels = kernels.compile_kernels

    def noted(jobs: Any, scratch: Path | None) -> list[Compiled]:
        names.extend(job.name for job, _ in jobs)
        return compile_kernels(jobs, scratch)

    monkeypatch.setattr(kernels, "compile_kernels", noted)
    return names


def test_a_kernel_of_a_file_that_is_not_ours(user: Any) -> None:
    found = image(form(user, "twice"))
    assert found.cubin.startswith(b"\x7fELF")
    assert found.metadata["parameters"] == [[[0], "*fp32"], [[1, 1], "fp32"]]
    assert b"user.py" in found.cubin  # line information


def test_a_template_brings_no_torch_into_a_worker(
    user: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling.shut_down()
    monkeypatch.setattr(compiling, "worker_count", lambda: 1)
    image(form(user, "twice"))
    source = "import sys\nassert 'torch' not in sys.modules\n" + SOURCE
    job = compiling.Job(source, "scaled", (("x", "*fp32"), ("factors", "i32")), (), 4, 2, 90)
    with pytest.raises(CompileError, match="body"):  # which is past the import
        compiling.compile_kernels([(job, "k.py")])
    compiling.shut_down()


def test_one_form_is_compiled_once(compiled: list[str]) -> None:
    assert image(keys()) is image(keys(6))
    assert compiled == ["embedding_keys"]
    assert image(keys(num_warps=8)).metadata["num_warps"] == 8
    assert len(compiled) == 2


def test_the_disk_has_it_for_another_process(compiled: list[str]) -> None:
    first = image(keys())
    template_images._images.clear()
    assert image(keys()).cubin == first.cubin
    assert compiled == ["embedding_keys"]
    cache = default_cache()
    assert cache is not None
    (folder,) = (cache.root / "kernels").iterdir()
    assert {"job.json", "kernel.cubin"} < {file.name for file in folder.iterdir()}


def test_the_text_of_a_function_is_in_the_key(
    user: Any, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = image(form(user, "twice"))
    template_images._images.clear()
    changed = SOURCE.replace("* 2", "* 3").splitlines(keepends=True)
    monkeypatch.setattr("linecache.getlines", lambda path: changed)
    assert image(form(user, "twice")).cubin != first.cubin
    assert len(compiled) == 2


def test_a_launch_waits_for_what_was_asked_for_ahead(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    go, wait = threading.Event(), kernels.compile_kernels

    def slow(*given: Any) -> list[Compiled]:
        assert go.wait(60)
        return wait(*given)

    monkeypatch.setattr(kernels, "compile_kernels", slow)
    prepare([keys(), keys(num_warps=8), keys(7)])
    places = list(template_images._images.values())
    assert len(places) == 2
    assert not any(place.done() for place in places)
    threading.Timer(0.1, go.set).start()
    assert image(keys()) is places[0].result()
    assert image(keys(num_warps=8)) is places[1].result()
    assert compiled == ["embedding_keys"] * 2


def test_an_error_is_told_to_who_asks(user: Any, compiled: list[str]) -> None:
    with pytest.raises(CompileError, match=r"(?s)'scaled' does not compile.*no_such"):
        image(form(user, "wrong"))
    with pytest.raises(CompileError):
        image(form(user, "wrong"))
    assert compiled == ["scaled"] * 2


def test_an_error_ahead_is_told_later(user: Any) -> None:
    prepare([form(user, "wrong")])
    with pytest.raises(CompileError, match="no_such"):
        image(form(user, "wrong"))


def test_a_child_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(template_images._images, keys(num_warps=8), Future())
    with template_images._lock:  # as a thread of the parent's might hold it
        child = os.fork()
    if child == 0:
        code = 1
        try:
            code = int(image(keys(num_warps=8)).metadata["num_warps"] != 8)
        finally:
            compiling.shut_down()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_end_of_the_program_ends_what_is_in_the_background(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, ended, tries = threading.Event(), threading.Event(), list[str]()

    def until_the_end(pool: compiling.Pool, job: Any, path: str) -> None:
        tries.append(job.name)
        begun.set()
        assert ended.wait(60)
        raise compiling._WorkerDied

    monkeypatch.setattr(compiling.Pool, "run", until_the_end)
    prepare([keys()])
    (place,) = template_images._images.values()
    assert begun.wait(60)
    compiling.shut_down()
    ended.set()
    assert "the compiler process ended" in str(place.exception(timeout=60))
    assert tries == ["embedding_keys"]  # and not again, as after a worker that was idle for long
