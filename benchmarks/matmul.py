"""Products with what stands around them: the library and our kernel, or one kernel from our
template, with the tile the model chooses and with the fastest of its candidates.

One line a product: microseconds of the library's product alone, of that with our pointwise kernel
behind it ("apart"), of the template with the chosen tile and with the best; how many times faster
than "apart" the template is, and how far the choice is from the best. Everything is compared with
float64 before it is timed. Kernels are compiled in parallel while others are timed; without a GPU
products are planned only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.harness import first_line, note, wanted
from benchmarks.matmul_zoo import PARTS, Product
from benchmarks.schedules import plan_on_fakes
from benchmarks.table import Cell, Row, Table, geometric_mean
from iocompiler.cost_model.device import DEVICES, Device, current_device
from iocompiler.cost_model.matmul_tiles import Space, candidates
from iocompiler.plan.data import Plan
from iocompiler.plan.fold import Site, folded, sites
from iocompiler.plan.product import MatmulTile
from iocompiler.runtime.measure_region import GpuRegionBench
from iocompiler.runtime.tune_matmul import Built
from tests.accuracy import FORWARD_FACTOR, SLACK, relative_error

COLUMNS = (
    "name", "library us", "apart us", "chosen us", "best us", "apart/chosen", "apart/best",
    "chosen/best", "chosen TFLOP/s", "chosen", "best", "tiles", "note",
)  # fmt: skip


def main() -> None:
    args = arguments()
    started = time.perf_counter()
    gpu = timing.on_gpu()
    device = current_device(torch.device("cuda")) if gpu else DEVICES["h200"]
    bench = GpuRegionBench(torch.device("cuda")) if gpu else None
    table = Table(f"matmul: {args.part}", COLUMNS)
    with ThreadPoolExecutor(1) as compiler:
        # a few rows ahead of the clock: compiling everything first would waste what the limit cuts
        work: list[_Work] = []
        for each in _planned(args, device, bench, compiler):
            work.append(each)
            if len(work) > args.ahead:
                _row(table, work.pop(0), bench, args, started)
        for each in work:
            _row(table, each, bench, args, started)
    _summary(table, started)
    table.finish(args.json)


def arguments() -> argparse.Namespace:
    found = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = found.add_argument
    add("--part", default="epilogues", help=f"comma-separated: {', '.join(PARTS)}")
    add("--only", default="", help="comma-separated: products whose name contains one of these")
    add("--most", type=int, default=8, help="tiles of a product at most (default 8)")
    add("--ahead", type=int, default=4, help="products compiled ahead of the clock (default 4)")
    add("--limit", type=float, default=400.0, help="seconds after which the rest is skipped")
    add("--no-check", dest="check", action="store_false", help="time without comparing")
    add("--json", metavar="PATH", help="write every tile's time there")
    return found.parse_args()


@dataclass(frozen=True)
class _Work:
    """One product, its plan as it stands and with each tile, being compiled."""

    product: Product
    site: Site | None
    plan: Plan | None
    tiles: list[MatmulTile]
    modeled: list[float]
    built: Future[list[Built | None]] | None
    note: str = ""


def _planned(
    args: argparse.Namespace,
    device: Device,
    bench: GpuRegionBench | None,
    compiler: ThreadPoolExecutor,
) -> Iterator[_Work]:
    for part in args.part.split(","):
        for product in PARTS[part]():
            if wanted(product.name, args.only):
                try:
                    yield _work(product, args.most, device, bench, compiler)
                except Exception as error:
                    text = f"{type(error).__name__}: {first_line(error)}"
                    yield _Work(product, None, None, [], [], None, text)


def _work(
    product: Product,
    most: int,
    device: Device,
    bench: GpuRegionBench | None,
    compiler: ThreadPoolExecutor,
) -> _Work:
    names = tuple(product.function.__code__.co_varnames[: len(product.layouts)])
    layouts = dict(zip(names, product.layouts, strict=True))
    plan = plan_on_fakes(product.function, layouts, names)
    found = sites(plan)
    if len(found) != 1:
        return _Work(product, None, None, [], [], None, f"{len(found)} sites")
    (site,) = found
    tiles = candidates(*site.key, device, most=most)
    space = Space(*site.key, device, {})
    modeled = [space.seconds(tile) for tile in tiles]
    plans = [plan, *(folded(plan, {site.key: tile}) for tile in tiles)]
    built = compiler.submit(bench.load, plans) if bench is not None else None
    return _Work(product, site, plan, tiles, modeled, built)


def _row(
    table: Table,
    work: _Work,
    bench: GpuRegionBench | None,
    args: argparse.Namespace,
    started: float,
) -> None:
    row: Row = {"name": work.product.name, "group": work.product.group, "note": work.note or None}
    if work.tiles:
        row["chosen"] = shown(work.tiles[0])
    if time.perf_counter() - started > args.limit:
        row["note"] = f"past {args.limit:.0f} s"
        if work.built is not None:
            work.built.cancel()
    elif bench is not None and work.built is not None:
        try:
            _measure(row, work, bench, args.check)
        except Exception as error:  # whatever a kernel raises is its result
            note(row, "failed", f"{type(error).__name__}: {first_line(error)}")
        torch.cuda.empty_cache()
    table.rows.append(row)
    table.write(args.json)
    print(_line(row), flush=True)


def _measure(row: Row, work: _Work, bench: GpuRegionBench, check: bool) -> None:
    assert work.built is not None
    assert work.plan is not None
    apart, *built = work.built.result()
    ways = {tile: run for tile, run in zip(work.tiles, built, strict=True) if run is not None}
    if apart is None:
        raise RuntimeError("the kernel behind the product does not compile")
    if work.tiles[0] not in ways:
        note(row, "chosen", "does not compile, or spills")
    if check:
        for tile, run in list(ways.items()):
            wrong = _wrong(work.product, work.plan, run)
            if wrong:
                note(row, shown(tile), wrong)
                del ways[tile]
    runs = [_library(work.product), apart, *ways.values()]
    library, both, *times = bench.time(work.plan, runs, {})
    row["library us"], row["apart us"] = _us(library), _us(both)
    measured = {tile: t for tile, t in zip(ways, times, strict=True) if t is not None}
    row["measured"] = str({shown(tile): round(t * 1e6, 1) for tile, t in measured.items()})
    row["modeled"] = str([round(t * 1e6, 1) for t in work.modeled])
    row["tiles"] = len(measured)
    if not measured or both is None:
        return
    best = min(measured, key=lambda tile: measured[tile])
    row["best"], row["best us"] = shown(best), _us(measured[best])
    row["apart/best"] = both / measured[best]
    chosen = measured.get(work.tiles[0])
    if chosen is not None:
        row["chosen us"], row["apart/chosen"] = _us(chosen), both / chosen
        row["chosen/best"] = chosen / measured[best]
        row["chosen TFLOP/s"] = work.product.flops / chosen / 1e12


def _us(seconds: float | None) -> Cell:
    return None if seconds is None else seconds * 1e6


def _library(product: Product) -> Built:
    return lambda args: [product.library(*args)]


def _wrong(product: Product, plan: Plan, run: Built) -> str:
    """By how much a kernel errs more than eager against float64; "" where it does not."""
    generator = torch.Generator("cuda").manual_seed(1)
    given = [_random(shape, strides, generator) for shape, strides in product.layouts]
    assert len(given) == len(plan.inputs)
    (got,) = run(list(given))
    exact = product.function(*(x.double() for x in given))
    eager = relative_error(product.function(*given), exact)
    error = relative_error(got, exact)
    allowed = FORWARD_FACTOR * eager + SLACK
    return "" if error <= allowed else f"WRONG: errs by {error:.3g}, allowed {allowed:.3g}"


def _random(shape: tuple[int, ...], strides: tuple[int, ...], generator: torch.Generator) -> Tensor:
    tensor = torch.empty_strided(shape, strides, dtype=torch.bfloat16, device="cuda")
    return tensor.normal_(generator=generator)


def shown(tile: MatmulTile) -> str:
    """ "128x256x64 w8 s4 p2"; "tma" where operands come by descriptors."""
    parts = {"w": tile.num_warps, "s": tile.num_stages, "p": tile.parts, "P": tile.programs}
    words = [f"{letter}{count}" for letter, count in parts.items() if count]
    kind = ["tma"] if tile.loads == "descriptors" else []
    return " ".join([f"{tile.m}x{tile.n}x{tile.k}", *words, *kind])


def _line(row: Row) -> str:
    times = [row.get(f"{name} us") for name in ("library", "apart", "chosen", "best")]
    cells = " ".join(f"{t:9.1f}" if isinstance(t, float) else f"{'-':>9}" for t in times)
    return f"{str(row['name'])[:26]:26} {cells}  {row.get('chosen') or ''}  {row.get('note') or ''}"


def _summary(table: Table, started: float) -> None:
    """By group: the mean gain over the library and a kernel, the worst, and the choice's."""
    for group in dict.fromkeys(row["group"] for row in table.rows):
        rows = [row for row in table.rows if row["group"] == group]
        for name in ("apart/chosen", "apart/best", "chosen/best"):
            values = [v for row in rows if isinstance(v := row.get(name), float)]
            table.summary |= _facts(f"{group}: {name}", values)
    table.summary["seconds"] = round(time.perf_counter() - started)


def _facts(name: str, values: Sequence[float]) -> dict[str, Cell]:
    if not values:
        return {}
    return {
        f"{name}, geometric mean": geometric_mean(values),
        f"{name}, median": statistics.median(values),
        f"{name}, least": min(values),
        f"{name}, most": max(values),
        f"{name}, rows": len(values),
    }


if __name__ == "__main__":
    main()
