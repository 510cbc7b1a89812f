"""Products and the kernels that read them by the clock: as they stand, or folded into a step of the
matmul template with one of several tiles. What is timed is the whole region, never the product
alone.

Only under mode="max-autotune", after the schedules of all kernels were measured. What was found is
kept in the cache under the region's text.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from iocompiler.codegen.matmul import template_prelude
from iocompiler.cost_model.device import Device
from iocompiler.cost_model.kernel import kernel_seconds
from iocompiler.cost_model.matmul_tiles import candidates
from iocompiler.plan.apart import apart, together
from iocompiler.plan.data import KernelStep, Plan
from iocompiler.plan.fold import folded, with_reasons
from iocompiler.plan.priced import Priced, chosen_by_price, priced
from iocompiler.plan.product import MatmulTile
from iocompiler.plan.sites import Site, SiteKey, sites
from iocompiler.runtime.cache import Cache, key_of
from iocompiler.runtime.compile import worker_count
from iocompiler.runtime.measure import DoesNotFit
from iocompiler.runtime.stimulus import has_safe_arguments
from iocompiler.runtime.tune import SHORTEST_S, TIE
from iocompiler.tile.index import Size

# measuring may take this many times as long as compiling a tile for each site took, and so long at
# least
_PATIENCE = 3.0
_LEAST_S = 5.0
# the part of that time in which tiles are compiled; the rest is for the clock
_COMPILING = 0.6
_DEFAULT_SIZE = 1024
# of the library's modeled time, that of products by themselves in one step which are measured
_NOT_WORSE = 1.15

Built: TypeAlias = Callable[[list[Any]], list[Any]]
"""A plan that is loaded: it takes a list of arguments, which it empties."""


@dataclass(frozen=True)
class Folding:
    """What was measured of a site.

    Attributes:
        kernel: the name of the site.
        chosen: the tile it is folded with; None where it stays as it is.
        model: the tile the model gives it.
        seconds: of the region, by tile; None stands for the library's call and the kernel.
    """

    kernel: str
    chosen: MatmulTile | None
    model: MatmulTile
    seconds: Mapping[MatmulTile | None, float]

    @property
    def gain(self) -> float:
        """How many times faster the region is than the library's call and the kernel."""
        return self.seconds[None] / self.seconds[self.chosen]

    def reason(self, apart: str) -> str:
        """Why the product passes through memory; ``apart``: what runs as it stands."""
        found = [seconds for tile, seconds in self.seconds.items() if tile is not None]
        best = f"{min(found) * 1e6:.1f} us" if found else "fails"
        return f"{apart} {self.seconds[None] * 1e6:.1f} us, in one {best}: measured"


class RegionBench(Protocol):
    """What `tune_matmuls` measures with; a test has its own."""

    def load(self, plans: Sequence[Plan]) -> list[Built | None]:
        """Plans compiled and loaded; None for one that does not compile, or spills registers."""

    def time(
        self, plan: Plan, built: Sequence[Built], sizes: Mapping[str, int]
    ) -> list[float | None]:
        """Seconds of each, on arguments as ``plan`` wants them; None for one that fails."""


def tune_matmuls(
    plan: Plan,
    device: Device,
    hints: Mapping[str, int],
    bench: RegionBench,
    cache: Cache | None,
    machine: str = "",
    most: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Plan, tuple[Folding, ...]]:
    """The plan with every site folded for which that was measured to be faster, and what was
    measured. A site that is not reached in the time there is, or that is not worth the clock, is
    folded where that is modeled to be faster.

    Args:
        hints: an example value for every size symbol.
        machine: the name of the GPU, for the cache.
        most: seconds that this may take, whatever compiling takes.
    """
    found = {site.key: _Subject.of(plan, site, hints) for site in reversed(sites(plan))}
    modeled = {each.site.key: each for each in priced(plan, device, hints)}
    subjects = [s for s in reversed(found.values()) if s.is_worth_it(device, modeled)]
    keys = {s.name: s.cache_key(device, machine) for s in subjects}
    known = {s.name: _remembered(cache, keys[s.name], s.name) for s in subjects}
    missing = [s for s in subjects if known[s.name] is None]
    tried = _measured(missing, device, bench, most, clock)
    for name, measured in tried.items():
        known[name] = measured
        if measured is not None:
            _remember(cache, keys[name], measured)
    settled = {s.site.key for s in subjects if known[s.name] is not None or s.name in tried}
    others = [each for key, each in modeled.items() if key not in settled]
    chosen: dict[SiteKey, MatmulTile] = {}
    reasons: dict[SiteKey, str] = {}
    for subject in subjects:
        folding = known[subject.name]
        if folding is not None and folding.chosen is not None:
            chosen[subject.site.key] = folding.chosen
        elif folding is not None:
            reasons[subject.site.key] = folding.reason(subject.site.apart)
    plan = folded(with_reasons(plan, reasons), chosen)
    plan = chosen_by_price(plan, others)
    return plan, tuple(f for f in known.values() if f is not None)


