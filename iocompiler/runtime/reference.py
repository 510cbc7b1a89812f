"""The reference executor: a plan on the CPU, its kernels by the tile interpreter, the rest by aten.

Slow and plain: what a compiled plan computes is compared with this, and this with float64 eager.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import getitem
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from iocompiler.plan.data import (
    AtenStep,
    BatchStep,
    ConstantStep,
    KernelStep,
    MatmulStep,
    Plan,
    Region,
    ViewStep,
)
from iocompiler.runtime.values import (
    found_sizes,
    fresh,
    input_sizes,
    laid_out,
    resolve,
    size_value,
    size_values,
)
from iocompiler.tile.interpret import run
from iocompiler.tile.program import Buffer, TileProgram

CPU = torch.device("cpu")


def run_plan(plan: Plan, args: list[Any]) -> list[Any]:
    """The outputs of ``plan`` for ``args`` (CPU tensors, ints for sizes, numbers), in order.

    ``args`` stays as it is; tensors the plan writes into are changed. Fresh outputs are poisoned
    before a kernel writes them, so an element a kernel forgets shows.

    Raises:
        ValueError: as many arguments as the plan has inputs are needed.
        KeyError: a step reads a name nothing before it defines.
    """
    if len(args) != len(plan.inputs):
        raise ValueError(f"the plan takes {len(plan.inputs)} arguments, got {len(args)}")
    values: dict[str, Any] = {
        name: value for (name, _), value in zip(plan.inputs, args, strict=True)
    }
    sizes = input_sizes(plan, args)
    for step in plan.steps:
        match step:
            case KernelStep():
                _kernel(step, values, sizes)
            case MatmulStep():
                _matmul(step, values, sizes)
            case BatchStep():
                _batch(step, values, sizes)
            case AtenStep():
                _aten(step, values, sizes)
            case ViewStep():
                values[step.name] = _view(step, values[step.base], sizes)
            case ConstantStep():
                values[step.name] = _constant(step)
    return [resolve(output, values, sizes, CPU) for output in plan.outputs]


def operator_named(target: str) -> Any:
    """The operator of a qualified name such as "aten.mm.default".

    Raises:
        AttributeError: there is no such operator.
    """
    return reduce(getattr, target.split("."), torch.ops)


def _kernel(step: KernelStep, values: dict[str, Any], sizes: dict[str, int]) -> None:
    for name, spec in step.outputs:
        values[name] = fresh(spec, sizes, CPU)
    run(step.program, _buffers(step.program, step.args, values, sizes), sizes, step.schedule)


def _matmul(step: MatmulStep, values: dict[str, Any], sizes: dict[str, int]) -> None:
    for name, spec in step.outputs:
        values[name] = fresh(spec, sizes, CPU)
    given = zip(step.buffers, step.args, strict=True)
    run_matmul(step, [_flat(buffer, values[name], sizes) for buffer, name in given], sizes)


def run_matmul(step: MatmulStep, flat: Sequence[torch.Tensor], sizes: dict[str, int]) -> None:
    """The products by aten in float32, then the epilogue by the tile interpreter.

    Args:
        flat: for each of the step's buffers, what lies behind its pointer.
    """
    if step.product.beside:
        for part in step.parts:
            run_matmul(part, flat[: len(part.buffers)], sizes)
            flat = flat[len(part.buffers) :]
        return
    made = step.product
    count = len(made.operands)
    batch, m, n, k = size_values((made.batch, made.m, made.n, made.k), sizes)
    shapes, strides = [(m, k), *[(k, n)] * len(made.rights)], [made.left, *made.rights]
    for term in made.more:
        inner = size_value(term.k, sizes)
        shapes += [(m, inner), (inner, n)]
        strides += [term.left, term.right]
    starts = (0, *made.starts, *[0] * (2 * len(made.more)))
    left, *others = (
        operand.as_strided(
            (batch, *shape), (along_batch, *along), operand.storage_offset() + start
        ).float()
        for operand, shape, (*along, along_batch), start in zip(
            flat[:count],
            shapes,
            [size_values(each, sizes) for each in strides],
            size_values(starts, sizes),
            strict=True,
        )
    )
    rights, pairs = others[: len(made.rights)], others[len(made.rights) :]
    buffers = {b.name: tensor for b, tensor in zip(step.tensors, flat[count:], strict=True)}
    for sums, right in zip(step.sums, rights, strict=True):
        total = torch.bmm(left, right)
        for one, other in zip(pairs[::2], pairs[1::2], strict=True):
            total += torch.bmm(one, other)
        buffers[sums.name] = total.flatten()
    run(step.program, buffers, sizes)


def _batch(step: BatchStep, values: dict[str, Any], sizes: dict[str, int]) -> None:
    for name, spec in step.outputs:
        values[name] = fresh(spec, sizes, CPU)
    for (args, _), extents in zip(step.members, step.extents(), strict=True):
        here = {**sizes, **{name: size_value(size, sizes) for name, size in extents.items()}}
        run(step.program, _buffers(step.program, args, values, here), here, step.schedule)


def _buffers(
    program: TileProgram, args: tuple[str, ...], values: dict[str, Any], sizes: dict[str, int]
) -> dict[str, torch.Tensor]:
    return {b.name: _flat(b, values[a], sizes) for b, a in zip(program.buffers, args, strict=True)}


def _flat(buffer: Buffer, value: Any, sizes: dict[str, int]) -> torch.Tensor:
    """What lies behind the buffer's pointer, as one flat tensor that shares its storage."""
    if not isinstance(value, torch.Tensor):
        return torch.tensor([value], dtype=buffer.dtype)
    room = value.untyped_storage().nbytes() // value.element_size() - value.storage_offset()
    elements = min(size_value(buffer.elements, sizes), room)
    return value.as_strided((elements,), (1,), value.storage_offset())


