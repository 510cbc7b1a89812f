"""The bits are those of the paper's generator, and those the generated kernels draw."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from iocompiler.codegen.prelude import PRELUDE
from iocompiler.codegen.pytext import helpers_for
from iocompiler.ops.random import UNIFORM
from iocompiler.tile import philox

_WORD = 2**32

# Random123's known answers for philox2x32, 7 rounds: (counter words, key), first result
_PUBLISHED = [
    ((0x00000000, 0x00000000, 0x00000000), 0x257A3673),
    ((0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF), 0xAB302C4D),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E), 0xBEDBBE6B),
]

# (seed, first counter, whether the kernel counts in 64 bits)
_CASES = [
    (0, 0, False),
    (1, 0, False),
    (2**31 + 5, 0, True),
    (2**62 + 12345678901, 0, False),
    (2**62 + 12345678901, 2**31 - 100, True),
    (2**63 - 2, 2**32 - 100, True),
    (77, 2**33 + 17, True),
]

# a kernel needs a file of its own, and the interpreter an environment set before Triton is imported
_KERNELS = """
@triton.jit
def draw(out, seed, start, n: tl.constexpr, wide: tl.constexpr):
    position = tl.arange(0, n)
    counter = position.to(tl.int64) + start if wide else position
    tl.store(out + position, _uniform(_random_bits(tl.load(seed), counter)))
"""

_MAIN = """
import json, sys, torch
results = []
for seed, start, wide in json.loads(sys.argv[1]):
    out = torch.empty(256, dtype=torch.float32)
    draw[(1,)](out, torch.tensor([seed]), start, 256, wide)
    results.append(out.view(torch.int32).tolist())
print(json.dumps(results))
"""


def by_hand(low: int, high: int, key: int) -> tuple[int, int]:
    """Both words of Philox2x32-7, in Python's integers, as the paper writes it."""
    for _ in range(7):
        upper, lower = divmod(0xD256D193 * low, _WORD)
        low, high = upper ^ key ^ high, lower
        key = (key + 0x9E3779B9) % _WORD
    return low, high


