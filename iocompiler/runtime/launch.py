"""Launching a compiled kernel with as little Python as there can be: one pack, one driver call.

`Signature` reads the text a generated module states its kernels' parameters in; `make_launch`
writes, for one kernel, a Python function whose constants are in its code. It packs launch
configuration and parameters into a buffer prepared once; buffers are taken from and given back to a
list, whose pop and append are atomic, so threads do not meet.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch

from iocompiler.errors import LaunchError
from iocompiler.runtime.driver import INVALID_CONTEXT, Driver
from iocompiler.runtime.launch_buffer import SCRATCH, Slots, layout_of
from iocompiler.runtime.overlap import ATTRIBUTES, NO_ATTRIBUTES

Launch = Callable[..., None]
"""``launch(stream, grid_x, grid_y, grid_z, *parameters)``: pointers as ints, numbers as numbers."""

_FORMATS = {
    "i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q",
    "u1": "?", "u8": "B", "u16": "H", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d",
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """One kernel parameter: its Triton type ("*fp32", "i32") and whether it may be taken as a
    multiple of 16.
    """

    name: str
    type: str
    divisible: bool

    @property
    def is_pointer(self) -> bool:
        return self.type.startswith("*")

    @property
    def format(self) -> str:
        return "Q" if self.is_pointer else _FORMATS[self.type]


@dataclass(frozen=True)
class Signature:
    """The parameters of a kernel, written ``"x:*fp32:16 n:i32"``; ``:16`` marks the ones that may
    be divisible.
    """

    parameters: tuple[Parameter, ...]

    @staticmethod
    def parse(text: str) -> Signature:
        rows = (part.split(":") for part in text.split())
        return Signature(tuple(Parameter(row[0], row[1], row[2:] == ["16"]) for row in rows))

    def __str__(self) -> str:
        return " ".join(
            f"{p.name}:{p.type}" + (":16" if p.divisible else "") for p in self.parameters
        )

    @property
    def types(self) -> tuple[tuple[str, str], ...]:
        return tuple((p.name, p.type) for p in self.parameters)

    def divisible(self, pointers: bool, sizes: bool) -> tuple[int, ...]:
        """Positions that are multiples of 16 if the marked ``pointers``, ``sizes`` are."""
        return tuple(
            position
            for position, p in enumerate(self.parameters)
            if p.divisible and (pointers if p.is_pointer else sizes)
        )


@dataclass(frozen=True)
class Image:
    """A kernel ready to be loaded: cubin and metadata as `compile.Compiled` has them."""

    cubin: bytes
    metadata: dict[str, Any]


_TEMPLATE = """\
def launch(stream, gx, gy, gz{parameters}):
{checks}    if not (gx and gy and gz):
        return
{scratch}    try:
        slot = take()
    except IndexError:
        slot = new_slot()
    buffer, config, addresses, _ = slot
    pack(buffer, 0, gx, gy, gz, {threads}, 1, 1, {shared}, stream, {attributes}
         {parameters}, {pointers})
    code = call(config, function, addresses, null)
    give(slot)
    if code:
        failed(code, config, addresses)
