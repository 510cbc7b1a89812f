"""The one list of passes: which run, in what order, and why each stands where it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, overload

from torch._guards import TracingContext, tracing
from torch.fx import GraphModule

from iocompiler.errors import (
    DuplicatePass,
    InvalidGraph,
    NotAPass,
    UnknownPass,
    add_note,
    close_match,
)
from iocompiler.graph import rewrite, view
from iocompiler.graph.match import Stage
from iocompiler.graph.normalise import normalise
from iocompiler.passes.activations import activations
from iocompiler.passes.attention import attention
from iocompiler.passes.dropout import dropout
from iocompiler.passes.embedding_gradients import embedding_gradients
from iocompiler.passes.float_inputs import float_inputs
from iocompiler.passes.foreach import foreach
from iocompiler.passes.gelu import gelu_by_erf, gelu_by_tanh
from iocompiler.passes.known_indices import known_indices
from iocompiler.passes.late_copies import late_copies
from iocompiler.passes.layouts import layouts
from iocompiler.passes.linear_cross_entropy import linear_cross_entropy
from iocompiler.passes.norms import norms_together
from iocompiler.passes.overlapping import overlapping_results
from iocompiler.passes.packed_gradients import packed_gradients
from iocompiler.passes.patches import patches
from iocompiler.passes.product_order import product_order
from iocompiler.passes.repeated import repeated
from iocompiler.passes.seeds import seeds_together
from iocompiler.passes.slices import slices
from iocompiler.passes.summed_gradients import summed_gradients
from iocompiler.passes.sums_of_products import sums_of_products
from iocompiler.passes.updates import updates
from iocompiler.passes.wide_products import wide_products


class Pass(Protocol):
    """Edits a graph; what `iocompiler.rewrite` and `iocompiler.graph_pass` make."""

    @property
    def name(self) -> str: ...

    @property
    def stage(self) -> Stage: ...

    @property
    def respells(self) -> bool: ...

    def __call__(self, gm: GraphModule) -> int:
        """Edit ``gm``; returns the number of sites changed."""
        ...


_OF_A_PASS = ("name", "stage", "respells", "__call__")


@dataclass(frozen=True)
class Done:
    """One pass that has run: its name and place (number 0 is the graph before the first), its sites
    and seconds.
    """

    name: str
    number: int
    total: int
    sites: int = 0
    seconds: float = 0.0


Observer: TypeAlias = Callable[[GraphModule, Done], None]
"""Called with the graph before the first pass and after each one; it reads and must not edit."""


class Pipeline:
    """An immutable sequence of passes; ``before``, ``after`` and ``without`` return another one.

    Raises:
        NotAPass, DuplicatePass: of what is to stand in it.
    """

    def __init__(self, *passes: Pass) -> None:
        names: set[str] = set()
        for each in passes:
            if not all(hasattr(each, name) for name in _OF_A_PASS):
                raise NotAPass(value=each)
            if each.name in names:
                raise DuplicatePass(name=each.name)
            names.add(each.name)
        self._passes = passes

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(each.name for each in self._passes)

    def before(self, name: str, *passes: Pass) -> Pipeline:
        """With ``passes`` just before the pass called ``name``; `UnknownPass` where there is
        none.
        """
        position = self._position(name)
        return Pipeline(*self._passes[:position], *passes, *self._passes[position:])

    def after(self, name: str, *passes: Pass) -> Pipeline:
        """With ``passes`` just after the pass called ``name``; `UnknownPass` where there is
        none.
        """
        position = self._position(name) + 1
        return Pipeline(*self._passes[:position], *passes, *self._passes[position:])

    def without(self, *names: str) -> Pipeline:
        """Without the passes of these names; `UnknownPass` for one that is not here."""
        dropped = {self._position(name) for name in names}
        return Pipeline(
            *(each for position, each in enumerate(self._passes) if position not in dropped)
        )

    def stage(self, stage: Stage) -> Pipeline:
        """Only the passes of one stage, "graph" or "flat"."""
        return Pipeline(*(each for each in self._passes if each.stage == stage))

    def run(
        self, gm: GraphModule, observers: Sequence[Observer] = (), start: str = "capture"
    ) -> int:
        """Run every pass on ``gm``, in order; check the graph, fill in fake values, observe.

        Returns:
            the number of sites changed by passes that do more than respell.

        Raises:
            InvalidGraph: a pass left a graph that is not well formed.
            Exception: what a pass raises, with a note that names the pass.
        """
        with tracing(TracingContext(view.fake_mode(gm.graph))):
            return self._run(gm, observers, start)

    def _run(self, gm: GraphModule, observers: Sequence[Observer], start: str) -> int:
        changed = 0
        _observe(observers, gm, Done(start, 0, len(self)))
        for number, each in enumerate(self._passes, 1):
            begun = time.perf_counter()
            try:
                sites = each(gm)
                _complete(gm, each.name)
                done = Done(each.name, number, len(self), sites, time.perf_counter() - begun)
                _observe(observers, gm, done)
            except Exception as error:
                add_note(error, f"in pass {each.name!r} ({number} of {len(self)})")
                raise
            changed += 0 if each.respells else sites
        gm.recompile()
        return changed

    def _position(self, name: str) -> int:
        if name not in self.names:
            known = ", ".join(self.names) or "none"
            raise UnknownPass(name=name, hint=close_match(name, self.names), known=known)
        return self.names.index(name)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self._passes)

    def __len__(self) -> int:
        return len(self._passes)

    @overload
    def __getitem__(self, index: int) -> Pass: ...
    @overload
    def __getitem__(self, index: slice) -> Pipeline: ...
    def __getitem__(self, index: int | slice) -> Pass | Pipeline:
        return Pipeline(*self._passes[index]) if isinstance(index, slice) else self._passes[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pipeline) and self._passes == other._passes

    def __hash__(self) -> int:
        return hash(self._passes)

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(self.names)})"


def _observe(observers: Sequence[Observer], gm: GraphModule, done: Done) -> None:
    for observer in observers:
        observer(gm, done)


def _complete(gm: GraphModule, name: str) -> None:
    """Check the graph a pass left, and compute the fake values it did not."""
    try:
        gm.graph.lint()
        rewrite.fill_values(gm)
    except Exception as error:
        raise InvalidGraph(name=name, cause=error) from error


DEFAULT = Pipeline(
    normalise,  # first: every recogniser sees one spelling
    float_inputs,  # touches nothing the others look for
    slices,  # what nobody reads is not there for the others to take
    late_copies,  # what attention would find behind them is what it reads
    attention,  # while its dropout and its masks still stand as they were written
    linear_cross_entropy,  # a head and its loss, while both stand whole
    product_order,  # of products that are no attention and no head any more
    dropout,  # what attention did not take: masks made again from seeds instead of being stored
    seeds_together,  # when all dropouts have drawn theirs
    gelu_by_tanh,  # one operator saves its input alone, and its derivative is cheap
    gelu_by_erf,
    patches,  # touches nothing the others look for
    layouts,  # of the convolutions that are left, and of what stands between them
    known_indices,  # what attention reads as tables of distances stands no more
    norms_together,  # of inputs alone: no other pass looks for them
    overlapping_results,  # when all that may change what a result is a view of has run
    repeated,  # what passes above have made for each of their sites is often the same
    foreach,  # on the flat graph: one plain operator a tensor, which the planner batches
    activations,  # on the flat graph, where it shows whether the backward reads what they read
    packed_gradients,  # on the flat graph, where the backward puts together what was split
    summed_gradients,  # of gradients that are where they stay
    sums_of_products,  # on the flat graph, where the backward adds what it has split
    embedding_gradients,  # on the flat graph, where the gradients of one table are added
    wide_products,  # of products that are whole, and of casts that nothing else reads
    updates,  # last: what the others see is functional
)
