"""Dropout from seeds: what is rewritten, what is not, that forward and backward agree, that seeds
repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from iocompiler.graph.capture import capture
from iocompiler.graph.findings import Miss, Rewrite, findings
from iocompiler.ops import target
from iocompiler.ops.decompositions import table
from iocompiler.ops.partition import partition, saved
from iocompiler.ops.random import SEEDS, UNIFORM
from iocompiler.passes.dropout import dropout
from iocompiler.tile import philox

Captured = Callable[..., GraphModule]


def rewritten(gm: GraphModule) -> tuple[GraphModule, int]:
    with target.planned_for((9, 0)):
        sites = dropout(gm)
    gm.graph.lint()
    gm.recompile()
    return gm, sites


class Parts:
    """A backend of the pass, our decompositions and our partition; keeps the two graphs."""

    def __init__(self) -> None:
        self.forward: GraphModule | None = None
        self.backward: GraphModule | None = None

    def __call__(self, gm: GraphModule, inputs: list[Any]) -> Any:
        def cut(joint: GraphModule, given: Any, **keywords: Any) -> tuple[GraphModule, GraphModule]:
            self.forward, self.backward = partition(joint, given, **keywords)
            return self.forward, self.backward

        compiler = lambda flat, _: make_boxed_func(flat.forward)
        graph, _ = rewritten(capture(gm, inputs))
        return aot_autograd(
            fw_compiler=compiler, bw_compiler=compiler, inference_compiler=compiler,
            decompositions=table(), partition_fn=cut,
        )(graph, inputs)  # fmt: skip


def test_sites_share_one_draw_of_seeds(captured: Captured) -> None:
    def f(x):
        return F.dropout(F.relu(F.dropout(x, 0.25)), 0.5)

    gm, sites = rewritten(captured(f, torch.randn(5, 7)))
    assert sites == 2
    (seeds,) = [node for node in gm.graph.nodes if node.target is SEEDS]
    assert seeds.args == (2, torch.device("cpu"))
    assert [node.args[1] for node in gm.graph.nodes if node.target is UNIFORM] == [0, 1]
    assert [each.variant for each in findings(gm) if isinstance(each, Rewrite)] == [
        "p=0.25",
        "p=0.5",
    ]
    assert all(each.where.startswith("test_dropout.py:") for each in findings(gm))


def test_values_are_those_of_the_formula(captured: Captured) -> None:
    x = torch.randn(33, 7)
    gm, _ = rewritten(captured(lambda x: F.dropout(x, 0.3), x))
    torch.manual_seed(4)
    (out,) = gm(x)
    torch.manual_seed(4)
    (seed,) = torch.ops.iocompiler.seeds(1, torch.device("cpu"))
    keep = philox.uniform(seed, torch.arange(33 * 7)).reshape(33, 7) >= 0.3
    torch.testing.assert_close(out, x * keep / 0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_those_of_the_formula_for_selu(captured: Captured, dtype: torch.dtype) -> None:
    p, alpha = 0.3, -F.selu(torch.tensor(-100.0, dtype=torch.float64)).item()
    x = torch.randn(33, 7, dtype=dtype)
    gm, sites = rewritten(captured(lambda x: F.alpha_dropout(x, p, training=True), x))
    assert sites == 1
    torch.manual_seed(4)
    (out,) = gm(x)
    torch.manual_seed(4)
    (seed,) = torch.ops.iocompiler.seeds(1, torch.device("cpu"))
    keep = philox.uniform(seed, torch.arange(33 * 7)).reshape(33, 7) >= p
    scale = ((1 - p) * (1 + p * alpha**2)) ** -0.5
    expected = scale * torch.where(keep, x.double(), -alpha) + scale * p * alpha
    torch.testing.assert_close(out, expected.to(dtype))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mean_and_variance_for_selu_stay(p: float) -> None:
    f = torch.compile(lambda x: F.alpha_dropout(x, p, training=True), backend=Parts())
    out = f(torch.randn(400, 500))
    assert abs(out.mean().item()) < 0.02
    assert abs(out.std().item() - 1) < 0.02


def _of_a_temporary(x):
    return F.dropout(x.sin(), 0.5, inplace=True)


def _of_part_of_one(x):
    h = x.sin()
    F.dropout(h[:, 1:], 0.5, inplace=True)
    return h


@pytest.mark.parametrize("f", [_of_a_temporary, _of_part_of_one])
def test_in_place(f: Callable[..., Any]) -> None:
    parts = Parts()
    x = torch.randn(40, 31, requires_grad=True)
    out = torch.compile(f, backend=parts, dynamic=False)(x)
    (found,) = torch.autograd.grad(out.sum(), x)
    kept = out.detach() != 0
    assert 0.3 < kept[:, 1:].double().mean() < 0.7
    factor = torch.where(kept, 2.0, 0.0)
    if f is _of_part_of_one:
        factor[:, 0] = 1.0
    torch.testing.assert_close(out, x.sin() * factor)
    torch.testing.assert_close(found, x.cos() * factor)
    assert parts.forward is not None
    assert parts.backward is not None
    assert [each.bytes for each in saved(parts.forward, parts.backward)] == [8]  # the seed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_layout_are_kept(captured: Captured, dtype: torch.dtype) -> None:
    x = torch.randn(6, 4, dtype=dtype).t()
    gm, _ = rewritten(captured(lambda x: F.dropout(x, 0.5), x))
    (out,) = gm(x)
    assert out.dtype == dtype
    assert out.stride() == F.dropout(x, 0.5).stride()


@pytest.mark.parametrize(
    "declined",
    [
        lambda x: F.dropout(x, 0.0),
        lambda x: F.dropout(x, 1.0),
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: F.alpha_dropout(x, 0.5, training=False),
        lambda x: F.dropout(x * 1, 1.0, inplace=True),
        lambda x: F.dropout2d(x, 0.5),
        lambda x: F.feature_alpha_dropout(x, 0.5, training=True),
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
        lambda x: torch.bernoulli(x.sigmoid()) * x,
        lambda x: torch.rand_like(x) * x,
    ],
)
def test_declined(captured: Captured, declined: Callable[..., Any]) -> None:
    gm, sites = rewritten(captured(declined, torch.randn(2, 3, 4, 4)))
    assert sites == 0
    assert not any(node.target in (SEEDS, UNIFORM) for node in gm.graph.nodes)


def test_a_dropout_of_another_kind_is_a_miss(captured: Captured) -> None:
    gm, _ = rewritten(captured(lambda x: F.dropout2d(x, 0.5), torch.randn(2, 3, 4, 4)))
    (miss,) = findings(gm)
    assert isinstance(miss, Miss)
    assert miss.pattern == "dropout"


def test_a_rate_that_sixteen_bits_would_miss_is_a_miss(captured: Captured) -> None:
    gm, sites = rewritten(captured(lambda x: F.dropout(x, 0.95), torch.randn(2, 3)))
    assert sites == 0
    (miss,) = findings(gm)
    assert isinstance(miss, Miss)
    assert "0.9" in miss.reason


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3, 0.85, 0.9])
def test_the_mean_of_the_result_is_that_of_the_input(p: float) -> None:
    """To 1e-4: over all random numbers there are, not over a draw of them."""
    numbers = (torch.arange(2**16, dtype=torch.float64) + 0.5) * 2.0**-16
    assert abs((numbers >= p).double().mean() / (1 - p) - 1) < 1e-4


def test_only_gpu_tensors_by_default(captured: Captured) -> None:
    assert dropout(captured(lambda x: F.dropout(x, 0.5), torch.randn(3))) == 0


def test_gpu_tensors() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode():
        x = torch.empty(4, 5, device="cuda")
        gm = make_fx(lambda x: F.dropout(x, 0.5), pre_dispatch=True)(x)
    assert dropout(gm) == 1
    assert [n.args for n in gm.graph.nodes if n.target is SEEDS] == [(1, torch.device("cuda:0"))]


def test_native_dropout_gives_result_and_mask(captured: Captured) -> None:
    def f(x):
        return torch.native_dropout(x, 0.5, True)

    x = torch.ones(40, 50)
    gm, sites = rewritten(captured(f, x))
    out, mask = gm(x)
    assert sites == 1
    assert mask.dtype == torch.bool
    assert torch.equal(out, mask * 2.0)


def test_seed_repeats_and_calls_differ() -> None:
    f = torch.compile(lambda x: F.dropout(x, 0.5), backend=Parts())
    x = torch.ones(64, 64)
    torch.manual_seed(1)
    first, second = f(x), f(x)
    torch.manual_seed(1)
    assert torch.equal(f(x), first)
    assert not torch.equal(second, first)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate(p: float) -> None:
    out = torch.compile(lambda x: F.dropout(x, p), backend=Parts())(torch.ones(300, 301))
    kept = (out != 0).double().mean().item()
    assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / out.numel()) ** 0.5
    assert torch.allclose(out[out != 0], torch.tensor(1 / (1 - p)))


def test_two_dropouts_of_one_call_are_independent() -> None:
    def f(x):
        return F.dropout(x, 0.5), F.dropout(x, 0.5)

    a, b = torch.compile(f, backend=Parts())(torch.ones(200, 200))
    both = ((a != 0) & (b != 0)).double().mean().item()
    assert abs(both - 0.25) < 0.02


@pytest.mark.parametrize("dynamic", [False, True])
def test_backward_drops_what_the_forward_dropped_and_stores_no_mask(dynamic: bool) -> None:
    def f(x, w):
        return F.dropout(F.gelu(x @ w), 0.4)

    parts = Parts()
    compiled = torch.compile(f, backend=parts, dynamic=dynamic)
    x = torch.randn(9, 16)
    w = torch.randn(16, 31, requires_grad=True)
    out = compiled(x, w)
    (found,) = torch.autograd.grad(out.sum(), w)
    kept = out.detach() != 0
    (wanted,) = torch.autograd.grad((F.gelu(x @ w) * kept / 0.6).sum(), w)
    torch.testing.assert_close(found, wanted)
    assert parts.forward is not None
    assert parts.backward is not None
    kinds = [each.dtype for each in saved(parts.forward, parts.backward)]
    assert torch.bool not in kinds
    assert any(node.target is UNIFORM for node in parts.backward.graph.nodes)
    assert not any(node.target is SEEDS for node in parts.backward.graph.nodes)


def test_infinite_and_empty_inputs_as_in_eager() -> None:
    f = torch.compile(lambda x: F.dropout(x, 0.5), backend=Parts(), dynamic=False)
    out = f(torch.full((40,), float("inf")))
    assert (out.isnan() | out.isinf()).all()
    assert out.isnan().any()
    assert out.isinf().any()
    assert f(torch.empty(0, 3)).shape == (0, 3)
