"""Products and the kernels that read them element by element: which can be one step of the matmul
template, and why others cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TypeAlias

from iocompiler.plan.alone import beside, sums
from iocompiler.plan.column_sums import Resized, folds_any, has_column_sums
from iocompiler.plan.data import (
    AtenStep,
    KernelStep,
    MatmulStep,
    Plan,
    TensorSpec,
    ViewStep,
)
from iocompiler.plan.factors import Factors, factors_of
from iocompiler.plan.look import Look
from iocompiler.plan.matrix import Made, NoEpilogue, epilogue
from iocompiler.plan.moving import names_read
from iocompiler.plan.product import UNCHOSEN, Product
from iocompiler.plan.sizes import equal
from iocompiler.tile.program import Buffer, TileProgram

SiteKey: TypeAlias = tuple[Product, TileProgram]
"""What is computed: equal sites get equal tiles."""

# What stands beside the sums in registers: beyond this an epilogue spills.
_MOST_OPERATIONS = 200
_MOST_BUFFERS = 16

# Triton's products cut operands off where the library's round them: on an H100 their error against
# float64 was 2.6 to 3.5 times the library's
_TF32 = "in TF32 the library rounds operands, which the template would cut off"


@dataclass(frozen=True)
class Site:
    """A kernel that can be the epilogue of the products it reads; or products by themselves, that
    are added up, or share an operand.

    Attributes:
        name: one for all equal sites of the plan, in every process.
        step: what would run instead; its tile is `UNCHOSEN`.
        places: of the products' steps and, last, of the kernel's, if any, in the plan.
        parts: the tensors of column sums in parts that have other parts then.
        has_kernel: behind the products.
    """

    name: str
    step: MatmulStep
    places: tuple[int, ...]
    parts: Mapping[str, Resized] = field(default_factory=dict)
    has_kernel: bool = True

    @property
    def key(self) -> SiteKey:
        return self.step.key

    @property
    def apart(self) -> str:
        """What runs as it stands."""
        return "library and kernel" if self.has_kernel else "library"


@dataclass(frozen=True)
class Declined:
    """A kernel that reads a product and cannot be its epilogue, and why."""

    kernel: str
    product: str
    reason: str


def sites(plan: Plan) -> tuple[Site, ...]:
    """What of the plan can be folded, in its order; no step is part of two sites."""
    return tuple(found for found in survey(plan) if isinstance(found, Site))


def survey(plan: Plan) -> Iterator[Site | Declined]:
    """Every kernel that reads a product element by element: a site, or why it is none; then, of
    what is part of none, sums of products, and products that share an operand. A result written
    over what dies (`in_place`) comes too late for one.
    """
    look = _Look(plan)
    names: dict[SiteKey, str] = {}
    for place, step in enumerate(plan.steps):
        if not isinstance(step, KernelStep) or not _is_by_element(step):
            continue
        pairs = zip(step.args, step.buffers, strict=True)
        if any(buffer.role == "out" and name in look.views for name, buffer in pairs):
            continue
        found = look.at(place, step)
        if isinstance(found, Site):
            name = names.setdefault(found.key, _unused(found.step.name, names))
            found = replace(found, name=name)
        if found is not None:
            yield found
    for step, places in chain(sums(look), beside(look)):
        name = names.setdefault(step.key, _unused(step.name, names))
        yield Site(name, step, places, has_kernel=False)


def _is_by_element(step: KernelStep) -> bool:
    return step.schedule.kind == "pointwise" or has_column_sums(step.program)


def _unused(wish: str, names: Mapping[SiteKey, str]) -> str:
    taken, count, name = set(names.values()), 1, wish
    while name in taken:
        count += 1
        name = f"{wish}_{count}"
    return name


class _Look(Look):
    """A plan seen from the kernels that may be epilogues."""

    def at(self, place: int, step: KernelStep) -> Site | Declined | None:
        """The site of the kernel; None where it reads no product."""
        products = self._products(step)
        if not products:
            return None
        reasons = []
        for group in self._groups(products):
            try:
                site = self._site(place, step, group)
            except NoEpilogue as error:
                reasons.append((len(group) > 1, group[0][0], str(error)))
                continue
            self.taken |= set(site.places)
            return site
        # what stands in the way of a product by itself
        _, product, reason = min(reasons, key=lambda each: each[0])
        return Declined(step.name, product, reason)

    def _groups(self, products: Mapping[str, Factors]) -> Iterator[list[tuple[str, Factors]]]:
        """What may be made in one step: two products of one left operand, one, its halves."""
        pair = self._pair(products)
        if pair:
            yield [(name, products[name]) for name in products if name in pair]
        for name, factors in products.items():
            yield [(name, factors)]
            halves = factors.halves()
            if halves is not None:
                yield [(name, half) for half in halves]

    def _products(self, step: KernelStep) -> dict[str, Factors]:
        """The products the kernel reads whole, by the values they make, the longest sums first."""
        found: dict[str, Factors] = {}
        for name, buffer in zip(step.args, step.buffers, strict=True):
            root = self.root(name)
            place = self.maker.get(root)
            if buffer.role != "in" or place is None or place in self.taken or root in found:
                continue
            maker = self.steps[place]
            factors = factors_of(maker, self.specs) if isinstance(maker, AtenStep) else None
            if factors is not None:
                found[root] = factors
        return dict(sorted(found.items(), key=lambda each: -_length(each[1].k)))

    def _pair(self, products: Mapping[str, Factors]) -> set[str]:
        """Two products of one left operand, to be made at once."""
        names = list(products)
        for n, one in enumerate(names):
            for other in names[n + 1 :]:
                if products[one].pairs_with(products[other]):
                    return {one, other}
        return set()

    def _site(self, place: int, step: KernelStep, products: Sequence[tuple[str, Factors]]) -> Site:
        rows: list[tuple[str, Factors, Made]] = []
        if any(factors.tf32 for _, factors in products):
            raise NoEpilogue(_TF32)
        for number, (name, factors) in enumerate(products):
            self.check_order(place, step, name, factors)
            rows.append((name, factors, self._made(place, step, name, factors, number)))
        program = epilogue(step.program, [row for _, _, row in rows])
        if len(program.ops) > _MOST_OPERATIONS or len(program.buffers) > _MOST_BUFFERS:
            raise NoEpilogue(f"{len(program.ops)} operations on {len(program.buffers)} tensors")
        names = dict(zip([b.name for b in step.buffers], step.args, strict=True))
        for name, factors, row in rows:
            if row.added is not None and factors.added is not None:
                names[row.added.buffer.name] = factors.added[0]
            if row.kept is not None:
                names[row.kept.name] = name
        product = self.product([factors for _, factors, _ in rows])
        places = dict.fromkeys(self.maker[name] for name, _, _ in rows)
        makers = [self.steps[at] for at in places]
        calls = [maker for maker in makers if isinstance(maker, AtenStep)]
        title = "_and_".join(dict.fromkeys(f.title for _, f, _ in rows))
        stored = dict.fromkeys(name for name, _, row in rows if row.kept is not None)
        kept = [(name, self.specs[name]) for name in stored]
        own = program.buffers[len(rows) :]
        left, right, *others = rows[0][1].operands
        parts = self._parts(step, program, names)
        folded = MatmulStep(
            f"{step.name}_of_{title}",
            product,
            program,
            UNCHOSEN,
            (
                left,
                right,
                *(f.right[0] for _, f, _ in rows[1:]),
                *others,
                *(names[b.name] for b in own),
            ),
            (*(_resized(name, spec, parts) for name, spec in step.outputs), *kept),
            (*(call.node for call in calls), *step.nodes),
            tuple(dict.fromkeys([*(c.where for c in calls if c.where), *step.where])),
        )
        return Site("", folded, (*places, place), parts)

    def _parts(
        self, step: KernelStep, program: TileProgram, names: Mapping[str, str]
    ) -> dict[str, Resized]:
        """The tensors of column sums in parts that have other parts behind a product."""
        before = {buffer.name: buffer.elements for buffer in step.program.buffers}
        found = {
            names[b.name]: Resized(before[b.name], b.elements)
            for b in program.buffers
            if b.name in before and not equal(b.elements, before[b.name])
        }
        if not found:
            return found
        for later in self.steps:
            reads = not isinstance(later, ViewStep) and names_read(later) & found.keys()
            if reads and not folds_any(later, found):
                raise NoEpilogue("what folds its sums is made for their parts")
        return found

    def _made(self, place: int, step: KernelStep, name: str, factors: Factors, number: int) -> Made:
        shows = [
            (buffer, arg)
            for buffer, arg in zip(step.buffers, step.args, strict=True)
            if self.root(arg) == name
        ]
        if not all(equal(self.offset(arg), 0) for _, arg in shows):
            raise NoEpilogue("it reads a part of the product")
        spec, start = self.specs[name], factors.start * factors.result[2]
        # halves are stored into one tensor
        number = number if factors.start == 0 else number - 1
        kept = self.last.get(name, 0) > place
        return Made(
            frozenset(buffer.name for buffer, _ in shows),
            spec.dtype,
            (factors.batch, factors.m, factors.n),
            factors.result,
            factors.added_to(f"bias{number}"),
            Buffer(f"product{number}", spec.dtype, "out", factors.elements) if kept else None,
            start,
        )


def _resized(name: str, spec: TensorSpec, parts: Mapping[str, Resized]) -> tuple[str, TensorSpec]:
    return name, replace(spec, shape=(parts[name].after,)) if name in parts else spec


def _length(size: object) -> float:
    return float(size) if isinstance(size, int) else 0.0
