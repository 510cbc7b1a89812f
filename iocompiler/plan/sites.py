"""Products and the kernels that read them element by element: which can be one step of the matmul
template, and why others cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from iocompiler.cost_model.call import call_of_step, resolve
from iocompiler.plan.column_sums import Resized, folds_any, has_column_sums
from iocompiler.plan.data import (
    AtenStep,
    KernelStep,
    MatmulStep,
    Plan,
    Step,
    TensorSpec,
    ViewStep,
    made,
    references,
)
from iocompiler.plan.factors import Factors, factors_of
from iocompiler.plan.groups import Member, can_join, groups
from iocompiler.plan.matrix import Made, NoEpilogue, epilogue, stored
from iocompiler.plan.moving import bases_of, names_read, storage, storages, written
from iocompiler.plan.product import MatmulTile, Product, Term
from iocompiler.plan.sizes import equal
from iocompiler.tile.index import Size
from iocompiler.tile.program import Buffer, TileProgram

SiteKey: TypeAlias = tuple[Product, TileProgram]
"""What is computed: equal sites get equal tiles."""

# What stands beside the sums in registers: beyond this an epilogue spills.
_MOST_OPERATIONS = 200
_MOST_BUFFERS = 16

# Triton's products cut operands off where the library's round them: on an H100 their error against
# float64 was 2.6 to 3.5 times the library's
_TF32 = "in TF32 the library rounds operands, which the template would cut off"

_SUM, _GROUP = "sum_of_products", "products_of_one_operand"

# the tile of a step nobody has chosen one for
UNCHOSEN = MatmulTile(0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Site:
    """A kernel that can be the epilogue of the products it reads; or products that are added up,
    by themselves.

    Attributes:
        name: one for all equal sites of the plan, in every process.
        step: what would run instead; its tile is `UNCHOSEN`.
        places: of the products' steps and, last, of the kernel's, in the plan; or of the sum's.
        parts: the tensors of column sums in parts that have other parts then.
    """

    name: str
    step: MatmulStep
    places: tuple[int, ...]
    parts: Mapping[str, Resized] = field(default_factory=dict)

    @property
    def key(self) -> SiteKey:
        return self.step.key


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
    """Every kernel that reads a product element by element: a site, or why it is none; then the
    sums of products that are part of none. A result written over what dies (`in_place`) comes too
    late for one.
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
    for place, step in enumerate(plan.steps):
        if isinstance(step, AtenStep) and place not in look.taken:
            alone = look.alone(place, step)
            if alone is not None:
                yield replace(alone, name=names.setdefault(alone.key, _unused(_SUM, names)))
    for site in look.beside():
        yield replace(site, name=names.setdefault(site.key, _unused(_GROUP, names)))


def _is_by_element(step: KernelStep) -> bool:
    return step.schedule.kind == "pointwise" or has_column_sums(step.program)


def _unused(wish: str, names: Mapping[SiteKey, str]) -> str:
    taken, count, name = set(names.values()), 1, wish
    while name in taken:
        count += 1
        name = f"{wish}_{count}"
    return name


