"""Calls of aten that are products a library makes of addresses.

    mm = torch.mm(reinterpret(x, (256, 1024), (1, 256), 0), y, out=...)
    -->  run_mm(stream, x.data_ptr(), y.data_ptr(), mm.data_ptr())

A call of aten takes tensors, looks at them and prepares the library's call anew each time: some 30
us of the host's time, and 3 for each view that is made for it alone. What is known of a product is
prepared once here, as a kernel is. It stays a call of a library, at its price.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from iocompiler.ops.addmm_gelu import ADDMM_GELU
from iocompiler.ops.biased_addmm import BIASED_ADDMM
from iocompiler.ops.library_product import Activation, LibraryProduct, Strides
from iocompiler.ops.wide_product import WIDE_PRODUCT
from iocompiler.plan.contents import made
from iocompiler.plan.data import AtenStep, Plan, Step, TensorSpec
from iocompiler.plan.factors import Factors, factors_of
from iocompiler.plan.memory import takes_out
from iocompiler.plan.sizes import equal, is_multiple, nonnegative
from iocompiler.tile.index import Size
from iocompiler.tile.traffic import VECTOR_BYTES

DTYPES = (torch.bfloat16, torch.float16)
"""Of whose products no switch of torch's changes what is computed: float32 has TF32."""
_TARGETS = frozenset(f"aten.{name}.default" for name in ("mm", "addmm", "bmm", "baddbmm"))
_ALONE = "aten._addmm_activation.default"
ACTIVATED = str(ADDMM_GELU)
BIAS: Strides = (0, 0, 1)
"""Those of what is added to every row."""


def addressed(plan: Plan) -> Plan:
    """The plan, its products' operands settled, with what a library makes of addresses marked
    (`AtenStep.product`). Functions that operators call are left alone: what they are passed need
    not be plain tensors.
    """
    if torch.device(plan.device).type != "cuda":
        return plan
    specs = {name: spec for name, spec in plan.inputs if spec is not None}
    steps: list[Step] = []
    for step in plan.steps:
        specs |= made(step)
        if isinstance(step, AtenStep):
            step = replace(step, product=library_product(step, specs, plan.device))
        steps.append(step)
    return replace(plan, steps=tuple(steps))


def library_product(
    step: AtenStep, specs: Mapping[str, TensorSpec], device: str
) -> LibraryProduct[Size] | None:
    """The product of a call on the plan's ``device``; None where it is none, or has a form that the
    library does not take, or may not take for some values of its symbols.
    """
    if step.target == ACTIVATED:
        return _activated(step, specs, device)
    if step.target == str(BIASED_ADDMM):
        return _biased(step, specs, device)
    if step.target == str(WIDE_PRODUCT):
        return _wide(step, specs, device)
    if step.target == _ALONE:
        found = library_product(_without_activation(step), specs, device)
        if found is None or found.added != BIAS:
            return None
        return replace(found, activation=_activation(step))
    if step.target not in _TARGETS or not takes_out(step, device):
        return None
    factors = factors_of(step, specs)
    if factors is None or factors.dtype not in DTYPES:
        return None
    return _of(factors)


def _activated(
    step: AtenStep, specs: Mapping[str, TensorSpec], device: str
) -> LibraryProduct[Size] | None:
    """Of a product with its activation, which lies as the product does."""
    (bias, a, b), (activation, (name, spec)) = step.args, step.outputs
    target, args = ("mm", (a, b)) if bias is None else ("addmm", step.args)
    plain = replace(step, target=f"aten.{target}.default", args=args, outputs=(activation,))
    found = library_product(replace(plain, is_tuple=False), specs, device)
    if found is None or name is None or spec != activation[1] or found.added not in (None, BIAS):
        return None
    return replace(found, sums=found.out, activation="gelu")


def _without_activation(step: AtenStep) -> AtenStep:
    others = tuple((key, value) for key, value in step.kwargs if key != "use_gelu")
    return replace(step, target="aten.addmm.default", kwargs=others)


def _activation(step: AtenStep) -> Activation:
    return "gelu" if dict(step.kwargs).get("use_gelu", False) else "relu"


