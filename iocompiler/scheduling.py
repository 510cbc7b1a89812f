"""A flat graph's plan with what is chosen for it: by price, by the clock under
mode="max-autotune", or as a plan file has it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule

from iocompiler import engines
from iocompiler.awaited import ready
from iocompiler.options import Options
from iocompiler.patience import Patience
from iocompiler.plan.data import Plan
from iocompiler.runtime.tangents import Boxed

if TYPE_CHECKING:
    from iocompiler.compilation import Measured


def scheduled(
    plan: Plan,
    gm: GraphModule,
    options: Options,
    name: str,
    donated: Collection[str],
    patience: Patience,
) -> tuple[Plan, tuple[Measured, ...], Boxed]:
    """The plan as it runs, what was measured, and what runs it: with the schedules of the plan
    file where that has the graph, else as `tuned` chooses, which then goes into the file.

    Args:
        donated: as of `plan.inplace.in_place`.
        patience: of what may be measured in this compilation.

    Raises:
        BadPlanFile: the file cannot be replayed.
    """
    # a CPU graph never needs the planner
    from iocompiler.plan.activation import with_activations
    from iocompiler.plan.addressed import addressed
    from iocompiler.plan.build import size_hints
    from iocompiler.plan.inplace import in_place
    from iocompiler.plan.memory import shared_memory
    from iocompiler.plan.residual import with_residuals

    def settle(chosen: Plan) -> Plan:
        hints = size_hints(gm)
        device = engines.device_row(gm, options)
        chosen = with_residuals(chosen, device, hints)
        chosen = with_activations(chosen, device, hints)
        return shared_memory(addressed(in_place(chosen, donated)), hints, donated)

    def measured_plan() -> tuple[Plan, Plan, tuple[Measured, ...]]:
        """As it was chosen, as it runs, and what was measured."""
        chosen, kernels = tuned(plan, gm, options, patience)
        settled, products = with_algorithms(settle(chosen), gm, options, patience)
        return replace(chosen, algorithms=settled.algorithms), settled, (*kernels, *products)

    if not options.plan:
        _, settled, measured = measured_plan()
        return settled, measured, engines.load(settled, gm, options, name)
    from iocompiler.runtime.plan_file import PlanFile

    file, device = PlanFile(Path(options.plan)), engines.device_row(gm, options).name
    replayed_plan = file.replayed(plan, name, device)
    if replayed_plan is not None:
        try:
            replayed_plan = settle(replayed_plan)
            return replayed_plan, (), ready(engines.load(replayed_plan, gm, options, name))
        except Exception as error:
            raise file.refused(name, error) from error
    chosen, settled, measured = measured_plan()
    run = ready(engines.load(settled, gm, options, name))
    file.add(chosen, plan, name, device)
    return settled, measured, run


def tuned(
    plan: Plan, gm: GraphModule, options: Options, patience: Patience
) -> tuple[Plan, tuple[Measured, ...]]:
    """The plan with its kernels' schedules measured, products and the kernels behind them folded
    where that was faster, and the measurements; as the model has it where the options do not ask
    for it, or nothing can be measured: without a GPU, or inside a CUDA graph.
    """
    if not _measures(plan, options):
        return by_price(plan, gm, options), ()
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from iocompiler.plan.build import size_hints
    from iocompiler.runtime.cache import default_cache
    from iocompiler.runtime.measure import GpuBench
    from iocompiler.runtime.measure_region import GpuRegionBench
    from iocompiler.runtime.tune import tune
    from iocompiler.runtime.tune_matmul import tune_matmuls

    device, hints, row = torch.device(plan.device), size_hints(gm), engines.device_row(gm, options)
    with unset_fake_temporarily():
        name = torch.cuda.get_device_name(device)
        bench, regions = GpuBench(device), GpuRegionBench(device)
        with patience.measuring() as most:
            plan, kernels = tune(plan, row, hints, bench, default_cache(), name, most)
            bench.release()
        with patience.measuring() as most:
            plan, foldings = tune_matmuls(plan, row, hints, regions, default_cache(), name, most)
            regions.release()
        return plan, (*kernels, *foldings)


def _measures(plan: Plan, options: Options) -> bool:
    """Whether ways to run the plan are timed."""
    on_gpu = torch.device(plan.device).type == "cuda"
    if not options.measures or options.engine != "auto" or not on_gpu:
        return False
    return torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing()


def with_algorithms(
    plan: Plan, gm: GraphModule, options: Options, patience: Patience
) -> tuple[Plan, tuple[Measured, ...]]:
    """A settled plan with the fastest of the library's algorithms for its products, and the
    measurements; with the library's own choice where the options do not ask for them.
    """
    if not _measures(plan, options):
        return plan, ()
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from iocompiler.plan.build import size_hints
    from iocompiler.runtime.ahead import multiplied
    from iocompiler.runtime.cache import default_cache
    from iocompiler.runtime.measure_products import GpuProductBench
    from iocompiler.runtime.tune_products import tune_products

    device, hints, row = torch.device(plan.device), size_hints(gm), engines.device_row(gm, options)
    with unset_fake_temporarily():
        name, bench = torch.cuda.get_device_name(device), GpuProductBench(device)
        inside = multiplied(plan, device, hints)
        with patience.measuring() as most:
            found = tune_products(plan, row, hints, bench, default_cache(), name, inside, most)
            bench.release()
        return found


def by_price(plan: Plan, gm: GraphModule, options: Options) -> Plan:
    """The plan with products and the kernels behind them folded where the cost model expects that
    to be faster: it has to have been measured of the device what the template reaches there.
    """
    row = engines.device_row(gm, options)
    if row.matmul_template is None:
        return plan
    from iocompiler.plan.build import size_hints
    from iocompiler.plan.priced import chosen_by_price, priced

    return chosen_by_price(plan, priced(plan, row, size_hints(gm)))
