"""How users set training up, beside weights in bfloat16: what becomes of a model and its calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SETUPS = ("bf16", "autocast", "checkpoints", "cache")


def dtype_of(setup: str) -> torch.dtype:
    """Of weights and images: float32 under autocast."""
    return torch.float32 if setup == "autocast" else torch.bfloat16


def prepared(setup: str, module: nn.Module) -> nn.Module:
    """A model in float32 as a setup has it: "checkpoints" runs each layer again in its backward,
    "cache" makes keys and values for later calls, as Hugging Face's configurations say, and returns
    the loss alone.
    """
    module = module.to(dtype_of(setup))
    if setup == "checkpoints":
        return checkpointed(module)
    if setup == "cache":
        module.config.use_cache = True  # type: ignore[union-attr]
        return _Loss(module)
    return module


def checkpointed(module: nn.Module) -> nn.Module:
    """A model whose layers run again in the backward, if it has any that can."""
    for part in module.modules():
        enable: Any = getattr(part, "gradient_checkpointing_enable", None)
        if enable is not None:
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            break
    return module


def entered(setup: str, function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The calls of a model that is set up."""
    if setup != "autocast":
        return function

    def call(**inputs: Tensor) -> Any:
        with torch.autocast(device, torch.bfloat16):
            return function(**inputs)

    return call


class _Loss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {"loss": self.model(**inputs).loss}
