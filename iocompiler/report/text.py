"""The report for people: totals, then kernels, what was recognised, near misses, and what was not
fused and why."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from iocompiler.recompute.trade import Trade
from iocompiler.report.ledger import Edge, Kernel, Report, Resources

WIDTH = 120
MOST_KERNELS = 40
MOST_EDGES = 15
MOST_AGAIN = 12


def as_text(report: Report, width: int = WIDTH) -> str:
    """The report as plain text, ``width`` columns wide."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(report)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def as_svg(report: Report, width: int = WIDTH) -> str:
    """The same as a picture."""
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(report)
    return console.export_svg(title=f"iocompiler on {report.device}")


def parts(report: Report) -> Iterator[RenderableType]:
    """What is printed, in order; sections with nothing to say are left out."""
    yield _totals(report)
    yield from map(_trade, report.trades)
    if report.kernels:
        yield _kernels(report)
    if report.rewrites:
        yield _findings(
            "recognised", [(r.pattern, r.where, r.variant) for r in report.rewrites], "as"
        )
    if report.misses:
        yield _findings(
            "near misses", [(m.pattern, m.where, m.reason) for m in report.misses], "why not"
        )
    if report.unfused:
        yield _unfused(report)
    if report.copies:
        yield _copies(report)
    if report.fallbacks:
        yield _findings(
            "not compiled", [(f.region, f.where, f.cause) for f in report.fallbacks], "why"
        )


