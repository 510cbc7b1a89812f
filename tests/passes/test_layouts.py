"""Orders of storage chosen for a graph: results, gradients, strides."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import iocompiler as ioc
from iocompiler.compilation import Compilation
from iocompiler.graph.findings import Rewrite
from iocompiler.ops import target
from iocompiler.ops.decomposed import norms
from iocompiler.passes.layouts.rules import RULES
from tests.compiling import compiler
from tests.passes.layout_cases import (
    BF16,
    Bottleneck,
    Chain,
    Classifier,
    Plain,
    Several,
    Shared,
    Squeezed,
    Tokens,
    UNet,
    Volume,
    check,
    launches_for_free,
    reasons,
    variants,
)

aten = torch.ops.aten
TAKEN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual block": (Bottleneck, (2, 32, 6, 5)),
    "skip": (UNet, (2, 16, 8, 6)),
    "classifier": (Classifier, (3, 8, 16, 16)),
    "tokens": (Tokens, (2, 16, 5, 4)),
    "squeezed": (Squeezed, (2, 16, 5, 4)),
    "shared weight": (Shared, (2, 16, 5, 4)),
    "several results": (Several, (2, 16, 5, 4)),
    "volumes": (Volume, (2, 8, 4, 3, 5)),
    "one place": (lambda: Chain(16, 32, 16, kernel=1), (2, 16, 6, 6)),
}


@pytest.fixture
def gpu() -> Iterator[None]:
    with launches_for_free():
        yield


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str, train: bool) -> None:
    make, shape = TAKEN[name]
    records = check(make, *shape, train=train)
    assert variants(records)
    assert not reasons(records) or name == "squeezed"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", ["residual block", "skip"])
def test_float32_in_tf32(name: str) -> None:
    make, shape = TAKEN[name]
    assert variants(check(make, *shape, dtype=torch.float32))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", ["residual block", "tokens", "squeezed"])
def test_any_batch_and_size(name: str) -> None:
    make, shape = TAKEN[name]
    records: list[Compilation] = []
    torch.manual_seed(0)
    module = make().to(BF16).eval()
    run = compiler(records, dynamic=True)(module)
    batch, channels, *places = shape
    for more in (0, 2, 6):
        x = torch.randn(batch + more, channels, *(p + more for p in places)).to(BF16)
        with torch.no_grad():
            found, expected = run(x), module(x)
        assert found.stride() == expected.stride()
        torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)
    assert len(records) == 1, "a guard on a size"
    assert variants(records)


# what stays


def made_last(module: nn.Module) -> nn.Module:
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


DECLINED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype, set[str]]] = {
    "depthwise": (
        lambda: Chain(16, 16, 16, groups=16),
        (2, 16, 5, 4),
        BF16,
        {"convolutions in groups have kernels of their own"},
    ),
    "odd channels": (
        lambda: Chain(12, 12, 12),
        (2, 12, 5, 4),
        BF16,
        {"channels are no multiple of 8"},
    ),
    "odd channels in TF32": (
        lambda: Chain(6, 6, 6),
        (2, 6, 5, 4),
        torch.float32,
        {"channels are no multiple of 4"},
    ),
    "double": (
        lambda: Chain(16, 16, 16),
        (2, 16, 5, 4),
        torch.float64,
        {"torch.float64 has no matrix units in convolutions"},
    ),
    "sequences": (
        lambda: Plain(nn.Sequential(nn.Conv1d(16, 16, 3), nn.Conv1d(16, 16, 3))),
        (2, 16, 9),
        BF16,
        set(),
    ),
}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", DECLINED)
def test_declined(name: str) -> None:
    make, shape, dtype, expected = DECLINED[name]
    records = check(make, *shape, dtype=dtype)
    assert not variants(records)
    assert reasons(records) == expected


@pytest.mark.usefixtures("gpu")
def test_one_convolution_alone_is_no_gain() -> None:
    """Its operands and its result would be copied by us instead of by the library."""
    records = check(lambda: Plain(nn.Conv2d(16, 16, 3)), 2, 16, 8, 6, train=False)
    assert not variants(records)
    (reason,) = reasons(records)
    more = re.fullmatch(r"channels last would take (\S+) us more in copies", reason)
    assert more is not None
    assert float(more[1]) < 1e-4


def test_small_ones_do_not_pay_for_the_launches() -> None:
    with target.planned_for((9, 0)):
        records = check(lambda: Chain(16, 16, 16), 2, 16, 5, 4)
    assert not variants(records)
    assert len(reasons(records)) == 1


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("weights", [True, False])
def test_what_is_there_already_is_left(weights: bool) -> None:
    """With channels last from the caller eager hands them on."""
    torch.manual_seed(0)
    module = Bottleneck().to(BF16).eval()
    module = made_last(module) if weights else module
    x = torch.randn(2, 32, 6, 5).to(BF16)
    x = x if weights else x.to(memory_format=torch.channels_last)
    records: list[Compilation] = []
    with torch.no_grad():
        found, expected = compiler(records)(module)(x), module(x)
    assert found.stride() == expected.stride()
    assert found.stride(1) == 1
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)
    assert not variants(records)
    assert not reasons(records)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("tf32", [True, False])
def test_float32_needs_tf32(tf32: bool) -> None:
    records: list[Compilation] = []
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
        compiler(records)(Chain(16, 16, 16, 16))(torch.randn(2, 16, 6, 6))
    assert bool(variants(records)) == tf32
    left = set() if tf32 else {"torch.float32 has no matrix units in convolutions"}
    assert reasons(records) == left


@pytest.mark.usefixtures("gpu")
def test_without_cudnn_nothing_is_known() -> None:
    records: list[Compilation] = []
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=False):
        compiler(records)(Chain(16, 16, 16, 16))(torch.randn(2, 16, 6, 6))
    assert not variants(records)
    assert reasons(records) == {"cuDNN is switched off"}


def test_on_a_cpu_inductor_decides(captured: Callable[..., Any]) -> None:
    from iocompiler.passes.layouts import layouts

    gm = captured(Chain(16, 16, 16).to(BF16), torch.randn(2, 16, 64, 64).to(BF16))
    assert layouts(gm) == 0
    assert not gm.meta.get("iocompiler_findings")


# what is around them


class Written(nn.Module):
    """The caller's image is scaled in place before it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = Chain(16, 16, 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        return self.convs(x)  # type: ignore[no-any-return]


