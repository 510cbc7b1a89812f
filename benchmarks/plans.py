"""Modeled against measured time over random legal plans of one training step, and their rank
correlation.

The step's forward and backward graphs are planned again and again; which groups of nodes become one
kernel is decided by a coin instead of the model (legality is not: what cannot be lowered, or makes
a cycle, stays apart). Each plan is emitted and run, its results are compared with those of the plan
the model chooses, and its forward and backward are timed together, host time left out. "chosen" is
that plan, "apart" has every node in a kernel of its own, "together" merges whatever can be; the
correlation (Spearman) is over the random plans alone. With ``--quick`` the reference interpreter
runs a few small plans: their times say nothing about a GPU.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from benchmarks import timing
from benchmarks.harness import Session, Skipped, first_line, note, parser
from benchmarks.module_zoo import CASES, Case
from benchmarks.table import Row, Table
from iocompiler import Compiler
from iocompiler.cost_model.device import DEVICES, Device, current_device
from iocompiler.plan.build import build_plan, size_hints
from iocompiler.plan.data import BatchStep, KernelStep, Plan
from iocompiler.plan.group import Accept, faster
from iocompiler.report.build import Part, build_report
from iocompiler.runtime.load import load, prepare
from iocompiler.runtime.reference import run_plan

ROUNDS = 3
_CALLS = 4  # in one timed batch
_TRIES = 10  # seeds for each plan that is wanted: some give a plan that was there before
# relative error of an output against the chosen plan's, which rounds elsewhere
_ALLOWED = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-4}

Plans = dict[str, Plan]
Run = Callable[[list[Any]], Sequence[Any]]


@dataclass
class Step:
    """The flat graphs of one training step, what they were called with, and what they gave."""

    graphs: dict[str, GraphModule] = field(default_factory=dict)
    given: dict[str, list[Any]] = field(default_factory=dict)
    results: dict[str, Sequence[Any]] = field(default_factory=dict)

    def plans(self, row: Device, accept: Callable[[str], Accept]) -> Plans:
        """A plan a graph; ``accept`` is called with the graph's name."""
        return {n: build_plan(gm, row, n, accept(n)) for n, gm in self.graphs.items()}

    def modeled(self, plans: Plans, row: Device) -> Any:
        """The report of the plans: time and bytes as the model has them."""
        parts = [Part(n, plan, size_hints(self.graphs[n])) for n, plan in plans.items()]
        return build_report(parts, row)


def main() -> None:
    args = arguments()
    count = min(args.plans, 3) if args.quick else args.plans
    columns = ["name", "kernels", "modeled MB", "modeled us", "measured us", "spread us", "check"]
    case = next(case for case in CASES if case.name == args.case)
    session = Session(args, Table(f"random plans, {case.name}, training step", columns))
    row: Row = {"name": case.name}
    session.attempt(row, "plans", partial(_measure, session, case, count))
    if row.get("note"):
        session.table.rows.append(row)
    session.table.finish(args.json)


def arguments() -> Any:
    found = parser(__doc__)
    add = found.add_argument
    add("--case", default="encoder layer", choices=[case.name for case in CASES])
    add("--plans", type=int, default=50, help="how many random plans (default 50)")
    found.set_defaults(limit=200.0, budget=0.1, steps=10)
    return found.parse_args()


def _measure(session: Session, case: Case, count: int) -> None:
    row = current_device(torch.device("cuda")) if timing.on_gpu() else DEVICES["h200"]
    step = recorded(case, session.args.quick)
    found = {"chosen": step.plans(row, lambda _: faster)}
    found["apart"] = step.plans(row, lambda _: lambda *groups: False)
    found["together"] = step.plans(row, lambda _: lambda *groups: True)
    found |= {f"plan {seed}": plans for seed, plans in distinct(step, row, count).items()}
    if timing.on_gpu():
        _compile([plan for plans in found.values() for plan in plans.values()], row)
    runs: dict[str, Callable[[], object]] = {}
    for name, plans in found.items():
        line = _line(name, step, plans, row)
        session.table.rows.append(line)
        try:
            if session.seconds_left < 0:
                raise Skipped("past the limit")
            _load(step, plans, runs, line)
        except Exception as failure:  # a plan that does not run is a result
            note(line, name, f"{type(failure).__name__}: {first_line(failure)}")
    limits = session.args.steps, session.args.budget
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():  # in turns: clocks drift
            if session.seconds_left < 0:
                break
            calls = [run] * _CALLS
            samples[name].append(1e3 * timing.batches(lambda calls=calls: calls, *limits).ms)
    for line in session.table.rows:
        if taken := samples.get(str(line["name"])):
            summary = timing.summary(taken)
            line["measured us"], line["spread us"] = summary.ms, (max(taken) - min(taken)) / 2
    session.table.summary |= correlated(session.table.rows)


def recorded(case: Case, quick: bool) -> Step:
    """One training step compiled by us: its graphs, arguments and results."""
    device = timing.device()
    step = Step()

    def engine(plan: Plan, gm: GraphModule) -> Run:
        name = "backward" if step.graphs else "forward"
        step.graphs[name] = gm
        run = loaded(plan, name)

        def call(args: list[Any]) -> Sequence[Any]:
            step.given[name] = list(args)
            torch.manual_seed(0)
            step.results[name] = run(args)
            return step.results[name]

        return call

    module = case.module(quick, device).to(case.dtype)
    inputs = case.inputs(quick, device, seed=1)
    out = torch.compile(module, backend=Compiler(engine=engine, cache=False, strict=True))(**inputs)
    out.backward(torch.ones_like(out) if out.dim() == 0 else torch.randn_like(out))
    if step.results.keys() != {"forward", "backward"}:
        raise ValueError(f"{case.name} is not one graph with a backward")
    return step


