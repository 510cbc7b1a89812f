"""Attention on a CPU that Inductor compiles for: what is taken, what is left to Inductor, and that
what is taken is an operator Inductor knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from iocompiler.backend import Compiler
from iocompiler.ops import target
from iocompiler.ops.attention import BACKWARD, FORWARD
from iocompiler.ops.attention_inductor import decompositions
from tests.passes.attention_cases import Compiled, heads

aten = torch.ops.aten


def plain(q, k, v):
    return (q @ k.mT * 0.3).softmax(-1) @ v


def biased(q, k, v, table):
    return (q @ k.mT + 2.0 * table).softmax(-1) @ v


def capped(q, k, v):
    return torch.tanh(q @ k.mT).softmax(-1) @ v


def dropped(q, k, v):
    return F.dropout((q @ k.mT).softmax(-1), 0.5) @ v


def _compiled(function: Callable[..., Any], inputs: dict[str, Any]) -> Compiled:
    compiled = Compiled(function)
    with target.inductor():
        compiled(**inputs)
    return compiled


def _wide() -> dict[str, Any]:
    return {**heads(), "v": torch.randn(2, 4, 7, 16)}


def _halves(**sizes: int) -> dict[str, Any]:
    return {n: x.detach().bfloat16().requires_grad_() for n, x in heads(**sizes).items()}


def _table(learned: bool) -> dict[str, Any]:
    return {**heads(), "table": torch.randn(7, 7, requires_grad=learned)}


@pytest.mark.parametrize(
    ("function", "inputs", "variant"),
    [
        (plain, heads(), "full"),
        (plain, _halves(rows=2, columns=512), "full"),
        (biased, _table(learned=False), "bias"),
    ],
    ids=["float32", "16 bits, long", "a bias without a gradient"],
)
def test_taken(function: Callable[..., Any], inputs: dict[str, Any], variant: str) -> None:
    assert _compiled(function, inputs).variants == [variant]


@pytest.mark.parametrize(
    ("function", "inputs", "reason"),
    [
        (dropped, heads(), "drops out"),
        (capped, heads(), "block by block"),
        (biased, _table(learned=True), "no gradient of a bias"),
        (plain, _wide(), "differ in width"),
        (plain, _halves(), "16-bit backward is slow below 512 keys"),
    ],
    ids=["dropout", "a score program", "a learned bias", "widths", "16 bits, short"],
)
def test_left_to_inductor(
    function: Callable[..., Any], inputs: dict[str, Any], reason: str
) -> None:
    compiled = _compiled(function, inputs)
    assert compiled.variants == []
    (miss,) = compiled.misses
    assert reason in miss
    elsewhere = Compiled(function)
    elsewhere(**inputs)
    assert len(elsewhere.variants) == 1


def test_short_in_16_bits_is_taken_where_nothing_is_differentiated() -> None:
    inputs = {name: x.detach() for name, x in _halves().items()}
    assert _compiled(plain, inputs).variants == ["full"]
    with torch.no_grad():
        assert _compiled(plain, _halves()).variants == ["full"]


def _graph(*kernels: str, keys: int = 7) -> GraphModule:
    def function(q, k):
        setting = (None, 0.3, False, 0.0)
        return [FORWARD(q, k, k, *setting, kernel, "hhhh")[0] for kernel in kernels]

    with FakeTensorMode():
        return make_fx(function)(torch.empty(2, 4, 7, 8), torch.empty(2, 4, keys, 8))


@pytest.mark.parametrize(
    ("graph", "taken"),
    [
        (_graph("cpu", "cpu"), True),
        (_graph("cpu", "blockwise"), False),
        (_graph("cpu", keys=0), False),
        (_graph(), False),
    ],
    ids=["the library's", "another one too", "no keys", "none"],
)
def test_all_attentions_of_a_graph_are_decomposed_or_none(graph: GraphModule, taken: bool) -> None:
    """Inductor refuses a graph that calls what its table decomposes."""
    assert decompositions(graph).keys() == ({FORWARD, BACKWARD} if taken else set())


def test_inductor_gets_the_library_operator() -> None:
    """Values as in eager; a row of NaN stays one. (tests/models/test_cpu.py trains.)"""

    def function(q, k, v, keep):
        return (q @ k.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ v

    inputs = {name: x.detach() for name, x in heads().items()}
    inputs["keep"] = torch.ones(7, 7, dtype=torch.bool).tril(2)
    inputs["q"][1, 2, 3, 0] = float("nan")
    run = torch.compile(function, backend=Compiler(strict=True))
    with (  # a graph from a cache would not say its code
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        out, (code,) = run_and_get_code(run, **inputs)
    torch.testing.assert_close(out, function(**inputs), equal_nan=True)
    assert out.isnan().any()
    assert "_scaled_dot_product_flash_attention_for_cpu" in code
    assert "torch.ops.iocompiler" not in code