def _aten(step: AtenStep, values: dict[str, Any], sizes: dict[str, int]) -> None:
    args, kwargs = tree_map_only(Region, _callable, (step.args, dict(step.kwargs)))
    args = [resolve(a, values, sizes, CPU) for a in args]
    kwargs = {key: resolve(a, values, sizes, CPU) for key, a in kwargs.items()}
    result = operator_named(step.target)(*args, **kwargs)
    for path, name, spec in step.results():
        value = reduce(getitem, path, result)
        if spec is None and isinstance(value, (int, float)):
            sizes[name] = value  # type: ignore[assignment]  # a number among the sizes
        if spec is not None and isinstance(value, torch.Tensor):
            found_sizes(spec, value, sizes)
            value = laid_out(value, size_values(spec.shape, sizes), size_values(spec.stride, sizes))
        values[name] = value


def _callable(region: Region) -> Callable[..., Any]:
    """The function of the region, for an operator to call."""

    def run(*args: Any) -> Any:
        given = _as_planned(region.plan, args) if region.exact else list(args)
        results = run_plan(region.plan, given)
        if region.returns == "value":
            return results[0]
        return results if region.returns == "list" else tuple(results)

    return run


def _as_planned(plan: Plan, args: Sequence[Any]) -> list[Any]:
    sizes = input_sizes(plan, list(args))
    return [
        value
        if spec is None
        else laid_out(value, size_values(spec.shape, sizes), size_values(spec.stride, sizes))
        for (_, spec), value in zip(plan.inputs, args, strict=True)
    ]


def _view(step: ViewStep, base: torch.Tensor, sizes: dict[str, int]) -> torch.Tensor:
    offset = base.storage_offset() + size_value(step.offset, sizes)
    return base.as_strided(
        size_values(step.spec.shape, sizes), size_values(step.spec.stride, sizes), offset
    )


def _constant(step: ConstantStep) -> torch.Tensor:
    shape, stride = size_values(step.spec.shape, {}), size_values(step.spec.stride, {})
    tensor = torch.empty_strided(shape, stride, dtype=step.spec.dtype)
    return tensor.copy_(torch.tensor(step.values, dtype=step.spec.dtype).reshape(shape))
