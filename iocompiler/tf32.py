"""What the program says of float32 on tensor cores.

torch has two settings for one thing, `allow_tf32` and `fp32_precision`; reading the older one
raises where a program has set the newer one.
"""

from __future__ import annotations

from typing import Any

import torch


def products_rounded() -> bool:
    """Whether float32 matrix products may be rounded to TF32 on a GPU."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def convolutions_rounded() -> bool:
    """Whether cuDNN may round float32 convolutions to TF32."""
    cudnn: Any = torch.backends.cudnn
    return bool(cudnn.conv.fp32_precision == "tf32")


def rounded(operator: str) -> bool:
    """Whether what an operator of this name contracts in float32 may be rounded to TF32."""
    return convolutions_rounded() if "conv" in operator else products_rounded()
