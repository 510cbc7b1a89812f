"""Who stands beside ours on a linear head with cross-entropy: whatever compiles the same code, and
what a user writes instead of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers

Loss = Callable[..., Tensor]

CHUNKER = "inductor-chunker"


def _liger(rows: int) -> Loss:
    """Liger's module; gradients of its chunks are added up in the weight's dtype, as it comes."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # optional

    fused = LigerFusedLinearCrossEntropyLoss()
    return lambda x, weight, target: fused(weight, x, target)


def _torch(rows: int) -> Loss:
    """torch 2.13's function: the logits as a whole, in the dtype of ``x``."""
    return F.linear_cross_entropy


def _torch_chunked(rows: int) -> Loss:
    """The same in chunks of as many rows as it chooses."""
    return _with_options()


def _torch_large_chunks(rows: int) -> Loss:
    """The same in chunks of ``rows``, ours: fewer than it chooses where the vocabulary is large."""
    return _with_options(batch_chunk_size=rows, chunking_method=None)


def _with_options(**given: Any) -> Loss:
    # a class of torch 2.13
    options = torch.nn.LinearCrossEntropyOptions(**given)  # type: ignore[attr-defined, unused-ignore]
    return lambda x, weight, target: F.linear_cross_entropy(x, weight, target, options=options)


# By name, what makes the loss from the rows of our chunks.
INSTEAD: dict[str, Callable[[int], Loss]] = {
    "liger": _liger,
    "torch": _torch,
    "torch-chunked": _torch_chunked,
    "torch-large-chunks": _torch_large_chunks,
}
DEFAULT = ("eager", "inductor", CHUNKER, *INSTEAD, "ours")
NAMES = (*peers.PEERS, CHUNKER, *INSTEAD)


def chosen(names: str) -> tuple[str, ...]:
    """The names of a comma-separated list; a wrong one exits with those that exist."""
    return peers.known(names, NAMES)


@contextmanager
def running(name: str, loss: Loss, rows: int) -> Iterator[Loss]:
    """``loss`` as the peer runs it; what the peer sets holds until the block ends, calls included.

    Args:
        rows: of a chunk of ours.
    """
    if name in INSTEAD:
        yield INSTEAD[name](rows)
    elif name == CHUNKER:
        import torch._inductor.config as config

        with config.patch({"auto_chunker.enable": True}):
            yield torch.compile(loss)
    else:
        yield peers.PEERS[name].compile(loss)


def chunked() -> int | None:
    """Graphs that Inductor has chunked in this process; None where this torch does not count."""
    import torch._inductor.metrics as metrics

    return getattr(metrics, "num_auto_chunking", None)
