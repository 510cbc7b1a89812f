"""What two ranks check: training under DDP and FSDP2, and functional collectives in a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import iocompiler as ioc
from iocompiler.compilation import Compilation
from iocompiler.plan.data import AtenStep, KernelStep, Plan

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


def model() -> nn.Sequential:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(WIDTH, 8))


def backend(records: list[Compilation]) -> ioc.Compiler:
    return ioc.Compiler(engine="reference", strict=True, on_compiled=records.append)


def ddp_around_compiled() -> None:
    _as_eager(lambda b: DistributedDataParallel(torch.compile(model(), backend=b)))


def compiled_around_ddp_in_buckets() -> None:
    """Dynamo's optimizer for DDP cuts the graph into buckets, each compiled for itself."""
    before = dist._DEFAULT_FIRST_BUCKET_BYTES
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1024
    try:
        wrap = lambda m: DistributedDataParallel(m, bucket_cap_mb=0.004)
        records = _as_eager(lambda b: torch.compile(wrap(model()), backend=b))
    finally:
        dist._DEFAULT_FIRST_BUCKET_BYTES = before
    assert len(records) > 2, len(records)


def compiled_around_ddp_whole() -> None:
    with torch._dynamo.config.patch(optimize_ddp=False):
        _as_eager(lambda b: torch.compile(DistributedDataParallel(model()), backend=b))


def sharded_blocks_compiled() -> None:
    def made(b: ioc.Compiler) -> nn.Module:
        net = model()
        for place in (0, 1):
            net[place] = torch.compile(net[place], backend=b)
        return _sharded(net)

    _as_eager(made)


def compiled_around_sharded() -> None:
    _as_eager(lambda b: torch.compile(_sharded(model()), backend=b))


def _sharded(net: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in list(net)[:2]:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def _as_eager(make: Callable[[ioc.Compiler], nn.Module]) -> list[Compilation]:
    """Three steps of training give the gradients of eager DDP, on every rank."""
    records: list[Compilation] = []
    expected = _gradients(DistributedDataParallel(model()))
    found = _gradients(make(backend(records)))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], msg=lambda m, n=name: f"{n}: {m}")
    assert records
    assert all("backward" in record.plans for record in records)
    return records


def _gradients(net: nn.Module) -> list[dict[str, Tensor]]:
    torch.manual_seed(1 + dist.get_rank())  # every rank has a batch of its own
    found = []
    for _ in range(3):
        net.zero_grad()
        net(torch.randn(2, 5, WIDTH)).square().mean().backward()
        named = {n: p.grad for n, p in net.named_parameters()}
        found.append({_plain(name): _whole(g).clone() for name, g in named.items()})
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 0.1 * parameter.grad
    return found


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "").replace("module.", "")


def _whole(gradient: Any) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


# --- functional collectives


def reductions(x: Tensor, w: Tensor) -> Tensor:
    first = collectives.all_reduce((x * 2).exp() + w, "sum", dist.group.WORLD)
    second = collectives.all_reduce(x.sin() * w, "max", dist.group.WORLD)
    return (first * 3).softmax(-1) + second.tanh()


def gathered(x: Tensor, w: Tensor) -> Tensor:
    whole = collectives.all_gather_tensor((x * w).exp(), 0, dist.group.WORLD)
    part = collectives.reduce_scatter_tensor(whole.sin() + 1, "sum", 0, dist.group.WORLD)
    return part.softmax(-1) + whole.sum(0)


def independent(x: Tensor, w: Tensor) -> Tensor:
    """Collectives that do not read one another."""
    a = (x * 2).exp()
    r1 = collectives.all_reduce(a, "sum", dist.group.WORLD)
    r2 = collectives.all_reduce(w.sum(0), "sum", dist.group.WORLD)
    r3 = collectives.all_gather_tensor(w[:1], 0, dist.group.WORLD)
    return (a + r1).softmax(-1) + r2 * r3.sum(0)


def in_place(x: Tensor, w: Tensor) -> Tensor:
    """What a collective has read is overwritten after it."""
    whole = collectives.wait_tensor(collectives.all_gather_tensor(x, 0, dist.group.WORLD))
    w.copy_(x * 5)
    x.add_(1)
    return whole.softmax(-1)


def plain_c10d(x: Tensor, w: Tensor) -> Tensor:
    y = (x * 2).exp()
    dist.all_reduce(y)
    return (y * w).softmax(-1)


GRAPHS = (reductions, gathered, independent, in_place, plain_c10d)


def collectives_in_a_graph() -> None:
    for function in GRAPHS:
        torch._dynamo.reset()
        records: list[Compilation] = []
        run = torch.compile(function, backend=backend(records), fullgraph=True)
        torch.manual_seed(1 + dist.get_rank())
        ours = [torch.randn(4, 6) for _ in range(2)]
        theirs = [t.clone() for t in ours]
        torch.testing.assert_close(run(*ours), function(*theirs), msg=function.__name__)
        torch.testing.assert_close(ours, theirs, msg=function.__name__)
        (record,) = records
        _in_order(record, function.__name__)


def _in_order(record: Compilation, name: str) -> None:
    """Collectives stand in the plan as often, and in the order, as in the graph; kernels around."""
    plan = record.plans["inference"]
    targets = [str(n.target) for n in record.flat["inference"].graph.nodes]
    assert _collectives(plan) == [t for t in targets if _is_collective(t)], name
    assert any(isinstance(step, KernelStep) for step in plan.steps), name


def _is_collective(target: str) -> bool:
    return target.startswith("_c10d_functional.") and "wait" not in target


def _collectives(plan: Plan) -> list[str]:
    called = [step.target for step in plan.steps if isinstance(step, AtenStep)]
    return [target for target in called if _is_collective(target)]


def gradients_through_collectives() -> None:
    from torch.distributed.nn.functional import all_reduce

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return (all_reduce((x * w).exp()) * 2).softmax(-1).square().sum()

    records: list[Compilation] = []
    torch.manual_seed(1 + dist.get_rank())
    x, w = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    expected = torch.autograd.grad(loss(x, w), (x, w))
    found = torch.autograd.grad(torch.compile(loss, backend=backend(records))(x, w), (x, w))
    torch.testing.assert_close(found, expected)


CASES: dict[str, Callable[[], None]] = {
    case.__name__: case
    for case in (
        ddp_around_compiled, compiled_around_ddp_in_buckets, compiled_around_ddp_whole,
        sharded_blocks_compiled, compiled_around_sharded, collectives_in_a_graph,
        gradients_through_collectives,
    )
}  # fmt: skip
