"""Steps of the matmul template as Triton source: the epilogue, and a kernel that calls the template
with it and with the sizes of its products.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from iocompiler.codegen import expressions
from iocompiler.codegen.kernel_writer import KernelWriter
from iocompiler.codegen.prelude import PRELUDE
from iocompiler.plan.column_sums import rows_of_part
from iocompiler.plan.data import MatmulStep, Schedule
from iocompiler.plan.product import DIRECTIONS, MatmulTile, Product, along
from iocompiler.tile.index import Size, ceil_div, product
from iocompiler.tile.program import Buffer, Op

# what the template calls the sums of each product
_SUMS = {"sums0": "sums", "sums1": "others"}
_TEMPLATES = ("matmul.py", "matmul_descriptors.py", "matmul_sums.py", "matmul_groups.py")
# loads one element at a time need a register each, and an address
_ANY_POINTERS = MatmulTile(64, 64, 32, num_warps=4, num_stages=2)
# of a tile: along the batch it is one matrix, along rows y, along columns x
_TILE_DIRECTIONS = dict(zip(DIRECTIONS, "zyx", strict=True))


def emit_matmul(step: MatmulStep, name: str) -> str:
    """The source of the kernel ``name``: its parameters are the step's buffers in order (pointers
    named ``<buffer>_ptr``, plain numbers for role "scalar"), then its size symbols. It refers to
    the names `template_prelude` defines.
    """
    return f"{_epilogue(step, name)}\n\n{_kernel(step, name)}"


def matmul_grid(step: MatmulStep) -> tuple[Size, Size, Size]:
    """The launch grid, as sizes."""
    tile = step.tile
    tiles: Size = 0
    for part in step.parts:
        made = part.product
        tiles += product([made.batch, ceil_div(made.m, tile.m), ceil_div(made.n, tile.n)])
    if tile.programs == 0:
        return tiles, 1, 1
    # a program that has no tile does nothing: with sizes that are symbols all are launched
    return (min(tiles, tile.programs) if isinstance(tiles, int) else tile.programs), 1, 1


def for_any_pointers(step: MatmulStep) -> MatmulStep | None:
    """What is launched on the same grid where a pointer is not a multiple of 16 bytes, which
    descriptors must be; None where the step itself takes any.
    """
    if step.tile.loads == "pointers":
        return None
    rows = max(_ANY_POINTERS.m, *(rows_of_part(part.program) for part in step.parts))
    return replace(step, tile=replace(_ANY_POINTERS, m=rows, programs=step.tile.programs))


@lru_cache(maxsize=1)
def template_prelude() -> str:
    """The functions generated kernels call, and those of the templates."""
    folder = Path(__file__).with_name("kernels")
    texts = [folder.joinpath(name).read_text() for name in _TEMPLATES]
    return "\n\n".join([PRELUDE, *(text[text.index("@triton.jit") :] for text in texts)])


# --- the epilogue


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


def _epilogue(step: MatmulStep, name: str) -> str:
    """Of products beside each other, one that calls theirs: ``b`` is the number of the product. A
    branch would keep Triton 3.6 from making one loop of tiles and inner extent: it fails in that.
    """
    if not step.product.beside:
        return _own_epilogue(step, f"{name}_epilogue", 0)
    texts, calls, begin = [], [], 0
    for number, part in enumerate(step.parts):
        texts.append(_own_epilogue(part, f"{name}_epilogue_{number}", begin, f"(b == {number})"))
        calls.append(f"    {name}_epilogue_{number}({_PARAMETERS})")
        begin += len(_operands_of(part))
    head = ["@triton.jit", f"def {name}_epilogue({_PARAMETERS}):"]
    return "\n\n".join([*texts, "\n".join(head + calls) + "\n"])


def _own_epilogue(step: MatmulStep, name: str, begin: int, condition: str = "") -> str:
    """Its operands stand at ``begin`` among all."""
    writer = _Epilogue(step, condition)
    for position in range(len(step.program.ops)):
        writer.write(position)
    operands = enumerate(_operands_of(step), begin)
    head = [
        "@triton.jit",
        f"def {name}({_PARAMETERS}):",
        *(f"    {operand} = operands[{place}]" for place, operand in operands),
    ]
    return "\n".join(head + writer.lines) + "\n"


def _operands_of(step: MatmulStep) -> list[str]:
    """What an epilogue is given, by its own names."""
    return [*map(_parameter, step.tensors), *step.program.size_symbols]


def _parameter(buffer: Buffer) -> str:
    return buffer.name if buffer.role == "scalar" else f"{buffer.name}_ptr"


# --- the kernel


def _kernel(step: MatmulStep, name: str) -> str:
    made, tile = step.product, step.tile
    parameters = [*map(_parameter, step.buffers), *step.size_symbols]
    spaces = [
        " x ".join(map(str, (each.batch, each.m, each.n, *each.depths)))
        for each in (part.product for part in step.parts)
    ]
    call = _group_call(step) if made.beside else _sums_call(step) if made.more else _call(step)
    return "\n".join(
        [
            "@triton.jit",
            f"def {name}({', '.join(parameters)}):",
            f'    """{tile.m} x {tile.n} x {tile.k} of matmul over {", ".join(spaces)}"""',
            f"    {call.template}(",
            *(f"        {line}," for line in call.given),
            f"        ({', '.join(_operands(step))},), {name}_epilogue,",
            *(f"        {', '.join(map(str, each))}," for each in (call.walk, call.flags)),
            "    )",
            "",
        ]
    )


@dataclass(frozen=True)
class _Call:
    """A template, and what it is called with: lines before the epilogue, and numbers behind it."""

    template: str
    given: tuple[str, ...]
    walk: tuple[int, ...]
    flags: tuple[bool, ...]


def _call(step: MatmulStep) -> _Call:
    made, tile = step.product, step.tile
    second = made.rights[1] if len(made.rights) > 1 else (0, 0, 0)
    walk = (tile.m, tile.n, tile.k, tile.group, tile.parts)
    if tile.loads == "descriptors":
        template = "matmul_descriptors"
        flags = [made.left[1] == 1, *(strides[0] == 1 for strides in made.rights)]
        flags += [False] * (3 - len(flags))
    else:
        template = "matmul"
        flags = _even(step)
    given = (
        f"left_ptr, {', '.join(_rights(made))}",
        _sizes(step, made.k),
        f"{_strides(made.left)}, {_strides(made.rights[0])}, {_strides(second)}",
    )
    return _Call(template, given, walk, tuple(flags))


def _sums_call(step: MatmulStep) -> _Call:
    """Of products that are added up."""
    made, tile = step.product, step.tile
    walk = (tile.m, tile.n, tile.k, tile.group, tile.parts, len(made.depths))
    if tile.loads == "descriptors":
        template = "matmul_sums_descriptors"
        flags = [made.left[1] == 1, made.rights[0][0] == 1]
    else:
        template = "matmul_sums"
        flags = _even(step)
    sides = [f"{buffer.name}_ptr" for buffer in made.operands]
    given = (
        f"{_tuple(sides[::2])}, {_tuple(sides[1::2])}",
        _sizes(step),
        _tuple(map(expressions.size, made.depths)),
        _tuple(map(_strides, made.lefts)),
        _tuple(map(_strides, made.all_rights)),
    )
    return _Call(template, given, walk, tuple(flags))


def _group_call(step: MatmulStep) -> _Call:
    """Of products beside each other."""
    products, tile = [part.product for part in step.parts], step.tile
    walk = (tile.m, tile.n, tile.k, tile.group, tile.parts, len(products))
    first = products[0]
    if tile.loads == "descriptors":
        template, flags = "matmul_groups_descriptors", [first.left[1] == 1, first.rights[0][0] == 1]
    else:
        template, flags = "matmul_groups", _even(step)
    suffixes = ["", *(f"_{place}" for place in range(1, len(products)))]
    given = (
        *(_tuple(f"{side}{suffix}_ptr" for suffix in suffixes) for side in ("left", "right")),
        _tuple(expressions.size(each.m) for each in products),
        _tuple(expressions.size(each.n) for each in products),
        expressions.size(first.k),
        _tuple(_strides(each.left) for each in products),
        _tuple(_strides(each.rights[0]) for each in products),
    )
    return _Call(template, given, walk, tuple(flags))


def _operands(step: MatmulStep) -> list[str]:
    """What the epilogues are given, by the names of the kernel's parameters."""
    found, begin = [], 0
    for part in step.parts:
        own = step.buffers[begin : begin + len(part.buffers)]
        found += [_parameter(buffer) for buffer in own[len(part.product.operands) :]]
        found += part.program.size_symbols
        begin += len(own)
    return found


