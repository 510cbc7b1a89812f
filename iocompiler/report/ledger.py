"""The ledger: what moved, what the least possible was, and why the rest was not saved."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from iocompiler.graph.findings import Miss, Rewrite
from iocompiler.recompute.trade import Trade

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers a thread, bytes of spills, bytes of shared memory a
    block."""

    registers: int
    spills: int
    shared: int


@dataclass(frozen=True)
class Template:
    """A hand-written template that a call launches, and what it takes; None where it was not, or
    cannot be, compiled.
    """

    name: str
    resources: Resources | None = None


@dataclass(frozen=True)
class Kernel:
    """One launch, or one call.

    Attributes:
        name: of the kernel, or the operator's qualified name for a plain call.
        graph: the flat graph it belongs to: "forward", "backward" or "inference".
        ops: the graph's nodes computed here.
        where: the user's lines they come from, as "model.py:88".
        bytes: modeled bytes of device memory traffic.
        bound: the least bytes its tensors allow: each read or written once.
        flops: arithmetic, a multiply and an add counted as two.
        time_us: modeled microseconds, launch included.
        tile: the schedule of a generated kernel, the reason of a plain call.
        layout: its results, as "bf16[8192, 768]", with their strides where they are not dense rows.
        source: the Triton text, or the name of the operator called.
        resources: of the compiled kernel; None where it was not compiled.
        formula: ``bytes`` in the size symbols; "" where shapes are static.
        generated: whether the kernel is ours.
        templates: of a call, those it launches, in order, each kernel of them once.
    """

    name: str
    graph: str
    ops: tuple[str, ...]
    where: tuple[str, ...]
    bytes: int
    bound: int
    flops: int
    time_us: float
    tile: str
    layout: str
    source: str
    resources: Resources | None = None
    formula: str = ""
    generated: bool = False
    templates: tuple[Template, ...] = ()


@dataclass(frozen=True)
class Edge:
    """A tensor that passed through memory between two kernels, and why; ``bytes`` are its own,
    once."""

    producer: str
    consumer: str
    bytes: int
    reason: str
    graph: str = ""


@dataclass(frozen=True)
class Copied:
    """A copy the program asks for, at one line: how often and what it would move, how often it is
    still done and what that moves. One that a reader needs, and nobody asks for, is asked for 0
    times.
    """

    operator: str
    where: str
    asked: int
    bytes: int
    kept: int
    bytes_kept: int


@dataclass(frozen=True)
class Lost:
    """What runs on aten, unrewritten or outside of any graph, and why."""

    region: str
    cause: str
    where: str = ""


@dataclass(frozen=True)
class Report:
    """What compiling a program for a device comes to.

    Attributes:
        device: the row it was priced for.
        kernels: every launch, in the order of the graphs and of their steps.
        rewrites, misses: what was recognised, and what nearly was.
        unfused: edges that stayed in memory, largest first.
        copies: those the program asks for, and what is left of them.
        fallbacks: regions lost to aten, and graph breaks.
        trades: memory for time in each training step, under a memory budget.
        bytes_bound: the least bytes any fusion of these graphs must move. What the forward hands to
            the backward does not count: it could be made again.
        time_bound_us: the least microseconds: those bytes at full bandwidth, or the arithmetic at
        full rate.
        sizes: the value every size symbol was priced at.
        graphs: the flat graphs by name ("forward_0"), for export; not part of a saved report.
    """

    device: str
    kernels: tuple[Kernel, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()
    misses: tuple[Miss, ...] = ()
    unfused: tuple[Edge, ...] = ()
    copies: tuple[Copied, ...] = ()
    fallbacks: tuple[Lost, ...] = ()
    trades: tuple[Trade, ...] = ()
    bytes_bound: int = 0
    time_bound_us: float = 0.0
    sizes: tuple[tuple[str, int], ...] = ()
    graphs: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def bytes_moved(self) -> int:
        """Modeled bytes of device memory traffic of all kernels."""
        return sum(k.bytes for k in self.kernels)

    @property
    def flops(self) -> int:
        return sum(k.flops for k in self.kernels)

    @property
    def time_us(self) -> float:
        """Modeled microseconds of all kernels, one after another."""
        return sum(k.time_us for k in self.kernels)

    def __add__(self, other: Report) -> Report:
        """Both programs, one after the other, on one device."""
        return replace(
            self,
            kernels=self.kernels + other.kernels,
            rewrites=self.rewrites + other.rewrites,
            misses=self.misses + other.misses,
            unfused=tuple(sorted(self.unfused + other.unfused, key=lambda e: -e.bytes)),
            copies=tuple(
                sorted(self.copies + other.copies, key=lambda c: -max(c.bytes, c.bytes_kept))
            ),
            fallbacks=self.fallbacks + other.fallbacks,
            trades=self.trades + other.trades,
            bytes_bound=self.bytes_bound + other.bytes_bound,
            time_bound_us=self.time_bound_us + other.time_bound_us,
            sizes=tuple(dict(self.sizes + other.sizes).items()),
            graphs={**self.graphs, **other.graphs},
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the report in the format of the suffix: .json, .txt, .svg or .mlir.

        Raises:
            ReportFormat: another suffix, or .mlir without torch-mlir or without the graphs.
        """
        from iocompiler.report.save import save

        save(self, path)

    def __str__(self) -> str:
        from iocompiler.report.text import as_text

        return as_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from iocompiler.report.text import parts

        yield from parts(self)
