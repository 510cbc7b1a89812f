"""The library's algorithms for products by the clock: the fastest of those that cuBLASLt proposes,
where that is not its first one.

Only under mode="max-autotune", on the plan as it runs. A product is a `Problem`, in numbers, so
equal layers are measured once; what was found is kept in the cache under it and the library's
version. Nothing is compiled.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from iocompiler.cost_model.cost import Contraction, Cost
from iocompiler.cost_model.device import Device
from iocompiler.cost_model.roofline import time as modeled
from iocompiler.ops.library_product import Algorithm, Problem
from iocompiler.plan.data import AtenStep, Plan
from iocompiler.runtime.cache import Cache, key_of
from iocompiler.runtime.measure import DoesNotFit
from iocompiler.runtime.products import asked
from iocompiler.runtime.tune import SHORTEST_S
from iocompiler.runtime.values import in_numbers

# the library's first algorithm stays where the best is not faster by more: some are by 2 % alone
TIE = 1.005
# no further product is begun after so long; each takes a tenth of a second at most, or six turns
LONGEST_S = 2.0


@dataclass(frozen=True)
class Selection:
    """What was measured of a product.

    Attributes:
        kernel: its form and extents, as text.
        chosen, model: the algorithm kept, and the one that the library proposes first.
        seconds: of a launch, by algorithm.
        problem: the product.
    """

    kernel: str
    chosen: Algorithm
    model: Algorithm
    seconds: Mapping[Algorithm, float]
    problem: Problem

    @property
    def gain(self) -> float:
        """How many times faster the chosen algorithm is than the library's first."""
        return self.seconds[self.model] / self.seconds[self.chosen]


class ProductBench(Protocol):
    """What `tune_products` measures with; a test has its own."""

    version: int
    """Of the library: what its algorithms are called depends on it."""

    def proposed(self, problem: Problem) -> Sequence[Algorithm]:
        """The library's algorithms for a product, its first one first; none where it has none."""

    def time(self, problem: Problem, algorithms: Sequence[Algorithm]) -> list[float | None]:
        """Seconds of each, None for one that the library refuses."""


def tune_products(
    plan: Plan,
    device: Device,
    hints: Mapping[str, int],
    bench: ProductBench,
    cache: Cache | None,
    machine: str = "",
    inside: Sequence[Problem] = (),
    most: float = LONGEST_S,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Plan, tuple[Selection, ...]]:
    """The plan with the fastest algorithms of its products (`Plan.algorithms`), and what was
    measured. Products are taken in the order of the time the model gives them; what is not reached
    in the time there is, or is mostly launch, is made by the library's first algorithm.

    Args:
        hints: an example value for every size symbol: measured is the product of these sizes, and
            no other is made by its algorithm.
        machine: the name of the GPU, for the cache.
        inside: the products inside of the plan's operators; what was measured makes them even
            where it is the library's first, as aten, whose they are else, may take another.
        most: seconds after which none is begun, if that is sooner.
    """
    start = clock()
    found: list[Selection] = []
    for problem in _worth_it([*problems_of(plan, hints), *inside], device):
        key = key_of("algorithm", repr(problem), repr(device), machine, bench.version)
        selection = _remembered(cache, key, problem)
        if selection is None and clock() - start < min(most, LONGEST_S):
            selection = _fastest(problem, bench)
            if selection is not None:
                _remember(cache, key, selection)
        if selection is not None:
            found.append(selection)
    others = set(inside)
    chosen = tuple(
        (each.problem, each.chosen)
        for each in found
        if each.chosen != each.model or each.problem in others
    )
    return dataclasses.replace(plan, algorithms=chosen), tuple(found)


# --- what is measured


def problems_of(plan: Plan, hints: Mapping[str, int]) -> list[Problem]:
    """The products of a plan that a library makes by addresses, equal ones as often as they are
    made; those of sizes without a hint are left out.
    """
    products = [step.product for step in plan.steps if isinstance(step, AtenStep) and step.product]
    found = [in_numbers(product, hints) for product in products]
    return [problem for problem in found if problem is not None]


def _worth_it(problems: Iterable[Problem], device: Device) -> list[Problem]:
    """Those that the library is asked for and that are more than a launch, each once, the one with
    most time first.
    """
    seconds = {problem: count * _seconds(problem, device) for problem, count in
               Counter(problems).items() if asked(problem) is not None}  # fmt: skip
    long = [p for p in seconds if _seconds(p, device) >= SHORTEST_S]
    return sorted(long, key=lambda problem: -seconds[problem])


def _seconds(of: Problem, device: Device) -> float:
    """Modeled, operands and result read and written once."""
    result = of.batch * of.m * of.n
    read = of.batch * (of.m * of.k + of.k * of.n) + (result if of.matrix is not None else 0)
    written = result * (of.stored or of.dtype).itemsize * (1 if of.sums is None else 2)
    work = Contraction(of.batch, of.m, of.n, of.k, of.dtype)
    return modeled(Cost(read * of.dtype.itemsize, written, contractions=(work,)), device)


def title(of: Problem) -> str:
    """As "8192 x 3072 x 768 bfloat16 nt, bias, gelu": rows, columns, inner extent, and which
    operands lie by columns ("t").
    """
    batch = f"{of.batch} of " if of.batch > 1 else ""
    lying = "".join("n" if strides[2] == 1 else "t" for strides in (of.a, of.b))
    dtype = str(of.dtype).removeprefix("torch.")
    extents = f"{batch}{of.m} x {of.n} x {of.k} {dtype} {lying}"
    words = {
        "in float32": of.stored is not None,
        "bias": of.biased,
        "added": of.matrix is not None,
        of.activation: of.activation is not None,
        "sums kept": of.sums is not None,
    }
    return ", ".join([extents, *(str(word) for word, has in words.items() if has)])


# --- measuring


def _fastest(problem: Problem, bench: ProductBench) -> Selection | None:
    """The measurement of a product; None where there is nothing to choose from."""
    algorithms = bench.proposed(problem)
    if len(algorithms) < 2:
        return None
    first = algorithms[0]
    try:
        times = bench.time(problem, algorithms)
    except DoesNotFit:
        return None
    seconds = {a: t for a, t in zip(algorithms, times, strict=True) if t is not None}
    if first not in seconds:
        return None
    best = min(seconds, key=lambda algorithm: seconds[algorithm])
    tied = seconds[first] <= TIE * seconds[best]
    return Selection(title(problem), first if tied else best, first, seconds, problem)


# --- remembering


def _remembered(cache: Cache | None, key: str, problem: Problem) -> Selection | None:
    entry = cache.get("tuning", key) if cache is not None else None
    if entry is None:
        return None
    rows = entry.meta["measured"]
    seconds = {Algorithm(**row["algorithm"]): float(row["seconds"]) for row in rows}
    chosen, model = (Algorithm(**entry.meta[name]) for name in ("chosen", "model"))
    return Selection(title(problem), chosen, model, seconds, problem)


def _remember(cache: Cache | None, key: str, found: Selection) -> None:
    if cache is None:
        return
    measured = [
        {"algorithm": dataclasses.asdict(algorithm), "seconds": seconds}
        for algorithm, seconds in found.seconds.items()
    ]
    chosen, model = (dataclasses.asdict(each) for each in (found.chosen, found.model))
    cache.store("tuning", key, {}, {"chosen": chosen, "model": model, "measured": measured})
