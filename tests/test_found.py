"""Programs that were wrong once, found by `tests/fuzz`; smallest first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler.backend import Compiler
from tests.compiling import check, compiled
from tests.runtime.text_engine import TextEngine

ALIASES: dict[str, Callable[[Tensor], Tensor]] = {
    "atleast_3d": torch.atleast_3d,
    "einsum that transposes": lambda x: torch.einsum("ij->ji", x),
    "type_as": lambda x: x.type_as(x),
    "conj_physical": torch.conj_physical,
    "sum_to_size": lambda x: x.sum_to_size(3, 4),
    "dropout in eval mode": lambda x: F.dropout(x, 0.5, training=False),
}


@pytest.mark.parametrize("name", ALIASES)
def test_writing_through_an_alias_that_no_schema_tells(name: str) -> None:
    def f(x: Tensor) -> Tensor:
        return ALIASES[name](x).fill_(2) + 1

    check(f, torch.randn(3, 4), engine="reference")


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_of_what_was_written_in_place(name: str) -> None:
    def f(x: Tensor) -> Tensor:
        written = (x + 1).exp_()
        alias = ALIASES[name](written)
        alias.add_(1)
        return torch.cat([alias.flatten(), written.flatten()])

    check(f, torch.randn(3, 4), engine="reference")


def test_what_a_call_shows_of_a_temporary_is_not_written_over() -> None:
    def f(x: Tensor) -> Tensor:
        copy = x.clone()
        shown = copy.unfold(1, 2, 1)  # a view, by a call
        return torch.cat([torch.special.erfc(copy.cumsum(0)).flatten(), shown.flatten()])

    def g(x: Tensor) -> tuple[Tensor, Tensor]:
        copy = x.clone()
        return torch.special.erfc(copy.cumsum(0)), copy.unfold(1, 2, 1)

    check(f, torch.randn(1, 2), engine="reference")
    x = torch.randn(1, 2)
    run, _ = compiled(g, engine="reference")
    torch.testing.assert_close(run(x), g(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_floor_division_where_the_quotient_rounds_up(dtype: torch.dtype) -> None:
    a = torch.tensor([1.5, 0.5, 2.5, -1.5, 0.9, -0.9, 0.0, 7.0, 3.0, -3.0, 4.0]).to(dtype)
    b = torch.tensor([0.3, 0.1, 0.1, 0.3, 0.1, 0.3, 0.3, -2.0, 0.0, 0.0, float("inf")]).to(dtype)
    check(lambda a, b: a // b, a, b, engine="reference")
    check(lambda a: torch.div(a, 0.3, rounding_mode="floor"), a, engine="reference")


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "//": lambda x: x // -2,
    "<": lambda x: x < -1,
    "== ": lambda x: x == -1,
    "< 300": lambda x: x < 300,
    "%": lambda x: x % -3,
    "where": lambda x: torch.where(x > 3, x, -1),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_beyond_a_byte(name: str) -> None:
    check(NUMBERS[name], torch.tensor([3, 200, 255, 0], dtype=torch.uint8), engine="reference")


@pytest.mark.parametrize("through_a_view", [False, True])
def test_an_input_overwritten_by_what_has_a_gradient(through_a_view: bool) -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        return (x.transpose(0, -1) if through_a_view else x).mul_(y)

    check(f, torch.randn(2, 3), torch.tensor(3.0, requires_grad=True), engine="reference")


def test_folds_of_symmetric_products_with_symbolic_sizes() -> None:
    for fold in (lambda x: x.amax(0, keepdim=True), lambda x: torch.linalg.vector_norm(x, dim=0)):
        f = lambda x, fold=fold: fold(torch.outer(x.flatten(), x.flatten()))
        check(f, torch.randn(5), engine="reference", dynamic=True)


def test_in_place_operators_with_symbolic_sizes() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        z = x / 2
        z.lerp_(y, 0.5)
        z.addcmul_(y, y)
        return z

    check(f, torch.randn(3, 5, 5), torch.randn(()), engine="reference", dynamic=True)


def test_a_loss_of_a_single_number() -> None:
    f = lambda x, y: F.cross_entropy(x.reshape(y.numel(), -1), y.flatten())
    check(f, torch.randn(()), torch.tensor(0), engine="reference")


def test_nan_has_a_gradient() -> None:
    x = torch.tensor([float("nan"), 1.0, 3.0])
    y = torch.tensor([0.5, 0.5, 0.5], requires_grad=True)
    run = torch.compile(
        lambda x, y: F.smooth_l1_loss(x, y, reduction="none"), backend="iocompiler",
        options={"engine": "reference"},
    )  # fmt: skip
    run(x, y).sum().backward()
    assert y.grad is not None
    assert y.grad[0].isnan()


def test_equal_elements_do_not_deviate() -> None:
    f = lambda x: x / (1e-3 + x.std(0, keepdim=True, correction=0)) + x.var(0)
    for rows in (3, 33, 1000):
        x = torch.tensor([0.1, 1.7, -2.3, 1e4]).expand(rows, 4)
        check(f, x.contiguous(), engine="reference")


def test_an_attention_whose_output_is_written_into() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        z = (x @ x.mT).softmax(-1) @ x
        z[0].add_(y)
        return z

    (record,) = check(f, torch.randn(4, 4, requires_grad=True), torch.randn(()), engine="reference")
    assert record.rewrites == []
    (miss,) = record.misses
    assert "writes into the output" in miss.reason


def test_a_symbolic_size_that_is_one_is_broadcast() -> None:
    f = lambda x: F.avg_pool1d(x[None], 2) / (x.abs() + 0.5)
    for size in (2, 3):
        check(f, torch.randn(size), engine="reference", dynamic=True)


@pytest.mark.parametrize("promoted", [False, True])
def test_a_maximum_is_found_again_in_the_backward(promoted: bool) -> None:
    """Rounded where it is stored or promoted, in the forward as in the backward."""

    def f(x: Tensor, y: Tensor) -> Tensor:
        z = F.silu(x)
        most = torch.maximum(z, y) if promoted else F.hardsigmoid(z)
        return most.amax(2, keepdim=True) + z[:, :, :1] * 0

    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randint(-5, 6, (3, 3, 3)).half().requires_grad_()
        check(f, x, torch.randint(-2, 3, (1,)).float(), engine="reference")


def test_a_constant_alone() -> None:
    def f(x: Tensor) -> Tensor:
        v = torch.tensor([1.0, 2.0, 0.5], device=x.device)
        w = v.abs() ** -0.5
        w.exp_()
        return w

    check(f, torch.randn(3), engine="reference")


def test_neighbours_of_a_flattened_transposed_matrix() -> None:
    check(lambda x: x.flatten().diff(dim=0), torch.randn(2, 2).t(), engine="reference")


def test_a_flipped_axis_splits_where_its_sign_cannot_be_proved() -> None:
    f = lambda x: x.chunk(2, 2)[1].clamp(-1, 1).prod() * 2
    for shape in ((1, 5, 6), (1, 3, 5)):
        check(f, torch.rand(*shape).requires_grad_(), engine="reference", dynamic=True)


def test_negative_indices_are_filled() -> None:
    for value in (2.0, torch.tensor(2.0)):
        f = lambda x, i, value=value: x.index_fill(0, i, value) * 2
        check(f, torch.randn(5, 3, requires_grad=True), torch.tensor([-1, 2]), engine="reference")


def test_a_floor_of_zero_has_the_sign_of_the_quotient() -> None:
    a = torch.tensor([-0.5, 0.5, 0.0, -0.0, -2.5, 3.0])
    for b in (-3.0, 3.0, float("inf"), -float("inf")):
        for divisor in (b, torch.tensor(b)):
            f = lambda a, divisor=divisor: (a // divisor).signbit()
            check(f, a, engine="reference")


@pytest.mark.parametrize("width", [0, 1])
def test_an_attention_over_next_to_nothing(width: int) -> None:
    def f(x: Tensor) -> Tensor:
        y = x[:, 1:][None]
        return F.scaled_dot_product_attention(y, y, y)

    (record,) = check(f, torch.randn(3, 1 + width, requires_grad=True), engine="reference")
    assert record.rewrites == []


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer": lambda x: F.layer_norm(x, x.shape[-1:]),
    "layer, two dims": lambda x: F.layer_norm(x, x.shape[-2:]),
    "group": lambda x: F.group_norm(x, 1),
    "instance": lambda x: F.instance_norm(x),
    "batch": lambda x: F.batch_norm(x.transpose(0, 1), None, None, training=True),
    "var_mean": lambda x: (x - torch.var_mean(x, -1, keepdim=True)[1]) * 300,
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_equal_elements_are_zero(name: str) -> None:
    for size in (7, 33, 1000):
        x = torch.tensor([0.1, 1.7, -2.3, 1e4]).view(4, 1, 1).expand(4, 2, size)
        run, _ = compiled(NORMS[name], engine="reference")
        assert bool((run(x.contiguous()) == 0).all()), size


def _imaginary(x: Tensor) -> tuple[Tensor, ...]:
    """Of a lazy conjugate: a view whose memory holds the negatives of its values."""
    z = torch.view_as_complex(x)
    return z.conj().imag + 1, z.conj().imag * z.real


def test_the_imaginary_part_of_a_lazy_conjugate() -> None:
    ours, theirs = (torch.arange(12.0).view(3, 2, 2).requires_grad_() for _ in range(2))
    run = torch.compile(_imaginary, backend=Compiler(engine=TextEngine(), strict=True))
    results, expected = run(ours), _imaginary(theirs)
    torch.testing.assert_close(results, expected)
    sum(results).sum().backward()
    sum(expected).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(("size", "pads"), [(1, (-1, 4)), (2, (-2, 1)), (3, (1, -3)), (1, (3, -1))])
@pytest.mark.parametrize("engine", ["reference", TextEngine()], ids=["reference", "text"])
def test_a_pad_of_which_nothing_is_left(size: int, pads: tuple[int, int], engine: object) -> None:
    def f(x: Tensor) -> Tensor:
        return F.pad(x, pads, value=0.5) * 2

    check(f, torch.randn(size, requires_grad=True), engine=engine)
    check(f, torch.randn(2, size), engine=engine)


@pytest.mark.parametrize("engine", ["reference", TextEngine()], ids=["reference", "text"])
def test_an_element_outside_of_what_was_written_over(engine: object) -> None:
    def f(x: Tensor) -> Tensor:
        return F.pad(x[None], (1, 0), mode="circular").split(3, -1)[1] * 2

    check(f, torch.randn(1, 3, requires_grad=True), engine=engine)


@pytest.mark.parametrize("engine", ["reference", TextEngine()], ids=["reference", "text"])
def test_what_is_written_over_all_of_another_dtype(engine: object) -> None:
    def f(base: Tensor, source: Tensor) -> Tensor:
        return torch.slice_scatter(base, source, 0, 0, 3) / 2

    check(f, torch.tensor([True, False, True]), torch.tensor([0.0, 0.3, -2.0]), engine=engine)
    check(f, torch.tensor([1, 2, 3]), torch.tensor([0.7, 1.9, -2.5]), engine=engine)


def test_the_logsumexp_of_one_number_beside_an_attention() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.logsumexp(((x @ x.mT).softmax(-1) @ x).sum(), 0, keepdim=True)

    check(f, torch.randn(2, 2, requires_grad=True))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*degrees of freedom.*:UserWarning")
@pytest.mark.parametrize("correction", [0, 1])
def test_one_product_has_no_variance_that_a_multiply_add_leaves(correction: int) -> None:
    """Of one degree of freedom less there is none: 0 / 0, which was infinite."""

    def f(x: Tensor) -> Tensor:
        return (x**2).var(0, correction=correction)

    x = torch.randn(1, 64, device="cuda")
    run, _ = compiled(f, engine="auto")
    assert torch.equal(run(x).nan_to_num(), x[0] * 0)
    assert bool(run(x).isnan().all()) == bool(correction)
