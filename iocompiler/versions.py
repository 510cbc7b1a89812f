"""The versions of torch and Triton the compiler works with, and where they differ."""

from __future__ import annotations

import functools
import importlib.metadata

from iocompiler.errors import UnsupportedVersion

OLDEST = {"torch": (2, 11), "triton": (3, 6)}


@functools.cache
def require_supported() -> None:
    """Looked at once a process, when the first graph comes.

    Raises:
        UnsupportedVersion: torch, or an installed Triton, is older than `OLDEST`.
    """
    for name, oldest in OLDEST.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a CPU needs no Triton
        if version_tuple(found) < oldest:
            raise UnsupportedVersion(name=name, found=found, oldest=".".join(map(str, oldest)))


@functools.cache
def group_norm_keeps_channels_last() -> bool:
    """Whether aten's group norm on a GPU returns channels last for channels last: from torch 2.15
    on. On a CPU it always did.
    """
    return version_tuple(importlib.metadata.version("torch")) >= (2, 15)


def version_tuple(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
