"""Steps of the matmul template as Triton source: the epilogue, and a kernel that calls the template
with it and with the sizes of its products.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from iocompiler.codegen import expressions
from iocompiler.codegen.matmul_epilogue import emit_epilogue, parameter
from iocompiler.codegen.prelude import PRELUDE
from iocompiler.plan.column_sums import rows_of_part
from iocompiler.plan.data import MatmulStep
from iocompiler.plan.product import MatmulTile, Product
from iocompiler.tile.index import Size, ceil_div, product

_TEMPLATES = ("matmul.py", "matmul_descriptors.py", "matmul_sums.py", "matmul_groups.py")
# loads one element at a time need a register each, and an address
_ANY_POINTERS = MatmulTile(64, 64, 32, num_warps=4, num_stages=2)


def emit_matmul(step: MatmulStep, name: str) -> str:
    """The source of the kernel ``name``: its parameters are the step's buffers in order (pointers
    named ``<buffer>_ptr``, plain numbers for role "scalar"), then its size symbols. It refers to
    the names `template_prelude` defines.
    """
    return f"{emit_epilogue(step, name)}\n\n{_kernel(step, name)}"


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


def _kernel(step: MatmulStep, name: str) -> str:
    made, tile = step.product, step.tile
    parameters = [*map(parameter, step.buffers), *step.size_symbols]
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
        found += [parameter(buffer) for buffer in own[len(part.product.operands) :]]
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
