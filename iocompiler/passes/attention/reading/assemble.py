"""The operands of a recognised attention, written in common axes."""

from __future__ import annotations

from torch.fx import Node

from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.axes import Axis, Dims, flat, resolve
from iocompiler.passes.attention.dims.views import Operand
from iocompiler.passes.attention.reading.description import Declined, Operands


def assemble(
    query: tuple[Node, Dims],
    key: tuple[Node, Dims],
    value: tuple[Node, Dims],
    output: Dims,
    rows: Dims,
    column: Axis,
    width: Axis,
) -> Operands:
    """The operands and their axes.

    Args:
        query, key, value: each with its dims; what they are views of is looked up here.
        output: the dims of the result.
        rows: dims that hold every axis of the scores but ``column``, in the order wanted.
        column: the axis the softmax is over; ``width``: what query and key are contracted over.

    Raises:
        Declined: the axes do not go together as an attention's do.
    """
    # What kernels have one of: keys, widths, rows. What operands are views of is looked for as far
    # as it has these whole; windows of an image have not.
    row = _row(flat(rows), *(set(flat(dims)) for _, dims in (query, key, value)))
    whole = {*resolve((column, width)), *_outside(output, flat(rows)), *([row] if row else [])}
    operands = [Operand(tuple(views.stages(*each, whole))) for each in (query, key, value)]
    columns, widths = resolve((column,)), resolve((width,))
    if len(columns) != 1 or len(widths) != 1:
        raise Declined("the keys or the head width are spread over several dims")
    rest = tuple(axis for axis in flat(rows) if axis is not columns[0])
    new = _outside(output, rest)
    if len(new) > 1:
        raise Declined("the output's width is spread over several dims")
    value_width = new[0] if new else Axis(1)
    allowed = ({*rest, *widths}, {*rest, *columns, *widths}, {*rest, *columns, value_width})
    axes = [set(flat(operand.dims)) for operand in operands]
    for name, its, may in zip(("query", "key", "value"), axes, allowed, strict=True):
        if not its <= may:
            raise Declined(f"the {name} has a dim the others have not")
    q, k, v = operands
    return Operands(q, k, v, _row(rest, *axes), columns[0], widths[0], value_width, rest)


def _row(rows: tuple[Axis, ...], query: set[Axis], key: set[Axis], value: set[Axis]) -> Axis | None:
    """The last axis that the query alone has."""
    own = [axis for axis in rows if axis in query and axis not in key | value]
    return own[-1] if own else None


def _outside(output: Dims, rows: tuple[Axis, ...]) -> list[Axis]:
    """The width of the value: axes of the output that the scores have not."""
    return [axis for axis in flat(output) if axis not in rows]
