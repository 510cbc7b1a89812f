"""The library's algorithms for the products of the models' training steps: the first that it
proposes, the fastest, and aten's call.

One line for each distinct product of a model's plans (a step in bfloat16 with attention written
plainly), how often it is made, and whether it stands inside of an operator. Behind it, for each
model, the sums over all of its products, and of all lines the geometric means over aten's time,
where aten has a call for the form. `python -m benchmarks.matmul --part algorithms`.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter

from benchmarks import timing
from benchmarks.harness import Skipped, first_line, note, wanted
from benchmarks.model_zoo import MODELS, Model
from benchmarks.table import Row, Table, geometric_mean
from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.cost_model.device import DEVICES, Device, current_device
from iocompiler.ops.library_product import Problem
from iocompiler.ops.target import planned_for
from iocompiler.pipeline import DEFAULT
from iocompiler.plan.build import size_hints
from iocompiler.plan.data import Plan
from iocompiler.report.explain import retargeted
from iocompiler.report.fakes import double, double_inputs
from iocompiler.runtime.ahead import multiplied
from iocompiler.runtime.measure import Call
from iocompiler.runtime.measure_products import Given, GpuProductBench, in_turns
from iocompiler.runtime.tune_products import TIE, problems_of, title

PART = "algorithms"
COLUMNS = (
    "name", "times", "inside", "first us", "chosen us", "aten us", "first/aten", "chosen/aten",
    "first/chosen", "rank", "proposed", "note",
)  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """``args``: only, quick, limit, json."""
    started = time.perf_counter()
    gpu = timing.on_gpu()
    row = current_device(torch.device("cuda")) if gpu else DEVICES["h100"]
    table = Table("matmul: algorithms", COLUMNS)
    bench = GpuProductBench(torch.device("cuda")) if gpu else None
    for model in MODELS.values():
        if not wanted(model.name, args.only):
            continue
        lines = list(rows(model, row, args.quick))
        for problem, line in lines:
            table.rows.append(line)
            try:
                if time.perf_counter() - started > args.limit:
                    raise Skipped(f"past {args.limit:.0f} s")
                if bench is not None:
                    measure(line, problem, bench)
            except Exception as error:  # whatever is wrong with it is its result
                note(line, "failed", f"{type(error).__name__}: {first_line(error)}")
            print(_shown(line), flush=True)
        table.summary |= _sums(model.name, [line for _, line in lines])
        table.write(args.json)
    for ratio in ("first/aten", "chosen/aten", "first/chosen"):
        values = [line.get(ratio) for line in table.rows]
        table.summary[f"{ratio}, geometric mean"] = geometric_mean(values)
    table.finish(args.json)


def rows(model: Model, device: Device, quick: bool) -> Iterator[tuple[Problem, Row]]:
    """Each product of a model's step, and its line so far; those made most often first."""
    own: Counter[Problem] = Counter()
    inside: Counter[Problem] = Counter()
    for plan, hints in plans(model, device, quick):
        own.update(problems_of(plan, hints))
        with planned_for(None if timing.on_gpu() else device.capability):
            inside.update(multiplied(plan, torch.device(timing.device()), hints))
    for problem, count in (own + inside).most_common():
        line: Row = {"name": f"{model.name} {title(problem)}", "times": count}
        if problem in inside:
            line["inside"] = inside[problem]
        line["strides"] = str([problem.a, problem.b, problem.out, problem.added])
        yield problem, line


def plans(model: Model, device: Device, quick: bool) -> list[tuple[Plan, dict[str, int]]]:
    """The plans of a training step as they run, and the values of their sizes."""
    records: list[Compilation] = []
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    torch._dynamo.reset()
    where = timing.device()
    module = model.module("eager", quick, where).to(torch.bfloat16).train()
    doubled: Any = double(module, mode)
    inputs = double_inputs(model.inputs(quick, where, torch.bfloat16, seed=1), mode)
    del module
    settings: dict[str, Any] = {"engine": _on_fakes, "strict": True, "device": device.name}
    backend = Compiler(retargeted(DEFAULT), on_compiled=records.append, **settings)
    with mode, warnings.catch_warnings(), planned_for(device.capability):
        warnings.simplefilter("ignore")
        torch.compile(doubled, backend=backend, dynamic=False)(**inputs)["loss"].backward()
    return [
        (plan, size_hints(record.flat[name]))
        for record in records
        for name, plan in record.plans.items()
    ]


