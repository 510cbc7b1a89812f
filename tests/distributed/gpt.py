"""A small GPT on ranks: attention, layer norms, a tied linear head and its cross-entropy."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import iocompiler as ioc
from iocompiler.compilation import Compilation
from tests.accuracy import FORWARD_FACTOR, GRADIENT_FACTOR, SLACK, relative_error
from tests.distributed.training import Batch, Task, as_eager, backend, gradients, moved
from tests.distributed.wrapped import around_compiled, sharded
from tests.models.gpt import GPT

VOCABULARY = 65
DRAWS = 8
"""Of the dropout, for means and spreads of gradients."""


def gpt(dropout: float = 0.0) -> GPT:
    torch.manual_seed(0)
    return GPT(VOCABULARY, width=32, heads=2, layers=2, longest=24, dropout=dropout)


def _tokens(draw: torch.Generator) -> Batch:
    drawn = torch.randint(VOCABULARY, (3, 20), generator=draw)
    return drawn[:, :-1], drawn[:, 1:]


def _loss(net: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = net(*batch)
    return loss


# eps is large: an update does not turn on the sign of a gradient that is nearly zero
_adamw = partial(torch.optim.AdamW, lr=1e-2, eps=1e-3)
TRAINING = Task(gpt, _tokens, _loss, _adamw)


def gpt_under_ddp(device: torch.device) -> None:
    records = as_eager(TRAINING, device, around_compiled)
    assert "attention" in _rewritten(records)


def gpt_under_ddp_in_bfloat16(device: torch.device) -> None:
    as_eager(replace(TRAINING, autocast=torch.bfloat16), device, around_compiled)


def gpt_under_ddp_in_cuda_graphs(device: torch.device) -> None:
    as_eager(TRAINING, device, around_compiled, mode="reduce-overhead")


def gpt_and_its_optimizer_compiled(device: torch.device) -> None:
    """The optimizer's step is kernels over many tensors, whose tables go to the rank's own GPU."""
    adamw = partial(_adamw, foreach=True, capturable=device.type == "cuda")
    as_eager(replace(TRAINING, optimizer=adamw, updates_compiled=True), device, around_compiled)


def gpt_sharded(device: torch.device) -> None:
    wrap = lambda m: sharded(m, list(m.blocks), device)
    as_eager(TRAINING, device, lambda m, b: torch.compile(wrap(m), backend=b))


def gpt_of_sharded_compiled_blocks(device: torch.device) -> None:
    """The parameters of each block come on FSDP's own stream, while the block before runs."""

    def made(net: nn.Module, b: ioc.Compiler) -> nn.Module:
        assert isinstance(net, GPT)
        for place, block in enumerate(net.blocks):
            net.blocks[place] = torch.compile(block, backend=b)
        return sharded(net, list(net.blocks), device)

    as_eager(TRAINING, device, made)


def _rewritten(records: list[Compilation]) -> set[str]:
    return {found.pattern for record in records for found in record.rewrites}


class Head(nn.Module):
    """``head(x, targets)``: a layer, a norm, and the loss of a vocabulary whose logits are more
    than one chunk.
    """

    VOCABULARY, TOKENS, WIDTH = 16500, 520, 16

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm = nn.Linear(self.WIDTH, self.WIDTH), nn.LayerNorm(self.WIDTH)
        self.head = nn.Linear(self.WIDTH, self.VOCABULARY, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.norm(self.layer(x))), targets)

    @classmethod
    def batch(cls, draw: torch.Generator) -> Batch:
        targets = torch.randint(cls.VOCABULARY, (cls.TOKENS,), generator=draw)
        return torch.randn(cls.TOKENS, cls.WIDTH, generator=draw), targets


def linear_cross_entropy_under_ddp(device: torch.device) -> None:
    records = as_eager(Task(Head, Head.batch, _loss), device, around_compiled)
    assert "linear_cross_entropy" in _rewritten(records)


def linear_cross_entropy_sharded(device: torch.device) -> None:
    wrap = lambda m: sharded(m, [m.head], device)
    as_eager(Task(Head, Head.batch, _loss), device, lambda m, b: torch.compile(wrap(m), backend=b))


# --- with dropout


