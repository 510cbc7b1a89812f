"""The disk cache: compiled kernels, whole graphs and module files, as text, JSON and cubins only.

One entry is one folder ``<root>/<kind>/<key>/`` with its files and a ``meta.json`` that holds their
hashes. It is written aside and renamed into place, so readers and other processes see all of it or
nothing. What does not match its hashes is thrown away and built again. Kinds: "kernels" (cubin,
with the source, or the job of a template), "graphs" (module text, JSON), "modules" (the generated
files that run), "tuning" (times of schedules, JSON).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from iocompiler.errors import CacheWarning

DEFAULT_LIMIT = 2 * 2**30
_META = "meta.json"
_EVICTION_PERIOD = 64
_MOVES = 20
_READS = 3
_ASIDE = ".new-"
_STALE_SECONDS = 3600.0


@dataclass(frozen=True)
class Entry:
    """One entry read back: its folder, its files' contents by name, and its JSON."""

    folder: Path
    files: Mapping[str, bytes]
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class Info:
    """Where the cache is, how many entries of each kind it has, its size and its limit in bytes."""

    root: str
    entries: Mapping[str, int]
    bytes: int
    limit: int


class Cache:
    """A bounded cache below ``root``; the least recently used entries go first. Safe for several
    processes.

    Raises:
        PermissionError: the folder belongs to, or can be written by, another user.
        OSError: the folder cannot be made or written.
    """

    def __init__(self, root: Path, limit: int = DEFAULT_LIMIT):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_foreign(root)
        with tempfile.TemporaryFile(dir=root):
            pass
        self.root = root
        self.limit = limit
        self._puts = 0
        self._warned = False

    def folder(self, kind: str, key: str) -> Path:
        return self.root / kind / key

    def get(self, kind: str, key: str) -> Entry | None:
        """The entry, or None where there is none. A damaged one is removed, with one warning per
        cache.
        """
        folder, reason = self.folder(kind, key), ""
        for attempt in range(_READS):
            time.sleep(0.001 * attempt)  # it may be being replaced
            try:
                return _read(folder)
            except FileNotFoundError:
                if not folder.exists():
                    return None
                reason = "a file is missing"
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                reason = str(error)
        self._drop_damaged(folder, reason)
        return None

    def put(self, kind: str, key: str, files: Mapping[str, bytes], data: Mapping[str, Any]) -> Path:
        """Store an entry and return its folder; an entry already there stays.

        Raises:
            OSError: it cannot be written.
        """
        target = self.folder(kind, key)
        target.parent.mkdir(mode=0o700, exist_ok=True)
        hashes = {name: _digest(content) for name, content in files.items()}
        meta: dict[str, Any] = {"files": hashes, "data": dict(data)}
        meta["check"] = _check(meta)
        aside = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=target.parent))
        try:
            for name, content in files.items():
                (aside / name).write_bytes(content)
            (aside / _META).write_text(json.dumps(meta))
            _move(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self._puts += 1
        if self._puts % _EVICTION_PERIOD == 1:
            self.evict(keep=target)
        return target

    def store(
        self, kind: str, key: str, files: Mapping[str, bytes], data: Mapping[str, Any]
    ) -> Path | None:
        """`put`, but a full or unwritable disk is one warning and None: the caller has what it
        would have stored.
        """
        try:
            return self.put(kind, key, files, data)
        except OSError as error:
            self._warn(f"cannot write the cache: {error}")
            return None

    def discard(self, kind: str, key: str, reason: str) -> None:
        """Remove an entry whose contents make no sense, with one warning per cache."""
        self._drop_damaged(self.folder(kind, key), reason)

    def forget(self, kind: str, key: str) -> None:
        """Remove an entry that another one is to replace."""
        _remove(self.folder(kind, key))

    def info(self) -> Info:
        entries = self._entries()
        counts: dict[str, int] = {}
        for folder, _, _ in entries:
            counts[folder.parent.name] = counts.get(folder.parent.name, 0) + 1
        return Info(str(self.root), counts, sum(size for _, _, size in entries), self.limit)

    def clear(self) -> int:
        """Remove every entry; returns how many there were."""
        entries = self._entries()
        for folder, _, _ in entries:
            _remove(folder)
        return len(entries)

    def evict(self, keep: Path | None = None) -> int:
        """Remove the least recently used entries until the cache is within its limit; returns how
        many went. The folder ``keep``, which is about to be read, stays however small the limit.
        """
        entries = sorted(self._entries(), key=lambda entry: entry[1])
        total = sum(size for _, _, size in entries)
        removed = 0
        for folder, _, size in entries:
            if total <= self.limit:
                break
            if folder == keep:
                continue
            _remove(folder)
            total -= size
            removed += 1
        return removed

    def _entries(self) -> list[tuple[Path, float, int]]:
        """(folder, time of last use, bytes) of every entry; what vanishes meanwhile is left out."""
        found = []
        for folder in self.root.glob("*/*"):
            try:
                if (
                    folder.name.startswith(_ASIDE)
                    and time.time() - folder.stat().st_mtime < _STALE_SECONDS
                ):
                    continue  # another process is writing it
                size = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
                found.append((folder, folder.stat().st_mtime, size))
            except OSError:
                continue
        return found

    def _drop_damaged(self, folder: Path, reason: str) -> None:
        _remove(folder)
        self._warn(f"damaged cache entry {folder.name}: {reason}; built again")

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(message, CacheWarning, stacklevel=5)


def key_of(*parts: Any) -> str:
    """A key for what the JSON-able ``parts`` say, under these versions of torch, Triton and the
    compiler.
    """
    text = json.dumps([versions(), parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of what shapes our output; of the compiler itself, the hash of every source file."""
    found = {}
    for package in ("torch", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = ""
    found["iocompiler"] = _own_hash()
    return found


def _own_hash() -> str:
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.lru_cache(maxsize=8)
def _open(root: str, limit: int) -> Cache | None:
    try:
        return Cache(Path(root), limit)
    except OSError as error:
        warnings.warn(f"compiling without a disk cache: {error}", CacheWarning, stacklevel=3)
        return None


def default_cache() -> Cache | None:
    """The cache of this process: IOCOMPILER_CACHE_DIR, or ~/.cache/iocompiler; None, warned once,
    if unusable.

    IOCOMPILER_CACHE_BYTES bounds its size (2 GiB if unset; what is no number is warned of once).
    """
    root = os.environ.get("IOCOMPILER_CACHE_DIR") or os.path.expanduser("~/.cache/iocompiler")
    return _open(root, _limit(os.environ.get("IOCOMPILER_CACHE_BYTES", "")))


@functools.lru_cache(maxsize=8)
def _limit(text: str) -> int:
    """Bytes from the text of the variable."""
    if not text.strip():
        return DEFAULT_LIMIT
    try:
        return max(0, int(text))
    except ValueError:
        told = f"IOCOMPILER_CACHE_BYTES is {text!r}, no whole number of bytes"
        warnings.warn(f"{told}: {DEFAULT_LIMIT} are taken", CacheWarning, stacklevel=3)
        return DEFAULT_LIMIT


def info() -> Info | None:
    """What the default cache holds; None if it cannot be used."""
    cache = default_cache()
    return cache.info() if cache else None


def clear() -> int | None:
    """Empty the default cache; returns the number of entries removed, None if it cannot be used."""
    cache = default_cache()
    return cache.clear() if cache else None


def _move(aside: Path, target: Path) -> None:
    """Rename a finished entry into its place, unless another process put one there first."""
    for attempt in range(_MOVES):
        try:
            os.replace(aside, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if (target / _META).exists():
                return
            # another process is removing it at this moment
            time.sleep(0.001 * attempt)
    raise OSError(errno.EEXIST, "remains of an entry are in the way", str(target))


def _remove(folder: Path) -> None:
    """Take an entry out of its place in one step, then delete it: a process killed on the way
    leaves no half of an entry. What it leaves aside is evicted when it is stale.
    """
    aside = folder
    if not folder.name.startswith(_ASIDE):
        aside = folder.with_name(f"{_ASIDE}{folder.name}-{uuid.uuid4().hex}")
        try:
            os.replace(folder, aside)
        except OSError:
            return  # another process was faster, or nothing can be removed here
    shutil.rmtree(aside, ignore_errors=True)


def _refuse_foreign(root: Path) -> None:
    status = root.stat()
    if status.st_uid != os.getuid():
        raise PermissionError(f"{root} belongs to user {status.st_uid}, not to {os.getuid()}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"{root} can be written by others (mode {stat.S_IMODE(status.st_mode):o})"
        )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _check(meta: Mapping[str, Any]) -> str:
    """The hash of what `_META` holds besides."""
    return _digest(json.dumps([meta["files"], meta["data"]], sort_keys=True).encode())


def _read(folder: Path) -> Entry:
    """The entry in the folder, which counts as used now; raises where something does not fit."""
    meta = json.loads((folder / _META).read_bytes())
    files = {name: _read_checked(folder / name, digest) for name, digest in meta["files"].items()}
    if meta["check"] != _check(meta):
        raise ValueError(f"{_META} does not match its hash")
    with contextlib.suppress(OSError):  # as where it can only be read
        os.utime(folder)  # used now: last to be evicted
    return Entry(folder, files, meta["data"])


def _read_checked(path: Path, digest: str) -> bytes:
    content = path.read_bytes()
    if _digest(content) != digest:
        raise ValueError(f"{path.name} does not match its hash")
    return content
