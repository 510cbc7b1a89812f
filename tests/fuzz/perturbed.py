"""Eager once more, with its roundings fallen differently: how far it errs but for luck.

Stochastic arithmetic (CESTAC: Vignes 1993, A stochastic arithmetic for reliable scientific
computation; Monte Carlo arithmetic: Parker 1997): results of ops that round are moved by a unit in
the last place, and how far that moves the outputs is the error to be expected of any order of the
same roundings. Of two equal values one is then larger, and nothing cancels by luck.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WHOLE = 16
"""Whole numbers up to this are taken for exact: moved, they would jump (`floor`, `==`)."""

_MOVED = 8
"""One element in this many goes up and one down, as often as stochastic rounding would differ from
rounding to nearest: a value between two neighbours is half a unit from the nearer one at most."""

_SELECTS = """
    _to_copy clone copy copy_ lift_fresh_copy _unsafe_view cat stack repeat flip roll unfold_copy
    index index_select gather take embedding where masked_fill masked_fill_ masked_scatter scatter
    slice_scatter select_scatter slice_backward select_backward index_fill index_copy
    constant_pad_nd reflection_pad1d replication_pad1d tril triu fill fill_ zero_ full full_like
    zeros zeros_like ones ones_like empty empty_like new_full new_zeros new_empty new_empty_strided
    empty_strided scalar_tensor eye maximum minimum amax amin max min aminmax sort topk median
    kthvalue cummax clamp clamp_ clamp_min clamp_max relu relu_ abs neg neg_ threshold_backward
    hardtanh max_pool2d_with_indices sign sgn copysign floor ceil round trunc frac fmod remainder
    floor_divide heaviside nan_to_num
"""
"""What rounds nothing unless it casts: elements of its operands, or what jumps. Views are known by
their schemas."""


_WITHIN = """
    native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward
    native_batch_norm native_batch_norm_backward cudnn_batch_norm cudnn_batch_norm_backward
    _fused_rms_norm _fused_rms_norm_backward _softmax _log_softmax _softmax_backward_data
    _log_softmax_backward_data _euclidean_dist
"""
"""Kernels that subtract what they computed themselves: roundings within them move as well, as
torch's decompositions spell them out. A CPU kernel that sums in float64 is exact there, and equal
operands cancel in a sum that is reused; neither is a property of the function."""


class Perturbed(TorchDispatchMode):
    """Below autograd, so that ops of the backward are moved too; ``seed`` decides how."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._selects, self._within = frozenset(_SELECTS.split()), frozenset(_WITHIN.split())
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in self._within and func in decomposition_table:
            with self:
                return decomposition_table[func](*args, **(kwargs or {}))
        operands, exact = _floats((args, kwargs)), name in self._selects or _is_view(func)
        if not exact and not func._schema.is_mutable:
            args, kwargs = tree_map_only(Tensor, self._read, (args, kwargs))
        result = func(*args, **(kwargs or {}))
        for tensor in _floats(result):
            if not exact or _finer(operands, tensor):
                self._move(tensor)
        return result

    def _read(self, operand: Tensor) -> Tensor:
        """What one reader sees of an operand: other roundings than the next one, as one kernel may
        read a value before it is rounded, or have it of a multiply-add, and another behind that.
        """
        if not operand.is_floating_point():
            return operand
        own = operand.clone()
        self._move(own)
        return own

    def _move(self, tensor: Tensor) -> None:
        """Some elements by a unit in the last place, in place; 0, inf and NaN stay."""
        stays = ~tensor.isfinite() | (tensor == tensor.round()) & (tensor.abs() <= _WHOLE)
        bits = tensor.view(_BITS[tensor.element_size()])
        generator = self._generator(tensor.device)
        drawn = torch.randint(_MOVED, bits.shape, generator=generator, device=tensor.device)
        units = (drawn == 0).to(bits.dtype) - (drawn == 1).to(bits.dtype)
        bits += units.masked_fill_(stays, 0)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def _is_view(func: OpOverload) -> bool:
    aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def _floats(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]


def _finer(operands: Sequence[Tensor], result: Tensor) -> bool:
    """Whether a copy rounds, or `to`, which may be a view as well."""
    eps = torch.finfo(result.dtype).eps
    return any(torch.finfo(t.dtype).eps < eps for t in operands)
