"""DDP and FSDP2, within and around what is compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import iocompiler as ioc
from iocompiler.compilation import Compilation
from tests.distributed.training import Batch, Task, as_eager

WIDTH = 16


class Block(nn.Module):
    """A transformer block, and all its kinds of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = self.qkv(self.norm(x)).reshape(batch, length, 3, 2, WIDTH // 2)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.mlp(x)


class Apart(nn.Module):
    """Attention of three projections, whose weights' gradients are slices of one product."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = (each(x).unflatten(-1, (2, -1)) for each in (self.query, self.key, self.value))
        q, k, v = (part.transpose(1, 2) for part in parts)
        mixed = torch.tanh(q @ k.mT).softmax(-1) @ v
        return x + mixed.transpose(1, 2).flatten(2)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(WIDTH, 8))


def apart() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Apart(), Apart())


def normed() -> nn.Sequential:
    """With buffers, which DDP sends from the first rank to the others before each forward."""
    torch.manual_seed(0)
    layers = (nn.Linear(WIDTH, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))
    return nn.Sequential(*layers)


def _mean_square(net: nn.Module, batch: Batch) -> Tensor:
    return net(*batch).square().mean()


BLOCKS = Task(model, lambda draw: (torch.randn(2, 5, WIDTH, generator=draw),), _mean_square)
APART = Task(apart, BLOCKS.batch, _mean_square)
NORMED = Task(normed, lambda draw: (torch.randn(24, WIDTH, generator=draw),), _mean_square)


def around_compiled(net: nn.Module, b: ioc.Compiler) -> nn.Module:
    return DistributedDataParallel(torch.compile(net, backend=b))


def ddp_around_compiled(device: torch.device) -> None:
    as_eager(BLOCKS, device, around_compiled)


def compiled_around_ddp_in_buckets(device: torch.device) -> None:
    """Dynamo's optimizer for DDP cuts the graph into buckets, each compiled for itself."""
    before = dist._DEFAULT_FIRST_BUCKET_BYTES
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1024
    try:
        wrap = lambda m: DistributedDataParallel(m, bucket_cap_mb=0.004)
        records = as_eager(BLOCKS, device, lambda m, b: torch.compile(wrap(m), backend=b))
    finally:
        dist._DEFAULT_FIRST_BUCKET_BYTES = before
    assert len(records) > 2, len(records)


def compiled_around_ddp_whole(device: torch.device) -> None:
    with torch._dynamo.config.patch(optimize_ddp=False):
        as_eager(BLOCKS, device, lambda m, b: torch.compile(DistributedDataParallel(m), backend=b))


def gradients_in_one_memory_under_ddp(device: torch.device) -> None:
    """Copied to buckets, or views of them from then on."""
    for wrap in (DistributedDataParallel, _with_views):
        records = as_eager(APART, device, partial(_around, wrap))
        assert all(r.cache == "found" or _packs(r) for r in records), records


def _with_views(net: nn.Module) -> nn.Module:
    return DistributedDataParallel(net, gradient_as_bucket_view=True)


def _around(wrap: Callable[[nn.Module], nn.Module], net: nn.Module, b: ioc.Compiler) -> nn.Module:
    return wrap(torch.compile(net, backend=b))


def gradients_in_one_memory_sharded(device: torch.device) -> None:
    def made(net: nn.Module, b: ioc.Compiler) -> nn.Module:
        for place in (0, 1):
            net[place] = torch.compile(net[place], backend=b)
        return sharded(net, list(net), device)

    records = as_eager(APART, device, made)
    assert all(r.cache == "found" or _packs(r) for r in records), records


def _packs(record: Compilation) -> bool:
    return any(each.pattern == "packed_gradients" for each in record.rewrites)


def buffers_under_ddp(device: torch.device) -> None:
    as_eager(NORMED, device, around_compiled)


def sharded_blocks_compiled(device: torch.device) -> None:
    def made(net: nn.Module, b: ioc.Compiler) -> nn.Module:
        for place in (0, 1):
            net[place] = torch.compile(net[place], backend=b)
        return sharded(net, list(net)[:2], device)

    as_eager(BLOCKS, device, made)


def compiled_around_sharded(device: torch.device) -> None:
    wrap = lambda m: sharded(m, list(m)[:2], device)
    as_eager(BLOCKS, device, lambda m, b: torch.compile(wrap(m), backend=b))


def sharded(net: nn.Module, parts: list[nn.Module], device: torch.device) -> nn.Module:
    """The parameters of each part, and the others, divided among the ranks."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in parts:
        fully_shard(part, mesh=mesh)
    return fully_shard(net, mesh=mesh)
