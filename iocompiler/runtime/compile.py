"""Kernels to cubins, in parallel worker processes that are started once and reused.

`warm` starts the workers while the graph is still being captured; `compile_kernels` sends them the
jobs. A worker is `runtime/worker.py`: it imports Triton and no torch: it is ready in 0.2 seconds.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from iocompiler.errors import CompileError

MAX_WORKERS = 16
_WORKER = Path(__file__).with_name("worker.py")


class Compilable(Protocol):
    """What can be compiled: a `Job`, or a `template_form.TemplateJob`."""

    @property
    def name(self) -> str: ...

    @property
    def where(self) -> str:
        """The user's lines."""

    def as_json(self) -> dict[str, Any]:
        """What the cubin depends on."""

    def message(self, path: str) -> dict[str, Any]:
        """What a worker is sent, where the kernel's text is that of the file ``path``."""

    def files(self) -> dict[str, bytes]:
        """What the cache keeps beside the cubin."""


@dataclass(frozen=True)
class Job:
    """One kernel to compile: ``source`` is the text of a whole file, ``where`` the user's lines.

    ``signature`` maps each parameter to its Triton type; ``divisible`` are the positions of those
    known to be multiples of 16 (bytes for pointers); ``capability`` is 90 for version 9.0;
    ``registers`` the most of a thread (0: any number).
    """

    source: str
    name: str
    signature: tuple[tuple[str, str], ...]
    divisible: tuple[int, ...]
    num_warps: int
    num_stages: int
    capability: int
    where: str = ""
    registers: int = 0

    def as_json(self) -> dict[str, Any]:
        """What the cubin depends on; "where" is for messages only."""
        return {
            "source": self.source,
            "name": self.name,
            "signature": dict(self.signature),
            "divisible": list(self.divisible),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "capability": self.capability,
            "registers": self.registers,
        }

    def message(self, path: str) -> dict[str, Any]:
        return {**self.as_json(), "path": path}

    def files(self) -> dict[str, bytes]:
        return {"kernel.py": self.source.encode()}


@dataclass(frozen=True)
class Compiled:
    """A cubin and its metadata (name, num_warps, shared, registers, spills, scratch sizes)."""

    cubin: bytes
    metadata: dict[str, Any]


class _WorkerDied(Exception):
    """The worker's socket closed before an answer came."""


class Pool:
    """Worker processes, one socket each. Not shared across a fork: the child starts its own."""

    def __init__(self, workers: int, scratch_root: Path | None):
        self.scratch = _scratch_folder(scratch_root)
        pairs = [socket.socketpair() for _ in range(workers)]
        environment = {
            **os.environ,
            "TRITON_CACHE_DIR": self.scratch,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        environment.pop("TRITON_INTERPRET", None)  # under which nothing is compiled
        theirs = [their.fileno() for _, their in pairs]
        with open(os.path.join(self.scratch, "stderr.txt"), "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(_WORKER), *map(str, theirs)],
                pass_fds=theirs,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=environment,
            )
        for _, their in pairs:
            their.close()
        # None stands for "no worker is left": it wakes whoever still waits for one
        self.idle: queue.SimpleQueue[socket.socket | None] = queue.SimpleQueue()
        self.size = workers
        self.ended = False  # for good: nobody takes up what it was doing
        self._lock = threading.Lock()
        self.connections = [ours for ours, _ in pairs]
        for ours in self.connections:
            self.idle.put(ours)

    @property
    def usable(self) -> bool:
        return self.size > 0 and self.process.poll() is None

    def run(self, job: Compilable, path: str) -> dict[str, Any]:
        """The answer to one job; blocks until a worker is free.

        Raises:
            _WorkerDied: the worker ended before it answered.
        """
        connection = self.idle.get()
        if connection is None:
            self.idle.put(None)
            raise _WorkerDied(self._last_words())
        try:
            connection.sendall((json.dumps(job.message(path)) + "\n").encode())
            line = _read_line(connection)
        except OSError as error:
            self._lost(connection)
            raise _WorkerDied(self._last_words()) from error
        if self.size:
            self.idle.put(connection)
        else:  # closed meanwhile
            connection.close()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _lost(self, connection: socket.socket) -> None:
        connection.close()
        with self._lock:
            self.size -= 1
            if self.size == 0:
                self.idle.put(None)

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            return Path(self.scratch, "stderr.txt").read_text(errors="replace")[-2000:].strip()
        return ""

    def close(self) -> None:
        """End the workers and remove their scratch folder."""
        self.size = 0
        with contextlib.suppress(queue.Empty):
            while (connection := self.idle.get_nowait()) is not None:
                connection.close()
        self.idle.put(None)
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            # a worker is in the middle of a job; it ends after it, when it finds its socket closed
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)


