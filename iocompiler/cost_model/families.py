"""The rules: from a call to its cost, one function, or maker of functions, a family."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from iocompiler.cost_model.call import Call, Operand
from iocompiler.cost_model.cost import Cost, elements, least, nbytes
from iocompiler.tile.index import Size, product

Rule: TypeAlias = Callable[[Call], Cost]


def free(call: Call) -> Cost:
    """Views, sizes and what only names a value."""
    return Cost()


def once(call: Call) -> Cost:
    """Inputs read and outputs written once, one FLOP an output element."""
    return _moved(call, flops=sum((product(s.shape) for s in call.results), 0))


def copied(call: Call) -> Cost:
    """Inputs read and outputs written once, no arithmetic."""
    return _moved(call)


def written(call: Call) -> Cost:
    """Tensors made from nothing."""
    return Cost(written_bytes=_written(call))


def pointwise(flops: int, transcendentals: int = 0) -> Rule:
    """Work an element of the (largest) output."""

    def rule(call: Call) -> Cost:
        count = _widest(call)
        return _moved(call, flops * count, transcendentals * count)

    return rule


def reduction(flops: int, transcendentals: int = 0) -> Rule:
    """Work an element of the first input."""

    def rule(call: Call) -> Cost:
        count = product(call.operands[0].spec.shape) if call.operands else 0
        return _moved(call, flops * count, transcendentals * count)

    return rule


def random(flops: int) -> Rule:
    """A random number an output element; of a ``like`` argument only the shape counts."""

    def rule(call: Call) -> Cost:
        return Cost(
            written_bytes=_written(call),
            flops=flops * sum((product(s.shape) for s in call.results), 0),
        )

    return rule


def gathered(call: Call) -> Cost:
    """Rows picked from a table by the other inputs."""
    read: Size = sum((count * o.spec.dtype.itemsize for o, count in elements_read(call)), 0)
    return Cost(read, _written(call))


_TABLES = {
    "aten.embedding": "weight",
    "aten.gather": "self",
    "aten.index": "self",
    "aten.index_select": "self",
    "aten.take": "self",
    "aten._unsafe_index": "self",
    "aten.take_along_dim": "self",
}
"""What is picked from, by the name of the operator's argument."""


def elements_read(call: Call) -> list[tuple[Operand, Size]]:
    """How many distinct elements of each operand a call needs at most: of a table, what it
    picks."""
    table = call.argument(_TABLES.get(call.name, ""))
    picked: Size = sum((elements(s) for s in call.results), 0)
    return [
        (o, least(elements(o.spec), picked) if o == table else elements(o.spec))
        for o in call.operands
    ]


def scattered(destination: str, flops: int = 0) -> Rule:
    """Elements put into ``destination``. In place, only what is put moves; else the whole result is
    written."""

    def rule(call: Call) -> Cost:
        target = call.argument(destination)
        put = [o for o in call.operands if o != target]
        values = greatest_operand(put)
        if call.name.endswith("_"):
            moved: Size = sum((nbytes(o.spec) for o in put), 0)
            count = elements(values.spec) if values else 0
            size = count * target.spec.dtype.itemsize
            return Cost(moved + (size if flops else 0), size, flops * count)
        return _moved(call, flops * (elements(values.spec) if values else 0))

    return rule


def overwritten(call: Call) -> Cost:
    """``copy_`` and ``copy``: the destination is written, not read."""
    source = call.argument("src")
    read = nbytes(source.spec) if isinstance(source, Operand) else 0
    return Cost(read, _written(call))


def sliced_in(call: Call) -> Cost:
    """A slice replaced in a copy: of the old tensor only what stays is read, which with the slice
    is the result."""
    return Cost(_written(call), _written(call))


def sort(call: Call) -> Cost:
    """Radix sort, 8 bits a pass: keys and positions are read and written in each."""
    keys = call.operands[0].spec
    passes = keys.dtype.itemsize
    return Cost(
        passes * nbytes(keys) + (passes - 1) * _indices(call),
        passes * _written(call),
        passes * elements(keys),
    )


def _indices(call: Call) -> Size:
    return nbytes(call.results[-1]) if len(call.results) > 1 else 0


def embedding_backward(call: Call) -> Cost:
    """The gradient's rows added into a zeroed table: gradient and positions read, the table written
    once."""
    return _moved(call, elements(call.operands[0].spec) if call.operands else 0)


def embedding_gradient(call: Call) -> Cost:
    """Ours: gradient and positions read, each row that a token names written once, after a fill
    with zeros, onto a base (its rows read, the rest copied), or into one (its rows read)."""
    grad, indices, base = (call.argument(name) for name in ("grad", "indices", "base"))
    table = base.spec if isinstance(base, Operand) else call.results[0]
    row = table.shape[1] * table.dtype.itemsize
    touched = least(elements(indices.spec), table.shape[0]) * row
    into = not call.results
    return Cost(
        _moved(call).read_bytes - (nbytes(table) - touched if into else 0),
        touched + (0 if into else nbytes(table)),
        elements(grad.spec),
    )


def _moved(call: Call, flops: Size = 0, transcendentals: Size = 0) -> Cost:
    read: Size = sum((nbytes(o.spec) for o in call.operands), 0)
    return Cost(read, _written(call), flops, transcendentals)


def _written(call: Call) -> Size:
    """The results; of a call without any, what it writes into."""
    specs = call.results or tuple(o.spec for o in call.mutated)
    return sum((nbytes(s) for s in specs), 0)


def _widest(call: Call) -> Size:
    """Elements an elementwise call works on: the first result's, or (``_foreach_``) all of them."""
    if "._foreach_" in call.name or "._fused_" in call.name:
        lists = call.results or tuple(o.spec for o in call.mutated)
        return sum((product(s.shape) for s in lists), 0)
    return product(call.results[0].shape) if call.results else 0


def greatest_operand(operands: list[Operand]) -> Operand | None:
    """The operand that holds the values put: the last floating-point one, or the last."""
    floating = [o for o in operands if o.spec.dtype.is_floating_point]
    found = floating or operands
    return found[-1] if found else None
