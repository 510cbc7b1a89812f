"""Products and the pointwise kernels that read them, folded into steps of the matmul template.

Whether that is faster is not asked by `folded`: it folds the sites that somebody chose, by price
(`cheaper`) or by the clock (`runtime/tune_matmul.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from iocompiler.cost_model.call import call_of_step
from iocompiler.cost_model.device import Device
from iocompiler.cost_model.kernel import kernel_seconds
from iocompiler.cost_model.matmul_price import matmul_seconds
from iocompiler.cost_model.matmul_tiles import choose
from iocompiler.cost_model.roofline import time
from iocompiler.cost_model.rules import price
from iocompiler.plan.data import (
    AtenStep,
    KernelStep,
    Plan,
    Step,
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


def cheaper(
    plan: Plan,
    device: Device,
    hints: Mapping[str, int],
    known: dict[SiteKey, MatmulTile] | None = None,
) -> dict[SiteKey, MatmulTile]:
    """The sites that are modeled to be faster folded, and their tiles: none where it was not
    measured what the template reaches on the device.

    Args:
        known: tiles of sites, whether they are folded or not, for one who asks for many plans.
    """
    if device.matmul_template is None:
        return {}
    tiles = {} if known is None else known
    found: dict[SiteKey, MatmulTile] = {}
    for apart in priced(plan, device, hints):
        key = apart.site.key
        if key not in tiles:
            tiles[key] = choose(*key, device, hints)
        seconds = matmul_seconds(*key, tiles[key], device, hints)
        if seconds is not None and seconds < apart.library_s + apart.kernel_s:
            found[key] = tiles[key]
    return found


@dataclass(frozen=True)
class Apart:
    """A site, and what is modeled of it as it stands: of the library's calls and of the kernel."""

    site: Site
    library_s: float
    kernel_s: float


def priced(plan: Plan, device: Device, hints: Mapping[str, int]) -> Iterator[Apart]:
    """Every site of the plan, in its order."""
    specs = {name: spec for name, spec in plan.inputs if spec is not None}
    for step in plan.steps:
        specs |= made(step)
    for site in sites(plan):
        *products, kernel = (plan.steps[place] for place in site.places)
        assert isinstance(kernel, KernelStep)
        library = 0.0
        for step in products:
            assert isinstance(step, AtenStep)
            library += time(price(call_of_step(step, specs)), device, torch.float32, hints)
        yield Apart(site, library, kernel_seconds(kernel.program, device, hints))


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
