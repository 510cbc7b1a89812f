"""Every candidate schedule of the memory-bound kernels and of AdamW over 100 tensors, timed: is the
model's choice the best?

One line a kernel: its program kind, the model's choice with its time and rate, the fastest
candidate with its own, and how many times longer the choice takes. Rates are of the bytes the cost
model counts. Kernels are compiled in parallel while the next ones are planned; without a GPU they
are planned only.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import timing
from benchmarks.adamw import WIDTHS as ADAMW_WIDTHS
from benchmarks.adamw import AdamW
from benchmarks.harness import first_line, wanted
from benchmarks.kernel_zoo import KERNELS, Kernel
from benchmarks.kernels import ROWS, WIDTHS
from benchmarks.table import environment, geometric_mean
from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.cost_model.candidates import candidates
from iocompiler.cost_model.device import DEVICES, Device, current_device
from iocompiler.ops.target import planned_for
from iocompiler.pipeline import DEFAULT
from iocompiler.plan.build import build_plan
from iocompiler.plan.data import Plan, Schedule
from iocompiler.report.explain import retargeted
from iocompiler.runtime.launch import Image
from iocompiler.runtime.measure import Bench, GpuBench
from iocompiler.runtime.subject import Subject
from iocompiler.runtime.tune import subjects_of
from iocompiler.runtime.values import size_value
from iocompiler.tile.traffic import traffic

_KINDS = {"pointwise": "point", "persistent": "whole", "looped": "loop", "rows": "rows"}


def main() -> None:
    args = arguments()
    started = time.perf_counter()
    gpu = timing.on_gpu()
    device = current_device(torch.device("cuda")) if gpu else DEVICES["h200"]
    bench = GpuBench(torch.device("cuda")) if gpu else None
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(1) as compiler:
        work = list(_planned(args, device, bench, compiler, started))
        print(f"planned {len(work)} kernels in {time.perf_counter() - started:.0f} s", flush=True)
        for kernel in work:
            if time.perf_counter() - started > args.limit:
                kernel.built and kernel.built.cancel()
                continue
            rows.append(_row(kernel, bench))
            print(_line(rows[-1]), flush=True)
            if args.each:
                print("".join(_each(rows[-1])), end="", flush=True)
    _summary(args, rows, len(work), started)


def arguments() -> argparse.Namespace:
    found = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = found.add_argument
    add("--only", default="", help="comma-separated: kernels whose name contains one of these")
    add("--widths", default=",".join(map(str, WIDTHS)), help=f"default {WIDTHS}")
    add("--rows", type=int, default=ROWS, help=f"default {ROWS}")
    add("--most", type=int, default=12, help="candidates of a kernel at most (default 12)")
    add("--each", action="store_true", help="a line for every candidate too")
    add("--limit", type=float, default=220.0, help="seconds after which the rest is skipped")
    add("--json", metavar="PATH", help="write every candidate's time there")
    return found.parse_args()


@dataclass(frozen=True)
class _Work:
    """One kernel of a zoo function's plan, being compiled."""

    name: str
    width: int
    subject: Subject
    schedules: list[Schedule]
    built: Future[list[Image | None]] | None


def _planned(
    args: argparse.Namespace,
    device: Device,
    bench: Bench | None,
    compiler: ThreadPoolExecutor,
    started: float,
) -> Iterator[_Work]:
    # wide kernels last: they take longest to compile, and the limit then costs whole widths
    for width in map(int, args.widths.split(",")):
        for name, plan in _plans(args.rows, width):
            if not wanted(name, args.only) or time.perf_counter() - started > args.limit:
                continue
            for subject in _subjects(name, width, plan, device):
                chosen = subject.chosen
                found = candidates(
                    subject.program, device, subject.sizes, most=args.most, first=chosen
                )
                pairs = [(subject, schedule) for schedule in found]
                built = compiler.submit(bench.compile, pairs) if bench is not None else None
                yield _Work(name, width, subject, found, built)


