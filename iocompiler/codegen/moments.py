"""A row's mean, and the sums of what deviates from it, taken in one pass.

Each lane keeps the mean of its elements so far and the sum of their squared deviations (Welford,
"Note on a Method for Calculating Corrected Sums of Squares and Products", Technometrics 4, 1962);
at the end the lanes are put together, each by how many elements it has (Chan, Golub, LeVeque 1983).
A row with an infinity has the mean NaN.
"""

from __future__ import annotations

from iocompiler.codegen import expressions
from iocompiler.codegen.kernel_writer import KernelWriter
from iocompiler.codegen.row_tile import tile
from iocompiler.tile.online import Online


def accumulate(writer: KernelWriter, sums: int, squares: int | None) -> None:
    """Take a piece of the row in: the lanes of ``sums`` hold means, those of ``squares`` sums."""
    value = writer.full(writer.tensor(writer.program.ops[sums].inputs[0]), tile(writer))
    if "r" in writer.masks:  # a lane's own mean changes nothing
        value = f"tl.where({writer.masks['r']}, {value}, acc_{sums})"
    share = f"1.0 / (start // {writer.schedule.r_block} + 1)"
    writer.line(f"element_{sums} = {value}")
    writer.line(f"deviation_{sums} = element_{sums} - acc_{sums}")
    writer.line(f"acc_{sums} += deviation_{sums} * ({share})")
    if squares is not None:
        writer.line(f"acc_{squares} += deviation_{sums} * (element_{sums} - acc_{sums})")


def finish(writer: KernelWriter, sums: int, mean: int) -> None:
    """Write the sum of the row and its mean."""
    block = writer.schedule.r_block
    points = expressions.size(writer.points(writer.program.reduced))
    held = f"({points} + {block - 1} - tl.arange(0, {block})[None, :]) // {block}"
    writer.line(f"held_{sums} = tl.maximum({held}, 0).to(tl.float32)")
    name = f"sum_{sums}"
    writer.line(f"{name} = {writer.folded('sum', f'acc_{sums} * held_{sums}', 1)}")
    writer.names[f"%{sums}"] = name
    writer.write(mean)


def total(writer: KernelWriter, position: int, deviations: Online) -> str:
    """The sum over all lanes, each about the row's mean."""
    lanes, held = f"acc_{deviations.beside}", f"held_{deviations.beside}"
    apart = f"({lanes} - {writer.value(deviations.against)})"
    if deviations.kind == "rests":
        return writer.folded("sum", f"{held} * {apart}", 1)
    return writer.folded("sum", f"acc_{position} + {held} * {apart} * {apart}", 1)
