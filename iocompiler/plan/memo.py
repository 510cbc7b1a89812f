"""Lowering, done once for each structure: the layers of a model are equal."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from iocompiler.plan.lower import Lowered, lower
from iocompiler.plan.lowering import Unsupported
from iocompiler.plan.structure import Element, Structure, Structures
from iocompiler.tile.program import TileProgram
from iocompiler.tile.rows import RowsTooLong, check_rows


@dataclass(frozen=True)
class _Done:
    """A program, the number of the node behind each of its buffers, and the elements it reads by
    number.
    """

    program: TileProgram
    nodes: tuple[int, ...]
    elements: tuple[Element, ...]

    def of(self, nodes: Sequence[Node], elements: Sequence[Element]) -> Lowered:
        """For other nodes of the same structure, which read other elements."""
        buffers = {
            number: b.name for number, b in zip(self.nodes, self.program.buffers, strict=True)
        }
        moved = {
            (buffers[number], old): new
            for (number, old), (_, new) in zip(self.elements, elements, strict=True)
            if number in buffers
        }
        return Lowered(self.program, tuple(nodes[number] for number in self.nodes), moved)


@dataclass(frozen=True)
class _Failed:
    """Why not, in texts and numbers of nodes."""

    parts: tuple[str | int, ...]


@dataclass
class Memo:
    """`lower` for the sets of nodes of one graph, whose order is ``order``. Sets of one structure
    get one and the same program, which may read the seeds of another layer.
    """

    order: Mapping[Node, int]
    _known: dict[Structure, _Done | _Failed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._structures = Structures(self.order)

    def lower(
        self, home: frozenset[Node], virtual: Container[Node], outputs: tuple[Node, ...]
    ) -> Lowered:
        """As `lower`; a program that cannot be scheduled is `Unsupported`, too."""
        structure, nodes, elements = self._structures.of(home, virtual, outputs)
        known = self._known.get(structure)
        if known is None:
            numbers = {node: number for number, node in enumerate(nodes)}
            known = self._fresh(home, virtual, outputs, numbers, elements)
            self._known[structure] = known
        if isinstance(known, _Failed):
            raise Unsupported(*(p if isinstance(p, str) else nodes[p] for p in known.parts))
        return known.of(nodes, elements)

    def _fresh(
        self,
        home: frozenset[Node],
        virtual: Container[Node],
        outputs: tuple[Node, ...],
        numbers: Mapping[Node, int],
        elements: tuple[Element, ...],
    ) -> _Done | _Failed:
        try:
            lowered = lower(home, virtual, outputs, self.order)
            check_rows(lowered.program)
        except Unsupported as error:
            return _Failed(tuple(p if isinstance(p, str) else numbers[p] for p in error.parts))
        except RowsTooLong as error:
            return _Failed((str(error),))
        return _Done(lowered.program, tuple(numbers[node] for node in lowered.nodes), elements)
