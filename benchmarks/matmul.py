"""Products with what stands around them: the library and our kernel, or one kernel from our
template, with the tile the model chooses and with the fastest of its candidates.

One line a product: microseconds of the library's product alone, of that with our pointwise kernel
behind it ("apart"), of the template with the chosen tile and with the best; how many times faster
than "apart" the template is, and how far the choice is from the best. "share" is that of the
library's rate at which `cost_model/matmul_price.py` would give the measured time: the median of
all, printed last, is what a device's row takes as `matmul_template`. "price" is the way the model
chooses, with the row's share or, where it has none, with 1; how often that is the faster way, and
what it costs where it is not, is printed too. Everything is compared with float64 before it is
timed. Kernels are compiled in parallel while others are timed; without a GPU products are planned
only.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmarks import matmul_algorithms, timing
from benchmarks.harness import Skipped, device_error, first_line, note, wanted
from benchmarks.matmul_zoo import PARTS, Product, Results
from benchmarks.schedules import plan_on_fakes
from benchmarks.table import Cell, Row, Table, geometric_mean
from iocompiler.cost_model.device import DEVICES, Device, current_device
from iocompiler.cost_model.matmul_price import TemplateTime, template_time
from iocompiler.cost_model.matmul_tiles import candidates
from iocompiler.cost_model.matmul_work import Work
from iocompiler.plan.data import Plan
from iocompiler.plan.fold import folded
from iocompiler.plan.priced import Priced, priced
from iocompiler.plan.product import MatmulTile
from iocompiler.plan.sites import sites
from iocompiler.runtime.measure_region import GpuRegionBench
from iocompiler.runtime.tune_matmul import Built, RegionBench
from tests.accuracy import FORWARD_FACTOR, SLACK, relative_error

FOLD, APART = "fold", "apart"
COLUMNS = (
    "name", "library us", "apart us", "chosen us", "best us", "apart/chosen", "apart/best",
    "chosen/best", "share", "price", "chosen TFLOP/s", "chosen", "best", "tiles", "note",
)  # fmt: skip


def main() -> None:
    args = arguments()
    if args.part == matmul_algorithms.PART:
        matmul_algorithms.run(args)
        return
    gpu = timing.on_gpu()
    device = current_device(torch.device("cuda")) if gpu else DEVICES["h200"]
    bench = GpuRegionBench(torch.device("cuda")) if gpu else None
    run = Run(args, device, bench, Table(f"matmul: {args.part}", COLUMNS))
    run.all(each for part in args.part.split(",") for each in PARTS[part]())
    summarize(run.table, run.started)
    run.table.finish(args.json)


def arguments() -> argparse.Namespace:
    found = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = found.add_argument
    parts = f"comma-separated: {', '.join(PARTS)}; or {matmul_algorithms.PART}"
    add("--part", default="epilogues", help=f"{parts} (`benchmarks/matmul_algorithms.py`)")
    add("--only", default="", help="comma-separated: products whose name contains one of these")
    add("--most", type=int, default=8, help="tiles of a product at most (default 8)")
    add("--ahead", type=int, default=4, help="products compiled ahead of the clock (default 4)")
    add("--limit", type=float, default=400.0, help="seconds after which the rest is skipped")
    add("--quick", action="store_true", help="small models, for a CPU (algorithms alone)")
    add("--no-check", dest="check", action="store_false", help="time without comparing")
    add("--json", metavar="PATH", help="write every tile's time there")
    return found.parse_args()


@dataclass(frozen=True)
class _Work:
    """One product, its plan as it stands and with each tile, being compiled."""

    product: Product
    plan: Plan
    tiles: list[MatmulTile]
    modeled: list[float]
    price: Priced
    template: TemplateTime
    built: Future[list[Built | None]] | None


@dataclass
class Run:
    """The table being filled; ``bench`` is None where nothing can be timed."""

    args: argparse.Namespace
    device: Device
    bench: RegionBench | None
    table: Table
    started: float = field(default_factory=time.perf_counter)
    broken: str = ""

    def all(self, products: Iterable[Product]) -> None:
        """Plan each product, compile it while those before are timed, time it."""
        waiting: list[tuple[Row, _Work]] = []
        with ThreadPoolExecutor(1) as compiler:
            for product in products:
                if not wanted(product.name, self.args.only):
                    continue
                row: Row = {"name": product.name, "group": product.group}
                self.table.rows.append(row)
                try:
                    self._raise_if_over()
                    waiting.append((row, self._planned(row, product, compiler)))
                except Exception as error:  # whatever is wrong with it is its result
                    self._failed(row, error)
                # a few products are ahead of the clock: what the limit cuts is not compiled
                if len(waiting) > self.args.ahead:
                    self._timed(*waiting.pop(0))
            for each in waiting:
                self._timed(*each)

    def _raise_if_over(self) -> None:
        if self.broken:
            raise Skipped(f"the device failed before: {self.broken}")
        if time.perf_counter() - self.started > self.args.limit:
            raise Skipped(f"past {self.args.limit:.0f} s")

    def _failed(self, row: Row, error: Exception) -> None:
        note(row, "failed", f"{type(error).__name__}: {first_line(error)}")
        if not isinstance(error, Skipped):
            self.broken = self.broken or device_error()
        print(_line(row), flush=True)

    def _planned(self, row: Row, product: Product, compiler: ThreadPoolExecutor) -> _Work:
        names = product.function.__code__.co_varnames[: len(product.layouts)]
        plan = plan_on_fakes(
            product.function, dict(zip(names, product.layouts, strict=True)), names
        )
        (site,) = sites(plan)
        tiles = candidates(*site.key, self.device, most=self.args.most)
        work = Work(*site.key, self.device, {})
        row["chosen"] = shown(tiles[0])
        known = self.device.matmul_template or 1.0
        (price,) = priced(plan, replace(self.device, matmul_template=known), {})
        row["price"] = FOLD if price.pays else APART
        template = template_time(*site.key, tiles[0], self.device, {})
        plans = [plan, *(folded(plan, {site.key: tile}) for tile in tiles)]
        built = compiler.submit(self.bench.load, plans) if self.bench is not None else None
        modeled = [work.seconds(tile) for tile in tiles]
        return _Work(product, plan, tiles, modeled, price, template, built)

    def _timed(self, row: Row, work: _Work) -> None:
        try:
            if work.built is not None and self.bench is not None:
                self._raise_if_over()
                _measure(row, work, work.built.result(), self.bench, self.args.check)
        except Exception as error:  # whatever a kernel raises is its result
            if work.built is not None:
                work.built.cancel()
            self._failed(row, error)
            return
        self.table.write(self.args.json)
        print(_line(row), flush=True)


def _measure(
    row: Row, work: _Work, built: Sequence[Built | None], bench: RegionBench, check: bool
) -> None:
    apart, *folds = built
    ways = {tile: run for tile, run in zip(work.tiles, folds, strict=True) if run is not None}
    if apart is None:
        raise RuntimeError("the kernel behind the product does not compile")
    if work.tiles[0] not in ways:
        note(row, "chosen", "does not compile, or spills")
    if check:
        for tile, wrong in _wrong(work.product, ways).items():
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
        # both are scaled by what the model errs of the library
        if library is not None:
            share = work.template.share(chosen * work.price.library_s / library)
            row["share"] = share if math.isfinite(share) else None
        row["chosen TFLOP/s"] = work.product.flops / chosen / 1e12


def _us(seconds: float | None) -> Cell:
    return None if seconds is None else seconds * 1e6


def _library(product: Product) -> Built:
    return lambda args: _listed(product.library(*args))


def _listed(results: Results) -> list[Tensor]:
    return list(results) if isinstance(results, tuple) else [results]


def _wrong(product: Product, ways: Mapping[MatmulTile, Built]) -> dict[MatmulTile, str]:
    """Of each kernel that errs more against float64 than eager may, by how much."""
    generator = torch.Generator(timing.device()).manual_seed(1)
    given = [_random(shape, strides, generator) for shape, strides in product.layouts]
    exact = _listed(product.function(*(x.double() for x in given)))
    eager = _listed(product.function(*given))
    allowed = [
        FORWARD_FACTOR * relative_error(theirs, wanted) + SLACK
        for theirs, wanted in zip(eager, exact, strict=True)
    ]
    found: dict[MatmulTile, str] = {}
    for tile, run in ways.items():
        for got, true, most in zip(run(list(given)), exact, allowed, strict=True):
            error = relative_error(got, true)
            if error > most:  # infinite where one of both is not finite
                found[tile] = f"WRONG: errs by {error:.3g}, allowed {most:.3g}"
    return found


def _random(shape: tuple[int, ...], strides: tuple[int, ...], generator: torch.Generator) -> Tensor:
    tensor = torch.empty_strided(shape, strides, dtype=torch.bfloat16, device=timing.device())
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


def summarize(table: Table, started: float) -> None:
    """By group: the mean gain over the library and a kernel, the worst, and the choice's."""
    for group in dict.fromkeys(row["group"] for row in table.rows):
        rows = [row for row in table.rows if row["group"] == group]
        for name in ("apart/chosen", "apart/best", "chosen/best", "share"):
            values = [v for row in rows if isinstance(v := row.get(name), float)]
            table.summary |= _facts(f"{group}: {name}", values)
    table.summary |= _price_facts(table.rows)
    table.summary["seconds"] = round(time.perf_counter() - started)


def _price_facts(rows: Sequence[Row]) -> dict[str, Cell]:
    """Of all rows: the share for a device's row, and how good the choice by price is."""
    gains = [
        (gain, row["price"]) for row in rows if isinstance(gain := row.get("apart/chosen"), float)
    ]
    shares = [share for row in rows if isinstance(share := row.get("share"), float)]
    found: dict[str, Cell] = {}
    if shares:
        found["share, median of all (matmul_template)"] = statistics.median(shares)
    if not gains:
        return found
    lost = [max(1.0, 1 / gain if price == FOLD else gain) for gain, price in gains]
    return found | {
        "choice by price, right": f"{lost.count(1.0)} of {len(lost)}",
        "choice by price, times the faster way at worst": max(lost),
    }


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
