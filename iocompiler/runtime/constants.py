"""The tensors of a graph module, which AOTAutograd makes the first inputs of its flat graphs: kept
in a cache entry by name or by value.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule

from iocompiler.errors import NotCacheable
from iocompiler.graph.fingerprint import tensor_bytes

_LARGEST = 2**16  # bytes of a tensor kept by value


def describe(graph: GraphModule, gm: GraphModule) -> list[dict[str, Any]]:
    """The tensors of a rewritten ``graph``, in AOTAutograd's order, as JSON.

    Args:
        gm: Dynamo's graph: a tensor it has is kept by its name there, one that tracing made by its
            elements.

    Raises:
        NotCacheable: tracing made a large one, or one with a gradient.
    """
    own = {id(tensor): name for name, tensor in tensors(gm)}
    return [_describe(tensor, own) for _, tensor in tensors(graph)]


def rebuild(row: Mapping[str, Any], gm: GraphModule) -> torch.Tensor:
    """The tensor a row of `describe` stands for; KeyError or ValueError where there is none."""
    if "attribute" in row:
        return dict(tensors(gm))[row["attribute"]]
    dtype = getattr(torch, row["dtype"])
    content = bytearray(base64.b64decode(row["elements"]))
    if content:
        flat = torch.frombuffer(content, dtype=dtype)
    else:
        flat = torch.empty(0, dtype=dtype, device="cpu")
    made = torch.empty_strided(row["shape"], row["stride"], dtype=dtype, device=row["device"])
    return made.copy_(flat.reshape(row["shape"]))


def tensors(gm: GraphModule) -> list[tuple[str, torch.Tensor]]:
    """Those of a graph by name, in AOTAutograd's order."""
    return [
        *gm.named_parameters(remove_duplicate=False),
        *gm.named_buffers(remove_duplicate=False),
    ]


def _describe(tensor: torch.Tensor, own: Mapping[int, str]) -> dict[str, Any]:
    if id(tensor) in own:
        return {"attribute": own[id(tensor)]}
    if tensor.nbytes > _LARGEST or tensor.requires_grad or tensor.layout is not torch.strided:
        raise NotCacheable(cause="tracing made a constant too large to keep")
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "device": str(tensor.device),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "elements": base64.b64encode(tensor_bytes(tensor)).decode(),
    }
