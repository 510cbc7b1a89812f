"""The row kernel of linear + cross-entropy in Triton's interpreter, against its reference."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

from iocompiler.ops.linear_cross_entropy_rows import (
    Piece,
    Rows,
    Setting,
    launch_rows,
    reference_rows,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 37, 5000])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(
    ("gradient", "copied", "bias"),
    [("", False, False), ("", True, True), ("in place", True, False), ("apart", False, True)],
)
@pytest.mark.parametrize(
    "setting",
    [Setting(-(1 << 62)), Setting(2, smoothing=0.1), Setting(outer=3.0, inner=0.4, capped=True)],
)
def test_losses_and_gradients(
    dtype: torch.dtype,
    vocabulary: int,
    scaled: bool,
    squared: bool,
    gradient: str,
    copied: bool,
    bias: bool,
    setting: Setting,
) -> None:
    torch.manual_seed(0)
    # rows longer than the vocabulary, aligned; those of the copy are not
    whole = torch.full((5, -(-vocabulary // 8) * 8), 7.0).to(dtype)
    whole[:, :vocabulary] = 3 * torch.randn(5, vocabulary)
    if vocabulary > 30:
        whole[1, 5] = -torch.inf
        whole[2, :vocabulary] = -torch.inf
        whole[3, 2] = torch.nan
    target = torch.randint(0, vocabulary, (5,))
    target[4] = setting.ignore_index
    rows_of = Rows(*(_shares() if given else None for given in (scaled, squared)))
    added = torch.randn(-(-vocabulary // 8) * 8).to(dtype)[:vocabulary] if bias else None
    found = []
    for run in (launch_rows, reference_rows):
        logits, apart, losses = whole.clone()[:, :vocabulary], whole.clone(), torch.empty(5)
        copy = torch.full((5, vocabulary + 3), 7.0).to(dtype)
        into = {"": None, "in place": logits, "apart": apart}[gradient]
        kept = copy[:, :vocabulary] if copied else None
        run(Piece(logits, target, losses, into, kept, added), rows_of, setting)
        found.append((losses, logits, apart, copy))
    tolerance = {"rtol": 2e-3, "atol": 1e-3} if dtype == torch.float16 else {}
    (losses, logits, apart, copy), (their_losses, their_logits, their_apart, their_copy) = found
    torch.testing.assert_close(losses, their_losses, equal_nan=True)
    torch.testing.assert_close(logits, their_logits, equal_nan=True, **tolerance)
    torch.testing.assert_close(apart, their_apart, equal_nan=True, **tolerance)
    assert torch.equal(copy.nan_to_num(), their_copy.nan_to_num())


def _shares() -> torch.Tensor:
    """Some rows take no part."""
    return torch.randn(5) * torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("label", [-1, 37, 1 << 40])
def test_a_target_out_of_range_gives_nan(label: int) -> None:
    z, losses = torch.randn(2, 40)[:, :37], torch.empty(2)
    launch_rows(Piece(z, torch.tensor([label, 3]), losses, z), Rows(), Setting())
    assert losses[0].isnan()
    assert z[0].isnan().all()
    assert z[1].isfinite().all()
