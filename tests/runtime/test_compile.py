"""Kernels to cubins in worker processes, and what is said when one does not compile."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from iocompiler.errors import CacheWarning, CompileError
from iocompiler.runtime import compile as compiling
from iocompiler.runtime.cache import default_cache
from iocompiler.runtime.compile import Job, compile_kernels
from iocompiler.runtime.kernels import compiled_images

SOURCE = """\
import triton
import triton.language as tl


@triton.jit
def double(x, out, n):
    i = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(out + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)
"""


def job(
    source: str = SOURCE, dtype: str = "fp32", divisible: tuple[int, ...] = (0, 1), where: str = ""
) -> Job:
    signature = (("x", f"*{dtype}"), ("out", f"*{dtype}"), ("n", "i32"))
    return Job(source, "double", signature, divisible, 4, 2, 90, where)


def test_cubins_of_several_kernels() -> None:
    jobs = [job(dtype=dtype) for dtype in ("fp32", "bf16", "fp64", "i64", "i1")]
    compiled = compile_kernels([(j, f"/kernels/{i}.py") for i, j in enumerate(jobs)])
    assert all(c.cubin.startswith(b"\x7fELF") for c in compiled)
    for c in compiled:
        assert c.metadata["name"] == "double"
        assert c.metadata["num_warps"] == 4
        assert c.metadata["registers"] > 0
        assert c.metadata["spills"] == 0
        assert c.metadata["shared"] == 0
    assert len({c.cubin for c in compiled}) == 5
    assert b"/kernels" in compiled[0].cubin  # line information names the file


def test_hints_change_the_code() -> None:
    hinted, plain = compile_kernels([(job(), "k.py"), (job(divisible=()), "k.py")])
    assert hinted.cubin != plain.cubin


def test_an_error_names_kernel_and_line() -> None:
    with pytest.raises(CompileError, match=r"(?s)'double'.*no_such.*\(at model.py:88\)$"):
        compile_kernels(
            [(job(SOURCE.replace("tl.load(", "tl.no_such("), where="model.py:88"), "k.py")]
        )
    assert compile_kernels([(job(), "k.py")])  # the worker lives on


def test_text_that_is_no_python() -> None:
    with pytest.raises(CompileError, match="SyntaxError"):
        compile_kernels([(job("def double(:"), "k.py")])


def test_a_worker_that_ends_is_replaced() -> None:
    pool = compiling.warm()
    compile_kernels([(job(), "k.py")])
    os.kill(pool.process.pid, signal.SIGKILL)
    for connection in _connections(pool):
        connection.shutdown(2)
        pool.idle.put(connection)
    assert compile_kernels([(job(), "k.py")])[0].cubin


def test_a_kernel_that_kills_the_compiler() -> None:
    fatal = "import os\nos.abort()\n" + SOURCE
    with pytest.raises(CompileError, match="compiler process ended"):
        compile_kernels([(job(fatal), "k.py")] * 2)
    assert compile_kernels([(job(), "k.py")])


def _connections(pool: compiling.Pool) -> list:  # type: ignore[type-arg]
    return [pool.idle.get() for _ in range(pool.size)]


def test_workers_import_no_torch() -> None:
    source = "import sys\nassert 'torch' not in sys.modules\n" + SOURCE
    assert compile_kernels([(job(source), "k.py")])


def test_workers_end_with_their_parent() -> None:
    pool = compiling.warm()
    scratch = pool.scratch
    compile_kernels([(job(), "k.py")])
    compiling.shut_down()
    assert pool.process.poll() is not None
    assert not os.path.exists(scratch)


def test_the_cache_saves_the_second_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = default_cache()
    first = compiled_images({"k": job()}, cache)["k"]
    monkeypatch.setattr("iocompiler.runtime.kernels.compile_kernels", lambda jobs, scratch: [])
    again = compiled_images({"k": job()}, cache)["k"]
    assert (first.cubin, first.metadata) == (again.cubin, again.metadata)
    assert cache is not None
    assert (cache.folder("kernels", "k") / "kernel.py").read_text() == SOURCE


def test_a_damaged_cubin_is_compiled_again() -> None:
    cache = default_cache()
    assert cache is not None
    first = compiled_images({"k": job()}, cache)["k"]
    Path(cache.folder("kernels", "k"), "kernel.cubin").write_bytes(b"damaged")
    with pytest.warns(CacheWarning, match="built again"):
        again = compiled_images({"k": job()}, cache)["k"]
    assert again.cubin == first.cubin


def test_without_a_cache() -> None:
    assert compiled_images({"k": job()}, None)["k"].cubin


def test_starting_the_workers_does_not_wait() -> None:
    compiling.shut_down()
    start = time.perf_counter()
    compiling.warm()
    assert time.perf_counter() - start < 0.1
    assert torch.get_num_threads() == 1
