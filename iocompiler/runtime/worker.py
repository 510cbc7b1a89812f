"""A Triton compiler behind a pipe: run as a script, it imports Triton once and forks workers that
take jobs.

``python worker.py <fd> <fd> ...`` serves one worker on each inherited socket. A job is one line of
JSON, the answer another; a worker ends when its socket closes or nothing came for `IDLE_SECONDS`.
This file imports Triton and the standard library only: not torch, and nothing of the package it
lies in, whose import would cost a second, but the templates, `template_source` and `overlap`, which
import no more than it does.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import select
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

IDLE_SECONDS = 300.0
# of every kernel: the default up to Triton 3.9, which warns; not of 3.10
OPTIONS = {"enable_fp_fusion": True}

_REGISTERS = re.compile(r"Used (\d+) registers")
# what the assembler says where matrix instructions cannot overlap
_SERIALIZED = "wgmma.mma_async instructions are serialized"
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def compile_kernel(job: dict[str, Any]) -> dict[str, Any]:
    """Compile one kernel of a source text, or a template.

    Args:
        job: "source" (text), "path" (the file it stands in, for line information), "name",
            "signature" (parameter name to Triton type, in order), "divisible" (positions of the
            parameters known to be multiples of 16), "num_warps", "num_stages", "capability"
            (90 for version 9.0), "registers" (the most of a thread; 0: any number); or a
            template's, which has "kernel".

    Returns:
        "cubin" (base64) and "metadata" (name, num_warps, shared bytes, registers, spills in bytes,
        scratch sizes, whether matrix instructions are serialized, whether it "waits" for the kernel
        before it (`overlap`); of a template its "parameters" as `template_source.Source` has them).
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    from iocompiler.runtime.overlap import waiting_kernels
    from iocompiler.runtime.template_source import template_source

    knobs.nvidia.dump_ptxas_log = True  # the only place registers and spills stand without a GPU
    knobs.compilation.always_compile = True
    knobs.compilation.store_binary_only = True
    target = GPUTarget("cuda", job["capability"], 32)
    made = template_source(job, target) if "kernel" in job else _source(job)
    log = io.StringIO()
    with contextlib.redirect_stdout(log), waiting_kernels(knobs, job["capability"]) as waits:
        compiled = triton.compile(made.source, target=target, options=made.options)
    cubin = base64.b64encode(compiled.asm["cubin"]).decode()
    metadata = {**_metadata(compiled.metadata, log.getvalue()), "waits": waits == [True]}
    return {"cubin": cubin, "metadata": {**metadata, "parameters": made.parameters}}


def _source(job: dict[str, Any]) -> Any:
    from triton.compiler import ASTSource

    from iocompiler.runtime.template_source import Source, executed, parameters_of

    function = executed(job["source"], job["path"])[job["name"]]
    attrs = {(position,): [["tt.divisibility", 16]] for position in job["divisible"]}
    options = {"num_warps": job["num_warps"], "num_stages": job["num_stages"], **OPTIONS}
    if job["registers"]:
        options["maxnreg"] = job["registers"]
    source = ASTSource(function, job["signature"], attrs=attrs)
    return Source(source, options, parameters_of(job["signature"]))


def _metadata(metadata: Any, log: str) -> dict[str, Any]:
    registers, spills = _REGISTERS.search(log), _SPILLS.search(log)
    fields = (
        "name",
        "num_warps",
        "num_ctas",
        "shared",
        "global_scratch_size",
        "profile_scratch_size",
    )
    found: dict[str, Any] = {field: getattr(metadata, field) for field in fields}
    found["cooperative"] = bool(metadata.launch_cooperative_grid or metadata.launch_pdl)
    found["registers"] = int(registers[1]) if registers else -1
    found["serialized"] = _SERIALIZED in log
    found["spills"] = int(spills[1]) + int(spills[2]) if spills else -1
    return found


def answer(line: str) -> str:
    """The JSON answer to one job: its result, or "error" with Triton's message."""
    try:
        return json.dumps(compile_kernel(json.loads(line)))
    except Exception as error:
        return json.dumps({"error": _told(error)})


def _told(error: BaseException) -> str:
    """The message, and of an error in a function that the kernel calls, that function's too."""
    text = f"{type(error).__name__}: {error}"
    return text if error.__cause__ is None else f"{text}\n{_told(error.__cause__)}"


def serve(connection: socket.socket) -> None:
    """Answer jobs until the other end closes or is silent for `IDLE_SECONDS`."""
    reader = connection.makefile("r", encoding="utf-8")
    while select.select([connection], [], [], IDLE_SECONDS)[0]:
        line = reader.readline()
        if not line:
            return
        connection.sendall((answer(line) + "\n").encode())


def main(descriptors: list[int]) -> None:
    """Import Triton, fork one worker a socket, and wait for them."""
    _import_package()
    _import_triton()
    sockets = [socket.socket(fileno=d) for d in descriptors]
    for connection in sockets:
        if os.fork() == 0:
            for other in sockets:
                if other is not connection:
                    other.close()
            with contextlib.suppress(OSError, KeyboardInterrupt):
                serve(connection)
            os._exit(0)
    for connection in sockets:
        connection.close()
    with contextlib.suppress(ChildProcessError, KeyboardInterrupt):
        while True:
            os.wait()


def _import_package() -> None:
    """The package by its place alone: its modules can be imported without what it imports."""
    package = ModuleType("iocompiler")
    package.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["iocompiler"] = package
    sys.meta_path.insert(0, _WithoutTorch())


class _WithoutTorch:
    """Torch cannot be found: Triton 3.7 imports it where it can."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torch":
            raise ModuleNotFoundError("torch is kept out of here", name=name)


def _import_triton() -> None:
    """Import what a compilation needs, before the fork: it is paid once."""
    import triton.compiler.code_generator
    import triton.language.extra.libdevice
    import triton.runtime.cache

    # Triton names its cache entries by a hash of all its files, libtriton.so too: 0.4 s in every
    # process. What is compiled here is never looked up there.
    triton.runtime.cache.triton_key = lambda: triton.__version__


if __name__ == "__main__":
    # the folder of this script is no place to import from: its files are named like other packages
    sys.path.pop(0)
    main([int(argument) for argument in sys.argv[1:]])
