"""What a library copies around convolutions that do not lie as it computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from iocompiler.cost_model.call import Call, Operand
from iocompiler.cost_model.convolution_order import computes_in_matrix_units, why_not_last
from iocompiler.cost_model.cost import Cost
from iocompiler.cost_model.device import device
from iocompiler.cost_model.roofline import relaid_bytes, time
from iocompiler.cost_model.rules import price
from iocompiler.plan.data import TensorSpec

H200 = device("h200")
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
PLAIN = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)


def spec(*shape: int, last: bool = False, dtype: torch.dtype = BF16) -> TensorSpec:
    order = torch.channels_last if last else torch.contiguous_format
    stride = torch.empty(shape, device="meta", memory_format=order).stride()
    return TensorSpec(shape, stride, dtype, "cuda")


def convolved(data: TensorSpec, weight: TensorSpec, result: TensorSpec) -> Cost:
    operands = Operand("x", data), Operand("w", weight)
    return price(Call("aten.convolution.default", (*operands, *PLAIN), {}, (result,)))


X, W, Y = (2, 16, 6, 5), (8, 16, 3, 3), (2, 8, 6, 5)
BYTES = [2 * torch.Size(shape).numel() for shape in (X, W, Y)]


def test_all_three_are_copied_where_channels_come_first() -> None:
    cost = convolved(spec(*X), spec(*W), spec(*Y))
    assert cost.bytes == sum(BYTES)
    assert cost.relaid_bytes == 2 * sum(BYTES)


def test_what_lies_last_is_read_as_it_lies() -> None:
    assert (
        convolved(spec(*X, last=True), spec(*W), spec(*Y, last=True)).relaid_bytes == 2 * BYTES[1]
    )
    every = (spec(*shape, last=True) for shape in (X, W, Y))
    assert convolved(*every).relaid_bytes == 0


def test_one_place_and_one_channel_lie_both_ways() -> None:
    data, weight, result = spec(2, 16, 6, 5), spec(8, 16, 1, 1), spec(2, 8, 6, 5)
    moved = 2 * 2 * (2 * 16 * 30 + 2 * 8 * 30)
    assert convolved(data, weight, result).relaid_bytes == moved
    assert convolved(spec(2, 16, 1, 1), weight, spec(2, 8, 1, 1)).relaid_bytes == 0


def test_each_gradient_copies_its_own() -> None:
    def backward(mask: list[bool]) -> Cost:
        operands = Operand("g", spec(*Y)), Operand("x", spec(*X)), Operand("w", spec(*W))
        args = (*operands, *PLAIN, mask)
        outputs = (spec(*X) if mask[0] else None, spec(*W), None)
        return price(Call("aten.convolution_backward.default", args, {}, outputs))

    assert backward([True, True, False]).relaid_bytes == 4 * sum(BYTES)
    assert backward([False, True, False]).relaid_bytes == 2 * sum(BYTES)


@pytest.mark.parametrize(
    ("shapes", "dtype"),
    [
        ((X, W, Y), F64),
        (((2, 12, 6, 5), (8, 12, 3, 3), Y), BF16),
        ((X, (9, 16, 3, 3), (2, 9, 6, 5)), BF16),
        (((2, 16, 6), (8, 16, 3), (2, 8, 6)), BF16),
    ],
)
def test_of_others_nothing_is_claimed(
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype
) -> None:
    assert convolved(*(spec(*shape, dtype=dtype) for shape in shapes)).relaid_bytes == 0


def test_why_not() -> None:
    assert why_not_last(BF16, (16, 8), 1) == ""
    assert why_not_last(F32, (4, 12), 1) == ""
    assert why_not_last(BF16, (4, 8), 1) == "channels are no multiple of 8"
    assert why_not_last(F32, (2, 8), 1) == "channels are no multiple of 4"
    assert "groups" in why_not_last(BF16, (16, 16), 16)
    assert "float64" in why_not_last(F64, (16, 16), 1)


def test_which_devices_compute_so() -> None:
    old = replace(H200, capability=(7, 0))
    assert computes_in_matrix_units(F16, old, tf32=True)
    assert not computes_in_matrix_units(BF16, old, tf32=True)
    assert not computes_in_matrix_units(F32, old, tf32=True)
    assert computes_in_matrix_units(F32, H200, tf32=True)
    assert not computes_in_matrix_units(F32, H200, tf32=False)
    assert not computes_in_matrix_units(BF16, device("cpu"), tf32=True)


def test_the_copies_take_their_time() -> None:
    cost = Cost(2**20, 2**20, relaid_bytes=2**30)
    alone = replace(cost, relaid_bytes=0)
    assert time(cost, H200, BF16) - time(alone, H200, BF16) == pytest.approx(2**30 / 4.3e12)
    assert time(cost, H200, F32) == time(alone, H200, F32)
    assert relaid_bytes(cost + cost, H200, BF16) == 2**31