def _tuple(items: Iterable[str]) -> str:
    return f"({', '.join(items)})"


def _sizes(step: MatmulStep, *more: Size) -> str:
    """The extents of the results; behind descriptors there is no batch."""
    made = step.product
    batch = () if step.tile.loads == "descriptors" else (made.batch,)
    return ", ".join(map(expressions.size, (*batch, made.m, made.n, *more)))


def _even(step: MatmulStep) -> list[bool]:
    """What is known where operands come by pointers: whether programs walk, and where blocks end
    with the product.
    """
    products, tile = [part.product for part in step.parts], step.tile
    return [
        tile.programs > 0,
        all(_divides(tile.m, each.m) for each in products),
        all(_divides(tile.n, each.n) for each in products),
        all(_divides(tile.k, depth) for each in products for depth in each.depths),
    ]


def _rights(made: Product) -> list[str]:
    """The right operands from where they begin; None for a second one that is not there."""
    texts = [
        f"{name}_ptr" + (f" + {expressions.extent(start)}" if start != 0 else "")
        for name, start in zip(("right", "second"), made.starts, strict=False)
    ]
    return texts if len(texts) > 1 else [*texts, "None"]


def _strides(strides: tuple[Size, Size, Size]) -> str:
    return f"({', '.join(expressions.extent(stride) for stride in strides)})"


def _divides(block: int, size: Size) -> bool:
    """Whether blocks cover a size exactly; unknown of a symbol."""
    return isinstance(size, int) and size % block == 0 and size > 0