def _totals(report: Report) -> Table:
    table = Table(
        title=f"iocompiler on {report.device}", title_justify="left", box=None, show_header=False
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    least, moved = report.bytes_bound, report.bytes_moved
    _row(
        table,
        "bytes moved",
        show_bytes(moved),
        f"{moved / least:.2f} x the least possible" if least else "",
    )
    _row(
        table,
        "least possible",
        show_bytes(least),
        "inputs and outputs once, and what contractions force",
    )
    bound_us = report.time_bound_us
    over = (
        f"{report.time_us / bound_us:.2f} x the bound of {show_time(bound_us)}" if bound_us else ""
    )
    _row(table, "modeled time", show_time(report.time_us), over)
    ours = sum(k.generated for k in report.kernels)
    _row(
        table,
        "kernels",
        str(len(report.kernels)),
        f"{ours} generated, {len(report.kernels) - ours} calls",
    )
    if report.sizes:
        sizes = ", ".join(f"{name} = {value}" for name, value in report.sizes)
        _row(table, "sizes", str(len(report.sizes)), f"priced at {sizes}")
    return table


def _trade(trade: Trade) -> Table:
    """All points, the unconstrained one first, then what the chosen one makes again."""
    bound = f"at most {show_bytes(trade.allowed)}" + ("" if trade.fits else ", which nothing keeps")
    table = _table(f"memory for time, peak {bound}")
    table.add_column("", no_wrap=True)
    table.add_column("way, or what is made again", ratio=3, overflow="fold")
    for name in ("peak", "time", "saved"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("where", ratio=2, overflow="fold")
    for point in trade.points or (trade.unconstrained, trade.chosen):
        mark = "*" if point == trade.chosen else ""
        peak, time = show_bytes(point.peak), show_time(point.time_us)
        _row(table, mark, point.name, peak, time, show_bytes(point.saved), "")
    largest = sorted(trade.again, key=lambda each: -each.bytes)
    for each in largest[:MOST_AGAIN]:
        what = f"again: {each.name} ({each.operator})"
        _row(table, "", what, "", "", f"-{show_bytes(each.bytes)}", each.where)
    rest = sum(each.bytes for each in largest[MOST_AGAIN:])
    _remainder(table, len(largest) - MOST_AGAIN, "made again", rest, columns=(1, 4))
    return table


@dataclass(frozen=True)
class Group:
    """Equal kernels, shown as one line."""

    first: Kernel
    members: tuple[Kernel, ...]

    @property
    def bytes(self) -> int:
        return sum(k.bytes for k in self.members)

    @property
    def time_us(self) -> float:
        return sum(k.time_us for k in self.members)


def grouped(kernels: tuple[Kernel, ...]) -> list[Group]:
    """Kernels that differ only in their place in the model, most time first."""
    groups: dict[tuple[object, ...], list[Kernel]] = {}
    for kernel in kernels:
        # the same program over the same sizes: the text names neither tensors nor lines
        key = (kernel.name, kernel.graph, kernel.bytes, kernel.flops, kernel.tile, kernel.layout)
        groups.setdefault((*key, kernel.templates), []).append(kernel)
    found = [Group(members[0], tuple(members)) for members in groups.values()]
    return sorted(found, key=lambda g: -g.time_us)


def _kernels(report: Report) -> Table:
    groups = grouped(report.kernels)
    compiled = any(k.resources or k.templates for k in report.kernels)
    table = _table("kernels, most time first")
    table.add_column("n", justify="right")
    table.add_column("in", no_wrap=True)
    table.add_column("kernel", ratio=6, overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("x bound", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("tile, or why a call", ratio=5)
    if compiled:
        table.add_column("regs/spill/\nsmem", no_wrap=True)
    table.add_column("where", min_width=21, overflow="fold")
    for group in groups[:MOST_KERNELS]:
        _row(table, *_kernel_cells(group, compiled))
        for each in group.first.templates:  # a line of its own below the call
            _row(table, "", "", f"  {each.name}", *[""] * 4, _show_resources(each.resources), "")
    rest = sum(g.bytes for g in groups[MOST_KERNELS:])
    _remainder(table, len(groups) - MOST_KERNELS, "kernels", rest, columns=(2, 3))
    return table


_PASSES = {"forward": "fwd", "backward": "bwd", "inference": "inf"}


def _kernel_cells(group: Group, compiled: bool) -> list[str]:
    first = group.first
    lines = sorted({line for k in group.members for line in k.where})
    cells = [
        f"{len(group.members)}",
        _PASSES.get(first.graph, first.graph),
        first.name.removeprefix(f"{first.graph}_").removesuffix(".default"),
        show_bytes(group.bytes),
        f"{first.bytes / first.bound:.2f}" if first.bound else "",
        show_time(group.time_us),
        first.tile if not first.tile.endswith(first.name) else "",
    ]
    if compiled:
        cells.append(_show_resources(first.resources))
    more = f" +{len(lines) - 1}" if len(lines) > 1 else ""
    return [*cells, lines[0] + more if lines else ""]


def _show_resources(r: Resources | None) -> str:
    return f"{r.registers}/{r.spills}/{r.shared}" if r else ""


def _unfused(report: Report) -> Table:
    table = _table("not fused, most bytes first")
    table.add_column("n", justify="right")
    table.add_column("from", ratio=2, overflow="fold")
    table.add_column("to", ratio=2, overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("why", ratio=5)
    groups: dict[tuple[str, int], list[Edge]] = {}
    for edge in report.unfused:
        groups.setdefault((_without_name(edge), edge.bytes), []).append(edge)
    ordered = sorted(groups.values(), key=lambda edges: -sum(e.bytes for e in edges))
    for edges in ordered[:MOST_EDGES]:
        first = edges[0]
        total = show_bytes(sum(e.bytes for e in edges))
        _row(table, str(len(edges)), first.producer, first.consumer, total, first.reason)
    rest = sum(e.bytes for edges in ordered[MOST_EDGES:] for e in edges)
    _remainder(table, len(ordered) - MOST_EDGES, "edges", rest, columns=(1, 3))
    return table


def _copies(report: Report) -> Table:
    asked = sum(copy.bytes for copy in report.copies)
    kept = sum(copy.bytes_kept for copy in report.copies)
    table = _table(f"copies: {show_bytes(asked)} asked for, {show_bytes(kept)} left")
    table.add_column("n", justify="right")
    table.add_column("what", ratio=2, overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("left", justify="right", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("where", ratio=2, overflow="fold")
    for copy in report.copies[:MOST_EDGES]:
        left = (str(copy.kept), show_bytes(copy.bytes_kept)) if copy.kept else ("", "")
        total = show_bytes(copy.bytes) if copy.asked else ""
        _row(table, str(copy.asked or ""), copy.operator, total, *left, copy.where)
    rest = sum(copy.bytes_kept for copy in report.copies[MOST_EDGES:])
    _remainder(table, len(report.copies) - MOST_EDGES, "lines", rest, columns=(1, 4))
    return table


def _without_name(edge: Edge) -> str:
    """The reason with the names of this edge's ends taken out: equal ones are one line."""
    return edge.reason.replace(edge.producer, "").replace(edge.consumer, "")


def _findings(title: str, rows: list[tuple[str, str, str]], last: str) -> Table:
    table = _table(title)
    table.add_column("n", justify="right")
    table.add_column("what", no_wrap=True)
    table.add_column("where", ratio=2)
    table.add_column(last, ratio=5)
    counts: dict[tuple[str, str, str], int] = {}
    for row in rows:
        counts[row] = counts.get(row, 0) + 1
    for row, count in counts.items():
        _row(table, str(count), *row)
    return table


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, expand=True, pad_edge=False
    )


def _row(table: Table, *cells: str) -> None:
    """Cells as they are: brackets in a shape are no markup."""
    table.add_row(*map(Text, cells))


def _remainder(table: Table, left: int, what: str, size: int, columns: tuple[int, int]) -> None:
    """A last line for what was cut: its name and its bytes stand in these columns."""
    if left > 0:
        cells = ["" for _ in table.columns]
        cells[columns[0]] = f"and {left} more {what}"
        cells[columns[1]] = show_bytes(size)
        _row(table, *cells)


def show_bytes(count: float) -> str:
    """With three digits, in powers of 1000: "1.23 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def show_time(microseconds: float) -> str:
    """With three digits: "12.3 us"."""
    for unit in ("us", "ms"):
        if microseconds < 999.5:
            return f"{microseconds:.3g} {unit}"
        microseconds /= 1000
    return f"{microseconds:.3g} s"
