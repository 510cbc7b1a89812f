"""The disk cache: whole entries or none, damage, foreign folders, eviction, two processes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from iocompiler.errors import CacheWarning
from iocompiler.runtime import cache as module
from iocompiler.runtime.cache import DEFAULT_LIMIT, Cache, default_cache, key_of

FILES = {"kernel.py": b"text", "kernel.cubin": b"\x00\x01"}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "own")


def test_an_entry_comes_back(cache: Cache) -> None:
    assert cache.get("kernels", "k") is None
    folder = cache.put("kernels", "k", FILES, {"registers": 3})
    entry = cache.get("kernels", "k")
    assert entry is not None
    assert (dict(entry.files), entry.meta, entry.folder) == (FILES, {"registers": 3}, folder)
    assert cache.get("graphs", "k") is None
    assert cache.info().entries == {"kernels": 1}


def test_an_entry_there_stays(cache: Cache) -> None:
    cache.put("kernels", "k", FILES, {"first": 1})
    cache.put("kernels", "k", {"kernel.py": b"other"}, {})
    entry = cache.get("kernels", "k")
    assert entry is not None
    assert entry.meta == {"first": 1}
    assert list((cache.root / "kernels").iterdir()) == [cache.folder("kernels", "k")]


@pytest.mark.parametrize(
    "damage", ["content", "missing", "no meta", "not json", "list", "truncated"]
)
def test_damage_is_rebuilt_with_one_warning(cache: Cache, damage: str) -> None:
    for key in ("a", "b"):
        folder = cache.put("kernels", key, FILES, {})
        match damage:
            case "content":
                (folder / "kernel.cubin").write_bytes(b"\x00\x02")
            case "missing":
                (folder / "kernel.cubin").unlink()
            case "no meta":
                (folder / "meta.json").unlink()
            case "not json":
                (folder / "meta.json").write_text("{")
            case "list":
                (folder / "meta.json").write_text("[]")
            case "truncated":
                (folder / "meta.json").write_text(json.dumps({"files": {}}))
    with pytest.warns(CacheWarning, match="built again") as caught:
        found = [cache.get("kernels", key) for key in "ab"]
    assert found == [None, None]
    assert len(caught) == 1
    cache.put("kernels", "a", FILES, {})
    assert cache.get("kernels", "a") is not None


def test_an_entry_replaced_while_it_is_read(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put("graphs", "k", {"first.py": b"1"}, {"v": 1})
    read, replaced = module._read_checked, False

    def slow(path: Path, digest: str) -> bytes:
        nonlocal replaced
        if not replaced:
            replaced = True
            cache.forget("graphs", "k")
            cache.put("graphs", "k", {"second.py": b"2"}, {"v": 2})
        return read(path, digest)

    monkeypatch.setattr(module, "_read_checked", slow)
    entry = cache.get("graphs", "k")  # a warning would be an error
    assert entry is not None
    assert (entry.files, entry.meta) == ({"second.py": b"2"}, {"v": 2})


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "own", limit=5000)
    for age, key in enumerate("abcd"):
        folder = cache.put("kernels", key, {"f": b"x" * 1400}, {})
        os.utime(folder, (1000 + age, 1000 + age))
    assert cache.get("kernels", "a") is not None  # used: now the youngest
    assert cache.evict() == 1
    assert cache.get("kernels", "b") is None
    assert all(cache.get("kernels", key) for key in "acd")
    assert cache.info().bytes <= 5000


def test_what_is_just_stored_stays_however_small_the_limit(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "root", limit=1)
    for key in ("one", "two"):
        cache._puts = 0  # as in a process of its own, which evicts first
        folder = cache.put("modules", key, {"graph.py": b"x = 1"}, {})
        assert (folder / "graph.py").exists()
    assert cache.info().entries == {"modules": 1}


@pytest.mark.parametrize(
    ("text", "limit"), [("", DEFAULT_LIMIT), (" ", DEFAULT_LIMIT), ("1000", 1000), ("-3", 0)]
)
def test_the_limit_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, limit: int
) -> None:
    monkeypatch.setenv("IOCOMPILER_CACHE_DIR", str(tmp_path / "root"))
    monkeypatch.setenv("IOCOMPILER_CACHE_BYTES", text)
    cache = default_cache()
    assert cache is not None
    assert cache.limit == limit


def test_a_limit_that_is_no_number_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOCOMPILER_CACHE_DIR", str(tmp_path / "root"))
    monkeypatch.setenv("IOCOMPILER_CACHE_BYTES", "2 GB")
    with pytest.warns(CacheWarning, match="IOCOMPILER_CACHE_BYTES is '2 GB'"):
        cache = default_cache()
    assert cache is not None
    assert cache.limit == DEFAULT_LIMIT
    assert default_cache() is cache  # and not again: a warning is an error here


def test_clear(cache: Cache) -> None:
    cache.put("kernels", "a", FILES, {})
    cache.put("graphs", "a", FILES, {})
    assert cache.clear() == 2
    assert cache.info().bytes == 0


def test_a_folder_others_can_write_is_refused(cache_root: Path) -> None:
    cache_root.mkdir()
    cache_root.chmod(0o777)
    with pytest.warns(CacheWarning, match="written by others"):
        assert default_cache() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert default_cache() is None  # warned once


def test_a_folder_of_another_user_is_refused(
    cache_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_root.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: cache_root.stat().st_uid + 1)
    with pytest.warns(CacheWarning, match="belongs to user"):
        assert default_cache() is None


def test_no_folder_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IOCOMPILER_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(CacheWarning, match="without a disk cache"):
        assert default_cache() is None
    assert module.info() is None
    assert module.clear() is None


def test_a_disk_that_takes_no_more_is_one_warning(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(CacheWarning, match="No space left") as caught:
        stored = [cache.store("kernels", key, FILES, {}) for key in "ab"]
    assert stored == [None, None]
    assert len(caught) == 1
    assert list((cache.root / "kernels").iterdir()) == []


def test_keys() -> None:
    assert key_of("kernel", {"a": 1, "b": 2}) == key_of("kernel", {"b": 2, "a": 1})
    assert key_of("kernel", {"a": 1}) != key_of("kernel", {"a": 2})
    assert key_of("kernel") != key_of("graph")


def test_keys_hold_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of("x")
    found = {**module.versions(), "triton": "0"}
    monkeypatch.setattr(module, "versions", lambda: found)
    assert key_of("x") != before


_PROCESS = """
import sys
import time
from pathlib import Path
from iocompiler.runtime.cache import Cache
cache = Cache(Path(sys.argv[1]))
for _ in range(150):
    for key in "abc":
        cache.put("kernels", key, {"f": key.encode() * 100_000}, {})
        entry = cache.get("kernels", key)
        assert entry is None or entry.files["f"] == key.encode() * 100_000
        if key == "b":
            cache.clear()
"""


def test_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", _PROCESS, str(tmp_path / "own")]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()


_WRITER = """
import itertools, sys
from pathlib import Path
from iocompiler.runtime.cache import Cache
cache = Cache(Path(sys.argv[1]), limit=1 << 20)
print("ready", flush=True)
for number in itertools.count():
    content = bytes([number % 251]) * 20_000
    cache.put("kernel", f"{number % 60:02}", {"a": content, "b": content}, {"n": number % 251})
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    root, chance = tmp_path / "cache", random.Random(0)
    for _ in range(3):
        command = [sys.executable, "-c", _WRITER, str(root)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.2))
        writer.kill()
        writer.communicate()
    cache = Cache(root)
    entries = [cache.get("kernel", f"{number:02}") for number in range(60)]  # a warning is an error
    assert any(entries)
    for entry in filter(None, entries):
        assert set(entry.files["a"]) == set(entry.files["b"]) == {entry.meta["n"]}
    cache.put("kernel", "after", {"a": b"x"}, {})
    assert cache.get("kernel", "after") is not None