def _plans(rows: int, width: int) -> Iterator[tuple[str, Callable[[], Plan]]]:
    """Each function's name, and what makes its plan."""
    for zoo in KERNELS:
        yield zoo.name, partial(plan_of, zoo, rows, width)
    if width in ADAMW_WIDTHS:
        yield "adamw", partial(plan_of_adamw, AdamW(width, 100))


def _subjects(name: str, width: int, plan: Callable[[], Plan], device: Device) -> list[Subject]:
    try:
        found = plan()
    except Exception as error:
        print(f"note: {name} {width}: {type(error).__name__}: {first_line(error)}")
        return []
    return subjects_of(found, device, {}, shortest=0.0)


def plan_of_adamw(step: AdamW) -> Plan:
    """Our plan of an optimizer step in bfloat16, made on fake tensors."""
    layouts = step.layouts()
    steps = [name for name in layouts if name.startswith("step")]
    return plan_on_fakes(step.update, layouts, tuple(layouts), wide=steps)


def plan_of(zoo: Kernel, rows: int, width: int) -> Plan:
    """Our plan of a zoo function (of its backward, where that is what is timed) in bfloat16, made
    on fake tensors.
    """
    shapes = zoo.shapes(rows, width)
    fixed = tuple(shapes) if not zoo.backward else zoo.fixed
    layouts = {name: (shape, None) for name, shape in shapes.items()}
    return plan_on_fakes(zoo.function, layouts, fixed)


def plan_on_fakes(
    function: Callable[..., Any],
    layouts: Mapping[str, tuple[tuple[int, ...], tuple[int, ...] | None]],
    fixed: Collection[str],
    wide: Collection[str] = (),
) -> Plan:
    """Our plan of a function of bfloat16 tensors on a GPU, made on fake tensors.

    Args:
        layouts: shape and strides (None: dense) of each argument.
        fixed: arguments without a gradient; unless all are, the plan is that of the backward.
        wide: arguments in float32.
    """
    backward = any(name not in fixed for name in layouts)
    records: list[Compilation] = []
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    torch._dynamo.reset()
    # fakes of the CPU, retargeted: those of CUDA need a torch built with it
    settings: dict[str, Any] = {"engine": _on_fakes, "strict": True}
    backend = Compiler(retargeted(DEFAULT), on_compiled=records.append, **settings)
    capability = DEVICES["h200"].capability
    with (
        mode,
        warnings.catch_warnings(),
        planned_for(capability),
        torch.set_grad_enabled(backward),
    ):
        warnings.simplefilter("ignore")
        given = {
            name: _empty(shape, strides, torch.float32 if name in wide else torch.bfloat16)
            for name, (shape, strides) in layouts.items()
        }
        for name, tensor in given.items():
            tensor.requires_grad_(name not in fixed)
        result: Any = torch.compile(function, backend=backend, dynamic=False)(**given)
        if backward:
            result.backward(torch.empty_like(result))
    flat = records[0].flat
    name = "backward" if backward else next(iter(flat))
    # the plan before anything is written over what dies: a fold comes first
    return build_plan(flat[name], DEVICES["h200"], name)


def _empty(
    shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: torch.dtype
) -> torch.Tensor:
    if strides is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")


def _on_fakes(plan: Plan, gm: torch.fx.GraphModule) -> Any:
    return lambda args: torch.fx.Interpreter(gm).boxed_run(args)


def _row(work: _Work, bench: Bench | None) -> dict[str, Any]:
    subject = work.subject
    moved = traffic(subject.program)
    row: dict[str, Any] = {
        "name": work.name,
        "width": work.width,
        "kernel": subject.name,
        "bytes": size_value(moved.read_bytes + moved.written_bytes, subject.sizes),
        "model": asdict(subject.chosen),
        "candidates": [asdict(s) for s in work.schedules],
    }
    if bench is None or work.built is None:
        return row
    try:
        _measure(row, work, bench, work.built.result())
    except Exception as error:  # whatever a kernel raises is its result
        row["note"] = f"{type(error).__name__}: {first_line(error)}"
    return row


