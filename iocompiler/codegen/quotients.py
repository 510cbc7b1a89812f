"""Quotients and powers in fewer steps than the op table's text takes."""

from __future__ import annotations

from typing import Protocol

from iocompiler.codegen.expressions import divided, powered
from iocompiler.tile.program import Op, TileProgram


class Writer(Protocol):
    """Of a `KernelWriter`, what is asked of it here."""

    program: TileProgram

    def line(self, text: str) -> None: ...

    def value(self, position: int) -> str: ...

    def tensor(self, position: int) -> str: ...


def in_few_steps(writer: Writer, op: Op) -> str:
    """The text of a quotient by a number, a coarse quotient or a power of a number; "" for all
    else. What a coarse one needs of its divisor alone is written before, in the divisor's shape:
    many elements that share one share that, too.
    """
    if op.fn not in ("div", "coarse_div", "pow"):
        return ""
    first, second = (writer.program.ops[i] for i in op.inputs)
    if op.fn == "pow":
        known = first.kind == "const"
        return powered(first.value, writer.tensor(op.inputs[1]), op.dtype) if known else ""
    dividend, coarse = writer.tensor(op.inputs[0]), op.fn == "coarse_div"
    if second.kind == "const":
        return divided(dividend, second.value, op.dtype, coarse)
    if not coarse:
        return ""
    divisor = writer.value(op.inputs[1])
    scale, inverse = (f"{name}_{op.inputs[1]}" for name in ("range", "inverse"))
    writer.line(f"{scale} = _range({divisor})")
    writer.line(f"{inverse} = _inverse({divisor} * {scale})")
    return f"{dividend} * {scale} * {inverse}"
