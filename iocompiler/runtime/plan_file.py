"""A plan file: the schedule of every kernel, chosen once, replayed exactly from then on.

    {"format": 1, "graphs": {"<fingerprint>": {"graph": "forward", "device": "h200",
        "kernels": {"forward_gelu": {"kind": "pointwise", "x_block": 1024, ...}}}}}

Beside "kernels", "matmuls" has the tiles of the products that are folded with a kernel behind them
(`plan/fold.py`), by site, and "products" the library's algorithms that were measured to be faster
than the one it proposes first, each with its product in numbers; there are none where none is. An
algorithm that the library does not propose any more is the one choice that is not replayed: its
first one runs, with a warning (`AlgorithmWarning`).

A graph is known by its plan but for the schedules, and the GPU by its row: the ranks of a node
replay one entry. A graph that the file does not have is added to it once it is compiled; one that
it has is neither measured nor chosen for anew, and of two processes that add one at a time the
first one's stays. What cannot be replayed is an error: a file that is wrong is never passed over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from iocompiler.codegen.module import kernel_names
from iocompiler.cost_model.candidates import walks_rows
from iocompiler.cost_model.tiles import REGISTERS
from iocompiler.errors import BadPlanFile
from iocompiler.ops.library_product import Algorithm, Problem
from iocompiler.plan.data import (
    AtenStep,
    BatchStep,
    KernelStep,
    MatmulStep,
    Plan,
    Schedule,
    TensorSpec,
)
from iocompiler.plan.fold import folded
from iocompiler.plan.product import MatmulTile, Product
from iocompiler.plan.sites import SiteKey, sites
from iocompiler.runtime.algorithm_rows import algorithm_rows, algorithms_of
from iocompiler.runtime.tune import rescheduled
from iocompiler.tile.arrange import merge_axes
from iocompiler.tile.flat import is_flat
from iocompiler.tile.index import product
from iocompiler.tile.program import TileProgram

FORMAT = 1
_KINDS = ("pointwise", "persistent", "looped", "rows")
_FIELDS = tuple(field.name for field in dataclasses.fields(Schedule))
_BLOCKS = ("x_block", "y_block", "r_block", "num_warps")
_MOST_WARPS = 32
_TILE_FIELDS = tuple(field.name for field in dataclasses.fields(MatmulTile))
_TILE_BLOCKS = ("m", "n", "k", "num_warps", "parts")
_LEAST_BLOCK = 16  # of the matrix units
_MOST_PARTS = 4

_Key = tuple[TileProgram, Schedule]


@dataclass(frozen=True)
class PlanFile:
    """The plan file at ``path``, which need not exist yet."""

    path: Path

    def replayed(self, plan: Plan, name: str, device: str) -> Plan | None:
        """``plan`` with the schedules, tiles and algorithms of the file; None where the file does
        not have its graph.

        Args:
            name: of the flat graph. device: the row it is planned for.

        Raises:
            BadPlanFile: the file or the graph in it cannot be replayed.
        """
        graphs, key = self._graphs(), fingerprint(plan, name)
        if key not in graphs:
            return None
        found, entry = graphs[key], f"graph {name!r} ({key})"
        if not isinstance(found, dict) or not isinstance(found.get("kernels"), dict):
            raise self._bad(f"{entry} has no kernels", entry)
        if found.get("device") != device:
            cause = f"{entry} was chosen for {found.get('device')!r}, this is {device!r}"
            raise self._bad(cause, entry)
        kernels = _kernels(plan)
        differing = sorted(set(found["kernels"]) ^ set(kernels))
        if differing:
            cause = f"{entry} and its plan differ in the kernels {', '.join(differing)}"
            raise self._bad(cause, entry)
        chosen: dict[_Key, Schedule] = {}
        for kernel, row in found["kernels"].items():
            work = kernels[kernel]
            try:
                chosen[work] = _schedule(row, *work)
            except ValueError as error:
                place = f"kernel {kernel!r} of {entry}"
                raise self._bad(f"{place}: {error}", place) from None
        plan = self._folded(rescheduled(plan, chosen), found.get("matmuls", {}), entry)
        return replace(plan, algorithms=self._algorithms(found.get("products"), entry))

    def _algorithms(self, rows: Any, entry: str) -> tuple[tuple[Problem, Algorithm], ...]:
        try:
            return algorithms_of([] if rows is None else rows)
        except ValueError as error:
            place = f'"products" of {entry}'
            raise self._bad(f"{place}: {error}", place) from None

    def _folded(self, plan: Plan, rows: Any, entry: str) -> Plan:
        there = {site.name: site.key for site in sites(plan)} if rows else {}
        unknown = sorted(set(rows) - set(there)) if isinstance(rows, dict) else ["matmuls"]
        if unknown:
            raise self._bad(f"{entry} has no products to fold for {', '.join(unknown)}", entry)
        tiles: dict[SiteKey, MatmulTile] = {}
        for name, row in rows.items():
            try:
                tiles[there[name]] = _tile(row, there[name][0])
            except ValueError as error:
                place = f"matmul {name!r} of {entry}"
                raise self._bad(f"{place}: {error}", place) from None
        return folded(plan, tiles)

    def add(self, plan: Plan, model: Plan, name: str, device: str) -> None:
        """Write the schedules, tiles and algorithms of ``plan`` down, beside those of other graphs.

        Args:
            model: the plan as the planner made it, nothing folded, after whose kernels the file
                names them.
        """
        named = _kernels(model)
        kernels = {kernel: _row(schedule) for kernel, (_, schedule) in named.items()}
        names = {key: kernel for kernel, key in named.items()}
        tiles = {step.key: step.tile for step in plan.steps if isinstance(step, MatmulStep)}
        chosen = {_work(s): s for s in plan.steps if isinstance(s, (KernelStep, BatchStep))}
        for step in model.steps:
            if isinstance(step, (KernelStep, BatchStep)) and _work(step) in chosen:
                kernel = names[step.program, step.schedule]
                kernels[kernel] = _row(chosen[_work(step)].schedule)
        there = sites(model) if tiles else ()
        matmuls = {s.name: _row(tiles[s.key]) for s in there if s.key in tiles}
        entry: dict[str, Any] = {"graph": name, "device": device, "kernels": kernels}
        products = algorithm_rows(plan.algorithms)
        further = {"matmuls": matmuls, "products": products}
        entry |= {key: of for key, of in further.items() if of}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _alone(self.path.parent):
                graphs = self._graphs()  # read again: another process may have added its own
                graphs.setdefault(fingerprint(model, name), entry)
                self._write(json.dumps({"format": FORMAT, "graphs": graphs}, indent=1) + "\n")
        except OSError as error:
            raise self._bad(f"it cannot be written: {error}") from None

    def _write(self, text: str) -> None:
        """Put in place whole, with the rights of the file that was there, or of any new file."""
        target = self.path.resolve()  # what a link points to
        aside = target.with_name(f"{target.name}.{os.getpid()}")
        try:
            aside.write_text(text, encoding="utf-8")
            if target.exists():
                shutil.copymode(target, aside)
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)

    def _graphs(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        try:
            data = json.loads(self.path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise self._bad(f"it cannot be read: {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise self._bad(f"it is no plan file of format {FORMAT}")
        graphs = data.get("graphs")
        if not isinstance(graphs, dict):
            raise self._bad("it has no graphs")
        return graphs

    def _bad(self, cause: str, place: str = "") -> BadPlanFile:
        advice = "delete the file" + (f", or in it {place}," if place else "")
        return BadPlanFile(path=str(self.path), cause=cause, advice=advice)

    def refused(self, name: str, error: Exception) -> BadPlanFile:
        """That a graph with the schedules of the file could not be loaded."""
        return self._bad(f"its schedules for graph {name!r} do not load: {error}")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system can lock a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def fingerprint(plan: Plan, name: str) -> str:
    """The same in every process and on every card, whatever the schedules: inputs, programs and
    calls in order.
    """
    given = [(name, spec and _anywhere(spec)) for name, spec in plan.inputs]
    lines = [name, _kind(plan.device), repr(given)]
    for step in plan.steps:
        if isinstance(step, (KernelStep, BatchStep)):
            lines.append(f"{step.name} {step.program}")
            lines.append(repr(step.args if isinstance(step, KernelStep) else step.members))
        elif isinstance(step, AtenStep):
            lines.append(f"{step.target} {[name for name, _ in step.outputs]}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:24]


def _anywhere(spec: TensorSpec) -> TensorSpec:
    return replace(spec, device=_kind(spec.device))


def _kind(device: str) -> str:
    return torch.device(device).type


def _kernels(plan: Plan) -> dict[str, _Key]:
    """The kernels of a plan by name, those of regions in it left out."""
    steps = [step for step in plan.steps if isinstance(step, (KernelStep, BatchStep))]
    if not steps:
        return {}
    own = {step.kernel: (step.program, step.schedule) for step in steps}
    return {kernel: own[key] for key, (kernel, _) in kernel_names(plan).items() if key in own}


def _work(step: KernelStep | BatchStep) -> tuple[Any, ...]:
    """What stays of a step, whatever its schedule and the parts of the sums it folds."""
    members = step.members if isinstance(step, BatchStep) else step.args
    return step.nodes, members, tuple(name for name, _ in step.outputs)


def _row(chosen: Schedule | MatmulTile) -> dict[str, Any]:
    return dataclasses.asdict(chosen)


def _tile(row: Any, product: Product) -> MatmulTile:
    """A tile as the file has it.

    Raises:
        ValueError: it is none, or none for the product.
    """
    if not isinstance(row, dict) or set(row) != set(_TILE_FIELDS):
        raise ValueError(f"a tile has the fields {', '.join(_TILE_FIELDS)}")
    if row["loads"] not in ("pointers", "descriptors"):
        raise ValueError(f"there are no loads {row['loads']!r}: pointers or descriptors")
    for name, value in row.items():
        if name == "loads":
            continue
        if type(value) is not int or value < (0 if name == "programs" else 1):
            raise ValueError(f"{name} is {value!r}, not a number")
    for name in _TILE_BLOCKS:
        if row[name] & (row[name] - 1):
            raise ValueError(f"{name} is {row[name]}, not a power of two")
    for name in ("m", "n", "k"):
        if row[name] < _LEAST_BLOCK:
            raise ValueError(f"{name} is {row[name]}, less than {_LEAST_BLOCK}")
    if row["num_warps"] > _MOST_WARPS or row["parts"] > _MOST_PARTS:
        raise ValueError(f"at most {_MOST_WARPS} warps and {_MOST_PARTS} parts")
    if row["loads"] == "descriptors" and not (product.takes_descriptors and row["programs"]):
        raise ValueError("descriptors need aligned operands, and programs that walk the tiles")
    return MatmulTile(**row)


def _schedule(row: Any, program: TileProgram, model: Schedule) -> Schedule:
    """A schedule as the file has it.

    Raises:
        ValueError: it is none, or none for the program that the model gave the schedule ``model``.
    """
    if not isinstance(row, dict) or set(row) != set(_FIELDS):
        raise ValueError(f"a schedule has the fields {', '.join(_FIELDS)}")
    if row["kind"] not in _KINDS:
        raise ValueError(f"there is no schedule {row['kind']!r}: the kinds are {', '.join(_KINDS)}")
    for name in _FIELDS[1:]:
        if type(row[name]) is not int or row[name] < 0:
            raise ValueError(f"{name} is {row[name]!r}, not a number")
    for name in _BLOCKS:
        if row[name] < 1 or row[name] & (row[name] - 1):
            raise ValueError(f"{name} is {row[name]}, not a power of two")
    if row["num_warps"] > _MOST_WARPS:
        raise ValueError(f"num_warps is {row['num_warps']}, more than {_MOST_WARPS}")
    if row["registers"] and row["registers"] not in REGISTERS:
        least, most = REGISTERS[0], REGISTERS[-1]
        raise ValueError(f"registers is {row['registers']}, not 0 or {least} to {most}")
    chosen = Schedule(**row)
    _check_fits(chosen, merge_axes(program), model)
    return chosen


def _check_fits(chosen: Schedule, merged: TileProgram, model: Schedule) -> None:
    """Raise `ValueError` where no kernel of the merged program can be made so."""
    walked = walks_rows(merged)
    reduces = {"persistent", "looped", *(["rows"] if walked else [])}
    fits = chosen.kind == model.kind or {chosen.kind, model.kind} <= reduces
    if walked:
        fits = fits and (chosen.kind == "rows") == (chosen.programs > 0)
    elif not is_flat(merged):
        fits = fits and chosen.programs == model.programs
    if not fits:
        raise ValueError(f"{chosen.kind} with {chosen.programs} programs does not fit this kernel")
    width = product([axis.size for axis in merged.reduced])
    if chosen.kind in ("persistent", "rows") and isinstance(width, int) and chosen.r_block < width:
        raise ValueError(f"r_block is {chosen.r_block}, less than a row of {width}")
