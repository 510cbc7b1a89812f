"""One kernel of a plan, as it is compiled and launched by itself to be timed.

Its text, name and signature are those it will have in the plan's module, so what is compiled here
is found in the cache when the module is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from iocompiler.codegen.batch import emit_batch
from iocompiler.codegen.pytext import helpers_for
from iocompiler.codegen.triton import PRELUDE, emit, grid
from iocompiler.plan.data import BatchStep, KernelStep, Schedule
from iocompiler.runtime.compile import Job
from iocompiler.runtime.launch import Signature
from iocompiler.runtime.values import size_value
from iocompiler.tile.flat import LENGTH
from iocompiler.tile.program import TileProgram

_DIVISOR = 16


@dataclass(frozen=True)
class Subject:
    """A kernel to be timed.

    Attributes:
        step: the first step of the plan that launches it; its schedule is the model's choice.
        name, signature: as in the plan's module.
        sizes: a value for every size symbol.
    """

    step: KernelStep | BatchStep
    name: str
    signature: str
    sizes: Mapping[str, int]

    @property
    def program(self) -> TileProgram:
        return self.step.program

    @property
    def chosen(self) -> Schedule:
        return self.step.schedule

    @property
    def numbers(self) -> tuple[int, ...]:
        """The sizes passed after the buffers."""
        return tuple(self.sizes[name] for name in self.program.size_symbols)

    def job(self, schedule: Schedule, capability: int) -> Job:
        """What the workers are to compile: the version for aligned pointers, and for sizes that are
        multiples of 16 where these are.
        """
        write = emit_batch if isinstance(self.step, BatchStep) else emit
        text = write(self.program, schedule, self.name).strip() + "\n"
        signature = Signature.parse(self.signature)
        even = all(number % _DIVISOR == 0 for number in self.numbers)
        prelude = helpers_for(PRELUDE, text).strip("\n") + "\n"
        return Job(
            source=f"{helpers_for(prelude, text)}\n\n{text}",
            name=self.name,
            signature=signature.types,
            divisible=signature.divisible(True, even),
            num_warps=schedule.num_warps,
            num_stages=schedule.num_stages,
            capability=capability,
            where=self.step.where[0] if self.step.where else "",
            registers=schedule.registers,
        )

    def grid(self, schedule: Schedule) -> tuple[int, int, int]:
        """The launch grid of a kernel that is no batch."""
        x, y, z = (size_value(size, self.sizes) for size in grid(self.program, schedule))
        return x, y, z

    @property
    def lengths(self) -> list[int]:
        """The points of each member of a batch."""
        assert isinstance(self.step, BatchStep)
        return [size_value(length, self.sizes) for _, length in self.step.members]

    def elements(self, length: int | None = None) -> list[int]:
        """Elements of each buffer; of a member of a batch with ``length`` points."""
        sizes = dict(self.sizes) if length is None else {**self.sizes, LENGTH.name: length}
        return [size_value(b.elements, sizes) for b in self.program.buffers]
