"""What else Dynamo can hand over: transforms, higher-order operators, subclasses, threads.

Parts of these run on aten, with a warning; the results are eager's.
"""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.errors import FallbackWarning


@pytest.fixture(autouse=True)
def _told() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        yield


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, backend=Compiler(engine="reference", cache=False))


def _cond(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))


def _loop(x: Tensor) -> Tensor:
    result: Tensor = while_loop(
        lambda i, x: i < 3, lambda i, x: (i + 1, x * 2), (torch.tensor(0), x)
    )[1]
    return result


def _scan(x: Tensor) -> tuple[Tensor, Tensor]:
    return scan(lambda c, v: (c + v, c * v), torch.zeros(5), x, dim=0)


def _flex(x: Tensor) -> Tensor:
    q = x[:, None, :, None].expand(4, 1, 5, 16).contiguous()
    return flex_attention(q, q, q, score_mod=lambda s, b, h, i, j: s + (i - j))


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x * 2


def _out(x: Tensor) -> tuple[Tensor, Tensor]:
    o = torch.empty(4, 5)
    torch.add(x, 1, out=o)
    return o, o * 2


def _random(x: Tensor) -> tuple[Tensor, ...]:
    drawn = torch.rand_like(x), torch.randn(3), torch.bernoulli(x.sigmoid())
    return *drawn, torch.randperm(5), torch.randint(0, 9, (4,))


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "cond": _cond,
    "while_loop": _loop,
    "scan": _scan,
    "flex_attention": _flex,
    "grad": torch.func.grad(lambda y: (y**2).sum()),
    "vmap": torch.func.vmap(lambda row: row.softmax(0)),
    "jvp": lambda x: torch.func.jvp(lambda y: y.softmax(0), (x,), (x,)),
    "inference_mode": _inference,
    "out=": _out,
    "float8": lambda x: (x.to(torch.float8_e4m3fn).float() * 2, x.to(torch.float8_e5m2).float()),
    "sparse": lambda x: torch.sparse.mm(x.relu().to_sparse(), x.t()) + 1,
}


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile:UserWarning")
@pytest.mark.filterwarnings("ignore:.*Sparse.*:UserWarning")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_what_eager_gives(name: str) -> None:
    function, x = FUNCTIONS[name], torch.randn(4, 5)
    result, expected = compiled(lambda x: function(x))(x), function(x)
    torch.testing.assert_close(result, expected)
    for tensor in result if isinstance(result, tuple) else (result,):
        assert type(tensor) is Tensor


def test_transforms_of_a_compiled_function() -> None:
    x = torch.randn(4, 5)

    def f(x: Tensor) -> Tensor:
        return (x.sin() * 2).sum(-1)

    run = compiled(f)
    torch.testing.assert_close(torch.func.vmap(run)(x), torch.func.vmap(f)(x))
    torch.testing.assert_close(torch.func.grad(run)(x[0]), torch.func.grad(f)(x[0]))
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        torch.testing.assert_close(transform(run)(x), transform(f)(x))
    per_row = torch.func.vmap(torch.func.grad(run))(x)
    torch.testing.assert_close(per_row, torch.func.vmap(torch.func.grad(f))(x))


def test_parameters_given_to_a_compiled_module() -> None:
    linear = torch.nn.Linear(5, 3)
    run = compiled(lambda w, b, x: torch.func.functional_call(linear, {"weight": w, "bias": b}, x))
    ours, theirs = (
        [torch.ones(3, 5, requires_grad=True), torch.ones(3, requires_grad=True)] for _ in range(2)
    )
    x = torch.randn(4, 5)
    result, expected = run(*ours, x), F.linear(x, *theirs)
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    expected.sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.filterwarnings("ignore:.*Sparse.*:UserWarning")
def test_sparse_inputs() -> None:
    dense, x = torch.randn(4, 5).relu(), torch.randn(5, 3)
    for sparse in (dense.to_sparse(), dense.to_sparse_csr()):
        torch.testing.assert_close(compiled(lambda s, x: s @ x + 1)(sparse, x), dense @ x + 1)


def test_sparse_gradients() -> None:
    ours, theirs = (torch.ones(5, 3, requires_grad=True) for _ in range(2))
    index = torch.tensor([1, 2, 1])
    f = lambda w: F.embedding(index, w, sparse=True).sum(1).square()
    compiled(f)(ours).sum().backward()
    f(theirs).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert ours.grad.is_sparse == theirs.grad.is_sparse
    torch.testing.assert_close(ours.grad.to_dense(), theirs.grad.to_dense())