@dataclass(frozen=True)
class _Subject:
    """A site to be timed: the plan it stands in, the region by itself, a value for every size."""

    site: Site
    plan: Plan
    region: Plan
    sizes: Mapping[str, int]

    @staticmethod
    def of(plan: Plan, site: Site, hints: Mapping[str, int]) -> _Subject:
        region = apart(plan, site)
        read: list[Size] = [buffer.elements for buffer in site.step.buffers]
        for _, spec in region.inputs:
            read += (*spec.shape, *spec.stride) if spec is not None else ()
        symbols = {s.name for size in read if not isinstance(size, int) for s in size.free_symbols}
        names = sorted(symbols | set(site.step.size_symbols))
        sizes = {name: int(hints.get(name, _DEFAULT_SIZE)) for name in names}
        return _Subject(site, plan, region, sizes)

    @property
    def name(self) -> str:
        return self.site.name

    def is_worth_it(self, device: Device, modeled: Mapping[SiteKey, Priced]) -> bool:
        """What the kernel alone takes is what can be saved; and random arguments must be safe.
        Where there is none, little can be: the model must not expect much worse.
        """
        price = modeled.get(self.site.key)
        if not self.site.has_kernel and price is not None and price.folded_s is not None:
            return price.folded_s < _NOT_WORSE * price.library_s
        program = self.site.step.program
        seconds = kernel_seconds(program, device, self.sizes)
        return seconds >= SHORTEST_S and has_safe_arguments(program, self.sizes)

    def tiles(self, device: Device) -> list[MatmulTile]:
        return candidates(*self.site.key, device, self.sizes)

    def with_tile(self, tile: MatmulTile | None) -> Plan:
        """The region folded, or as it stands."""
        return self.region if tile is None else together(self.plan, self.site, tile)

    def cache_key(self, device: Device, machine: str) -> str:
        # whatever the kernels are called; another template is another measurement
        steps = [dataclasses.replace(s, name="") if isinstance(s, KernelStep) else s
                 for s in self.region.steps]  # fmt: skip
        text = repr(dataclasses.replace(self.region, steps=tuple(steps)))
        sizes, template = dict(self.sizes), template_prelude()
        return key_of("folding", text, sizes, repr(device), machine, template)


# --- measuring


def _measured(
    subjects: list[_Subject],
    device: Device,
    bench: RegionBench,
    most: float,
    clock: Callable[[], float],
) -> dict[str, Folding | None]:
    """By name, what was found of the sites that were reached: None where nothing could be."""
    if not subjects or most <= 0:
        return {}
    start = clock()
    tiles = {s.name: s.tiles(device) for s in subjects}
    plans = {(s.name, way): s.with_tile(way) for s in subjects for way in (None, *tiles[s.name])}
    first: list[tuple[str, MatmulTile | None]] = [
        (s.name, way) for s in subjects for way in (None, tiles[s.name][0])
    ]
    others: list[tuple[str, MatmulTile | None]] = [
        (s.name, tiles[s.name][rank])
        for rank in range(1, max(len(found) for found in tiles.values()))
        for s in subjects
        if rank < len(tiles[s.name])
    ]
    built = dict(zip(first, bench.load([plans[each] for each in first]), strict=True))
    allowed = min(most, max(_LEAST_S, _PATIENCE * (clock() - start)))
    at_once = worker_count()
    for place in range(0, len(others), at_once):
        if clock() - start > _COMPILING * allowed:
            break
        some = others[place : place + at_once]
        built |= zip(some, bench.load([plans[each] for each in some]), strict=True)
    found: dict[str, Folding | None] = {}
    for subject in subjects:
        if clock() - start > allowed:
            break
        ways = {way: run for (name, way), run in built.items() if name == subject.name and run}
        try:
            found[subject.name] = _fastest(subject, ways, tiles[subject.name][0], bench)
        except DoesNotFit:  # beside the model, twice: the clock cannot tell
            continue
    return found


def _fastest(
    subject: _Subject,
    ways: Mapping[MatmulTile | None, Built],
    model: MatmulTile,
    bench: RegionBench,
) -> Folding | None:
    """The measurement of a site; None where there is nothing to choose from."""
    if None not in ways or len(ways) < 2:
        return None
    times = bench.time(subject.region, list(ways.values()), subject.sizes)
    seconds = {way: t for way, t in zip(ways, times, strict=True) if t is not None}
    if None not in seconds:
        return None
    best = min(seconds, key=lambda way: seconds[way])
    tied = seconds[None] <= TIE * seconds[best]
    return Folding(subject.name, None if tied else best, model, seconds)


# --- remembering


def _remembered(cache: Cache | None, key: str, name: str) -> Folding | None:
    entry = cache.get("tuning", key) if cache is not None else None
    if entry is None:
        return None
    seconds = {_tile(row["tile"]): float(row["seconds"]) for row in entry.meta["measured"]}
    model = _tile(entry.meta["model"])
    assert model is not None
    return Folding(name, _tile(entry.meta["chosen"]), model, seconds)


def _remember(cache: Cache | None, key: str, found: Folding) -> None:
    if cache is None:
        return
    measured = [{"tile": _row(tile), "seconds": t} for tile, t in found.seconds.items()]
    meta = {"chosen": _row(found.chosen), "model": _row(found.model), "measured": measured}
    cache.store("tuning", key, {}, meta)


def _row(tile: MatmulTile | None) -> dict[str, Any] | None:
    return None if tile is None else dataclasses.asdict(tile)


def _tile(row: dict[str, Any] | None) -> MatmulTile | None:
    return None if row is None else MatmulTile(**row)
