"""The bits are Triton's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from iocompiler.tile import philox

pytest.importorskip("triton")

# a kernel needs a file of its own, and the interpreter an environment set before Triton is imported
_KERNEL = """
import json, sys, torch, triton, triton.language as tl

@triton.jit
def draw(out, seed, start, n: tl.constexpr, wide: tl.constexpr):
    position = tl.arange(0, n)
    offset = position.to(tl.int64) + start if wide else position
    tl.store(out + position, tl.rand(tl.load(seed), offset))

results = []
for seed, start, wide in json.loads(sys.argv[1]):
    out = torch.empty(256, dtype=torch.float32)
    draw[(1,)](out, torch.tensor([seed]), start, 256, wide)
    results.append(out.view(torch.int32).tolist())
print(json.dumps(results))
"""

_CASES = [
    (0, 0, False),
    (1, 0, False),
    (2**31 + 5, 0, True),
    (2**62 + 12345678901, 0, False),
    (2**62 + 12345678901, 2**31 - 100, True),
    (77, 2**33 + 17, True),
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    script = tmp_path_factory.mktemp("philox") / "draw.py"
    script.write_text(textwrap.dedent(_KERNEL))
    run = subprocess.run(
        [sys.executable, str(script), json.dumps(_CASES)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[list[int]] = json.loads(run.stdout)
    return found


@pytest.mark.parametrize("case", range(len(_CASES)))
def test_bits_are_those_of_tl_rand(drawn: list[list[int]], case: int) -> None:
    seed, start, _ = _CASES[case]
    ours = philox.uniform(torch.tensor(seed), torch.arange(256) + start)
    assert ours.view(torch.int32).tolist() == drawn[case]


def test_seed_may_be_a_number_and_offsets_any_shape() -> None:
    flat = philox.uniform(9, torch.arange(12))
    assert torch.equal(
        philox.uniform(torch.tensor(9), torch.arange(12).reshape(3, 4)), flat.reshape(3, 4)
    )
    assert torch.equal(philox.uniform(9, torch.arange(12, dtype=torch.int32)), flat)


def test_numbers_are_uniform_in_the_half_open_interval() -> None:
    x = philox.uniform(3, torch.arange(1 << 16)).double()
    assert x.min() >= 0
    assert x.max() < 1
    assert abs(x.mean() - 0.5) < 4 * (1 / 12) ** 0.5 / 2**8
    counts = torch.histc(x, 16, 0, 1)
    assert (
        (counts - 4096) ** 2 / 4096
    ).sum() < 40  # chi-squared with 15 degrees of freedom: p < 0.0005
    lagged = ((x[1:] - 0.5) * (x[:-1] - 0.5)).mean() * 12
    assert abs(lagged) < 4 / 2**8


def test_seeds_give_unrelated_streams() -> None:
    a, b = (philox.uniform(seed, torch.arange(1 << 14)) for seed in (5, 6))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.04
