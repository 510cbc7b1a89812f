"""The row kernel of linear + cross-entropy in Triton's interpreter, against its reference."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

from iocompiler.ops.linear_cross_entropy_chunks import (
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
@pytest.mark.parametrize("vocabulary", [1, 37, 5000, 8192])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    "setting",
    [Setting(-(1 << 62)), Setting(2, smoothing=0.1), Setting(outer=3.0, inner=0.4, capped=True)],
)
def test_losses_and_gradients(
    dtype: torch.dtype,
    vocabulary: int,
    scaled: bool,
    squared: bool,
    gradient: bool,
    setting: Setting,
) -> None:
    torch.manual_seed(0)
    # rows longer than the vocabulary: what lies behind is not touched
    whole = torch.full((5, vocabulary + 3), 7.0).to(dtype)
    whole[:, :vocabulary] = 3 * torch.randn(5, vocabulary)
    if vocabulary > 30:
        whole[1, 5] = -torch.inf
        whole[2, :vocabulary] = -torch.inf
        whole[3, 2] = torch.nan
    target = torch.randint(0, vocabulary, (5,))
    target[4] = setting.ignore_index
    rows_of = Rows(*(_shares() if given else None for given in (scaled, squared)))
    mine, theirs = whole.clone(), whole.clone()
    losses = [torch.empty(5), torch.empty(5)]
    for run, z, out in ((launch_rows, mine, losses[0]), (reference_rows, theirs, losses[1])):
        run(z[:, :vocabulary], target, rows_of, out, setting, gradient)
    tolerance = {"rtol": 2e-3, "atol": 1e-3} if dtype == torch.float16 else {}
    torch.testing.assert_close(losses[0], losses[1], equal_nan=True)
    torch.testing.assert_close(mine, theirs, equal_nan=True, **tolerance)


def _shares() -> torch.Tensor:
    """Some rows take no part."""
    return torch.randn(5) * torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("label", [-1, 37, 1 << 40])
def test_a_target_out_of_range_gives_nan(label: int) -> None:
    z, losses = torch.randn(2, 37), torch.empty(2)
    launch_rows(z, torch.tensor([label, 3]), Rows(), losses, Setting(), True)
    assert losses[0].isnan()
    assert z[0].isnan().all()
    assert z[1].isfinite().all()
