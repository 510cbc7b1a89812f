"""Sites by the model: as they stand, and folded with the tile that the model gives them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from iocompiler.cost_model.device import Device
from iocompiler.cost_model.kernel import kernel_seconds
from iocompiler.cost_model.matmul_price import matmul_seconds
from iocompiler.cost_model.matmul_tiles import choose
from iocompiler.cost_model.rules import call_seconds
from iocompiler.plan.activation import activations
from iocompiler.plan.contents import made
from iocompiler.plan.data import AtenStep, KernelStep, Plan
from iocompiler.plan.fold import folded, with_reasons
from iocompiler.plan.product import MatmulTile
from iocompiler.plan.residual import Residual, residuals
from iocompiler.plan.sites import Site, SiteKey, sites


@dataclass(frozen=True)
class Priced:
    """A site by the model, as it stands and as one step with the tile that `choose` gives it.

    Attributes:
        library_s: of the library's calls. kernel_s: of the kernel behind them, if any, less what
            of it the library does (`residual.py`, `activation.py`).
        folded_s: of the step; None where nothing was measured that says so.
    """

    site: Site
    tile: MatmulTile
    library_s: float
    kernel_s: float
    folded_s: float | None

    @property
    def pays(self) -> bool:
        return self.folded_s is not None and self.folded_s < self.library_s + self.kernel_s

    @property
    def reason(self) -> str:
        """Why its products pass through memory, where it does not pay."""
        assert self.folded_s is not None
        apart = (self.library_s + self.kernel_s) * 1e6
        return f"{self.site.apart} {apart:.1f} us, in one {self.folded_s * 1e6:.1f} us: modeled"


def priced(
    plan: Plan,
    device: Device,
    hints: Mapping[str, int],
    known: dict[SiteKey, MatmulTile] | None = None,
) -> tuple[Priced, ...]:
    """The sites of the plan, one of equal ones: none where it was not measured what the template
    reaches on the device.

    Args:
        known: tiles chosen before, and place for those chosen now, for one with many plans.
    """
    if device.matmul_template is None:
        return ()
    specs = {name: spec for name, spec in plan.inputs if spec is not None}
    for step in plan.steps:
        specs |= made(step)
    apart: dict[tuple[int, ...], Residual] = {
        (each.product, each.kernel): each for each in residuals(plan)
    }
    activated = {(each.product, each.kernel): each for each in activations(plan, device, hints)}
    tiles = {} if known is None else known
    found: dict[SiteKey, Priced] = {}
    for site in sites(plan):
        key = site.key
        if key in found:
            continue
        if key not in tiles:
            tiles[key] = choose(*key, device, hints)
        calls = [plan.steps[place] for place in site.places]
        kernel = calls.pop() if site.has_kernel else None
        residual = apart.get(site.places)
        if residual is not None:  # the library adds
            calls, kernel = [residual.call], residual.rest
            specs |= made(residual.call) | {view.name: view.spec for view in residual.views}
        elif site.places in activated:
            calls, kernel = [activated[site.places].call], None
        found[key] = Priced(
            site,
            tiles[key],
            sum(
                call_seconds(step, specs, device, hints)
                for step in calls
                if isinstance(step, AtenStep)
            ),
            kernel_seconds(kernel.program, device, hints)
            if isinstance(kernel, KernelStep)
            else 0.0,
            matmul_seconds(*key, tiles[key], device, hints),
        )
    return tuple(found.values())


def chosen_by_price(plan: Plan, choices: Iterable[Priced]) -> Plan:
    """The plan with the sites folded that pay, and the prices as reasons where others do not."""
    choices = tuple(choices)
    pays = {each.site.key: each.tile for each in choices if each.pays}
    rest = [each for each in choices if not each.pays and each.folded_s is not None]
    return folded(with_reasons(plan, {each.site.key: each.reason for each in rest}), pays)
