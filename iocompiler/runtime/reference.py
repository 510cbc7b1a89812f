"""The reference executor: a plan on the CPU, its kernels by the tile interpreter, the rest by aten.

Slow and plain: what a compiled plan computes is compared with this, and this with float64 eager.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import getitem
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from iocompiler.plan.contents import made
from iocompiler.plan.data import (
    AtenStep,
    BatchStep,
    ConstantStep,
    KernelStep,
    MatmulStep,
    Plan,
    Region,
    Step,
    TensorSpec,
    ViewStep,
)
from iocompiler.plan.memory import rooms
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
    results = _Results(plan, values, sizes)
    for step in plan.steps:
        if isinstance(step, (KernelStep, MatmulStep, BatchStep)):
            results.allocate(step)
        match step:
            case KernelStep():
                buffers = _buffers(step.program, step.args, values, sizes)
                run(step.program, buffers, sizes, step.schedule)
            case MatmulStep():
                given = zip(step.buffers, step.args, strict=True)
                run_matmul(step, [_flat(b, values[name], sizes) for b, name in given], sizes)
            case BatchStep():
                _batch(step, values, sizes)
            case AtenStep():
                _aten(step, values, sizes)
                results.move(step)
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


class _Results:
    """Memory for what a plan makes, full of poison: of its own, or where the plan has placed it."""

    def __init__(self, plan: Plan, values: dict[str, Any], sizes: dict[str, int]) -> None:
        self._placed = dict(plan.placed)
        self._rooms = rooms(plan.steps, self._placed)
        self._values, self._sizes = values, sizes

    def allocate(self, step: Step) -> None:
        """Before a kernel runs."""
        for name, spec in made(step).items():
            self._values[name] = self._allocated(name, spec)

    def move(self, step: AtenStep) -> None:
        """After a call that writes into memory of ours."""
        for name, spec in made(step).items():
            if name in self._placed:
                self._values[name] = self._allocated(name, spec).copy_(self._values[name])

    def _allocated(self, name: str, spec: TensorSpec) -> torch.Tensor:
        poison = fresh(spec, self._sizes, CPU)
        if name in self._placed:
            place = self._placed[name]
            given, offset = self._values[place.root], size_value(place.offset, self._sizes)
            return _shown(spec, given, offset, self._sizes).copy_(poison)
        if name in self._rooms:
            whole = replace(spec, shape=(self._rooms[name],), stride=(1,))
            return _shown(spec, fresh(whole, self._sizes, CPU), 0, self._sizes)
        return poison


def _shown(
    spec: TensorSpec, given: torch.Tensor, offset: int, sizes: Mapping[str, int]
) -> torch.Tensor:
    shape, stride = size_values(spec.shape, sizes), size_values(spec.stride, sizes)
    tensor = torch.empty(0, dtype=spec.dtype)
    return tensor.set_(given.untyped_storage(), offset, shape, stride)


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
    product = step.product
    count = len(product.operands)
    batch, m, n, k = size_values((product.batch, product.m, product.n, product.k), sizes)
    shapes, strides = [(m, k), *[(k, n)] * len(product.rights)], [product.left, *product.rights]
    for term in product.more:
        inner = size_value(term.k, sizes)
        shapes += [(m, inner), (inner, n)]
        strides += [term.left, term.right]
    starts = (0, *product.starts, *[0] * (2 * len(product.more)))
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
    rights, pairs = others[: len(product.rights)], others[len(product.rights) :]
    buffers = {b.name: tensor for b, tensor in zip(step.tensors, flat[count:], strict=True)}
    for sums, right in zip(step.sums, rights, strict=True):
        total = torch.bmm(left, right)
        for one, other in zip(pairs[::2], pairs[1::2], strict=True):
            total += torch.bmm(one, other)
        buffers[sums.name] = total.flatten()
    run(step.program, buffers, sizes)


def _batch(step: BatchStep, values: dict[str, Any], sizes: dict[str, int]) -> None:
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
    offset = int(base.storage_offset()) + size_value(step.offset, sizes)
    shown = _shown(step.spec, base, offset, sizes)
    # elements may stand for their conjugates or negatives
    shown = shown.conj() if base.is_conj() else shown
    return torch._neg_view(shown) if base.is_neg() else shown


def _constant(step: ConstantStep) -> torch.Tensor:
    shape, stride = size_values(step.spec.shape, {}), size_values(step.spec.stride, {})
    tensor = torch.empty_strided(shape, stride, dtype=step.spec.dtype)
    return tensor.copy_(torch.tensor(step.values, dtype=step.spec.dtype).reshape(shape))
