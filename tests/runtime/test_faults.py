"""Disks that fill up, files that rot, a compiler that fails: results stay right, one warning tells,
and the cache is whole again afterwards.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import iocompiler as ioc
from iocompiler.compilation import Compilation
from iocompiler.errors import CacheWarning, CompileError, FallbackWarning
from iocompiler.runtime import cache as disk
from iocompiler.runtime import compile as compiling
from iocompiler.runtime.cache import Cache
from tests.runtime.compilations import PreparingEngine, model
from tests.runtime.text_engine import _plans


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    disk._open.cache_clear()
    yield
    disk._open.cache_clear()


def compile_and_check() -> tuple[Compilation, list[str]]:
    """Compile and hold against eager, as a new process would: what it says, and its warnings."""
    disk._open.cache_clear()  # a warning is given once by each cache
    torch._dynamo.reset()
    records: list[Compilation] = []
    backend = ioc.Compiler(engine=PreparingEngine(), on_compiled=records.append)
    x, w = (torch.randn(6, 6).requires_grad_() for _ in range(2))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found, expected = torch.compile(model, backend=backend)(x, w), model(x, w)
        ours, theirs = (torch.autograd.grad(y.square().sum(), (x, w)) for y in (found, expected))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    mine = (CacheWarning, FallbackWarning)
    return records[0], [str(w.message) for w in told if issubclass(w.category, mine)]


class Disk:
    """Counts what is written below a folder; from the ``full``-th on there is no space left."""

    def __init__(self, root: Path, full: int | None) -> None:
        self.root, self.full, self.count = str(root), full, 0

    def fails(self, path: Any) -> None:
        if not str(path).startswith(self.root):
            return
        self.count += 1
        if self.full is not None and self.count > self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def install(self, patch: pytest.MonkeyPatch) -> None:
        bytes_, text, mkdtemp, mkdir, replace = (
            Path.write_bytes, Path.write_text, tempfile.mkdtemp, Path.mkdir, os.replace,
        )  # fmt: skip

        def write_bytes(path: Path, data: bytes) -> int:
            if str(path).startswith(self.root) and self.full is not None:
                bytes_(path, data[: len(data) // 2])  # what still fits is written
            self.fails(path)
            return bytes_(path, data)

        def write_text(path: Path, data: str, *rest: Any, **named: Any) -> int:
            self.fails(path)
            return text(path, data, *rest, **named)

        def make(suffix: Any = None, prefix: Any = None, dir: Any = None) -> str:
            self.fails(dir)
            return mkdtemp(suffix, prefix, dir)

        def make_folder(path: Path, *rest: Any, **named: Any) -> None:
            if not path.exists():
                self.fails(path)
            mkdir(path, *rest, **named)

        def move(old: Any, new: Any) -> None:
            self.fails(new)
            replace(old, new)

        patch.setattr(Path, "write_bytes", write_bytes)
        patch.setattr(Path, "write_text", write_text)
        patch.setattr(tempfile, "mkdtemp", make)
        patch.setattr(Path, "mkdir", make_folder)
        patch.setattr(os, "replace", move)


def test_a_disk_that_fills_up_at_every_write(cache_root: Path) -> None:
    compiling.shut_down()
    with pytest.MonkeyPatch.context() as patch:
        counting = Disk(cache_root, None)
        counting.install(patch)
        record, told = compile_and_check()
    assert (record.cache, told) == ("stored", [])
    assert counting.count > 10
    for full in range(0, counting.count, max(1, counting.count // 5)):
        Cache(cache_root).clear()
        compiling.shut_down()
        with pytest.MonkeyPatch.context() as patch:
            filling = Disk(cache_root, full)
            filling.install(patch)
            record, told = compile_and_check()
        assert len(told) == (filling.count > full), (full, told)
        assert all("No space left" in line for line in told), (full, told)
        assert record.fallbacks == [], full
        record, told = compile_and_check()
        assert record.cache in ("stored", "found"), full
        assert told == [], (full, told)


def _files(root: Path) -> list[Path]:
    kinds = ("graphs", "modules", "kernels")
    return sorted(f for kind in kinds for f in (root / kind).glob("*/*"))


DAMAGES = ("flipped", "truncated", "empty")


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_every_file_damaged_in_turn(cache_root: Path, first: int) -> None:
    chance = random.Random(first)
    compile_and_check()
    places = [f.relative_to(cache_root) for f in _files(cache_root)]
    assert {p.parts[0] for p in places} == {"graphs", "modules", "kernels"}
    for number, place in enumerate(places, first):
        file = cache_root / place
        content = file.read_bytes()
        match DAMAGES[number % len(DAMAGES)] if content else "longer":
            case "longer":
                file.write_bytes(b"\0")
            case "flipped":
                at = chance.randrange(len(content))
                changed = bytes([content[at] ^ (1 << chance.randrange(8))])
                file.write_bytes(content[:at] + changed + content[at + 1 :])
            case "truncated":
                file.write_bytes(content[: chance.randrange(len(content))])
            case "empty":
                file.write_bytes(b"")
        entry = Cache(cache_root).folder(place.parts[0], place.parts[1])
        with pytest.warns(CacheWarning, match="built again"):
            assert Cache(cache_root).get(place.parts[0], place.parts[1]) is None, place
        assert not entry.exists()
        shutil.rmtree(cache_root / "graphs", ignore_errors=True)  # else nothing would be compiled
        record, told = compile_and_check()
        assert record.cache == "stored", place
        assert record.fallbacks == []
        assert file.exists()
        assert told == [], (place, told)


def test_a_flipped_bit_is_one_warning_and_the_graph_is_made_again(cache_root: Path) -> None:
    compile_and_check()
    (meta,) = (cache_root / "graphs").glob("*/meta.json")
    content = meta.read_text()
    assert '"inputs": 2' in content
    meta.write_text(content.replace('"inputs": 2', '"inputs": 3'))  # valid, and another number
    record, told = compile_and_check()
    assert record.cache == "stored"
    assert len(told) == 1
    assert "does not match its hash" in told[0]
    assert compile_and_check()[0].cache == "found"


def test_entries_that_can_only_be_read(cache_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_and_check()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", refuse)
    record, told = compile_and_check()
    assert (record.cache, told) == ("found", [])


def _jobs(patch: pytest.MonkeyPatch, failing: int | None) -> list[str]:
    """The kernels compiled from now on, by name; the compiler fails at the ``failing``-th."""
    seen: list[str] = []
    compiled = compiling._compile

    def one(job: Any, *rest: Any) -> Any:
        seen.append(job.name)
        if len(seen) - 1 == failing:
            raise CompileError(kernel=job.name, cause="out of registers", where=job.where)
        return compiled(job, *rest)

    patch.setattr(compiling, "_compile", one)
    return seen


def test_a_compiler_that_fails_at_every_kernel_in_turn(cache_root: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        names = _jobs(patch, None)
        compile_and_check()
    assert len(names) > 1
    for failing in range(len(names)):
        Cache(cache_root).clear()
        _plans().clear()
        with pytest.MonkeyPatch.context() as patch:
            _jobs(patch, failing)
            record, told = compile_and_check()
        assert len(told) == 1, told
        assert "the graph runs on aten: CompileError: kernel" in told[0]
        assert len(record.fallbacks) == 1
        assert record.cache == "not cached: a part of it runs on aten"
    record, told = compile_and_check()
    assert (record.cache, told) == ("stored", [])


def test_workers_that_die_at_every_kernel_in_turn(cache_root: Path) -> None:
    """Killed once, a worker is replaced: nothing is lost, nothing told."""
    with pytest.MonkeyPatch.context() as patch:
        names = _jobs(patch, None)
        compile_and_check()
    for failing in range(len(names)):
        Cache(cache_root).clear()
        count = itertools.count()
        run = compiling.Pool.run

        def dying(
            pool: compiling.Pool, job: Any, path: str, failing: int = failing, count: Any = count,
            run: Any = run,
        ) -> Any:  # fmt: skip
            if next(count) == failing:
                pool.process.kill()
                raise compiling._WorkerDied("killed")
            return run(pool, job, path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiling.Pool, "run", dying)
            record, told = compile_and_check()
        assert (record.cache, told, record.fallbacks) == ("stored", [], [])
