"""An unsupported version is named in one line, at first use."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import pytest
import torch

import iocompiler as ioc
from iocompiler.errors import UnsupportedVersion
from iocompiler.versions import require_supported, version_tuple


@pytest.fixture(autouse=True)
def _looked_at_anew() -> Iterator[None]:
    require_supported.cache_clear()
    yield
    require_supported.cache_clear()


def test_these_are_supported() -> None:
    require_supported()


@pytest.mark.parametrize("package", ["torch", "triton"])
def test_an_old_one_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.metadata.version

    def version(name: str) -> str:
        return "2.4.1+cpu" if name == package else installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UnsupportedVersion, match=rf"needs {package} \S+ or later, this is 2\.4\.1"):
        require_supported()
    run = torch.compile(lambda x: x + 1, backend=ioc.Compiler(engine="reference"))
    with pytest.raises(Exception, match=f"iocompiler needs {package}"):
        run(torch.ones(3))


def test_without_triton_a_cpu_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.13.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    require_supported()


def test_versions_are_numbers_as_far_as_they_are() -> None:
    assert version_tuple("2.13.0+cpu") == (2, 13, 0)
    assert version_tuple("3.6.0rc1") == (3, 6)