def _on_fakes(plan: Plan, gm: GraphModule) -> Any:
    return lambda args: Interpreter(gm).boxed_run(args)


def measure(line: Row, problem: Problem, bench: GpuProductBench) -> None:
    """Write the times of all ways down, and what the choice among them is."""
    proposed = bench.proposed(problem)
    if not proposed:
        note(line, "library", "has no algorithm")
        return
    with torch.no_grad():
        sets = bench.argument_sets(problem)
        ways = [bench.calls(problem, each, sets) for each in proposed]
        aten, *times = in_turns([by_aten(problem, sets), *ways])
    seconds = {place: taken for place, taken in enumerate(times) if taken is not None}
    best = min(seconds, key=lambda place: seconds[place])
    first = seconds.get(0)
    if first is None:
        note(line, "library", "refuses its first algorithm")
        return
    rank = 0 if first <= TIE * seconds[best] else best
    line["first us"], line["chosen us"] = first * 1e6, seconds[rank] * 1e6
    line["rank"], line["proposed"] = rank, len(proposed)
    line["first/chosen"] = first / seconds[rank]
    line["measured"] = str([round(taken * 1e6, 2) for taken in seconds.values()])
    line["algorithms"] = str([tuple(vars(each).values()) for each in proposed])
    if aten is not None:
        line["aten us"] = aten * 1e6
        line["first/aten"], line["chosen/aten"] = first / aten, seconds[rank] / aten


def by_aten(of: Problem, sets: Iterable[Given]) -> list[Call]:
    """aten's one call for a product on each set of operands; none where it has no such call."""
    alone = of.batch == 1 and of.biased
    if of.sums is not None or of.bias or (of.activation is not None and not alone):
        return []
    return [_aten_call(of, given) for given in sets]


def _aten_call(of: Problem, given: Given) -> Call:
    def seen(flat: Tensor, rows: int, columns: int, strides: tuple[int, int, int]) -> Tensor:
        whole = flat.as_strided((of.batch, rows, columns), strides)
        return whole[0] if of.batch == 1 else whole

    a, b, out, added = given[:4]
    assert a is not None
    assert b is not None
    assert out is not None
    left, right = seen(a, of.m, of.k, of.a), seen(b, of.k, of.n, of.b)
    into = seen(out, of.m, of.n, of.out)
    if of.stored is not None:
        stored: Any = torch.mm if of.batch == 1 else torch.bmm
        return partial(stored, left, right, out_dtype=of.stored)
    if added is None or of.added is None:
        plain: Any = torch.mm if of.batch == 1 else torch.bmm
        return partial(plain, left, right, out=into)
    summand = added[: of.n] if of.biased else seen(added, of.m, of.n, of.added)
    if of.activation:
        activated = partial(torch._addmm_activation, use_gelu=of.activation == "gelu")
        return partial(activated, summand, left, right, out=into)
    adding: Any = torch.addmm if of.batch == 1 else torch.baddbmm
    return partial(adding, summand, left, right, out=into)


def _sums(name: str, lines: list[Row]) -> dict[str, Any]:
    """Milliseconds of a step's products by all three ways, where all were measured."""
    ways = ("first us", "chosen us", "aten us")
    whole = [line for line in lines if all(isinstance(line.get(way), float) for way in ways)]
    sums = {
        way: sum(float(line[way]) * int(line["times"]) for line in whole)  # type: ignore[arg-type]
        for way in ways
    }
    found = {f"{name}: {way.replace('us', 'ms')} in all": us * 1e-3 for way, us in sums.items()}
    return {f"{name}: distinct products": len(lines)} | (found if whole else {})


def _shown(line: Row) -> str:
    times = [line.get(f"{way} us") for way in ("first", "chosen", "aten")]
    cells = " ".join(f"{t:9.1f}" if isinstance(t, float) else f"{'-':>9}" for t in times)
    return f"{str(line['name'])[:56]:56} x{line['times']:<3} {cells}  {line.get('note') or ''}"