def dropout_trains_as_eager(device: torch.device) -> None:
    """Nobody draws a mask twice: means and spreads over several are compared. The mean of compiled
    gradients is as near to eager's as eager's own of other masks; so is their spread.
    """
    eager, others = (
        _drawn_gradients(DistributedDataParallel(gpt(0.3).to(device)), device, first)
        for first in (0, dist.get_world_size() * DRAWS)
    )
    ours = _drawn_gradients(around_compiled(gpt(0.3).to(device), backend([], device)), device, 0)
    error, usual = (relative_error(g.mean(0), eager.mean(0)) for g in (ours, others))
    assert error <= GRADIENT_FACTOR * usual + SLACK, f"{error} from eager, eager {usual}"
    spread = (ours.var(0).sum() / eager.var(0).sum()).item()
    assert 1 / FORWARD_FACTOR <= spread <= FORWARD_FACTOR, f"{spread} of eager's variance"


def dropout_is_repeated_by_its_seeds(device: torch.device) -> None:
    """DDP's gradients are the mean of what the ranks find alone under the same seeds."""
    records: list[Compilation] = []
    alone = torch.compile(gpt(0.3).to(device), backend=backend(records, device))
    mean = _drawn_gradients(alone, device, 0)
    dist.all_reduce(mean)
    together = around_compiled(gpt(0.3).to(device), backend(records, device))
    found = _drawn_gradients(together, device, 0)
    assert relative_error(found, mean / dist.get_world_size()) <= SLACK
    other = _drawn_gradients(together, device, dist.get_world_size() * DRAWS)
    assert relative_error(other, found) > SLACK


def dropout_differs_between_ranks(device: torch.device) -> None:
    """By their seeds, as eager's does: equal ones give equal masks."""
    run = torch.compile(lambda x: F.dropout(x, 0.5), backend=backend([], device))

    def drawn(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        mask = run(torch.ones(64, 64, device=device))
        masks = [torch.empty_like(mask) for _ in range(dist.get_world_size())]
        dist.all_gather(masks, mask)
        return masks

    first, second = drawn(5)
    assert torch.equal(first, second)
    first, second = drawn(5 + dist.get_rank())
    assert not torch.equal(first, second)
    assert torch.equal(torch.stack(drawn(5 + dist.get_rank())), torch.stack([first, second]))


def _drawn_gradients(net: nn.Module, device: torch.device, first_seed: int) -> Tensor:
    """Of all parameters, a row a draw; seeds differ from rank to rank."""
    batch = moved(_tokens(torch.Generator().manual_seed(dist.get_rank())), device, torch.float32)
    rows = []
    for draw in range(DRAWS):
        net.zero_grad()
        torch.manual_seed(first_seed + dist.get_rank() + dist.get_world_size() * draw)
        _loss(net, batch).backward()
        rows.append(torch.cat([g.flatten() for g in gradients(net).values()]))
    return torch.stack(rows)


# --- where a rank's device or stream is not the current one


def gpt_on_every_device_while_another_is_current(device: torch.device) -> None:
    """In one process: kernels, tables and entries of the cache are each device's own."""
    for place, current in _devices(device):
        for again in (False, True) if place.type == "cuda" else (False,):
            torch._dynamo.reset()
            with torch.cuda.device(current) if current else nullcontext():
                records = as_eager(TRAINING, place, _compiled, eager=_plain)
            if again:
                assert [record.cache for record in records] == ["found"]


def gpt_on_a_stream_of_its_own(device: torch.device) -> None:
    on_gpu = device.type == "cuda"
    with torch.cuda.stream(torch.cuda.Stream(device)) if on_gpu else nullcontext():
        as_eager(TRAINING, device, _compiled, eager=_plain)


def _compiled(net: nn.Module, b: ioc.Compiler) -> nn.Module:
    compiled: nn.Module = torch.compile(net, backend=b)
    return compiled


def _plain(net: nn.Module) -> nn.Module:
    return net


def _devices(device: torch.device) -> list[tuple[torch.device, torch.device | None]]:
    """Each with another one; None for the only one."""
    if device.type == "cpu":
        return [(device, None)]
    count = torch.cuda.device_count()
    on = [torch.device(device.type, index) for index in range(count)]
    return [(each, on[(index + 1) % count]) for index, each in enumerate(on)]