@pytest.mark.usefixtures("gpu")
def test_what_is_written_in_place_is_left() -> None:
    torch.manual_seed(0)
    module, records = Written().to(BF16), list[Compilation]()
    x = torch.randn(2, 16, 6, 6).to(BF16)
    ours, theirs = x.clone(), x.clone()
    with torch.no_grad():
        found, expected = compiler(records)(module)(ours), module(theirs)
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(ours, theirs)
    assert found.stride() == expected.stride()
    assert "what it reads or makes is written in place" in reasons(records)


class Overwritten(nn.Module):
    """A part of what a convolution makes is set."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Chain(16, 16, 16), Chain(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y[:, 0] = 1
        return self.two(y) + y.view(y.shape[0], -1).mean()


class Frozen(nn.Module):
    """The first half learns nothing, the second half does, of one image."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Chain(16, 16, 16), Chain(16, 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            still = self.one(x)
        return self.two(x) + still


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Chain(16, 16, 16, 16), Chain(16, 16, 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.utils.checkpoint.checkpoint(self.one, x, use_reentrant=False)
        return self.two(y)  # type: ignore[no-any-return]


class Pooled(nn.Module):
    """Pools, paddings, an upsampling, a reduction over channels and one over places."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Chain(16, 16, 16), Chain(16, 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(F.avg_pool2d(self.one(x), 2), (1, 0, 1, 0))
        x = F.interpolate(x, scale_factor=2, mode="bilinear")
        x = self.two(x) - x.amax(1, keepdim=True)
        return x + x.mean((0, 2, 3), keepdim=True) + x.sum(3, keepdim=True)


class Groups(nn.Module):
    """Plain convolutions around one in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Chain(16, 16, 16, 16), Chain(16, 16, 16, 16)
        self.middle = Chain(16, 16, groups=16)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.middle(self.one(x)))  # type: ignore[no-any-return]


AROUND = (Overwritten, Frozen, Checkpointed, Pooled, Groups)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("make", AROUND)
def test_around(make: Callable[[], nn.Module]) -> None:
    assert variants(check(make, 2, 16, 6, 6)) or make is Overwritten


