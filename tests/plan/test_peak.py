"""The scheduled peak of plans written by hand: buffers live from their first step to their last."""

from __future__ import annotations

import pytest
import sympy
import torch

from iocompiler.plan.data import AtenStep, Plan, Ref, Step, TensorSpec, ViewStep
from iocompiler.plan.peak import scheduled_peak, storage_bytes

KB = 1024


def spec(kilobytes: int) -> TensorSpec:
    return TensorSpec((256 * kilobytes,), (1,), torch.float32, "cpu")


def call(name: str, kilobytes: int, *read: str, target: str = "aten.sin.default") -> AtenStep:
    return AtenStep(target, tuple(map(Ref, read)), (), ((name, spec(kilobytes)),), False)


def plan(inputs: dict[str, int], steps: list[Step], *outputs: str) -> Plan:
    given = tuple((name, spec(size)) for name, size in inputs.items())
    return Plan(given, tuple(steps), tuple(map(Ref, outputs)), "cpu")


NOTHING = plan({}, [])


def peak(forward: Plan, backward: Plan = NOTHING, **handed_over: int) -> int:
    return scheduled_peak(forward, backward, handed_over, {}) // KB


def test_a_buffer_dies_after_its_last_reader() -> None:
    steps = [call("a", 4, "x"), call("b", 1, "a"), call("c", 3, "b")]
    assert peak(plan({"x": 100}, steps, "c")) == 4 + 1
    steps = [call("a", 4, "x"), call("b", 1, "a"), call("c", 3, "b", "a")]
    assert peak(plan({"x": 100}, steps, "c")) == 4 + 1 + 3


def test_what_nobody_reads_dies_at_once() -> None:
    assert peak(plan({"x": 1}, [call("a", 4, "x"), call("b", 3, "x")], "b")) == 4


def test_a_view_keeps_its_base_and_adds_nothing() -> None:
    steps = [
        call("a", 4, "x"),
        ViewStep("v", "a", spec(4)),
        call("b", 1, "x"),
        call("c", 1, "v", "b"),
    ]
    assert peak(plan({"x": 1}, steps, "c")) == 4 + 1 + 1
    aten = call("v", 4, "a", target="aten.view.default")
    assert peak(plan({"x": 1}, [steps[0], aten, *steps[2:]], "c")) == 4 + 1 + 1


def test_a_view_of_an_input_is_not_counted() -> None:
    assert peak(plan({"x": 9}, [ViewStep("v", "x", spec(9)), call("a", 2, "v")], "v", "a")) == 2


def test_saved_tensors_live_into_the_backward_and_die_there() -> None:
    forward = plan({"x": 9}, [call("a", 4, "x"), call("b", 2, "a")], "b", "a")
    steps = [call("d", 3, "tangents_1", "a"), call("e", 5, "d")]
    backward = plan({"a": 4, "tangents_1": 2}, steps, "e")
    # b, which the caller holds; then a, the tangent and d, or d and e
    assert peak(forward, backward, a=1) == 2 + max(4 + 2 + 3, 3 + 5)


def test_parameters_handed_on_are_not_counted() -> None:
    forward = plan({"w": 50}, [call("a", 4, "w")], "a", "w")
    assert peak(forward, plan({"w": 50}, [call("d", 3, "w")], "d"), w=1) == 4 + 3


def test_two_saved_views_of_one_storage_are_counted_once() -> None:
    views = [ViewStep("u", "a", spec(2)), ViewStep("v", "a", spec(2))]
    forward = plan({"x": 1}, [call("a", 4, "x"), *views, call("b", 1, "a")], "b", "u", "v")
    backward = plan({"u": 2, "v": 2}, [call("d", 1, "u"), call("e", 1, "v", "d")], "e")
    assert peak(forward, backward, u=1, v=2) == 1 + 4 + 1 + 1


def test_what_is_returned_and_saved_is_held_to_the_end() -> None:
    forward = plan({"x": 1}, [call("a", 4, "x")], "a", "a")
    backward = plan({"a": 4}, [call("d", 1, "a"), call("e", 7, "d")], "e")
    assert peak(forward, backward, a=1) == 4 + 1 + 7


