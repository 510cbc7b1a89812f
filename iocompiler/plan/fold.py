"""Products and the kernels that read them element by element, folded into steps of the matmul
template.

Whether that is faster is not asked by `folded`: it folds the sites that somebody chose, by price
(`priced.py`) or by the clock (`runtime/tune_matmul.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from iocompiler.plan.column_sums import Resized, folding
from iocompiler.plan.contents import made
from iocompiler.plan.data import AtenStep, Plan, Step, ViewStep
from iocompiler.plan.dataflow import WHY
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
    parts: dict[str, Resized] = {}
    for site in sites(plan):
        tile = chosen.get(site.key)
        if tile is None:
            continue
        *products, kernel = site.places
        steps[kernel] = [replace(site.step, tile=tile)]
        gone |= _edges(plan, site)
        parts |= site.parts
        for place in products:
            steps[place] = []
            for later in _views(plan.steps, place, kernel):
                steps[kernel] += steps[later]
                steps[later] = []
    ordered = tuple(folding(step, parts) for place in sorted(steps) for step in steps[place])
    kept = tuple(edge for edge in plan.unfused if (edge.producer, edge.consumer) not in gone)
    return replace(plan, steps=ordered, unfused=kept)


def with_reasons(plan: Plan, reasons: Mapping[SiteKey, str]) -> Plan:
    """The plan with other reasons why the products of some sites pass through memory; of those by
    themselves, why they are the library's.
    """
    alone: dict[int, str] = {}
    changed: dict[tuple[str, str], str] = {}
    for site in sites(plan) if reasons else ():
        if site.key in reasons:
            changed |= dict.fromkeys(_edges(plan, site), reasons[site.key])
            if not site.has_kernel:
                alone |= dict.fromkeys(site.places, reasons[site.key])
    unfused = tuple(
        replace(edge, reason=changed.get((edge.producer, edge.consumer), edge.reason))
        for edge in plan.unfused
    )
    steps = list(plan.steps)
    for place, reason in alone.items():
        step = steps[place]
        assert isinstance(step, AtenStep)
        steps[place] = replace(step, reason=f"{step.reason}{WHY}{reason}")
    return replace(plan, steps=tuple(steps), unfused=unfused)


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
