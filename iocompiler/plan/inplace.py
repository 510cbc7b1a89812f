"""Results written over what dies: a kernel that reads a tensor for the last time, each element
where it writes one of its result, may write there. So may the gradient of an embedding table that
is added to another: all rows but those of its tokens stay as they are. The result then takes no
memory of its own.

So may results of a backward be written over what its forward saved for it and nobody else has
(`donated.py`), at run time, if the graph is not kept: a step says both ways (`KernelStep.over`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from iocompiler.plan.contents import made, references
from iocompiler.plan.data import (
    Argument,
    AtenStep,
    BatchStep,
    KernelStep,
    MatmulStep,
    Plan,
    Ref,
    Schedule,
    Step,
    TensorSpec,
    ViewStep,
)
from iocompiler.plan.moving import bases_of, names_read, storage
from iocompiler.plan.ordered import is_collective
from iocompiler.plan.sizes import equal
from iocompiler.tile.arrange import merge_axes, pointwise_tiling
from iocompiler.tile.index import product
from iocompiler.tile.program import TileProgram
from iocompiler.tile.scaling import scaling

FRESH = frozenset(
    f"aten.{name}.default"
    for name in ("mm", "addmm", "bmm", "baddbmm", "_addmm_activation", "convolution")
) | {
    "iocompiler.sum_of_products.default", "iocompiler.addmm_gelu.default",
    "iocompiler.biased_addmm.default", "iocompiler.wide_product.default",
}  # fmt: skip
"""Products whose result is memory of its own, in whole."""
_ONTO = "iocompiler.embedding_gradient_onto.default"
_INTO = "iocompiler.embedding_gradient_.default"
_OWNING = FRESH | {
    "iocompiler.aligned_mm.default", "iocompiler.embedding_gradient.default", _ONTO,
    "iocompiler.linear_cross_entropy_gradients.default",
    "iocompiler.linear_divergence_gradients.default",
}  # fmt: skip
"""All calls we know that of, each of their results by itself."""
LEAST_BYTES = 1 << 24
"""Of what a forward saved, smaller tensors are left alone: to know whether they are read for the
last time costs the host some microseconds.
"""
_WALKING = 2048
"""Programs that scale a tensor: as many as any device holds at once, and few enough to start and
end for nothing where nothing is to be done.
"""


def in_place(plan: Plan, donated: Collection[str] = ()) -> Plan:
    """The plan, its schedules settled, with such results as views of what they are written over.

    Args:
        donated: inputs that nobody reads after the last call for them.
    """
    worth = {
        name: spec
        for name, spec in plan.inputs
        if spec is not None and name in donated and _is_worth(spec)
    }
    return replace(plan, steps=tuple(_Rewriter(plan.steps, plan.outputs, worth).run()))


def owned(step: Step) -> dict[str, TensorSpec]:
    """The values of a step in memory that it allocates, of which nothing else is known to show
    any.
    """
    if isinstance(step, AtenStep):
        return made(step) if step.target in _OWNING else {}
    return made(step) if isinstance(step, (KernelStep, MatmulStep, BatchStep)) else {}


def _is_worth(spec: TensorSpec) -> bool:
    size = product(spec.shape) * spec.dtype.itemsize
    return isinstance(size, int) and size >= LEAST_BYTES


class _Rewriter:
    """Attributes:
    specs: of all values. owned: the specs of tensors that a step of the plan allocates, and of
        those that are ``donated`` to it.
    bases: the value whose storage each view, and each result in another's place, shows.
    last: the last step that reads or writes each storage.
    kept: the storages that nothing is written over: the caller has them, or a collective reads
        them, which goes on behind its step, on a stream of its own.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        outputs: tuple[Argument, ...],
        donated: dict[str, TensorSpec],
    ) -> None:
        self.steps = steps
        self.specs: dict[str, TensorSpec] = {}
        self.donated = frozenset(donated)
        self.owned: dict[str, TensorSpec] = dict(donated)
        self.bases = bases_of(steps)
        self.last: dict[str, int] = {}
        self.kept = {self._root(ref.name) for ref in references(outputs)}
        for at, step in enumerate(steps):
            self._enter(at, step)

    def run(self) -> list[Step]:
        result: list[Step] = []
        for at, step in enumerate(self.steps):
            if isinstance(step, KernelStep):
                views, step = self._over(at, step)
                result += views
            elif isinstance(step, AtenStep) and step.target == _ONTO:
                views, step = self._onto(at, step)
                result += views
            result.append(step)
        return result

    def _enter(self, at: int, step: Step) -> None:
        self.specs |= made(step)
        self.owned |= owned(step)
        if isinstance(step, AtenStep) and is_collective(step.target):
            self.kept |= {self._root(name) for name in names_read(step)}
        for name in names_read(step) | set(made(step)):
            self.last[self._root(name)] = at

    def _root(self, name: str) -> str:
        return storage(name, self.bases)

    def _over(self, at: int, step: KernelStep) -> tuple[list[Step], KernelStep]:
        """Views for the results that are written over an argument, and the kernel without them."""
        views: list[Step] = []
        outputs = list(step.outputs)
        over: list[tuple[str, str]] = []
        for name, spec in step.outputs:
            given = self._taken(at, step, name, spec)
            root = self._root(given)
            if root in self.donated:
                over.append((name, root))
                self.kept.add(root)  # by one result
            elif given:
                views.append(self._shared(at, name, given, spec))
                outputs.remove((name, spec))
        schedule = _walking(step) if over else step.schedule
        return views, replace(step, outputs=tuple(outputs), over=tuple(over), schedule=schedule)

    def _taken(self, at: int, step: KernelStep, name: str, spec: TensorSpec) -> str:
        """The argument that a result is written over, rather one that dies in any call; "": none"""
        out = step.args.index(name)
        for place, given in sorted(
            enumerate(step.args), key=lambda each: self._root(each[1]) in self.donated
        ):
            if self._root(given) in dict(step.outputs):
                continue
            if self._dies(at, step.args, given, spec) and _in_step(step, place, out):
                return given
        return ""

    def _onto(self, at: int, step: AtenStep) -> tuple[list[Step], AtenStep]:
        """The gradient of an embedding table put onto another as one written into that."""
        ((name, spec),), (base, *lookup) = step.outputs, step.args
        read = [ref.name for ref in references(step.args)]
        if name is None or spec is None or not isinstance(base, Ref):
            return [], step
        if self._root(base.name) in self.donated or self.specs.get(base.name) != spec:
            return [], step
        if not self._dies(at, read, base.name, spec):
            return [], step
        view = self._shared(at, name, base.name, spec)
        return [view], replace(step, target=_INTO, args=(Ref(name), *lookup), outputs=())

    def _shared(self, at: int, name: str, given: str, spec: TensorSpec) -> ViewStep:
        """The result ``name`` of the step at ``at`` in the storage of its argument ``given``."""
        root = self._root(given)
        self.bases[name] = root
        self.last[root] = self.last.get(name, at)
        if name in self.kept:
            self.kept.add(root)
        return ViewStep(name, root, spec)

    def _dies(self, at: int, read: Sequence[str], given: str, spec: TensorSpec) -> bool:
        """Whether the argument's storage is the plan's own, as large as the result, read by this
        step (of arguments ``read``) in this one alone, and never again.
        """
        root = self._root(given)
        whole = self.owned.get(root)
        if whole is None or root in self.kept or self.last[root] != at:
            return False
        if [self._root(name) for name in read].count(root) != 1:
            return False
        return whole.dtype == spec.dtype and _is_dense_like(whole, spec)