def test_nested_tensors() -> None:
    parts = [torch.randn(2, 3), torch.randn(4, 3)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    result = compiled(lambda n: (n * 2).sin())(nested)
    torch.testing.assert_close(result.values(), (nested * 2).sin().values())


class Image(torch.Tensor):
    """A class that only overrides functions of torch, as those of torchvision do."""


@pytest.mark.parametrize("engine", ["aten", "reference"])
def test_classes_that_override_functions(engine: str) -> None:
    ours, theirs = (torch.ones(4, 4).as_subclass(Image).requires_grad_() for _ in range(2))
    run = torch.compile(lambda x: (x @ x).sin(), backend=Compiler(engine=engine, strict=True))
    for _ in range(2):
        result, expected = run(ours), (theirs @ theirs).sin()
        assert type(result) is type(expected) is Image
        torch.testing.assert_close(result, expected)
        result.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


def _in_place(x: Tensor) -> Tensor:
    return x.add_(1) * 2


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_memory_that_does_not_hold_the_values(engine: str) -> None:
    """Generated code would read the negatives of an imaginary part; there is no pointer at all to
    what MKL-DNN laid out, or to zeros that stand for none.
    """
    backend = Compiler(engine=engine, cache=False)
    for make, function in (
        (lambda: torch.arange(4).to(torch.complex64).mul(1j).conj().imag, _in_place),
        (lambda: torch.ones(4, 4).to_mkldnn(), lambda x: x.to_dense() * 2),
        (lambda: torch._efficientzerotensor((4,)), lambda x: x + 1),
    ):
        ours, theirs = make(), make()
        with pytest.warns(FallbackWarning, match="an input is"):
            result = torch.compile(function, backend=backend)(ours)
        torch.testing.assert_close(result, function(theirs))
        torch.testing.assert_close(ours.to_dense(), theirs.to_dense())


def test_a_step_under_compiled_autograd() -> None:
    records: list[Compilation] = []
    linear = torch.nn.Linear(4, 3)
    backend = Compiler(engine="reference", strict=True, cache=False, on_compiled=records.append)

    def step(x: Tensor) -> Tensor:
        loss = linear(x).sin().sum()
        loss.backward()
        return loss

    for x in torch.randn(3, 5, 4):
        linear.zero_grad()
        step(x)
        expected = linear.weight.grad
        linear.zero_grad()
        with torch._dynamo.config.patch(compiled_autograd=True):
            torch.compile(step, backend=backend)(x)
        torch.testing.assert_close(linear.weight.grad, expected)
    assert [list(record.plans) for record in records] == [["forward"], ["inference"]]


def test_a_second_derivative_is_refused_clearly() -> None:
    x = torch.randn(4, requires_grad=True)
    (slope,) = torch.autograd.grad(compiled(lambda x: (x**3).sum())(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        slope.sum().backward()


def test_checkpoint_with_reentrant_autograd() -> None:
    linear = torch.nn.Linear(5, 5)

    def f(x: Tensor) -> Tensor:
        return checkpoint(lambda y: linear(y).sin(), x, use_reentrant=True).sum()

    ours, theirs = (torch.ones(4, 5, requires_grad=True) for _ in range(2))
    compiled(f)(ours).backward()
    f(theirs).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_hooks() -> None:
    def f(x: Tensor) -> Tensor:
        y = x.sin()
        y.register_hook(lambda grad: grad * 2)
        return y.sum()

    ours, theirs = (torch.ones(3, requires_grad=True) for _ in range(2))
    compiled(f)(ours).backward()
    f(theirs).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    module = torch.nn.Linear(3, 3)
    module.register_forward_hook(lambda module, given, out: out * 3)
    torch.testing.assert_close(compiled(module)(torch.ones(2, 3)), module(torch.ones(2, 3)))


def test_inputs_that_share_memory() -> None:
    def f(a: Tensor, b: Tensor) -> Tensor:
        a.add_(1)
        return b * 2 + a.sum()

    for places in ((slice(4), slice(2, 6)), (slice(4), slice(4)), (slice(3), slice(3, 6))):
        torch._dynamo.reset()  # torch's guards take one overlap for the other, in any backend
        run = compiled(f)
        ours, theirs = torch.arange(6.0), torch.arange(6.0)
        expected = f(theirs[places[0]], theirs[places[1]])
        torch.testing.assert_close(run(ours[places[0]], ours[places[1]]), expected)
        torch.testing.assert_close(ours, theirs)


def test_random_numbers_repeat_under_a_seed() -> None:
    run, x = compiled(_random), torch.randn(4, 5)
    torch.manual_seed(1)
    first = run(x)
    torch.manual_seed(1)
    assert all(map(torch.equal, first, run(x)))
    assert not torch.equal(first[0], run(x)[0])


def test_fifty_shapes_are_two_graphs() -> None:
    records: list[Compilation] = []
    backend = Compiler(engine="reference", cache=False, on_compiled=records.append)
    linear, draw = torch.nn.Linear(8, 8), random.Random(0)

    def f(x: Tensor) -> Tensor:
        return linear(x).softmax(-1).sum(1)

    run = torch.compile(f, backend=backend)
    for _ in range(50):
        x = torch.randn(draw.randint(2, 40), draw.randint(2, 50), 8)
        torch.testing.assert_close(run(x), f(x))
    assert len(records) <= 2


PROGRAMS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(0) * 2,
    "norm": lambda x: F.layer_norm(x, (6,)) + x.sum(0),
    "attention": lambda x: ((x @ x.mT) / 2).softmax(-1) @ x,
    "loss": lambda x: F.cross_entropy(x, torch.zeros(x.shape[0], dtype=torch.int64)),
    "cat": lambda x: torch.cat([x, x * 2]).cumsum(0),
    "pairs": lambda x: x[:, None] * x[None],
    "flip": lambda x: x[torch.arange(x.shape[0]).flip(0)] * x.shape[0],
    "views": lambda x: x.view(-1, 2, 3).transpose(0, 1).reshape(2, -1) + 1,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_dynamic_sizes_of_zero_and_one(name: str) -> None:
    records: list[Compilation] = []
    backend = Compiler(engine="reference", strict=True, cache=False, on_compiled=records.append)
    run = torch.compile(PROGRAMS[name], backend=backend, dynamic=True)
    for size in (5, 1, 0, 7, 0):
        ours = torch.randn(size, 6, requires_grad=True)
        theirs = ours.detach().clone().requires_grad_()
        result, expected = run(ours), PROGRAMS[name](theirs)
        torch.testing.assert_close(result, expected, equal_nan=True)
        result.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True)
    assert len(records) <= 3


def test_calls_from_several_threads() -> None:
    run, wrong = compiled(lambda x: (x.sin() * 2).sum(0)), list[Exception]()

    def call(rows: int) -> None:
        try:
            x = torch.randn(rows, 4)
            torch.testing.assert_close(run(x), (x.sin() * 2).sum(0))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=call, args=(3 + i % 2,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
