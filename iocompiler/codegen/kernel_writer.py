"""The text of one kernel in the making: lines, names of values, masks, single operations."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

import torch

from iocompiler.codegen import expressions
from iocompiler.codegen.quotients import in_few_steps
from iocompiler.plan.data import Schedule
from iocompiler.tile import philox
from iocompiler.tile.index import Affine, Axis, Size, product, row_major
from iocompiler.tile.ops import REDUCES
from iocompiler.tile.program import Op, TileProgram

_WORD = re.compile(r"\w+")
_AGAIN = ("evict_last", "evict_first")  # by turns, of what is loaded for the third and second time
_REDUCERS = {"max": "_maximum", "min": "_minimum", "prod": "_multiply", "any": "_either"}


class KernelWriter:
    """Writes a merged program.

    ``masks`` maps each tile direction to the name of its bounds mask, where it has one.
    """

    def __init__(self, program: TileProgram, schedule: Schedule):
        self.program, self.schedule = program, schedule
        self.lines: list[str] = []
        self.depth = 1
        self.names: dict[str, str] = {}  # text of axes ("x0") and of values ("%3")
        self.masks: dict[str, str] = {}
        self.direction: dict[str, str] = {}  # axis -> "x", "y" or "r"
        self.extent: dict[str, Size] = {a.name: a.size for a in program.axes}
        self.flat: dict[str, tuple[Axis, ...]] = {}  # flat positions and the axes that span them
        self._axis_names: set[str] = set()  # of lines that may go unread
        self.rank = 2  # dimensions of the tile
        self.readings = 0  # of the row, that are done: what is loaded now was loaded in them

    # --- text

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def text(self, name: str, original: TileProgram) -> str:
        parameters = [
            b.name if b.role == "scalar" else f"{b.name}_ptr" for b in original.buffers
        ] + list(original.size_symbols)
        space = " x ".join(f"{a.name}<{a.size}" for a in self.program.axes) or "one point"
        head = [
            "@triton.jit",
            f"def {name}({', '.join(parameters)}):",
            f'    """{self.schedule.kind} over {space}"""',
        ]
        return "\n".join(head + self._read_lines()) + "\n"

    def _read_lines(self) -> list[str]:
        """The lines, but for those that name an axis which nothing reads."""
        kept: list[str] = []
        read: set[str] = set()
        for line in reversed(self.lines):
            words = _WORD.findall(line)
            if words and words[0] in self._axis_names and words[0] not in read:
                continue
            read.update(words)
            kept.append(line)
        return kept[::-1]

    def steps(self, bounds: str) -> str:
        """The range of a loop: with three stages or more, what the next steps read is on its way
        while this one computes.
        """
        stages = self.schedule.num_stages
        return f"tl.range({bounds}, num_stages={stages})" if stages > 2 else f"range({bounds})"

    # --- axes

    def flat_axes(self, axes: tuple[Axis, ...], flat: str, direction: str) -> None:
        """Name each axis of a tile direction in terms of its flat position."""
        if len(axes) > 1:
            self.flat[flat] = axes
        rest = flat
        for place, axis in enumerate(reversed(axes)):
            self.direction[axis.name] = direction
            last = place == len(axes) - 1
            if last and len(axes) == 1:
                self.names[axis.name] = flat
                continue
            extent = expressions.size(axis.size)
            name = f"{axis.name}_of_{direction}"
            self._axis_names.add(name)
            self.line(f"{name} = {rest}" if last else f"{name} = {rest} % ({extent})")
            if not last:
                following = f"{direction}_over_{place}"
                self._axis_names.add(following)
                self.line(f"{following} = {rest} // ({extent})")
                rest = following
            self.names[axis.name] = name

    def bounded(self, direction: str, position: str, total: Size, block: int) -> None:
        """Write the bounds mask of a direction, unless the blocks cover it exactly."""
        # no block covers an empty extent exactly: each would read one element of it
        if total != 0 and (block == 1 or (isinstance(total, int) and total % block == 0)):
            self.masks.pop(direction, None)
            return
        self.line(f"{direction}_mask = {position} < {expressions.extent(total)}")
        self.masks[direction] = f"{direction}_mask"

    # --- which directions a value varies over

    def directions(self, names: Iterable[str]) -> set[str]:
        return {self.direction[n] for n in names if n in self.direction}

    def spans(self, value: int) -> set[str]:
        found = self.directions(self.program.varies[value])
        return found | {"x"} if value in self._scanned else found

    @functools.cached_property
    def _scanned(self) -> set[int]:
        """What is computed from a scan has all rows of a tile, be they the same: Triton (3.6) sums
        the scan of a row that several threads hold wrongly.
        """
        found: set[int] = set()
        for position, op in enumerate(self.program.ops):
            if op.kind == "scan" or not found.isdisjoint(op.inputs):
                found.add(position)
        return found

    @functools.cached_property
    def _compared_products(self) -> set[int]:
        """Products whose extremum is taken, and that something, the extremum say, is added to or
        subtracted from: in a multiply-add they would be other numbers there, and what is zero at
        the maximum (a softmax of one number has the logarithm zero) a rounding error.
        """
        extrema, summed = (
            {i for op in self.program.ops if op.kind == kind and op.fn in names for i in op.inputs}
            for kind, names in (("reduce", ("max", "min")), ("map", ("add", "sub")))
        )
        return {
            position
            for position in extrema & summed
            if self.program.ops[position].fn == "mul"
            and self.program.ops[position].dtype in (torch.float32, torch.float64)
        }

    def address_spans(self, index: Affine) -> set[str]:
        found = self.directions(index.axes)
        for value in index.values:
            found |= self.spans(value)
        return found

    # --- one operation

    def value(self, position: int) -> str:
        return self.names[f"%{position}"]

    def write(self, position: int) -> None:
        """Write one operation that is no reduction and no scan."""
        op = self.program.ops[position]
        if position in self._compared_products:
            text = f"_product({', '.join(map(self.tensor, op.inputs))})"
        else:
            text = getattr(self, f"_{op.kind}")(op)
        if op.kind == "store":
            self.line(text)
        elif op.kind == "const":
            self.names[f"%{position}"] = text  # literals stand where they are used
        elif op.kind == "rand":
            self.line(f"bits_{position} = {text}")
            self.names[f"%{position}"] = f"_uniform(bits_{position})"
        else:
            name = f"{op.fn or op.kind}_{position}"
            self.line(f"{name} = {text}")
            self.names[f"%{position}"] = name

    def _mask(self, spans: set[str], op_mask: str | None) -> str:
        parts = [self.masks[d] for d in ("y", "x", "r") if d in spans and d in self.masks]
        return " & ".join(parts + ([op_mask] if op_mask else []))

    def _load(self, op: Op) -> str:
        buffer = self.program.buffer(op.buffer)
        if buffer.role == "scalar":
            return f"{op.buffer}"
        assert op.index is not None
        spans = self.address_spans(op.index)
        mask_value = op.inputs[0] if op.inputs else None
        if mask_value is not None:
            spans |= self.spans(mask_value)
        mask = self._mask(spans, self.value(mask_value) if mask_value is not None else None)
        address = self._address(op)
        # of two equal loads Triton makes one, and holds its value
        policy = f", eviction_policy='{_AGAIN[self.readings % 2]}'" if self.readings else ""
        if not mask:
            return f"tl.load({op.buffer}_ptr + {address}{policy})"
        if mask_value is not None and not self.spans(mask_value) <= self.address_spans(op.index):
            # a load has the shape of its addresses
            address += f" + ({self.value(mask_value)}).to(tl.int32) * 0"
        other = expressions.constant(op.value if mask_value is not None else 0, op.dtype)
        return f"tl.load({op.buffer}_ptr + {address}, {mask}, other={other}{policy})"

    def _address(self, op: Op) -> str:
        assert op.index is not None
        wide = expressions.needs_wide(self.program.buffer(op.buffer).elements)
        return f"({self._affine(op.index, wide)})"

    def _affine(self, index: Affine, wide: bool) -> str:
        """An index as text, the row-major position of the axes of a direction as the flat position
        that they were computed from: what comes next in it is seen to, and costs no arithmetic.
        """
        names = dict(self.names)
        for flat, axes in self.flat.items():
            step = index.coefficient(axes[-1].name)
            whole = row_major(axes) * step
            if step != 0 and all(index.coefficient(n) == c for n, c in whole.terms):
                index = index - whole + Affine.of(f"@{flat}") * step
                names[f"@{flat}"] = flat
        return expressions.affine(index, names, wide)

    def _store(self, op: Op) -> str:
        assert op.index is not None
        spans = self.address_spans(op.index)
        extra = self.value(op.inputs[1]) if len(op.inputs) > 1 else None
        mask = self._mask(spans, extra)
        value = self.value(op.inputs[0])
        address = self.tile_of(self._address(op), op.index)
        tail = f", {mask}" if mask else ""
        call = "tl.atomic_add" if op.fn == "atomic_add" else "tl.store"
        sem = ", sem='relaxed'" if op.fn == "atomic_add" else ""
        return f"{call}({op.buffer}_ptr + {address}, {value}{tail}{sem})"

    def tile_of(self, address: str, index: Affine) -> str:
        """``address`` as a block even where it is one: that takes a scalar and a block of one value
        alike.
        """
        one = not self.address_spans(index)
        return f"{address} + tl.full({self._point}, 0, tl.int32)" if one else address

    def _const(self, op: Op) -> str:
        return expressions.constant(op.value, op.dtype)

    def _iota(self, op: Op) -> str:
        assert op.index is not None
        wide = expressions.passes_int32(op.index, self.extent)
        return f"({self._affine(op.index, wide)})"

    def _map(self, op: Op) -> str:
        inputs = op.inputs
        threshold = self._threshold(op)
        if threshold is not None:
            return f"(bits_{inputs[0]} >= {threshold})"
        operands = [self.value(i) for i in inputs]
        short = in_few_steps(self, op)
        if short:
            return short
        if all(self.program.ops[i].kind == "const" for i in inputs[:1]) and op.fn not in ("where",):
            # functions of tl need a tensor: a literal alone is made one
            operands[0] = self.tensor(inputs[0])
        if op.fn == "where":
            operands[1:] = [self.tensor(i) for i in inputs[1:]]
        operands = [o if _atomic(o) else f"({o})" for o in operands]
        return expressions.mapped(op.fn, operands, self.program.ops[inputs[-1]].dtype)

    def _threshold(self, op: Op) -> int | None:
        """What the bits of a random number must reach for the number to reach a constant; None for
        what is no such comparison, or holds of all or no numbers.
        """
        if op.fn != "ge" or self.program.ops[op.inputs[0]].kind != "rand":
            return None
        limit = self.program.ops[op.inputs[1]]
        if limit.kind != "const" or not isinstance(limit.value, (int, float)):
            return None
        below = philox.threshold(torch.tensor(limit.value, dtype=limit.dtype).item())
        return below << philox.BITS if 0 < below < 2**philox.BITS else None

    @property
    def _point(self) -> str:
        """The shape of a tile of one value."""
        return "[1]" if self.rank == 1 else "[1, 1]"

    def tensor(self, position: int) -> str:
        op = self.program.ops[position]
        if op.kind != "const" or not isinstance(op.value, (bool, int, float)):
            return self.value(position)
        value = expressions.constant(op.value, op.dtype)
        return f"tl.full({self._point}, {value}, {expressions.TYPES[op.dtype]})"

    def _cast(self, op: Op) -> str:
        return f"{self.tensor(op.inputs[0])}.to({expressions.TYPES[op.dtype]})"

    def _rand(self, op: Op) -> str:
        assert op.index is not None
        wide = expressions.passes_int32(op.index, self.extent)
        counter = self._affine(op.index, wide)
        if not op.index.terms:  # a number has no type
            counter = f"tl.full({self._point}, {counter}, tl.int64)"
        return f"_random_bits({self.value(op.inputs[0])}, {counter})"

    # --- reductions

    def neutral(self, fn: str, dtype: torch.dtype) -> str:
        return expressions.constant(REDUCES[fn].neutral(dtype), dtype)

    def full(self, value: str, shape: str) -> str:
        return f"tl.broadcast_to({value}, {shape})"

    def guarded(self, value: str, fn: str, dtype: torch.dtype, directions: tuple[str, ...]) -> str:
        """``value`` with the points outside the space replaced by the neutral element."""
        masks = [self.masks[d] for d in directions if d in self.masks]
        if not masks:
            return value
        return f"tl.where({' & '.join(masks)}, {value}, {self.neutral(fn, dtype)})"

    def folded(self, fn: str, tile: str, axis: int) -> str:
        """The reduction of a whole tile along one of its dimensions, that dimension kept."""
        if fn == "sum":
            return f"tl.sum({tile}, axis={axis}, keep_dims=True)"
        if fn == "any":
            return f"tl.reduce(({tile}).to(tl.int32), {axis}, _either, keep_dims=True) != 0"
        return f"tl.reduce({tile}, {axis}, {_REDUCERS[fn]}, keep_dims=True)"

    def combined(self, fn: str, a: str, b: str) -> str:
        if fn == "sum":
            return f"{a} + {b}"
        if fn == "any":
            return f"{a} | {b}"
        return f"{_REDUCERS[fn]}({a}, {b})"

    def points(self, axes: tuple[Axis, ...]) -> Size:
        return product([a.size for a in axes])


def _atomic(text: str) -> bool:
    """Whether a text needs no parentheses as an operand."""
    name_or_number = text.replace("_", "").replace(".", "").isalnum()
    in_parentheses = text.startswith("(") and text.endswith(")") and text.count("(") == 1
    return name_or_number or in_parentheses or text.startswith("tl.full")