class Found(nn.Module):
    """How many places are positive is known when it has run."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = Chain(16, 16, 16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.convs(x)
        return y, y[y > 0] * 2


@pytest.mark.usefixtures("gpu")
def test_sizes_that_a_run_finds() -> None:
    torch.manual_seed(0)
    module, records = Found().to(BF16), list[Compilation]()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        run = compiler(records)(module)
        for _ in range(2):
            x = torch.randn(2, 16, 6, 6).to(BF16)
            for found, expected in zip(run(x), module(x), strict=True):
                torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)
                assert found.stride() == expected.stride()
    assert len(records) == 1
    assert variants(records)


class Normed(nn.Module):
    """Group norms before convolutions of one place, whose weights do not say in what order."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(4))
        self.norms = nn.ModuleList(nn.GroupNorm(4, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
        return x


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("keeps", [True, False])
def test_group_norms_of_all_versions(monkeypatch: pytest.MonkeyPatch, keeps: bool) -> None:
    """On a GPU, before torch 2.15, its result is contiguous: it is copied, in the same kernel."""
    rules = [replace(r, keeps=lambda x: keeps) if r.ops == "group_norm" else r for r in RULES]
    by_name = {name: rule for rule in rules for name in rule.ops.split()}
    monkeypatch.setattr("iocompiler.passes.layouts.rules._BY_NAME", by_name)
    monkeypatch.setattr(norms, "group_norm_keeps_order", lambda x: keeps)
    records = check(Normed, 2, 16, 6, 6)
    assert variants(records)
    (forward,) = {record.flat["forward"] for record in records[:1]}
    convolutions = forward.graph.find_nodes(op="call_function", target=aten.convolution.default)
    assert len(convolutions) == 4
    for node in convolutions:
        assert node.meta["val"].stride(1) == 1
        assert node.args[0].meta["val"].stride(1) == 1


@pytest.mark.usefixtures("gpu")
def test_under_autocast() -> None:
    """Parameters are float32: they are cast and laid out in one kernel."""
    torch.manual_seed(0)
    module, records = UNet(), list[Compilation]()
    x = torch.randn(2, 16, 8, 6, requires_grad=True)
    results = []
    for run in (compiler(records)(module), module):
        with torch.autocast("cpu", BF16):
            out = run(x)
        grads = torch.autograd.grad(out.float().square().sum(), [x, *module.parameters()])
        results.append((out, *grads))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-1)
    assert results[0][0].stride() == results[1][0].stride()
    assert variants(records)


# what comes of it


def calls(record: Compilation, target_: Any) -> int:
    assert record.graph is not None
    return len(record.graph.graph.find_nodes(op="call_function", target=target_))


@pytest.mark.usefixtures("gpu")
def test_a_weight_is_copied_once_for_two_convolutions() -> None:
    (record, *_) = check(Shared, 2, 16, 5, 4, train=False)
    image, weight = 2 * 2 * 2 * 16 * 5 * 4, 2 * 2 * 16 * 16 * 9
    ours, theirs = 2 * image + weight, 2 * (2 * image + weight)
    said = f"3 values, 3 copies of {ours} bytes for {theirs} that the library made"
    assert variants([record]) == [said]
    assert calls(record, torch.ops.iocompiler.laid_out.default) == 3  # image, weight, result


def explained(training: bool, pipeline: ioc.Pipeline) -> ioc.Report:
    x = torch.randn(64, 256, 56, 56, dtype=BF16, device="meta")
    return ioc.explain(
        Bottleneck(256, 64).to(BF16).train(training),
        torch.empty_like(x, device="cpu").requires_grad_(training),
        device="h200",
        training=training,
        pipeline=pipeline,
        compile_kernels=False,
    )


@pytest.mark.parametrize("training", [True, False])
def test_a_residual_block_moves_less(training: bool) -> None:
    plain = explained(training, ioc.DEFAULT.without("layouts"))
    ours = explained(training, ioc.DEFAULT)
    assert ours.bytes_moved < 0.8 * plain.bytes_moved
    assert ours.time_us < 0.9 * plain.time_us
    (found,) = (each for each in ours.rewrites if isinstance(each, Rewrite))
    assert found.pattern == "layout"
    assert found.where.startswith("layout_cases.py:")
    # the image and the weight of the middle convolution, and what comes back of that
    image, weight = 2 * 2 * 64 * 256 * 56 * 56, 2 * 2 * 64 * 64 * 9
    kept = {each.bytes_kept: each.kept for each in ours.copies}
    assert kept == ({image: 1, 2 * weight: 2} if training else {image: 1, weight: 1})


def test_convolutions_read_and_write_as_they_lie() -> None:
    """No library call is left with an operand or a result of channels first."""
    report = explained(True, ioc.DEFAULT)
    convolutions = [k for k in report.kernels if "convolution" in k.name]
    assert len(convolutions) == 6
    assert all(each.bytes == each.bound for each in convolutions)


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", TAKEN)
def test_on_a_gpu(name: str, train: bool) -> None:
    make, (_, channels, *places) = TAKEN[name]
    shape = 8, channels, *(4 * place for place in places)
    with launches_for_free(None):
        records = check(make, *shape, train=train, device="cuda", engine="auto")
    assert variants(records)