"""


def make_launch(
    signature: Signature,
    image: Image,
    driver: Driver,
    device: int,
    unaligned: Launch | None = None,
    odd_sizes: Launch | None = None,
) -> Launch:
    """The launch function of a kernel loaded on CUDA device ``device``.

    Args:
        unaligned: called instead where a pointer marked divisible is not 16-byte aligned.
        odd_sizes: called instead where a size marked divisible is no multiple of 16.
            Where these are None, nothing is checked.

    Raises:
        LaunchError: the cubin cannot be loaded, or asks for a kind of launch that is not supported.
    """
    given = [p.name for p in signature.parameters]
    return loaded(signature, image, driver, device, given, unaligned, odd_sizes)(())


def loaded(
    signature: Signature,
    image: Image,
    driver: Driver,
    device: int,
    given: Sequence[str],
    unaligned: Launch | None = None,
    odd_sizes: Launch | None = None,
) -> Callable[[Sequence[float]], Launch]:
    """What makes launch functions of a kernel, each from the values of its parameters, in their
    order, that are not ``given`` at every call.

    Args:
        given: the names of the parameters the functions take, in their order.
        unaligned, odd_sizes: and errors, as of `make_launch`.
    """
    metadata = image.metadata
    name = metadata["name"]
    if metadata["num_ctas"] != 1 or metadata["cooperative"]:
        raise LaunchError(
            kernel=name,
            action="preparing",
            cause="clusters and cooperative grids are not supported",
        )
    function = ctypes.c_void_p(driver.function(image.cubin, name, metadata["shared"], device))
    layout = layout_of({p.name: p.format for p in signature.parameters}, given)
    code = _code(_text(signature, given, metadata, unaligned, odd_sizes), name)
    constants: dict[str, Any] = {
        "pack": layout.packed.pack_into,
        "call": driver.launch,
        "function": function,
        "null": ctypes.c_void_p(0),
        "unaligned": unaligned,
        "odd_sizes": odd_sizes,
        "failed": _failure(driver, name, device, function),
        "allocate": lambda size: torch.empty(
            size, dtype=torch.uint8, device=torch.device("cuda", device)
        ),
    }

    def made(values: Sequence[float]) -> Launch:
        slots = Slots(layout, values)
        slotted = {"take": slots.free.pop, "give": slots.free.append, "new_slot": slots.new}
        namespace = {**constants, **slotted}
        exec(code, namespace)
        launch: Launch = namespace["launch"]
        return launch

    return made


@functools.lru_cache(maxsize=256)
def _code(text: str, name: str) -> CodeType:
    # kernels with as many parameters that take as much have the same text
    return compile(text, f"<launch of {name}>", "exec")


def _text(
    signature: Signature,
    given: Sequence[str],
    metadata: dict[str, Any],
    unaligned: Launch | None,
    odd_sizes: Launch | None,
) -> str:
    """The launch function's source: the constants of the kernel are in its code."""
    names = {name: f"a{i}" for i, name in enumerate(given)}
    parameters = "".join(f", {n}" for n in names.values())
    scratch = {key: metadata[f"{key}_size"] for key in SCRATCH if metadata[f"{key}_size"]}
    return _TEMPLATE.format(
        parameters=parameters,
        checks=_checks(signature, names, parameters, unaligned, odd_sizes),
        scratch="".join(
            f"    {key} = allocate(gx * gy * gz * {size})\n" for key, size in scratch.items()
        ),
        threads=32 * metadata["num_warps"],
        shared=metadata["shared"],
        attributes="{}, {}".format(*(ATTRIBUTES if metadata["waits"] else NO_ATTRIBUTES)),
        pointers=", ".join(f"{key}.data_ptr()" if key in scratch else "0" for key in SCRATCH),
    )


def _checks(
    signature: Signature,
    names: Mapping[str, str],
    parameters: str,
    unaligned: Launch | None,
    odd_sizes: Launch | None,
) -> str:
    own = [names.get(p.name, "") for p in signature.parameters]
    pointers = [own[i] for i in signature.divisible(True, False)] if unaligned else []
    sizes = [own[i] for i in signature.divisible(False, True)] if odd_sizes else []
    lines = ""
    for group, instead in ((pointers, "unaligned"), (sizes, "odd_sizes")):
        if group:
            lines += f"    if ({' | '.join(group)}) & 15:\n"
            lines += f"        return {instead}(stream, gx, gy, gz{parameters})\n"
    return lines


def _failure(
    driver: Driver, name: str, device: int, function: ctypes.c_void_p
) -> Callable[..., None]:
    def failed(code: int, config: ctypes.c_void_p, addresses: ctypes.c_void_p) -> None:
        if code == INVALID_CONTEXT:
            # this thread has not touched the device: torch sets the context at the first allocation
            driver.enter(device)
            code = driver.launch(config, function, addresses, ctypes.c_void_p(0))
        if code:
            raise LaunchError(kernel=name, action="launching", cause=driver.describe(code))

    return failed
