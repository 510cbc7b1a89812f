"""Modeled times and lower bounds against cases worked out by hand, and against measured matmuls."""

import math

import pytest
import sympy
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from iocompiler.cost_model.bound import bound, contraction_excess, lower_bound
from iocompiler.cost_model.cost import Contraction, Cost, value_of
from iocompiler.cost_model.device import DEVICES
from iocompiler.cost_model.roofline import contraction_time, efficiency, time

H200 = DEVICES["h200"]
BF16 = torch.bfloat16
aten = torch.ops.aten


def reached(m, n, k, aligned=True):
    """TFLOP/s of a bf16 matmul on an H200, as modeled."""
    c = Contraction(1, m, n, k, BF16, aligned)
    return c.flops / contraction_time(c, H200) / 1e12


def test_a_copy_takes_its_bytes_and_one_launch():
    assert time(Cost(2**30, 2**30), H200) == pytest.approx(2.5e-6 + 2**31 / 4.3e12)


def test_the_longest_of_bytes_and_arithmetic_counts():
    assert time(Cost(1000, 1000, flops=6e9), H200) == pytest.approx(2.5e-6 + 1e-4)
    assert time(Cost(transcendentals=6e9), H200) == pytest.approx(2.5e-6 + 8e-4)
    assert time(Cost(flops=6e9), H200, torch.float64) > time(Cost(flops=6e9), H200)


def test_what_is_staged_in_l2_is_copied_after_the_arithmetic():
    cost = Cost(0, 2**30, flops=6e12, staged_bytes=2**30)
    alone = Cost(0, 2**30, flops=6e12)
    assert time(cost, H200) - time(alone, H200) == pytest.approx(2**30 / 4.3e12)
    assert (cost + cost).staged_bytes == 2**31


def test_an_empty_launch_still_costs():
    assert time(Cost(), H200) == H200.launch_s


@pytest.mark.parametrize(
    ("shape", "measured"),
    [((8192, 8192, 8192), 790), ((8192, 128256, 2048), 650), ((8192, 8192, 2048), 650)],
)
def test_aligned_matmuls_are_within_15_percent_of_measured(shape, measured):
    assert reached(*shape) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("shape", [(8192, 50257, 768), (8192, 30522, 1024)])
def test_unaligned_vocabularies_are_within_15_percent_of_measured(shape):
    assert reached(*shape, aligned=False) == pytest.approx(227, rel=0.15)


def test_alignment_does_not_matter_to_float32():
    c = Contraction(1, 4096, 50257, 768, torch.float32, aligned=False)
    assert efficiency(c, H200) == efficiency(Contraction(1, 4096, 50257, 768, torch.float32), H200)


def test_efficiency_stays_between_zero_and_one():
    for m in (1, 17, 128, 1000, 8192):
        for k in (1, 64, 4096):
            assert 0 < efficiency(Contraction(3, m, 129, k, BF16), H200) <= 1


def test_one_more_tile_than_the_sms_costs_a_wave():
    # 132 SMs: 11 x 12 tiles of 256 x 128 fill them once
    full, over = reached(11 * 256, 12 * 128, 4096), reached(11 * 256, 13 * 128, 4096)
    assert over < full


def test_an_empty_contraction_takes_no_time():
    assert contraction_time(Contraction(1, 0, 8, 8, BF16), H200) == 0


def test_attention_is_slower_with_small_heads_and_masks():
    wide = efficiency(Contraction(64, 2048, 2048, 128, BF16, kind="attention"), H200)
    narrow = efficiency(Contraction(64, 2048, 2048, 64, BF16, kind="attention"), H200)
    causal = efficiency(Contraction(64, 2048, 2048, 128, BF16, kind="causal attention"), H200)
    assert narrow < wide
    assert causal < wide


def test_symbolic_times_take_hints():
    n = sympy.Symbol("s0", integer=True, positive=True)
    assert time(Cost(4 * n, 4 * n), H200, hints={"s0": 10**9}) == pytest.approx(
        2.5e-6 + 8e9 / 4.3e12
    )


# --- bounds


def test_a_contraction_that_fits_the_chip_forces_nothing():
    assert contraction_excess(Contraction(1, 8192, 8192, 8192, BF16), H200) == 0


def test_a_huge_contraction_forces_what_hong_and_kung_say():
    side = 2**20
    c = Contraction(1, side, side, side, BF16)
    room = H200.on_chip_bytes // 2
    forced = 2 * side**3 / math.sqrt(room) - 2 * room
    assert contraction_excess(c, H200) == pytest.approx((forced - 3 * side**2) * 2, rel=1e-9)


def test_convolutions_and_attention_force_nothing_more():
    side = 2**20
    assert contraction_excess(Contraction(1, side, side, side, BF16, kind="attention"), H200) == 0
    assert contraction_excess(Contraction(1, side, side, side, BF16, kind="conv"), H200) == 0


def test_a_symbolic_excess_is_an_expression_that_agrees():
    n = sympy.Symbol("s0", integer=True, positive=True)
    got = contraction_excess(Contraction(1, n, n, n, BF16), H200)
    for side in (1024, 2**20):
        exact = contraction_excess(Contraction(1, side, side, side, BF16), H200)
        assert value_of(got, {"s0": side}) == pytest.approx(exact, rel=1e-9)


def test_the_bound_of_a_graph_counts_inputs_and_outputs_once_whatever_lies_between():
    def mlp(x, w, v):
        return aten.mm(aten.relu(aten.mm(x, w)), v)

    gm = make_fx(mlp, tracing_mode="fake")(
        torch.randn(64, 32), torch.randn(32, 128), torch.randn(128, 16)
    )
    found = bound(gm, H200)
    assert found.bytes == 4 * (64 * 32 + 32 * 128 + 128 * 16 + 64 * 16)
    assert found.work.flops == 2 * 64 * 128 * (32 + 16) + 64 * 128


def test_unread_inputs_and_passed_on_inputs_do_not_count():
    gm = make_fx(lambda x, y, z: (aten.neg(x), z), tracing_mode="fake")(
        *(torch.randn(8) for _ in range(3))
    )
    assert bound(gm, H200).bytes == 64


def test_of_a_table_only_what_is_picked_counts_whatever_views_lie_between():
    def pick(table, positions):
        return aten.embedding(aten.t(table), positions)

    table, positions = torch.randn(16, 1000), torch.zeros(4, dtype=torch.int64)
    gm = make_fx(pick, tracing_mode="fake")(table, positions)
    assert bound(gm, H200).bytes == 4 * 64 + 32 + 4 * 64


def test_bound_time_is_the_longer_of_bytes_and_arithmetic():
    moving = lower_bound([2**32, 2**32], [Cost(flops=1)], H200)
    assert moving.time(H200) == pytest.approx(2**33 / 4.3e12)
    matmul = Cost(flops=2 * 2**39, contractions=(Contraction(1, 2**13, 2**13, 2**13, BF16),))
    assert lower_bound([], [matmul], H200).time(H200) == pytest.approx(2**40 / 790e12)


def test_no_kernel_beats_the_bound():
    inner = Contraction(1, 4096, 4096, 4096, BF16)
    c = Cost(2 * 2**25, 2**25, inner.flops, 0, (inner,))
    least = lower_bound([2**25] * 3, [c], H200)
    assert least.bytes == c.bytes
    assert least.time(H200) < time(c, H200)
