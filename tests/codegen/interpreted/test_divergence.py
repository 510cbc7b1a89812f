"""The row kernel of linear + divergence in Triton's interpreter, against its reference."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

from iocompiler.ops import linear_cross_entropy_walk as walk
from iocompiler.ops.linear_cross_entropy_rows import Rows, Setting
from iocompiler.ops.linear_divergence_rows import Divergence, Pair, launch_rows, reference_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
CAPPED = Setting(2, smoothing=0.1, outer=3.0, inner=0.4, capped=True)
CASES = [
    (Setting(), Divergence(scale=0.5, outer=0.7)),
    (CAPPED, Divergence(0.5, "logits", 2.0, 0.3, True, entropy=False)),
    (Setting(), Divergence(scale=-0.5, outer=0.7, reversed=True)),
    (CAPPED, Divergence(reversed=True, entropy=False)),
    (Setting(2), Divergence(0.5, "probabilities")),
    (Setting(), Divergence(0.5, "probabilities", entropy=False, spread=0.1)),
    (CAPPED, Divergence(0.5, "log-probabilities")),
    (Setting(), Divergence(0.5, "log-probabilities", reversed=True)),
]


@pytest.fixture
def blocks_of_128(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = walk.of_two_rows
    monkeypatch.setattr(walk, "of_two_rows", lambda *given: whole(*given) | {"BLOCK": 128})


@pytest.mark.usefixtures("blocks_of_128")
@pytest.mark.parametrize(
    ("dtype", "vocabulary", "hard", "needed"),
    [(torch.float32, 300, "", (True, False)), (torch.float16, 37, "weighed", (True, True))],
)
@pytest.mark.parametrize(("setting", "divergence"), CASES)
def test_losses_and_gradients(
    dtype: torch.dtype,
    vocabulary: int,
    hard: str,
    needed: tuple[bool, bool],
    setting: Setting,
    divergence: Divergence,
) -> None:
    torch.manual_seed(0)
    logits, other = (_rows(vocabulary, dtype) for _ in range(2))
    given = divergence.kind != "logits"
    if given:
        # in rows that lie anywhere, and in another dtype
        other = torch.rand(6, vocabulary + 3)
        other[0, :9] = 0.0
        if divergence.kind == "log-probabilities":
            other = other.log()
        needed = (needed[0], False)
    target = torch.tensor([0, vocabulary - 1, 3, 5, setting.ignore_index, setting.ignore_index])
    shares = [torch.tensor([0.5, 0.0, 2.0, -1.0, 0.3, 0.0]) for _ in range(3)]
    shares[2] = shares[2].flip(0)
    shares[2][5] = 0.0
    rows = Rows(*shares[:2]) if hard == "weighed" else Rows()
    found = []
    for run in (launch_rows, reference_rows):
        mine, theirs, losses = logits.clone(), other.clone(), torch.empty(6)
        pair = Pair(
            mine[:, :vocabulary],
            theirs[:, :vocabulary],
            target if hard else None,
            shares[2],
            losses,
            *(each if need else None for each, need in zip((mine, theirs), needed, strict=True)),
        )
        run(pair, rows, setting, divergence)
        found.append((losses, mine, theirs))
    tolerance = {"rtol": 2e-3, "atol": 1e-3} if dtype == torch.float16 else {"rtol": 2e-5}
    tolerance = {"atol": 1e-5, **tolerance}
    for name, one, two in zip(("losses", "gradient", "other's"), *found, strict=True):
        torch.testing.assert_close(one, two, equal_nan=True, **tolerance, msg=lambda m: name + m)  # noqa: B023
    assert found[0][0][5] == 0


def _rows(vocabulary: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits in rows longer than the vocabulary, aligned."""
    whole = torch.full((6, -(-vocabulary // 8) * 8), 7.0)
    whole[:, :vocabulary] = 3 * torch.randn(6, vocabulary)
    return whole.to(dtype)


@pytest.mark.parametrize("divergence", [Divergence(), Divergence(reversed=True)])
def test_what_has_no_weight_adds_nothing_and_nan_stays(divergence: Divergence) -> None:
    torch.manual_seed(0)
    logits, other = (_rows(40, torch.float32) for _ in range(2))
    logits[0, 3] = other[0, 3] = -torch.inf
    logits[1, :] = -torch.inf
    logits[2, 5] = torch.nan
    other[3, 5] = torch.nan
    other[4, 5] = logits[4, 5] = torch.nan
    share = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    found = []
    for run in (launch_rows, reference_rows):
        mine, theirs, losses = logits.clone(), other.clone(), torch.empty(6)
        pair = Pair(mine, theirs, None, share, losses, mine, theirs)
        run(pair, Rows(), Setting(), replace(divergence))
        found.append((losses, mine, theirs))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, equal_nan=True, rtol=2e-5, atol=1e-5)
    losses = found[0][0]
    assert losses[[0, 4, 5]].isfinite().all()
    assert losses[1:4].isnan().all()