def loaded(plan: Plan, name: str) -> Run:
    """The emitted module where it can run, else the reference interpreter."""
    device = torch.device(plan.device)
    return load(plan, device, name) if device.type == "cuda" else partial(run_plan, plan)


def at_random(seed: int) -> Callable[[str], Accept]:
    """For each graph a coin that comes up as often as the seed says."""
    share = random.Random(seed).random()

    def accept(name: str) -> Accept:
        coin = random.Random(f"{seed} {name}")
        return lambda *groups: coin.random() < share

    return accept


def distinct(step: Step, row: Device, count: int) -> dict[int, Plans]:
    """``count`` plans by seed, no two of which group alike; fewer where there are not as many."""
    found: dict[int, Plans] = {}
    seen: set[frozenset[tuple[str, ...]]] = set()
    for seed in range(_TRIES * count):
        if len(found) == count:
            break
        plans = step.plans(row, at_random(seed))
        groups = frozenset(kernel.nodes for plan in plans.values() for kernel in kernels(plan))
        if groups not in seen:
            seen.add(groups)
            found[seed] = plans
    return found


def kernels(plan: Plan) -> list[KernelStep | BatchStep]:
    return [step for step in plan.steps if isinstance(step, (KernelStep, BatchStep))]


def _compile(plans: Sequence[Plan], row: Device) -> None:
    """All kernels into the cache, in the compiler's worker processes; failures show when loaded."""
    with ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(prepare, plan, row, "plan") for plan in plans]
    for each in waiting:
        each.exception()


def _line(name: str, step: Step, plans: Plans, row: Device) -> Row:
    report = step.modeled(plans, row)
    return {
        "name": name,
        "kernels": sum(len(kernels(plan)) for plan in plans.values()),
        "modeled MB": report.bytes_moved / 1e6,
        "modeled us": report.time_us,
    }


def _load(step: Step, plans: Plans, runs: dict[str, Callable[[], object]], line: Row) -> None:
    """Load and check a plan; what is wrong is not timed."""
    functions = {name: loaded(plan, name) for name, plan in plans.items()}

    def run() -> dict[str, Sequence[Any]]:
        torch.manual_seed(0)
        with torch.no_grad():  # as autograd calls them; the parameters given ask for a gradient
            return {name: function(list(step.given[name])) for name, function in functions.items()}

    results = run()
    worst = max(error(results[name], step.results[name]) for name in functions)
    line["check"] = f"{'ok' if worst <= 1 else 'FAIL'} {worst:.2f}"
    if worst <= 1:
        runs[str(line["name"])] = run


def error(values: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest error of an output, in units of what is allowed; infinite where integers differ,
    or where something is no number in one and a number in the other.

    Errors are relative to the root mean square of the expected values, or to a tenth of that of
    the largest output of equal shape where that is more: the gradient of BERT's key bias is zero
    but for rounding, that of its value bias is not. What is kept in float32 was computed from
    results in the graph's least dtype, which another plan may not round: its error is theirs.
    """
    sizes: dict[torch.Size, float] = {}
    for x in filter(_is_real, expected):
        sizes[x.shape] = max(sizes.get(x.shape, 0.0), _size(x) / 10)
    least = [sizes[x.shape] if _is_real(x) else 0.0 for x in expected]
    allowed = max((_ALLOWED.get(x.dtype, 1e-8) for x in filter(_is_real, expected)), default=1e-8)
    return max(map(partial(_error, allowed), least, values, expected), default=math.inf)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _size(value: Tensor) -> float:
    return float(value.detach().double().square().mean().sqrt())


def _error(allowed: float, least: float, value: Any, expected: Any) -> float:
    if not _is_real(value):
        if isinstance(value, Tensor):
            return 0.0 if torch.equal(value.cpu(), expected.cpu()) else math.inf
        return 0.0 if value == expected else math.inf
    scale = max(_size(expected), least, 1e-12)
    relative = _size(value.double() - expected.double()) / scale
    return relative / allowed if math.isfinite(relative) else math.inf


def correlated(rows: Sequence[Row]) -> dict[str, Any]:
    """Spearman's correlation over the random plans, and how many were faster than the chosen."""
    timed = {str(r["name"]): r for r in rows if r.get("measured us") is not None}
    random_plans = [r for name, r in timed.items() if name.startswith("plan ")]
    modeled, measured = (
        [float(r[key] or 0) for r in random_plans] for key in ("modeled us", "measured us")
    )
    summary: dict[str, Any] = {
        "random plans measured": len(random_plans),
        "rank correlation of modeled and measured time": spearman(modeled, measured),
    }
    if "chosen" in timed:
        chosen = float(timed["chosen"]["measured us"] or 0)
        summary["random plans faster than the chosen"] = sum(m < chosen for m in measured)
        if measured:
            summary["fastest random plan / chosen"] = min(measured) / chosen
    return summary


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """The correlation of the ranks, ties sharing the mean of theirs; None where one of the two is
    constant."""
    x, y = _centred(_ranks(a)), _centred(_ranks(b))
    scale = math.sqrt(sum(v * v for v in x) * sum(v * v for v in y))
    return sum(v * w for v, w in zip(x, y, strict=True)) / scale if scale else None


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]


def _centred(values: Sequence[float]) -> list[float]:
    mean = sum(values) / len(values) if values else 0.0
    return [v - mean for v in values]


if __name__ == "__main__":
    main()