def _walking(step: KernelStep) -> Schedule:
    """For a product with one number, written over what is multiplied: a schedule that makes nothing
    of a product with 1.
    """
    schedule = step.schedule
    if schedule.kind != "pointwise" or scaling(step.program) is None:
        return schedule
    if pointwise_tiling(merge_axes(step.program)).y is not None:
        return schedule
    return replace(schedule, programs=_WALKING)


def _is_dense_like(a: TensorSpec, b: TensorSpec) -> bool:
    """Whether both fill memory of one size without gaps."""
    count = product(a.shape)
    return all(equal(size, count) for size in (product(b.shape), a.reach, b.reach))


def _in_step(step: KernelStep, source: int, target: int) -> bool:
    """Whether a kernel loads each element of one argument once, before it stores one of the other
    there.

    An element that is the same for a whole row or column, or of a tile of fewer elements than
    threads, is loaded by several threads, some of them after another has stored.
    """
    program, schedule = step.program, step.schedule
    tile, threads = schedule.x_block * schedule.y_block * schedule.r_block, 32 * schedule.num_warps
    if schedule.num_warps > 1 and tile < threads:
        return False
    read, written = program.buffers[source], program.buffers[target]
    if read.role != "in" or written.role != "out":
        return False
    ops = program.ops
    loads = [i for i, op in enumerate(ops) if op.kind == "load" and op.buffer == read.name]
    stores = [i for i, op in enumerate(ops) if op.kind == "store" and op.buffer == written.name]
    if len(loads) != 1 or len(stores) != 1 or ops[stores[0]].fn or loads[0] > stores[0]:
        return False
    load = ops[loads[0]]
    if load.index is None or load.reads or load.index != ops[stores[0]].index:
        return False
    axes = {axis.name for axis in program.axes if not equal(axis.size, 1)}
    if not axes <= set(load.index.names):
        return False
    return schedule.kind == "persistent" or _in_one_pass(program, loads[0])


def _in_one_pass(program: TileProgram, load: int) -> bool:
    """Whether nothing computed from the load, short of a reduction, waits for a reduction: a row in
    pieces would be loaded again after what a pass before has stored.
    """
    level: list[int] = []
    follows: list[bool] = []
    for position, op in enumerate(program.ops):
        before = max((level[r] for r in op.reads), default=0)
        follows.append(position == load or any(follows[r] for r in op.reads))
        if follows[position] and before > 0:
            return False
        level.append(before + (op.kind == "reduce"))
        if op.kind == "reduce":
            follows[position] = False
    return True