def _biased(
    step: AtenStep, specs: Mapping[str, TensorSpec], device: str
) -> LibraryProduct[Size] | None:
    """Of a product with a matrix and a bias: it has to be one with either."""
    matrix, bias, *operands = step.args
    addmm = replace(step, target="aten.addmm.default")
    either = [
        library_product(replace(addmm, args=(added, *operands)), specs, device)
        for added in (matrix, bias)
    ]
    if either[0] is None or either[1] is None or either[1].added != BIAS:
        return None
    ((_, result),) = made(step).items()
    if specs[matrix.name].shape != result.shape:
        return None
    return _rounded_once(replace(either[0], bias=True))


def _wide(
    step: AtenStep, specs: Mapping[str, TensorSpec], device: str
) -> LibraryProduct[Size] | None:
    """Of a product that is stored in another dtype, and lies as it would in its own."""
    ((name, spec),) = step.outputs
    if spec is None:
        return None
    target = "mm" if len(spec.shape) == 2 else "bmm"
    like = replace(spec, dtype=specs[step.args[0].name].dtype)
    plain = replace(step, target=f"aten.{target}.default", outputs=((name, like),))
    found = library_product(plain, specs, device)
    return None if found is None else replace(found, stored=spec.dtype)


def _of(factors: Factors) -> LibraryProduct[Size] | None:
    batch, m, n, k = factors.batch, factors.m, factors.n, factors.k
    if any(equal(size, 0) for size in (batch, m, n, k)):
        return None
    a = _operand(factors.left[1], batch, m, k)
    b = _operand(factors.right[1], batch, k, n)
    out = _result(factors.result, batch, m, n)
    if a is None or b is None or out is None:
        return None
    if factors.added is None:
        return LibraryProduct(batch, m, n, k, factors.dtype, a, b, out)
    added = _added(factors.added[1], batch, m, n)
    if added is None:
        return None
    found = LibraryProduct(batch, m, n, k, factors.dtype, a, b, out, added)
    return _rounded_once(found) if added == BIAS else found


def _rounded_once(biased: LibraryProduct[Size]) -> LibraryProduct[Size] | None:
    """A product with a bias whose lines all begin where a vector does. Of others, where a matrix is
    added too, the library rounds that sum, in 16 bits, before it adds the bias (on an H100): an
    error that is alike for all rows of a column, and that its sum has as often as there are rows.
    """
    strides = (*biased.a, *biased.b, *biased.out, *(biased.added or ()))
    vector = VECTOR_BYTES // biased.dtype.itemsize
    whole = all(equal(each, 1) or is_multiple(each, vector) for each in strides)
    return biased if whole else None


def _operand(strides: Strides, batch: Size, rows: Size, columns: Size) -> Strides | None:
    """An operand's strides as a library takes them, a matrix by its rows or by its columns.

    Args:
        strides: along rows, along columns, along the batch: the order of `Factors`.
    """
    row, column, along_batch = strides
    along_batch = 0 if equal(batch, 1) else along_batch
    if not nonnegative(along_batch):
        return None
    found = _matrix(row, column, rows, columns)
    return None if found is None else (along_batch, *found)


def _matrix(row: Size, column: Size, rows: Size, columns: Size) -> tuple[Size, Size] | None:
    """Its strides: one is 1, and the other reaches over what lies along that one. Of one row, or
    one column, any stride will do.
    """
    if equal(rows, 1):
        row, column = (columns, 1) if equal(column, 1) or equal(columns, 1) else (1, column)
    elif equal(columns, 1):
        column = rows if equal(row, 1) else 1
    if equal(column, 1) and _reaches(row, columns):
        return row, 1
    if equal(row, 1) and _reaches(column, rows):
        return 1, column
    return None


def _reaches(stride: Size, extent: Size) -> bool:
    return nonnegative(stride - extent)


def _result(strides: Strides, batch: Size, m: Size, n: Size) -> Strides | None:
    """A result's strides (along the batch, along rows, along columns): by its rows, each matrix in
    a place of its own.
    """
    along_batch, row, column = strides
    row, column = n if equal(m, 1) else row, 1 if equal(n, 1) else column
    if not equal(column, 1) or not _reaches(row, n):
        return None
    if equal(batch, 1):
        return 0, row, 1
    return (along_batch, row, 1) if _reaches(along_batch, row * m) else None


def _added(strides: Strides, batch: Size, m: Size, n: Size) -> Strides | None:
    """What is added: one number a column, or a tensor of the result's form. Strides are 0 along
    extents of 1.
    """
    along_batch, row, column = strides
    if equal(along_batch, 0) and equal(row, 0) and (equal(column, 1) or equal(n, 1)):
        return BIAS
    return _result(strides, batch, m, n)
