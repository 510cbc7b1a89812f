"""The epilogues of a step of the matmul template as Triton source."""

from __future__ import annotations

from iocompiler.codegen import expressions
from iocompiler.codegen.kernel_writer import KernelWriter
from iocompiler.plan.column_sums import rows_of_part
from iocompiler.plan.data import MatmulStep, Schedule
from iocompiler.plan.product import DIRECTIONS, along
from iocompiler.tile.program import Buffer, Op

# what the template calls the sums of each product
_SUMS = {"sums0": "sums", "sums1": "others"}
# of a tile: along the batch it is one matrix, along rows y, along columns x
_TILE_DIRECTIONS = dict(zip(DIRECTIONS, "zyx", strict=True))


class _Epilogue(KernelWriter):
    """The body of an epilogue: a tile of rows by columns, the sums of which are there."""

    def __init__(self, step: MatmulStep, condition: str = ""):
        """``condition``: what must be true, or nothing is loaded and stored."""
        super().__init__(step.program, Schedule("pointwise"))
        self._condition = condition
        self._made, self._tile = made, tile = step.product, step.tile
        self.line(f"m = (top + tl.arange(0, {tile.m}))[:, None]")
        for direction, dim in _TILE_DIRECTIONS.items():
            within = step.program.reduced if direction == "m" else ()
            self.flat_axes((*along(step.program, direction), *within), direction, dim)
        self.bounded("y", "m", made.m, tile.m)
        self.bounded("x", "n", made.n, tile.n)

    def _mask(self, spans: set[str], op_mask: str | None) -> str:
        mask = super()._mask(spans, op_mask)
        return " & ".join(part for part in (mask, self._condition) if part)

    def _load(self, op: Op) -> str:
        return _SUMS[op.buffer] if op.buffer in _SUMS else super()._load(op)

    def _store(self, op: Op) -> str:
        """Every element of the tile, also where the product is a row or a column."""
        if self.program.ops[op.inputs[0]].kind == "reduce":
            return self._store_sums(op)
        assert op.index is not None
        address = self._address(op)
        if not {"x", "y"} <= self.address_spans(op.index):
            address += " + (m + n) * 0"
        mask = self._mask({"x", "y"}, None)
        tail = f", {mask}" if mask else ""
        return f"tl.store({op.buffer}_ptr + {address}, {self.value(op.inputs[0])}{tail})"

    def _reduce(self, op: Op) -> str:
        """The sums of each column, in parts: [parts of the tile, columns]."""
        tile, rows = self._tile, rows_of_part(self.program)
        columns = tile.n // tile.parts
        value = self.full(self.tensor(op.inputs[0]), f"[{tile.m}, {columns}]")
        value = self.guarded(value, op.fn, op.dtype, ("y",))
        parted = f"tl.reshape({value}, [{tile.m // rows}, {rows}, {columns}])"
        return f"tl.sum({parted}, axis=1)"

    def _store_sums(self, op: Op) -> str:
        """To [parts, columns] of the whole product; parts below its last row are none."""
        tile, rows, made = self._tile, rows_of_part(self.program), self._made
        part = f"(top // {rows} + tl.arange(0, {tile.m // rows}))[:, None]"
        wide = expressions.needs_wide(self.program.buffer(op.buffer).elements)
        masks = [self.masks["x"]] if "x" in self.masks else []
        if "y" in self.masks:
            masks.append(f"({part} * {rows} < {expressions.extent(made.m)})")
        place = f"({part}{'.to(tl.int64)' if wide else ''} * ({expressions.extent(made.n)}) + n)"
        tail = f", {' & '.join(masks)}" if masks else ""
        return f"tl.store({op.buffer}_ptr + {place}, {self.value(op.inputs[0])}{tail})"


_PARAMETERS = "sums, others, b, top, n, operands"


def emit_epilogue(step: MatmulStep, name: str) -> str:
    """Of products beside each other, one that calls theirs: ``b`` is the number of the product. A
    branch would keep Triton 3.6 from making one loop of tiles and inner extent: it fails in that.
    """
    if not step.product.beside:
        return _own_epilogue(step, f"{name}_epilogue", 0)
    texts, calls, begin = [], [], 0
    for number, part in enumerate(step.parts):
        texts.append(_own_epilogue(part, f"{name}_epilogue_{number}", begin, f"(b == {number})"))
        calls.append(f"    {name}_epilogue_{number}({_PARAMETERS})")
        begin += len(operands_of(part))
    head = ["@triton.jit", f"def {name}_epilogue({_PARAMETERS}):"]
    return "\n\n".join([*texts, "\n".join(head + calls) + "\n"])


def _own_epilogue(step: MatmulStep, name: str, begin: int, condition: str = "") -> str:
    """Its operands stand at ``begin`` among all."""
    writer = _Epilogue(step, condition)
    for position in range(len(step.program.ops)):
        writer.write(position)
    operands = enumerate(operands_of(step), begin)
    head = [
        "@triton.jit",
        f"def {name}({_PARAMETERS}):",
        *(f"    {operand} = operands[{place}]" for place, operand in operands),
    ]
    return "\n".join(head + writer.lines) + "\n"


def operands_of(step: MatmulStep) -> list[str]:
    """What an epilogue is given, by its own names."""
    return [*map(parameter, step.tensors), *step.program.size_symbols]


def parameter(buffer: Buffer) -> str:
    return buffer.name if buffer.role == "scalar" else f"{buffer.name}_ptr"
