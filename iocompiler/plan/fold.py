"""Products and the pointwise kernels that read them, folded into steps of the matmul template.

Whether that is faster is not asked by `folded`: it folds the sites that somebody chose, by price
(`cheaper`) or by the clock (`runtime/tune_matmul.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from iocompiler.cost_model.call import call_of_step
from iocompiler.cost_model.device import Device
from iocompiler.cost_model.kernel import kernel_seconds
from iocompiler.cost_model.matmul import matmul_seconds
from iocompiler.cost_model.matmul_tiles import choose
from iocompiler.cost_model.roofline import time
from iocompiler.cost_model.rules import price
from iocompiler.plan.data import (
    AtenStep,
    KernelStep,
    Plan,
    Step,
    TensorSpec,
    ViewStep,
    made,
)
from iocompiler.plan.product import MatmulTile
from iocompiler.plan.sites import Site, SiteKey, sites


def folded(plan: Plan, chosen: Mapping[SiteKey, MatmulTile]) -> Plan:
    """The plan with the chosen sites folded. Where the kernel stood now stands the template, and
    behind it the views of products that only later steps read.
    """
    if not chosen:
        return plan
    steps: dict[int, list[Step]] = {n: [step] for n, step in enumerate(plan.steps)}
    gone: set[tuple[str, str]] = set()
    for site in sites(plan):
        tile = chosen.get(site.key)
        if tile is None:
            continue
        *products, kernel = site.places
        steps[kernel] = [replace(site.step, tile=tile)]
        gone |= _edges(plan, site)
        for place in products:
            steps[place] = []
            for later in _views(plan.steps, place, kernel):
                steps[kernel] += steps[later]
                steps[later] = []
    ordered = tuple(step for place in sorted(steps) for step in steps[place])
    kept = tuple(edge for edge in plan.unfused if (edge.producer, edge.consumer) not in gone)
    return replace(plan, steps=ordered, unfused=kept)


def cheaper(plan: Plan, device: Device, hints: Mapping[str, int]) -> dict[SiteKey, MatmulTile]:
    """The sites that are modeled to be faster folded, and their tiles: none where it was not
    measured what the template reaches on the device.
    """
    specs = {name: spec for name, spec in plan.inputs if spec is not None}
    for step in plan.steps:
        specs |= made(step)
    found: dict[SiteKey, MatmulTile] = {}
    for site in sites(plan):
        step = site.step
        seconds = matmul_seconds(step.product, step.program, device, hints)
        before = [plan.steps[place] for place in site.places]
        if seconds is not None and seconds < sum(_seconds(s, specs, device, hints) for s in before):
            found[site.key] = choose(step.product, step.program, device, hints)
    return found


def _seconds(
    step: Step, specs: Mapping[str, TensorSpec], device: Device, hints: Mapping[str, int]
) -> float:
    if isinstance(step, KernelStep):
        return kernel_seconds(step.program, device, hints)
    assert isinstance(step, AtenStep)
    return time(price(call_of_step(step, specs)), device, torch.float32, hints)


def with_reasons(plan: Plan, reasons: Mapping[SiteKey, str]) -> Plan:
    """The plan with other reasons why the products of some sites pass through memory."""
    changed: dict[tuple[str, str], str] = {}
    for site in sites(plan) if reasons else ():
        if site.key in reasons:
            changed |= dict.fromkeys(_edges(plan, site), reasons[site.key])
    unfused = tuple(
        replace(edge, reason=changed.get((edge.producer, edge.consumer), edge.reason))
        for edge in plan.unfused
    )
    return replace(plan, unfused=unfused)


def _edges(plan: Plan, site: Site) -> set[tuple[str, str]]:
    """From the products of a site to the nodes of its kernel."""
    names = {name for place in site.places[:-1] for name in made(plan.steps[place])}
    return {(name, node) for name in names for node in site.step.nodes}


def _views(steps: Sequence[Step], product: int, kernel: int) -> list[int]:
    """Views of what the product's step makes, before the kernel."""
    roots = set(made(steps[product]))
    found = []
    for place in range(product + 1, kernel):
        step = steps[place]
        if isinstance(step, ViewStep) and step.base in roots:
            roots.add(step.name)
            found.append(place)
    return found