class _Look:
    """A plan seen from the kernels that may be epilogues."""

    def __init__(self, plan: Plan) -> None:
        self.steps = plan.steps
        self.bases = bases_of(plan.steps)
        self.views = {step.name: step for step in plan.steps if isinstance(step, ViewStep)}
        self.specs = {name: spec for name, spec in plan.inputs if spec is not None}
        self.maker: dict[str, int] = {}
        for place, step in enumerate(plan.steps):
            self.specs |= made(step)
            self.maker |= dict.fromkeys(made(step), place)
        self.last: dict[str, int] = {}
        for place, step in enumerate(plan.steps):
            if not isinstance(step, ViewStep):
                self.last |= dict.fromkeys(self._roots(names_read(step)), place)
        left = {r.name for r in references(plan.outputs)}
        self.last |= dict.fromkeys(self._roots(left), len(plan.steps))
        self.taken: set[int] = set()

    def _roots(self, names: set[str]) -> set[str]:
        return storages(names, self.bases)

    def _root(self, name: str) -> str:
        return storage(name, self.bases)

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

    def alone(self, place: int, step: AtenStep) -> Site | None:
        """The site of products that are added up, with nothing behind them that it could take."""
        factors = factors_of(step, self.specs)
        if factors is None or not factors.more or factors.tf32:
            return None
        return Site("", self._stored(_SUM, step, factors), (place,))

    def beside(self) -> Iterator[Site]:
        """The sites of products that share an operand and that nothing else takes."""
        members: dict[int, Member] = {}
        count = 0
        for place, step in enumerate(self.steps):
            count += not isinstance(step, ViewStep)
            if isinstance(step, AtenStep) and place not in self.taken:
                factors = factors_of(step, self.specs)
                if factors is not None and not factors.tf32 and can_join(step, factors):
                    members[count] = Member(place, next(iter(made(step))), factors)
        for group, side in groups(members, self._may_wait):
            calls = [(self.steps[each.place], each.factors) for each in group]
            steps = [self._stored(_GROUP, s, f) for s, f in calls if isinstance(s, AtenStep)]
            yield Site("", _beside(steps, side), tuple(each.place for each in group))

    def _may_wait(self, one: Member, last: Member) -> bool:
        if one.name in self._roots(set(last.factors.reads)):
            return False
        try:
            self._check_order(last.place, self.steps[last.place], one.name, one.factors)
        except NoEpilogue:
            return False
        return True

    def _stored(self, title: str, step: AtenStep, factors: Factors) -> MatmulStep:
        """The call as a step that does no more than it."""
        ((name, spec),) = made(step).items()
        sums = Made(
            frozenset(), spec.dtype, (factors.batch, factors.m, factors.n), factors.result,
            factors.added_to("bias0"), Buffer("product0", spec.dtype, "out", factors.elements),
        )  # fmt: skip
        added = (factors.added[0],) if factors.added is not None else ()
        return MatmulStep(
            title,
            self._product([factors]),
            stored(sums),
            UNCHOSEN,
            (*factors.operands, *added, name),
            ((name, spec),),
            (step.node,),
            (step.where,) if step.where else (),
        )

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
            root = self._root(name)
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
            self._check_order(place, step, name, factors)
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
        product = self._product([factors for _, factors, _ in rows])
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

    def _product(self, rows: Sequence[Factors]) -> Product:
        first = rows[0]
        starts = tuple(f.start * f.right[1][1] for f in rows)
        found = Product(
            first.batch, first.m, first.n, first.k, first.dtype,
            first.left[1], tuple(f.right[1] for f in rows), starts,
            more=tuple(Term(pair.k, pair.left[1], pair.right[1]) for pair in first.more),
        )  # fmt: skip
        begins = [self._offset(first.left[0])]
        begins += [self._offset(f.right[0]) + start for f, start in zip(rows, starts, strict=True)]
        begins += map(self._offset, first.operands[2:])
        return replace(found, aligned=all(map(found.is_whole, begins)))

    def _made(self, place: int, step: KernelStep, name: str, factors: Factors, number: int) -> Made:
        shows = [
            (buffer, arg)
            for buffer, arg in zip(step.buffers, step.args, strict=True)
            if self._root(arg) == name
        ]
        if not all(equal(self._offset(arg), 0) for _, arg in shows):
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

    def _offset(self, name: str) -> Size:
        offset: Size = 0
        while name in self.views:
            offset = offset + self.views[name].offset
            name = self.views[name].base
        return offset

    def _check_order(self, place: int, step: KernelStep, name: str, factors: Factors) -> None:
        """The product may wait until the kernel runs: nobody needs it before, nobody changes what
        it is made of, not even the kernel.
        """
        read = self._roots(set(factors.reads))
        for between in self.steps[self.maker[name] + 1 : place]:
            if isinstance(between, ViewStep):
                continue
            if name in self._roots(names_read(between)):
                raise NoEpilogue("another step reads the product before")
            if read & self._roots(_changed(between, self.specs)):
                raise NoEpilogue("what the product is made of is overwritten before")
        if read & self._roots(written(step)):
            raise NoEpilogue("it overwrites what the product is made of")


def _beside(steps: Sequence[MatmulStep], shared: str) -> MatmulStep:
    """One step for several, which share an operand."""
    first, *others = steps
    beside = tuple((replace(s.product, shares=shared), s.program) for s in others)
    return replace(
        first,
        product=replace(first.product, beside=beside),
        args=tuple(arg for step in steps for arg in step.args),
        outputs=tuple(each for step in steps for each in step.outputs),
        nodes=tuple(node for step in steps for node in step.nodes),
        where=tuple(dict.fromkeys(line for step in steps for line in step.where)),
    )


def _resized(name: str, spec: TensorSpec, parts: Mapping[str, Resized]) -> tuple[str, TensorSpec]:
    return name, replace(spec, shape=(parts[name].after,)) if name in parts else spec


def _length(size: object) -> float:
    return float(size) if isinstance(size, int) else 0.0


def _changed(step: Step, specs: Mapping[str, TensorSpec]) -> set[str]:
    """The values a step may overwrite: of an operator without a schema, all it reads."""
    if not isinstance(step, AtenStep):
        return written(step)
    if getattr(resolve(step.target), "_schema", None) is None:
        return names_read(step)
    return written(step) | {operand.name for operand in call_of_step(step, specs).mutated}
