"""What, besides a graph, decides what is traced and chosen for it: torch's modes and switches."""

from __future__ import annotations

from typing import Any

import torch
from torch._functorch import config as functorch

_AUTOCAST_DEVICES = ("cpu", "cuda")


def settings() -> dict[str, Any]:
    """Torch's modes and switches of this moment, as JSON-able values with stable names."""
    backends: Any = torch.backends
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": [_autocast(device) for device in _AUTOCAST_DEVICES],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "default dtype": str(torch.get_default_dtype()),
        "deterministic": [
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch._C._get_deterministic_fill_uninitialized_memory(),
        ],
        "float32 matmul": [
            backends.cuda.matmul.fp32_precision,
            backends.mkldnn.matmul.fp32_precision,
        ],
        "cuda": _cuda(),
        "cudnn": _cudnn(),
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "functorch": {k: repr(v) for k, v in sorted(functorch.save_config_portable().items())},
        "git": str(torch.version.git_version),
    }


def _autocast(device: str) -> list[Any]:
    return [device, torch.is_autocast_enabled(device), str(torch.get_autocast_dtype(device))]


def _cuda() -> list[Any]:
    backend: Any = torch.backends.cuda
    return [
        str(torch.version.cuda),
        repr(backend.matmul.allow_fp16_reduced_precision_reduction),
        repr(backend.matmul.allow_bf16_reduced_precision_reduction),
        backend.flash_sdp_enabled(),
        backend.mem_efficient_sdp_enabled(),
        backend.math_sdp_enabled(),
        backend.cudnn_sdp_enabled(),
    ]


def _cudnn() -> list[Any]:
    backend: Any = torch.backends.cudnn
    return [backend.enabled, backend.benchmark, backend.deterministic, backend.conv.fp32_precision]
