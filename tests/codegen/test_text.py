"""The text of three kernels, whole: what a reader of a generated file sees."""

# ruff: noqa: E501  # the lines are the kernels own

from __future__ import annotations

import re

import pytest
import torch

from iocompiler.codegen.expressions import divided
from iocompiler.codegen.triton import emit
from tests.codegen.cases import CASES


def text(name: str, schedule: int) -> str:
    case = CASES[name]
    emitted = emit(case.program, case.schedules[schedule], "kernel")
    return emitted.replace('"""', "'''")


def test_a_pointwise_kernel() -> None:
    assert (
        text("broadcasting", 2)
        == """\
@triton.jit
def kernel(a_ptr, w_ptr, b_ptr, out_ptr):
    '''pointwise over x0<7 x x1<13'''
    x = tl.program_id(0) * 128 + tl.arange(0, 128)
    x_mask = x < 91
    x1_of_x = x % (13)
    x_over_0 = x // (13)
    x0_of_x = x_over_0
    load_0 = tl.load(a_ptr + (x), x_mask, other=0.0)
    load_1 = tl.load(w_ptr + (x1_of_x), x_mask, other=0.0)
    load_2 = tl.load(b_ptr + (x0_of_x), x_mask, other=0.0)
    mul_3 = load_0 * load_1
    add_4 = mul_3 + load_2
    tl.store(out_ptr + (x), add_4, x_mask)
"""
    )


def test_a_row_in_registers() -> None:
    assert (
        text("softmax bf16", 1)
        == """\
@triton.jit
def kernel(a_ptr, out_ptr):
    '''persistent over x0<5 x r0<13'''
    x = tl.program_id(0) * 4 + tl.arange(0, 4)[:, None]
    x_mask = x < 5
    r = tl.arange(0, 16)[None, :]
    r_mask = r < 13
    load_0 = tl.load(a_ptr + (r + x * 13), x_mask & r_mask, other=0.0)
    cast_1 = load_0.to(tl.float32)
    max_2 = tl.reduce(tl.where(r_mask, tl.broadcast_to(cast_1, [4, 16]), float('-inf')), 1, _maximum, keep_dims=True)
    sub_3 = cast_1 - max_2
    exp_4 = tl.exp(sub_3)
    sum_5 = tl.sum(tl.where(r_mask, tl.broadcast_to(exp_4, [4, 16]), 0.0), axis=1, keep_dims=True)
    div_6 = tl.div_rn(exp_4, sum_5)
    cast_7 = div_6.to(tl.bfloat16)
    tl.store(out_ptr + (r + x * 13), cast_7, x_mask & r_mask)
"""
    )


@pytest.mark.parametrize("divisor", [3.0, 768.0, 1000.0, 50257.0, -0.7, 1e-3, 1.1])
def test_a_corrected_product_is_the_quotient(divisor: float) -> None:
    """`_quotient` step by step; float64 holds what a multiply-add of float32 rounds once."""
    called = re.fullmatch(r"_quotient\(x, (.*), (.*)\)", divided("x", divisor, torch.float32))
    assert called
    by, inverse = (torch.tensor(float(text)) for text in called.groups())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1 << 20, generator=generator) * 2.0 ** torch.randint(-60, 60, (1 << 20,))
    x[:4] = torch.tensor([0.0, -0.0, float("inf"), float("-inf")])
    guess = x * inverse
    rest = (x.double() - guess.double() * by.double()).float()
    corrected = (guess.double() + rest.double() * inverse.double()).float()
    found = torch.where((rest != 0) & guess.isfinite(), corrected, guess)
    assert torch.equal(found.view(torch.int32), (x / torch.tensor(divisor)).view(torch.int32))
    assert not torch.equal(guess, found)  # the correction is needed


@pytest.mark.parametrize("divisor", [0.0, float("inf"), float("nan"), 1e-30, 2 - 2.0**-23])
def test_what_is_divided_as_it_stands(divisor: float) -> None:
    assert divided("x", divisor, torch.float32) == ""


def test_a_row_in_pieces() -> None:
    assert (
        text("softmax, any size", 1)
        == """\
@triton.jit
def kernel(a_ptr, out_ptr, s0, s1):
    '''looped over x0<s0 x r0<s1'''
    x = tl.program_id(0) * 4 + tl.arange(0, 4)[:, None]
    x_mask = x < s0
    acc_1 = tl.full([4, 4], float('-inf'), tl.float32)
    acc_4 = tl.full([4, 4], 0.0, tl.float32)
    for start in range(0, s1, 4):
        r = start + tl.arange(0, 4)[None, :]
        r_mask = r < s1
        load_0 = tl.load(a_ptr + (r.to(tl.int64) + x.to(tl.int64) * (s1)), x_mask & r_mask, other=0.0)
        acc_4 = _rescaled(acc_4, acc_1, tl.where(r_mask, tl.broadcast_to(load_0, [4, 4]), float('-inf')))
        acc_1 = _maximum(acc_1, tl.where(r_mask, tl.broadcast_to(load_0, [4, 4]), float('-inf')))
    max_1 = tl.reduce(acc_1, 1, _maximum, keep_dims=True)
    sum_4 = tl.sum(acc_4 * tl.exp(acc_1 - max_1), axis=1, keep_dims=True)
    for start in range(0, s1, 4):
        r = start + tl.arange(0, 4)[None, :]
        r_mask = r < s1
        load_0 = tl.load(a_ptr + (r.to(tl.int64) + x.to(tl.int64) * (s1)), x_mask & r_mask, other=0.0)
        sub_2 = load_0 - max_1
        exp_3 = tl.exp(sub_2)
        div_5 = tl.div_rn(exp_3, sum_4)
        tl.store(out_ptr + (r.to(tl.int64) + x.to(tl.int64) * (s1)), div_5, x_mask & r_mask)
"""
    )


def test_a_product_that_may_have_nothing_to_do() -> None:
    assert (
        text("scaled", 0)
        == """\
@triton.jit
def kernel(a_ptr, factor_ptr, out_ptr):
    '''pointwise over x0<37'''
    # a product with 1, written over its operand, stands there already
    factor = tl.load(factor_ptr + 0)
    if (factor == 1) & (a_ptr.to(tl.int64) == out_ptr.to(tl.int64)):
        return
    for tile in range(tl.program_id(0), 5, 2):
        x = tile * 8 + tl.arange(0, 8)
        x_mask = x < 37
        load_0 = tl.load(a_ptr + (x), x_mask, other=0.0)
        cast_1 = load_0.to(tl.float32)
        load_2 = tl.load(factor_ptr + (0))
        mul_3 = cast_1 * load_2
        cast_4 = mul_3.to(tl.float16)
        tl.store(out_ptr + (x), cast_4, x_mask)
"""
    )
