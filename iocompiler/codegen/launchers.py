"""What the functions of a generated module call, and where these are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from iocompiler.ops.library_product import LibraryProduct
from iocompiler.plan.data import BatchStep, KernelStep, MatmulStep
from iocompiler.tile.index import Size


@dataclass(frozen=True)
class Launcher:
    """A kernel's launch function in the module: its name, what registers it, and its grid."""

    name: str
    registration: str
    grid: tuple[Size, Size, Size]


class Launchers(Protocol):
    """Where the body gets the launch functions of its kernels."""

    def launcher(self, step: KernelStep | MatmulStep, signature: str) -> Launcher: ...

    def batch(self, step: BatchStep) -> str: ...

    def product(self, product: LibraryProduct[Size], title: str) -> str: ...


@dataclass
class Shared:
    """What the functions of a module have in common: its ``globals``, operators by their names
    there, what does their calls again by these names and the form of the calls, the functions that
    others pass to operators, whether algorithms of products were measured, and how often all of
    them call aten, and a library for a product.
    """

    globals: list[str] = field(default_factory=list)
    operators: dict[str, str] = field(default_factory=dict)
    replayed: dict[tuple[str, str], str] = field(default_factory=dict)
    functions: list[str] = field(default_factory=list)
    measured: bool = False
    aten_calls: int = 0
    products: int = 0