def _scratch_folder(root: Path | None) -> str:
    """A folder of the pool's own below ``root``, or where that is full or gone, in the system's."""
    try:
        return tempfile.mkdtemp(prefix="triton-", dir=root)
    except OSError:
        return tempfile.mkdtemp(prefix="triton-")


def _read_line(connection: socket.socket) -> bytes:
    parts: list[bytes] = []
    while not parts or not parts[-1].endswith(b"\n"):
        part = connection.recv(1 << 20)
        if not part:
            raise ConnectionError("the worker closed its socket")
        parts.append(part)
    return b"".join(parts)


_pool: Pool | None = None
_pool_lock = threading.Lock()


def warm(scratch_root: Path | None = None) -> Pool:
    """The worker pool, started if it does not run; Triton may write to ``scratch_root``."""
    global _pool
    with _pool_lock:
        if _pool is None or not _pool.usable:
            if _pool is not None:
                _pool.close()
            _pool = Pool(worker_count(), scratch_root)
        return _pool


def worker_count() -> int:
    """As many workers as this process may use processors, at most `MAX_WORKERS`."""
    return max(1, min(len(os.sched_getaffinity(0)), MAX_WORKERS))


def _forget() -> None:
    """In a forked child: the parent's workers are not its own, and its copies of their sockets
    would keep them waiting when the parent has ended; a lock some thread held stays held.
    """
    global _pool, _pool_lock
    _pool_lock = threading.Lock()
    if _pool is not None:
        for connection in _pool.connections:
            connection.close()
        _pool.process.returncode = 0  # not this process's child: nothing to wait for
        _pool = None


os.register_at_fork(after_in_child=_forget)


@atexit.register
def shut_down() -> None:
    """End the workers; the next compilation starts new ones."""
    global _pool
    with _pool_lock:
        if _pool is not None:
            _pool.ended = True
            _pool.close()
        _pool = None


def compile_kernels(
    jobs: Sequence[tuple[Compilable, str]], scratch_root: Path | None = None
) -> list[Compiled]:
    """The jobs' cubins, in order. With each job goes the path of the file its line information
    shall name.

    Raises:
        CompileError: a kernel does not compile; the message has its name, Triton's message and the
        user's line.
    """
    if len(jobs) <= 1:
        return [_compile(job, path, scratch_root) for job, path in jobs]
    with ThreadPoolExecutor(min(len(jobs), worker_count())) as threads:
        return list(threads.map(lambda job: _compile(job[0], job[1], scratch_root), jobs))


def _compile(job: Compilable, path: str, scratch_root: Path | None) -> Compiled:
    # workers end when idle for long, all at once: the second try has a fresh pool
    for last_try in (False, True):
        pool = warm(scratch_root)
        try:
            answer = pool.run(job, path)
            break
        except _WorkerDied as died:
            pool.close()
            if last_try or pool.ended:
                cause = f"the compiler process ended. {died}".strip()
                raise CompileError(kernel=job.name, cause=cause, where=job.where) from died
    if "error" in answer:
        raise CompileError(kernel=job.name, cause=answer["error"], where=job.where)
    return Compiled(base64.b64decode(answer["cubin"]), answer["metadata"])