def word(seed: int, counter: int) -> int:
    """The bits of an element: a quarter of its block, upper halves first."""
    block, quarter = divmod(counter, 4)
    word = by_hand(block % _WORD, (block ^ seed) // _WORD, seed % _WORD)[quarter // 2]
    return word % 2**16 if quarter % 2 else word // 2**16


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    pytest.importorskip("triton")
    script = tmp_path_factory.mktemp("philox") / "draw.py"
    script.write_text(f"{helpers_for(PRELUDE, _KERNELS)}\n{_KERNELS}\n{_MAIN}")
    run = subprocess.run(
        [sys.executable, "-W", "error", str(script), json.dumps(_CASES)],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found: list[list[int]] = json.loads(run.stdout)
    return found


@pytest.mark.parametrize(("words", "first"), _PUBLISHED)
def test_the_reference_of_these_tests_is_the_published_generator(
    words: tuple[int, int, int], first: int
) -> None:
    assert by_hand(*words)[0] == first


@pytest.mark.parametrize(("seed", "start"), [case[:2] for case in _CASES])
def test_bits_are_those_computed_by_hand(seed: int, start: int) -> None:
    counters = range(start, start + 64)
    expected = [word(seed, c) for c in counters]
    assert philox.random_bits(seed, torch.tensor(list(counters))).tolist() == expected
    numbers = philox.uniform(seed, torch.tensor(list(counters)))
    assert numbers.dtype == torch.float32
    assert numbers.tolist() == [(bits + 0.5) * 2.0**-16 for bits in expected]


@pytest.mark.parametrize("case", range(len(_CASES)))
def test_kernels_draw_the_same_bits(drawn: list[list[int]], case: int) -> None:
    seed, start, _ = _CASES[case]
    ours = philox.uniform(torch.tensor(seed), torch.arange(256) + start)
    assert ours.view(torch.int32).tolist() == drawn[case]


def test_a_module_has_the_generator_only_where_it_draws() -> None:
    assert "def _random_bits" in helpers_for(PRELUDE, "draw = _random_bits(seed, x)")
    assert "def _random_bits" not in helpers_for(PRELUDE, "bits_3 = tl.load(x)")


def test_seed_may_be_a_number_and_counters_any_shape() -> None:
    flat = philox.uniform(9, torch.arange(12))
    assert torch.equal(
        philox.uniform(torch.tensor(9), torch.arange(12).reshape(3, 4)), flat.reshape(3, 4)
    )
    assert torch.equal(philox.uniform(9, torch.arange(12, dtype=torch.int32)), flat)
    assert philox.uniform(9, torch.arange(0)).shape == (0,)


def check_operator(device: str) -> None:
    seeds = torch.tensor([5, 2**62 + 7], device=device)
    numbers = UNIFORM(seeds, 1, [3, 5])
    assert numbers.device == seeds.device
    assert torch.equal(numbers.cpu(), philox.uniform(2**62 + 7, torch.arange(15).reshape(3, 5)))


def test_the_operator_counts_in_row_major_order() -> None:
    check_operator("cpu")


@pytest.mark.gpu
def test_the_operator_draws_the_same_bits_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    check_operator("cuda")


def check_uniform(numbers: torch.Tensor) -> None:
    """Range, mean, variance, cells of the interval and neighbours, each within about four standard
    deviations.
    """
    x = numbers.double()
    n = x.numel()
    assert x.min() > 0
    assert x.max() < 1
    centred = x - 0.5
    assert abs(centred.mean()) < 4 * math.sqrt(1 / 12 / n)
    assert abs((centred**2).mean() - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
    cells = 256
    counts = torch.bincount((x * cells).long(), minlength=cells).double()
    chi_squared = ((counts - n / cells) ** 2 / (n / cells)).sum()
    freedom = cells - 1
    assert abs(chi_squared - freedom) < 4.5 * math.sqrt(2 * freedom)
    for lag in (1, 2, 3, 4, 5, 6, 8, 32, 1024):
        correlation = (centred[lag:] * centred[:-lag]).mean() * 12
        assert abs(correlation) < 4.5 / math.sqrt(n - lag)


@pytest.mark.parametrize("seed", [0, 1, 3, 2**31, 2**32, 2**62 + 12345678901])
def test_numbers_along_the_counter_are_uniform_and_unrelated(seed: int) -> None:
    check_uniform(philox.uniform(seed, torch.arange(1 << 20)))


@pytest.mark.parametrize("counter", [0, 1, 2**32 + 9])
def test_numbers_along_the_seed_are_uniform_and_unrelated(counter: int) -> None:
    check_uniform(philox.uniform(torch.arange(1 << 20), torch.tensor(counter)))


def test_numbers_along_the_high_half_of_the_seed_are_uniform_and_unrelated() -> None:
    check_uniform(philox.uniform(torch.arange(1 << 20) << 32, torch.tensor(11)))


@pytest.mark.parametrize("other", [6, 5 + 2**31, 5 + 2**32])
def test_neighbouring_seeds_give_unrelated_streams(other: int) -> None:
    a, b = (philox.uniform(seed, torch.arange(1 << 20)).double() for seed in (5, other))
    assert abs(((a - 0.5) * (b - 0.5)).mean() * 12) < 4 / 2**10


def test_numbers_are_the_middles_of_equal_cells() -> None:
    numbers = philox.uniform(3, torch.arange(1 << 22))
    places = numbers.double() * 2**16 - 0.5
    assert torch.equal(places, places.round())
    counts = torch.bincount(places.long(), minlength=2**16).double()
    assert counts.min() > 0
    chi_squared = ((counts - 64) ** 2 / 64).sum()
    assert abs(chi_squared - (2**16 - 1)) < 4.5 * math.sqrt(2 * (2**16 - 1))


def test_the_four_numbers_of_a_block_are_unrelated_in_every_bit() -> None:
    count = 1 << 16
    bits = philox.random_bits(9, torch.arange(4 * count)).reshape(count, 4)
    each = ((bits[:, :, None] >> torch.arange(16)) & 1).double().reshape(count, 64) * 2 - 1
    related = (each.T @ each) / count - torch.eye(64, dtype=torch.float64)
    # of 2016 pairs, none beyond five standard deviations
    assert related.abs().max() < 5 / math.sqrt(count)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.25, 0.3, 0.5, 0.9, 1 - 1e-6])
def test_a_threshold_parts_the_numbers_as_the_comparison_does(p: float) -> None:
    numbers = (torch.arange(2**16).float() + 0.5) * 2.0**-16
    below = philox.threshold(torch.tensor(p).item())
    assert below == int((numbers < p).sum())
    assert abs(below / 2**16 - p) <= 2.0**-17 + 1e-8


@pytest.mark.parametrize("bit", [0, 1, 2, 31, 32])
def test_one_flipped_bit_of_the_counter_flips_half_the_bits(bit: int) -> None:
    counter = torch.arange(1 << 14)
    flipped = philox.random_bits(3, counter) ^ philox.random_bits(3, counter ^ (1 << bit))
    for place in range(philox.BITS):
        assert abs(((flipped >> place) & 1).double().mean() - 0.5) < 5 * 0.5 / 2**7
