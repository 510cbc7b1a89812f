"""What the text of a graph tells apart, what it does not, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from iocompiler.errors import NotCacheable
from iocompiler.graph.fingerprint import fingerprint
from iocompiler.graph.settings import settings
from tests.compiling import grad


def text(f: Callable[..., Any], *inputs: Any, dynamic: bool | None = None) -> str:
    """The text of the one graph Dynamo makes of ``f``; what refuses it is raised."""
    found: list[str | NotCacheable] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        try:
            found.append(fingerprint(gm, example_inputs))
        except NotCacheable as error:
            found.append(error)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(f, backend=backend, dynamic=dynamic)(*inputs)
    (one,) = found
    if isinstance(one, NotCacheable):
        raise one
    return one


def base(x: Tensor, w: Tensor) -> Tensor:
    return F.softmax(x @ w, dim=-1) * 2


X, W = torch.randn(4, 6), torch.randn(6, 5)


def test_names_and_values_do_not_matter() -> None:
    def other(left: Tensor, right: Tensor) -> Tensor:
        # another comment, other names
        product = left @ right
        probabilities = F.softmax(product, dim=-1)
        return probabilities * 2

    assert text(other, torch.zeros(4, 6), torch.ones(6, 5)) == text(base, X, W)


@pytest.mark.parametrize(
    "other",
    [
        lambda x, w: F.softmax(x @ w, dim=-1) * 3,
        lambda x, w: F.softmax(x @ w, dim=-1) * 2.0,
        lambda x, w: F.softmax(x @ w, dim=-2) * 2,
        lambda x, w: F.softmax(x @ w, -1) * 2,
        lambda x, w: F.log_softmax(x @ w, dim=-1) * 2,
        lambda x, w: F.softmax(x @ w, dim=-1, dtype=torch.float64) * 2,
        lambda x, w: ((y := F.softmax(x @ w, dim=-1)) * 2, y),
        lambda x, w: F.softmax((x @ w)[1:], dim=-1) * 2,
        lambda x, w: F.softmax((x @ w)[:, 1:3], dim=-1) * 2,
    ],
)
def test_every_argument_matters(other: Callable[..., Any]) -> None:
    assert text(other, X, W) != text(base, X, W)


def test_every_fact_of_an_input_matters() -> None:
    shared = torch.randn(60)
    variants = {
        "plain": (X, W),
        "shape": (torch.randn(3, 6), W),
        "strides": (torch.randn(6, 4).t(), W),
        "offset": (torch.randn(25)[1:].view(4, 6), W),
        "dtype": (X.double(), W.double()),
        "gradient": (grad(4, 6), W),
        "history": (grad(4, 6) * 1, W),
        "parameter": (torch.nn.Parameter(X), W),
        "one storage": (shared[:24].view(4, 6), shared[24:54].view(6, 5)),
    }
    texts = {name: text(base, *inputs) for name, inputs in variants.items()}
    assert len(set(texts.values())) == len(texts)


def test_inputs_that_are_one() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    assert text(f, X, X) != text(f, X, X.clone())


def test_sizes_that_vary() -> None:
    first = text(base, torch.randn(7, 6), W, dynamic=True)
    assert text(base, torch.randn(9, 6), W, dynamic=True) == first
    assert "s0" in first
    assert text(base, torch.randn(7, 6), W) != first


def test_what_dynamo_guards_matters() -> None:
    def even(x: Tensor) -> Tensor:
        return x.sin() if x.shape[0] % 2 == 0 else x.sin() + 0

    def plain(x: Tensor) -> Tensor:
        return x.sin()

    assert text(even, torch.randn(6), dynamic=True) != text(plain, torch.randn(6), dynamic=True)


class Doubling(torch.nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("factor", torch.full((3,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_constants_matter() -> None:
    x = torch.randn(3)

    def by(value: float) -> str:
        gm = torch.fx.symbolic_trace(Doubling(value))
        (placeholder,) = gm.graph.find_nodes(op="placeholder")
        placeholder.meta["example_value"] = FakeTensorMode().from_tensor(x)
        return fingerprint(gm, [x])

    first, again, other = by(2.0), by(2.0), by(3.0)
    assert first == again
    assert first != other


class Wrapped(Tensor):
    pass


@torch._dynamo.allow_in_graph
def foreign(x: Tensor) -> Tensor:
    return x + 1


@torch.library.custom_op("fingerprint::tripled", mutates_args=())
def tripled(x: Tensor) -> Tensor:
    return x * 3


@tripled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize(
    ("f", "x", "message"),
    [
        (lambda x: checkpoint(torch.sin, x, use_reentrant=False), grad(3), "higher-order"),
        (lambda x: foreign(x) * 2, X, "foreign, which is not torch's own"),
        (lambda x: torch.ops.fingerprint.tripled(x), X, "tripled, which is not torch's own"),
        (lambda x: x * 2, X.as_subclass(Wrapped), "a Wrapped"),
        (lambda x: x * 2, torch.randn(3, dtype=torch.complex64).conj(), "a plain dense tensor"),
    ],
)
def test_what_is_refused(f: Callable[..., Any], x: Tensor, message: str) -> None:
    with pytest.raises(NotCacheable, match=message):
        text(f, x)


def test_sizes_that_depend_on_data_are_refused() -> None:
    with (
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
        pytest.raises(NotCacheable, match="depends on data"),
    ):
        text(lambda x: x.nonzero() + 1, X)


def test_settings_tell_modes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [settings()]
    assert settings() == seen[0]
    contexts = [
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autocast("cpu", dtype=torch.float16),
        torch._functorch.config.patch(activation_memory_budget=0.5),
        torch.backends.cudnn.flags(enabled=False),
    ]
    for context in contexts:
        with context:
            seen.append(settings())
    torch.use_deterministic_algorithms(True)
    seen.append(settings())
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float64)
    seen.append(settings())
    torch.set_default_dtype(torch.float32)
    assert settings() == seen[0]
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    seen.append(settings())
    torch.backends.cuda.matmul.fp32_precision = "none"
    assert len({str(each) for each in seen}) == len(seen)
