"""The reference executor: poison, sizes, devices, views on storages with an offset."""

from __future__ import annotations

import pytest
import torch

from iocompiler.plan.data import AtenStep, ConstantStep, Ref, TensorSpec, ViewStep
from iocompiler.runtime.reference import operator_named, run_plan
from iocompiler.runtime.values import fresh, laid_out
from iocompiler.tile.index import Affine, Axis
from iocompiler.tile.program import Buffer, Builder
from tests.runtime.plans import S0, binary, kernel, plan, spec


def test_steps_in_order() -> None:
    graph = plan(
        {"s0": None, "x": spec(S0, 3)},
        [
            kernel("mul", binary("mul", 3 * S0), ("x", "x", "square"), spec(S0, 3)),
            ViewStep("t", "square", spec(3, S0, stride=(1, 3))),
            AtenStep("aten.mm.default", (Ref("t"), Ref("x")), (), (("p", spec(3, 3)),), False),
            ConstantStep("c", spec(2, 2), (1.0, 2.0, 3.0, 4.0)),
        ],
        (Ref("p"), Ref("t"), Ref("c"), None, S0 + 1),
    )
    x = torch.randn(5, 3)
    p, t, c, none, size = run_plan(graph, [5, x])
    torch.testing.assert_close(p, (x * x).T @ x)
    assert t.stride() == (1, 3)
    assert c.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert (none, size) == (None, 6)


def test_what_a_kernel_forgets_is_poison() -> None:
    builder, x = Builder(), Affine.of("x")
    builder.store("out", x * 2, builder.load("a", x, torch.float32))
    buffers = (Buffer("a", torch.float32, "in", 3), Buffer("out", torch.float32, "out", 6))
    program = builder.program((Axis("x", 3),), (), buffers)
    graph = plan({"x": spec(3)}, [kernel("half", program, ("x", "out"), spec(6))], (Ref("out"),))
    out = run_plan(graph, [torch.ones(3)])[0]
    assert out[::2].tolist() == [1.0, 1.0, 1.0]
    assert out[1::2].isnan().all()


@pytest.mark.parametrize(
    ("dtype", "poison"),
    [(torch.int32, -(2**31)), (torch.uint8, 0), (torch.bool, True), (torch.int64, -(2**63))],
)
def test_poison_of_integers(dtype: torch.dtype, poison: int) -> None:
    made = fresh(spec(2, S0, dtype=dtype), {"s0": 3}, torch.device("cpu"))
    assert made.shape == (2, 3)
    assert (made == poison).all()


def test_empty_and_scalar_tensors_are_made() -> None:
    assert fresh(spec(0, 3), {}, torch.device("cpu")).shape == (0, 3)
    assert fresh(spec(), {}, torch.device("cpu")).isnan()


def test_views_count_from_their_base() -> None:
    base = torch.arange(20.0)[4:]
    view = ViewStep("v", "x", spec(2, 3, stride=(6, 2)), 1)
    graph = plan(
        {"x": spec(16)},
        [
            view,
            ViewStep("w", "v", spec(2), 2),
            kernel("add", binary("add", 2), ("w", "w", "a"), spec(2)),
        ],
        (Ref("v"), Ref("a")),
    )
    v, a = run_plan(graph, [base])
    assert v.tolist() == [[5.0, 7.0, 9.0], [11.0, 13.0, 15.0]]
    assert a.tolist() == [14.0, 16.0]


def test_cuda_arguments_run_on_the_cpu() -> None:
    made = AtenStep(
        "aten.full.default",
        ([2], 3.0),
        (("device", torch.device("cuda", 1)), ("dtype", torch.float32)),
        (("f", TensorSpec((2,), (1,), torch.float32, "cuda:1")),),
        False,
    )
    assert run_plan(plan({}, [made], (Ref("f"),)), [])[0].device.type == "cpu"


def test_sizes_reach_operators() -> None:
    step = AtenStep(
        "aten.full.default", ([S0, 2 * S0], S0 / 2), (), (("f", spec(S0, 2 * S0)),), False
    )
    assert run_plan(plan({"s0": None}, [step], (Ref("f"),)), [3])[0].tolist() == [[1.5] * 6] * 3


def test_the_wrong_number_of_arguments() -> None:
    with pytest.raises(ValueError, match="takes 1 arguments, got 2"):
        run_plan(plan({"x": spec(2)}, [], ()), [torch.ones(2), torch.ones(2)])


def test_names_nothing_defines() -> None:
    graph = plan({}, [AtenStep("aten.relu.default", (Ref("y"),), (), (("z", spec(2)),), False)], ())
    with pytest.raises(KeyError, match="y"):
        run_plan(graph, [])


def test_operators_that_do_not_exist() -> None:
    assert operator_named("aten.mm.default") is torch.ops.aten.mm.default
    with pytest.raises(AttributeError, match="no_such"):
        operator_named("aten.no_such.default")


def test_strides_are_repaired_only_where_they_differ() -> None:
    x = torch.randn(3, 4)
    assert laid_out(x, (3, 4), (4, 1)) is x
    moved = laid_out(x, (3, 4), (1, 3))
    assert moved.stride() == (1, 3)
    torch.testing.assert_close(moved, x)
    one = torch.randn(1, 4)
    assert laid_out(one, (1, 4), (77, 1)) is one
    none = torch.empty(0, 4)
    assert laid_out(none, (0, 4), (1, 1)) is none


@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8)])
def test_results_may_be_written_into(shape: tuple[int, ...]) -> None:
    """As those of emitted modules: what autograd does not follow is no view made without it."""

    def function(x, w):
        h = x @ w
        return torch.zeros_like(h).view(shape), h.sin()

    x, w = torch.randn(2, 3, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    compiled = torch.compile(function, backend="iocompiler", options={"engine": "reference"})
    zeros, _ = compiled(x, w)
    zeros.add_(x.sum())
    assert zeros.requires_grad