def _measure(
    row: dict[str, Any], work: _Work, bench: Bench, images: Sequence[Image | None]
) -> None:
    built = [(s, i) for s, i in zip(work.schedules, images, strict=True) if i is not None]
    times = bench.time(work.subject, built)
    row["candidates"] = [
        {
            "schedule": asdict(schedule),
            "us": seconds * 1e6,
            "registers": image.metadata["registers"],
            "spills": image.metadata["spills"],
        }
        for (schedule, image), seconds in zip(built, times, strict=True)
        if seconds is not None
    ]
    row["failed"] = len(images) - len(row["candidates"])
    clean = [c for c in row["candidates"] if c["spills"] <= 0]
    chosen = next(c for c in row["candidates"] if c["schedule"] == row["model"])
    best = min(clean or row["candidates"], key=lambda c: c["us"])
    row["model us"], row["best us"], row["best"] = chosen["us"], best["us"], best["schedule"]
    row["ratio"] = chosen["us"] / best["us"]
    row["model GB/s"] = row["bytes"] / chosen["us"] / 1e3
    row["best GB/s"] = row["bytes"] / best["us"] / 1e3
    row["model spills"] = chosen["spills"]


def _line(row: dict[str, Any]) -> str:
    place = f"{row['name'][:21]:21} {row['width']:>5} {row['kernel'][-14:]:14}"
    model = f"{_KINDS[row['model']['kind']]:5} {_shown(row['model']):16}"
    if "best us" not in row:
        count = len(row["candidates"])
        return f"{place} {model} {row.get('note', f'{count} candidates')}"
    spills = f" spills {row['model spills']}" if row["model spills"] > 0 else ""
    best = f"{_KINDS[row['best']['kind']]:5} {_shown(row['best']):16}"
    return (
        f"{place} {model}{row['model us']:7.1f} {row['model GB/s']:5.0f}  "
        f"{best}{row['best us']:7.1f} {row['best GB/s']:5.0f} {row['ratio']:5.2f}{spills}"
    )


def _each(row: dict[str, Any]) -> Iterator[str]:
    """A line for every candidate that was timed, the fastest first; else those there are."""
    timed = [c for c in row["candidates"] if "us" in c]
    for c in sorted(timed, key=lambda c: float(c["us"])):
        rate = row["bytes"] / c["us"] / 1e3
        words = f"{c['registers']} registers, {c['spills']} bytes of spills"
        yield f"    {_shown(c['schedule']):22}{c['us']:8.1f} us {rate:5.0f} GB/s  {words}\n"
    for c in row["candidates"] if not timed else ():
        yield f"    {_shown(c)}\n"


def _shown(schedule: dict[str, Any]) -> str:
    """ "x2 r1024 w4", and how many programs walk, and their bound of registers ("p264", "b64")."""
    parts = {"x": schedule["x_block"], "y": schedule["y_block"], "r": schedule["r_block"]}
    blocks = [f"{name}{size}" for name, size in parts.items() if size > 1 or name == "x"]
    more = {"w": schedule["num_warps"], "p": schedule["programs"], "b": schedule["registers"]}
    return " ".join(blocks + [f"{name}{number}" for name, number in more.items() if number])


def _summary(
    args: argparse.Namespace, rows: list[dict[str, Any]], planned: int, started: float
) -> None:
    ratios = [row["ratio"] for row in rows if "ratio" in row]
    mean = geometric_mean(ratios)
    facts = {
        "kernels": f"{len(ratios)} of {planned}",
        "geometric mean of choice / best": None if mean is None else round(mean, 3),
        "choices within 3 % of the best": sum(ratio <= 1.03 for ratio in ratios),
        "seconds": round(time.perf_counter() - started),
    }
    for name, value in facts.items():
        print(f"{name}: {value}")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        found = {"title": "schedules", "facts": environment() | facts, "rows": rows}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
