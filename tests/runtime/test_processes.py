"""Several threads, several processes, forks, and processes killed on the way."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from iocompiler.runtime import compile as compiling
from iocompiler.runtime import load
from iocompiler.runtime.cache import Cache
from iocompiler.runtime.compile import compile_kernels
from iocompiler.runtime.module import Module
from tests.compiling import OLD_TORCH
from tests.runtime.compilations import Processes, compile_and_check
from tests.runtime.test_compile import job

_WAITING = """\
# %% call
from iocompiler.runtime.module import open_module
from tests.runtime.test_processes import BARRIER

BARRIER.wait(20)
module = open_module(__file__, globals(), "cpu")
BARRIER.wait(20)
"""
BARRIER = threading.Barrier(2)


def in_threads(function: Any, count: int) -> list[Any]:
    """What the function returns, or raises, in each of so many threads at once."""
    found: list[Any] = [None] * count

    def run(place: int) -> None:
        try:
            found[place] = function(place)
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


def test_two_threads_run_one_file(tmp_path: Path) -> None:
    path = tmp_path / "graph.py"
    path.write_text(_WAITING)
    modules = [Module(str(path)), Module(str(path))]
    namespaces = in_threads(lambda place: modules[place].execute(), 2)
    assert [n["module"] for n in namespaces] == modules


@pytest.mark.skipif(OLD_TORCH, reason="may crash where several threads compile, with aot_eager too")
def test_compiling_in_threads() -> None:
    """Each has code of its own to compile, and all have one Dynamo, one cache and one pool."""
    found = in_threads(lambda _: compile_and_check(), 3)
    assert set(found) <= {"stored", "found"}, found
    assert "stored" in found


def _in_child(check: Any) -> int:
    """The exit status of a forked child that runs the check; killed where it takes too long."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            check()
            status = 0
        finally:
            os._exit(status)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.1)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -1


def test_a_forked_child_has_workers_of_its_own() -> None:
    pool = compiling.warm()
    compile_kernels([(job(), "k.py")])

    def check() -> None:
        assert compile_kernels([(job(), "k.py")])[0].cubin
        compiling.shut_down()

    assert _in_child(check) == 0
    assert compiling.warm() is pool
    assert compile_kernels([(job(), "k.py")])[0].cubin


def test_a_child_forked_while_the_pool_was_locked() -> None:
    compiling.warm()
    with compiling._pool_lock:  # as by a thread that starts the workers
        assert _in_child(lambda: compiling.warm().close()) == 0


def test_a_forked_child_keeps_no_worker_of_its_parent_alive() -> None:
    pool = compiling.warm()
    compile_kernels([(job(), "k.py")])
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(theirs)
        os.read(ours, 1)  # until the parent lets it go
        os._exit(0)
    try:
        start = time.perf_counter()
        compiling.shut_down()
        assert pool.process.returncode == 0, "it was killed: its sockets were open elsewhere"
        assert time.perf_counter() - start < 1.5
    finally:
        os.close(theirs)
        os.close(ours)
        os.waitpid(child, 0)


def test_a_forked_child_leaves_the_folder_of_its_parent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(load, "default_cache", lambda: None)
    before = load.module_file("x = 1\n", "graph")

    def check() -> None:
        assert load.module_file("x = 1\n", "graph") != before
        if load._temporary is not None:
            load._temporary.cleanup()

    assert _in_child(check) == 0
    assert Path(before).exists()
    assert load.module_file("x = 2\n", "graph")


def test_eight_processes_with_one_cache(tmp_path: Path) -> None:
    results = Processes(str(tmp_path / "shared")).together(8)
    assert {result for result, _ in results} <= {"stored", "found"}, results
    assert [told for _, told in results if told] == []
    entries = Cache(tmp_path / "shared").info().entries
    assert entries["graphs"] == 1
    again = Processes(str(tmp_path / "shared"))
    assert again.result(*again.start()) == ("found", [])


@pytest.mark.parametrize("count", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_compilations_killed_at_any_moment(count: int, tmp_path: Path) -> None:
    root, chance = tmp_path / "shared", random.Random(count)
    processes = Processes(str(root))
    start = time.perf_counter()
    alone = Processes(str(tmp_path / "alone"))
    assert alone.result(*alone.start())[0] == "stored"
    whole = time.perf_counter() - start
    for number in range(count):
        processes.killed(lambda: chance.uniform(0.0, whole))
        if number % 10 == 9 or number == count - 1:
            # what the killed ones left is right, or no entry at all: no warning of damage
            result, told = processes.result(*processes.start())
            assert result in ("stored", "found"), result
            assert told == []
            Cache(root).clear()
