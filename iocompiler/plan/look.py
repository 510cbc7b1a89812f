"""A plan seen from its products: who makes what, where it is read last, what may wait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from iocompiler.cost_model.call import call_of_step, resolve
from iocompiler.plan.contents import made, references
from iocompiler.plan.data import AtenStep, Plan, Step, TensorSpec, ViewStep
from iocompiler.plan.factors import Factors
from iocompiler.plan.matrix import NoEpilogue
from iocompiler.plan.moving import bases_of, names_read, storage, storages, written
from iocompiler.plan.product import Product, Term
from iocompiler.tile.index import Size


class Look:
    """Attributes:
    bases: the value whose storage each view shows. views: by name. specs: of all values.
    maker, last: the place of the step that makes a value, and of that which reads it last, views
        left out. readers: of each storage, the places of all that read it.
    taken: the places of what belongs to a site.
    """

    def __init__(self, plan: Plan) -> None:
        self.steps = plan.steps
        self.bases = bases_of(plan.steps)
        self.views = {step.name: step for step in plan.steps if isinstance(step, ViewStep)}
        self.specs = {name: spec for name, spec in plan.inputs if spec is not None}
        self.maker: dict[str, int] = {}
        for place, step in enumerate(plan.steps):
            self.specs |= made(step)
            self.maker |= dict.fromkeys(made(step), place)
        self.readers: dict[str, list[int]] = {}
        for place, step in enumerate(plan.steps):
            if not isinstance(step, ViewStep):
                for name in self.roots(names_read(step)):
                    self.readers.setdefault(name, []).append(place)
        self.last = {name: places[-1] for name, places in self.readers.items()}
        left = {r.name for r in references(plan.outputs)}
        self.last |= dict.fromkeys(self.roots(left), len(plan.steps))
        self.taken: set[int] = set()

    def roots(self, names: set[str]) -> set[str]:
        return storages(names, self.bases)

    def root(self, name: str) -> str:
        return storage(name, self.bases)

    def product(self, rows: Sequence[Factors]) -> Product:
        """The products of one left operand as the template makes them."""
        first = rows[0]
        starts = tuple(f.start * f.right[1][1] for f in rows)
        found = Product(
            first.batch, first.m, first.n, first.k, first.dtype,
            first.left[1], tuple(f.right[1] for f in rows), starts,
            more=tuple(Term(pair.k, pair.left[1], pair.right[1]) for pair in first.more),
        )  # fmt: skip
        begins = [self.offset(first.left[0])]
        begins += [self.offset(f.right[0]) + start for f, start in zip(rows, starts, strict=True)]
        begins += map(self.offset, first.operands[2:])
        return replace(found, aligned=all(map(found.is_whole, begins)))

    def offset(self, name: str) -> Size:
        """Of a value in the storage that it shows."""
        offset: Size = 0
        while name in self.views:
            offset = offset + self.views[name].offset
            name = self.views[name].base
        return offset

    def unused(self, wish: str) -> str:
        """A name like this one that no value has."""
        while wish in self.specs:
            wish += "_"
        return wish

    def is_overwritten(self, roots: set[str], after: int, before: int) -> bool:
        """Whether a step between these two may change what lies in storages."""
        return any(
            roots & self.roots(_changed(step, self.specs))
            for step in self.steps[after + 1 : before]
            if not isinstance(step, ViewStep)
        )

    def check_order(self, place: int, step: Step, name: str, factors: Factors) -> None:
        """The product may wait until a step runs: nobody needs it before, nobody changes what it is
        made of, not even the step.
        """
        read, maker = self.roots(set(factors.reads)), self.maker[name]
        if any(maker < reader < place for reader in self.readers.get(name, ())):
            raise NoEpilogue("another step reads the product before")
        if self.is_overwritten(read, maker, place):
            raise NoEpilogue("what the product is made of is overwritten before")
        if read & self.roots(written(step)):
            raise NoEpilogue("it overwrites what the product is made of")


def _changed(step: Step, specs: Mapping[str, TensorSpec]) -> set[str]:
    """The values a step may overwrite: of an operator without a schema, all it reads."""
    if not isinstance(step, AtenStep):
        return written(step)
    if getattr(resolve(step.target), "_schema", None) is None:
        return names_read(step)
    return written(step) | {operand.name for operand in call_of_step(step, specs).mutated}
