"""The run-time values of a plan's sizes and arguments: symbols become Python ints, references
become tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch

from iocompiler.ops.library_product import LibraryProduct, Problem
from iocompiler.plan.data import Argument, Plan, Ref, TensorSpec
from iocompiler.tile.index import Size


def size_value(size: Size, sizes: Mapping[str, int]) -> int:
    """The size with every symbol replaced by its value.

    Raises:
        KeyError: a symbol has no value.
    """
    if isinstance(size, int):
        return size
    return int(size.xreplace({s: sympy.Integer(sizes[s.name]) for s in size.free_symbols}))


def size_values(sizes: tuple[Size, ...], values: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(size_value(s, values) for s in sizes)


def in_numbers(product: LibraryProduct[Size], sizes: Mapping[str, int]) -> Problem | None:
    """The product of these sizes, as a module has it when it runs; None where it depends on
    another.
    """
    if not set(product.size_symbols) <= set(sizes):
        return None

    def numbers(strides: tuple[Size, Size, Size]) -> tuple[int, int, int]:
        batch, row, column = size_values(strides, sizes)
        return batch, row, column

    extents = product.batch, product.m, product.n, product.k
    batch, m, n, k = (size_value(extent, sizes) for extent in extents)
    added, sums = (s if s is None else numbers(s) for s in (product.added, product.sums))
    return Problem(
        batch, m, n, k, product.dtype, numbers(product.a), numbers(product.b),
        numbers(product.out), added, product.bias, sums, product.stored, product.activation,
    )  # fmt: skip


def input_sizes(plan: Plan, args: list[Any]) -> dict[str, int]:
    """Values of the size symbols: the int inputs, and what the shapes of the tensor inputs tell."""
    found: dict[str, int] = {}
    for (name, spec), value in zip(plan.inputs, args, strict=True):
        if spec is None:
            if isinstance(value, int) and not isinstance(value, bool):
                found[name] = int(value)
            continue
        found_sizes(spec, value, found)
    return found


def found_sizes(spec: TensorSpec, tensor: torch.Tensor, sizes: dict[str, int]) -> None:
    """Enter the sizes that stand as a dimension of a tensor and are not known yet."""
    for declared, actual in zip(spec.shape, tensor.shape, strict=True):
        if isinstance(declared, sympy.Symbol):
            sizes.setdefault(declared.name, int(actual))


def storage_elements(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from a tensor's first to its last in memory, both counted; 0 for an empty one."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def resolve(
    argument: Argument, values: Mapping[str, Any], sizes: Mapping[str, int], device: torch.device
) -> Any:
    """An `AtenStep` argument as the operator takes it; CUDA devices are replaced by ``device``."""
    if isinstance(argument, Ref):
        return values[argument.name]
    if isinstance(argument, (list, tuple)):
        return type(argument)(resolve(a, values, sizes, device) for a in argument)
    if isinstance(argument, dict):
        return {key: resolve(a, values, sizes, device) for key, a in argument.items()}
    if isinstance(argument, torch.device):
        return device if argument.type == "cuda" else argument
    if isinstance(argument, sympy.Basic):
        return _number(argument, sizes)
    return argument


def _number(expr: sympy.Basic, sizes: Mapping[str, int]) -> int | float | bool:
    value = expr.xreplace({s: _sympy(sizes[s.name]) for s in expr.free_symbols})
    if value in (sympy.true, sympy.false):
        return bool(value)
    return int(value) if value.is_Integer else float(value)


def _sympy(number: float) -> sympy.Basic:
    return sympy.Float(number) if isinstance(number, float) else sympy.Integer(number)


def laid_out(tensor: torch.Tensor, shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """``tensor`` itself where its strides are the planned ones, else a copy that has them.

    The meta function of an operator can predict other strides than its kernel gives; kernels
    planned for the predicted ones would then read the wrong elements.
    """
    if tensor.stride() == stride:
        return tensor
    actual = tensor.stride()
    if all(n <= 1 or a == s for n, a, s in zip(shape, actual, stride, strict=True)) or 0 in shape:
        return tensor
    copy = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def fresh(spec: TensorSpec, sizes: Mapping[str, int], device: torch.device) -> torch.Tensor:
    """A new tensor of ``spec`` full of poison: NaN, the least integer, or True."""
    shape, stride = size_values(spec.shape, sizes), size_values(spec.stride, sizes)
    poison: float | int | bool = True
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        poison = float("nan")
    elif spec.dtype != torch.bool:
        poison = torch.iinfo(spec.dtype).min
    storage = torch.empty(storage_elements(shape, stride), dtype=spec.dtype, device=device)
    whole = storage.fill_(poison).untyped_storage()
    # no view: under autograd whoever is given it may write into it
    return torch.empty(0, dtype=spec.dtype, device=device).set_(whole, 0, shape, stride)