def test_gradients_are_held_to_the_end() -> None:
    steps = [call("d", 1, "tangents_1"), call("e", 7, "d"), call("f", 2, "d")]
    backward = plan({"tangents_1": 1}, steps, "d", "e", "f")
    assert peak(NOTHING, backward) == 1 + 7 + 2


@pytest.mark.parametrize(("shape", "stride", "elements"), [
    ((3, 5), (8, 1), 21), ((3, 5), (0, 1), 5), ((0, 5), (5, 1), 0), ((), (), 1),
])  # fmt: skip
def test_bytes_of_a_storage(shape: tuple[int, ...], stride: tuple[int, ...], elements: int) -> None:
    assert storage_bytes(TensorSpec(shape, stride, torch.bfloat16, "cpu"), {}) == 2 * elements


def test_sizes_are_taken_at_their_hints() -> None:
    s = sympy.Symbol("s0", positive=True, integer=True)
    found = TensorSpec((s, 4), (4, 1), torch.float32, "cpu")
    assert storage_bytes(found, {"s0": 10}) == 160


def test_the_logits_of_two_heads_count() -> None:
    rows, vocabulary = 300, 4099
    shapes = {"x": (rows, 32), "w": (vocabulary, 32), "t": (rows, 16), "u": (vocabulary, 16)}
    specs = {
        name: TensorSpec(shape, (shape[1], 1), torch.bfloat16, "cpu")
        for name, shape in shapes.items()
    }
    share = TensorSpec((rows,), (1,), torch.float32, "cpu")
    setting = (-100, 0.0, 1.0, 1.0, False, 0.5, "logits", 0.5, 1.0, False, True, False, 0.0)
    heads = (Ref("x"), Ref("w"), None, Ref("t"), Ref("u"), None)
    args = (*heads, None, None, None, Ref("s"), *setting)
    step = AtenStep("iocompiler.linear_divergence_losses.default", args, (), (("r", share),), True)
    made = Plan((*specs.items(), ("s", share)), (step,), (), "cpu")
    filled = 4160 * 2  # bytes of a row
    assert scheduled_peak(made, NOTHING, {}, {}) == rows * 4 + filled * (2 * rows + 32 + 16)


@pytest.mark.parametrize("vocabulary", [4096, 4099])
@pytest.mark.parametrize("keep", [False, True])
def test_a_heads_logits_count_while_it_runs(vocabulary: int, keep: bool) -> None:
    """What the operator really allocates, its results among it."""
    rows, width = 300, 32
    x, weight = torch.zeros(rows, width).bfloat16(), torch.zeros(vocabulary, width).bfloat16()
    target, rest = torch.zeros(rows, dtype=torch.int64), (-100, 0.0, 1.0, 1.0, False, keep)
    given = {"x": x, "weight": weight, "target": target}
    specs = {
        n: TensorSpec(tuple(t.shape), tuple(t.stride()), t.dtype, "cpu") for n, t in given.items()
    }
    for gradients in (False, True):
        name = "gradients" if gradients else "losses"
        needed = (True, True, False) if gradients else ()
        run = getattr(torch.ops.iocompiler, f"linear_cross_entropy_{name}").default
        results = run(x, weight, None, target, None, None, *rest, *needed)
        args = (Ref("x"), Ref("weight"), None, Ref("target"), None, None, *rest, *needed)
        outputs = tuple(
            (f"r{at}", TensorSpec(tuple(t.shape), tuple(t.stride()), t.dtype, "cpu"))
            for at, t in enumerate(results)
        )
        step = AtenStep(f"iocompiler.linear_cross_entropy_{name}.default", args, (), outputs, True)
        made = Plan(tuple(specs.items()), (step,), (), "cpu")
        own = sum(t.numel() * t.itemsize for t in results)
        scratch = 300 * (-(-vocabulary // 64) * 64) * 2
        odd = vocabulary % 8 != 0
        if keep and not gradients and not odd:
            scratch = 0
        filled = (-(-vocabulary // 64) * 64) * width * 2 if odd else 0
        if keep and not gradients and odd:  # classes that fit, and the others, of rows and weight
            scratch, filled = 300 * (vocabulary // 64 * 64) * 2, (300 + width) * 64 * 2
        assert scheduled_peak(made, NOTHING, {}, {}) == own + scratch + filled
