"""Every decomposition against float64: at most twice eager's own error (gradients: three times)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from iocompiler.ops.decompositions import table
from tests.accuracy import FORWARD_FACTOR, GRADIENT_FACTOR, SLACK, relative_error
from tests.ops.cases import CASES
from tests.ops.decomposing import in_dtype, outcome

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(CASES))
def test_as_accurate_as_eager(name: str, dtype: torch.dtype) -> None:
    function, make = CASES[name]
    inputs = make()
    reference = outcome(function, in_dtype(inputs, dtype, wide=True), decomposed=False)
    eager = outcome(function, in_dtype(inputs, dtype), decomposed=False)
    ours = outcome(function, in_dtype(inputs, dtype), decomposed=True)
    rounding = torch.finfo(dtype).eps / 2
    for kind, factor in (("values", FORWARD_FACTOR), ("gradients", GRADIENT_FACTOR)):
        triples = zip(*(getattr(o, kind) for o in (ours, eager, reference)), strict=True)
        for place, (mine, theirs, ref) in enumerate(triples):
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
            floor = 1e-4 * ref.numel() ** 0.5
            allowed = factor * max(relative_error(theirs, ref, floor), rounding) + SLACK
            assert relative_error(mine, ref, floor) <= allowed, f"{kind} {place}"


SPECIAL = [
    "gelu", "gelu tanh", "silu", "mish", "hardswish", "elu", "softplus", "logsigmoid", "relu6",
    "clamp", "clamp tensor", "masked_fill", "tril", "lerp", "logaddexp", "var", "std",
    "logsumexp", "norm 2", "norm inf", "amax", "softmax", "log_softmax", "layer_norm", "rms_norm",
    "batch_norm", "cross_entropy", "cross_entropy smooth", "mse", "smooth_l1", "kl_div log",
    "gather", "scatter value", "scatter_add", "roll", "nan_to_num", "square", "cumsum",
]  # fmt: skip


@pytest.mark.parametrize("name", SPECIAL)
def test_nan_and_infinity_as_in_eager(name: str) -> None:
    function, make = CASES[name]
    inputs = make()
    with torch.no_grad():
        flat = inputs[0].view(-1)
        flat[0], flat[3], flat[-1] = float("nan"), float("inf"), -float("inf")
    eager = outcome(function, in_dtype(inputs, torch.float32), decomposed=False)
    ours = outcome(function, in_dtype(inputs, torch.float32), decomposed=True)
    for mine, theirs in zip(ours.values, eager.values, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True, rtol=1e-4, atol=1e-5)


EMPTY = [
    (lambda x: F.gelu(x) + F.silu(x), (0, 3)),
    (lambda x: x.softmax(-1), (0, 3)),
    (lambda x: x.softmax(-1), (3, 0)),
    (lambda x: x.log_softmax(0), (3, 0)),
    (lambda x: F.layer_norm(x, (3,)), (0, 3)),
    (lambda x: F.group_norm(x, 2), (0, 4, 3)),
    (lambda x: x.var(0), (0, 3)),
    (lambda x: x.var(-1), (0, 3)),
    (lambda x: x.std(-1), (3, 1)),
    (lambda x: (x * x).var(0), (1, 3)),
    (lambda x: torch.cat(torch.var_mean(x / 0, 0, correction=0)), (1, 3)),
    (lambda x: torch.std(x, 0, correction=0), (1, 3)),
    (lambda x: F.cross_entropy(x, torch.zeros(0, dtype=torch.int64)), (0, 3)),
    (lambda x: F.mse_loss(x, x + 1), (0,)),
    (lambda x: x.roll(1, 0), (0, 3)),
    (lambda x: x.roll(2), (0,)),
    (lambda x: x.split(2, 0), (0, 3)),
    (lambda x: x.split(0, 0), (0, 3)),
    (lambda x: x.unbind(0), (0, 3)),
    (lambda x: torch.linalg.vector_norm(x), (0, 3)),
    (lambda x: x.sum() + x.mean(), (0,)),
    (lambda x: torch.cat([x, x]), (0, 3)),
]


@pytest.mark.parametrize("place", range(len(EMPTY)))
@pytest.mark.filterwarnings("ignore:.*degrees of freedom.*:UserWarning")
def test_empty_tensors_as_in_eager(place: int) -> None:
    function, shape = EMPTY[place]
    inputs = [torch.randn(shape, requires_grad=True)]
    eager, ours = (outcome(function, inputs, decomposed=flag) for flag in (False, True))
    for kind in ("values", "gradients"):
        for mine, theirs in zip(getattr(ours, kind), getattr(eager, kind), strict=True):
            torch.testing.assert_close(mine, theirs, equal_nan=True)


@pytest.mark.parametrize(
    "name",
    [
        "layer_norm",
        "layer_norm 2d",
        "group_norm",
        "rms_norm",
        "gelu",
        "var_mean",
        "roll",
        "softmax",
        "log_softmax",
        "clamp",
        "mish",
        "glu",
        "cumsum",
        "tril",
        "scatter src",
        "flip",
        "cast",
        "norm 2",
        "mse none",
    ],
)
def test_layouts_as_in_eager(name: str) -> None:
    function, make = CASES[name]
    inputs = make()
    inputs[0] = inputs[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    eager, ours = (outcome(function, inputs, decomposed=flag) for flag in (False, True))
    for mine, theirs in zip(ours.values, eager.values, strict=True):
        assert mine.stride() == theirs.stride()


@pytest.mark.parametrize("shape", [(2, 6, 5, 3), (2, 6, 4, 3, 2)], ids=["2d", "3d"])
def test_group_norm_keeps_channels_last(shape: tuple[int, ...]) -> None:
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = torch.randn(shape).to(memory_format=last).requires_grad_()
    eager, ours = (
        outcome(lambda x: F.group_norm(x, 3), [x], decomposed=flag) for flag in (False, True)
    )
    for kind in ("values", "gradients"):
        for mine, theirs in zip(getattr(ours, kind), getattr(eager, kind), strict=True):
            assert mine.stride() == theirs.stride() == x.stride()
            torch.testing.assert_close(mine, theirs)


def test_every_label_ignored_gives_nan_as_in_eager() -> None:
    def f(x):
        return F.cross_entropy(x, torch.full((4,), -100))

    x = torch.randn(4, 5, requires_grad=True)
    ours = outcome(f, [x], decomposed=True)
    assert ours.values[0].isnan()
    torch.testing.assert_close(
        ours.gradients, outcome(f, [x], decomposed=False).gradients, equal_nan=True
    )


def test_integer_and_bool_values_stay_exact() -> None:
    def f(x, i):
        moved = x.scatter(1, i, 2**53 + 1).roll(1, 0)
        return moved.scatter_add(1, i, torch.ones_like(i)), (x > 0).roll(1), x.bool().tril()

    inputs = [torch.arange(12).reshape(3, 4) + 2**53, torch.tensor([[0], [3], [1]])]
    eager, ours = (outcome(f, inputs, decomposed=flag) for flag in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(ours.values, eager.values, strict=True))


def test_running_statistics_are_updated() -> None:
    def f(x):
        norm = torch.nn.BatchNorm2d(6)
        return norm(x), norm.running_mean, norm.running_var

    x = torch.randn(4, 6, 3, 2)
    eager, ours = (outcome(f, [x], decomposed=flag) for flag in (False, True))
    for mine, theirs in zip(ours.values, eager.values, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["scatter many", "scatter narrow", "scatter from larger"])
def test_a_scatter_of_several_elements_a_line_stays(name: str) -> None:
    function, make = CASES[name]
    left = outcome(function, make(), decomposed=True).left
    assert any("scatter" in str(op) for op in left)


@pytest.mark.parametrize("name", ["scatter value", "scatter src", "gather", "cross_entropy"])
def test_one_element_a_line_needs_no_scatter(name: str) -> None:
    function, make = CASES[name]
    left = outcome(function, make(), decomposed=True).left
    assert not any("scatter" in str(op) or "index_put" in str(op) for op in left)


def test_a_move_between_devices_is_no_cast() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode():
        x = torch.empty(4, device="cuda")
        gm = make_fx(lambda x: x.to("cpu", torch.bfloat16), decomposition_table=table())(x)
    targets = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.aten._to_copy.default]


COPIES = {
    "another dtype": (lambda x: x.new_empty(5, 7, dtype=torch.float64), True),
    "broadcast": (lambda x: x.new_empty(2, 5, 7), True),
    "strides": (lambda x: x.new_empty(7, 5).t(), False),
    "of a larger": (lambda x: x.new_empty(5, 9)[:, 1:8], False),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_lies_as_in_eager_in_memory_of_its_own(name: str) -> None:
    make, plain = COPIES[name]
    x = torch.randn(5, 7)
    eager, ours = (
        outcome(lambda x: torch.ops.aten.copy.default(make(x), x), [x], decomposed=flag)
        for flag in (False, True)
    )
    (mine,), (theirs,) = ours.values, eager.values
    assert torch.equal(mine, theirs)
    assert mine.stride() == theirs.stride()
    assert mine.data_ptr() != x.data_ptr()
    assert (torch.ops.aten.copy.default in ours.left) is not plain


def test_the_gradient_of_a_norm_over_one_number_is_zero() -> None:
    """Whatever a multiply-add leaves of ``x - mean``: as if x had been rounded for the mean."""
    rule = table()[torch.ops.aten.native_layer_norm_backward.default]
    x, grad = torch.randn(2, 5, 1)
    x[3], grad[4] = float("inf"), float("nan")
    mean, rstd, weight = x * (1 + 1e-7), torch.full_like(x, 316.0), torch.tensor([1.5])
    given = (grad, x, [1], mean, rstd, weight, None, [True, True, False])
    dx, dweight, _ = rule(*given)
    finite = torch.tensor([True, True, True, False, False])
    assert torch.equal(dx[finite], torch.zeros(3, 1))
    assert dx[~finite].isnan().all()
    assert dweight.isnan().all()
    dweight = rule(grad[:3], x[:3], [1], mean[:3], rstd[:3], weight, None, [False, True, False])[1]
    assert torch.equal(dweight, torch.zeros(1))
