"""The order of storage a library's convolutions compute in, and what they move for it.

The matrix units are fed with channels last, a vector of channels at a time. cuDNN takes tensors
with channels first too, but then copies operands and result around its kernels ("Convolutional
Layers User's Guide", NVIDIA Deep Learning Performance documentation: channels in and out divisible
by 8 in 16 bits, by 4 in TF32; "Tensor Layouts In Memory: NCHW vs NHWC": layouts that avoid the
transposition). Other counts are padded or computed without the matrix units, grouped convolutions
have kernels of their own: of these nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from iocompiler.cost_model.cost import nbytes
from iocompiler.cost_model.device import Device
from iocompiler.plan.data import TensorSpec
from iocompiler.tile.index import Size
from iocompiler.tile.traffic import VECTOR_BYTES

# the compute capability whose matrix units took the dtype first; float32 as TF32
_SINCE = {torch.float16: (7, 0), torch.bfloat16: (8, 0), torch.float32: (8, 0)}


def why_not_last(dtype: torch.dtype, channels: Sequence[Any], groups: Any) -> str:
    """Why a convolution is not known to compute with channels last; "" where it is.

    Args:
        channels: how many go in, how many come out.
    """
    if dtype not in _SINCE:
        return f"{dtype} has no matrix units in convolutions"
    if groups != 1:
        return "convolutions in groups have kernels of their own"
    step = VECTOR_BYTES // dtype.itemsize
    if any(not isinstance(count, int) or count % step or count <= 0 for count in channels):
        return f"channels are no multiple of {step}"
    return ""


def computes_in_matrix_units(dtype: torch.dtype, device: Device, tf32: bool) -> bool:
    """Whether convolutions of this dtype run in the device's matrix units.

    Args:
        tf32: float32 may be rounded to TF32 (`tf32.convolutions_rounded`).
    """
    since = _SINCE.get(dtype)
    if since is None or device.capability is None or device.capability < since:
        return False
    return tf32 or dtype != torch.float32


def relaid_bytes(data: TensorSpec, weight: TensorSpec, result: TensorSpec, groups: Any) -> Size:
    """What a convolution, or one of its two gradients, reads and writes to have all three tensors
    with channels last: aten computes so where data or weight lie so, cuDNN wherever it can.
    """
    if len(data.shape) not in (4, 5):
        return 0
    if why_not_last(data.dtype, (data.shape[1], result.shape[1]), groups):
        return 0
    return sum((2 * nbytes(spec) for spec in (data, weight, result) if _is_first(spec)), 0)


def _is_first(spec: TensorSpec) -> bool:
    """Whether the channels do not lie last; one channel or one place lies both ways."""
    several = spec.shape[1] != 1 and any(size != 1 for size in spec.shape[2:])
    return several and spec.stride[1] != 1
