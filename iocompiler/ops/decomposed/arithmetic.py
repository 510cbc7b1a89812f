"""What every decomposition here shares: arithmetic is done in float32 where values are shorter."""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import get_computation_dtype

DECLINED: typing.NoReturn = typing.cast(typing.NoReturn, NotImplemented)
"""What a decomposition returns for arguments it is not for: the operator then stays as it is."""


def wide(x: Tensor) -> Tensor:
    """``x`` in the dtype arithmetic on it is done in: float32 for bfloat16 and float16."""
    return cast(x, get_computation_dtype(x.dtype)) if x.is_floating_point() else x


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as ``dtype``: the tensor itself where it is that already."""
    return x if x.dtype == dtype else torch.ops.prims.convert_element_type.default(x, dtype)


def positive(dims: int | Sequence[int] | None, rank: int) -> list[int]:
    """Dimensions counted from the front; all of them for None or none."""
    if dims is None:
        return list(range(rank))
    listed = [dims] if isinstance(dims, int) else list(dims)
    return [d % rank for d in listed] if listed and rank else list(range(rank))


def count(x: Tensor, dims: Sequence[int]) -> Any:
    """The number of elements of ``x`` that fold into one along ``dims``; an int or a SymInt."""
    return math.prod(x.shape[d] for d in dims)
