"""The row kernel of linear + cross-entropy in Triton's interpreter, against its reference."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

from iocompiler.ops import linear_cross_entropy_walk
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
@pytest.mark.parametrize(("scaled", "squared"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("gradient", "copied"),
    [("", ""), ("", "copy"), ("", "copy with tails"), ("in place", "copy"), ("apart", "")],
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
    copied: str,
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
    found = []
    for run in (launch_rows, reference_rows):
        logits, apart, losses = whole.clone()[:, :vocabulary], whole.clone(), torch.empty(5)
        copy = torch.full((5, vocabulary + 3), 7.0).to(dtype)
        into = {"": None, "in place": logits, "apart": apart}[gradient]
        kept = copy[:, :vocabulary] if copied else None
        parts = _cut(logits) if copied == "copy with tails" else (logits, None)
        run(Piece(parts[0], target, losses, into, kept, parts[1]), rows_of, setting)
        found.append((losses, logits, apart, copy))
    tolerance = {"rtol": 2e-3, "atol": 1e-3} if dtype == torch.float16 else {}
    (losses, logits, apart, copy), (their_losses, their_logits, their_apart, their_copy) = found
    torch.testing.assert_close(losses, their_losses, equal_nan=True)
    torch.testing.assert_close(logits, their_logits, equal_nan=True, **tolerance)
    torch.testing.assert_close(apart, their_apart, equal_nan=True, **tolerance)
    assert torch.equal(copy.nan_to_num(), their_copy.nan_to_num())


def _cut(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits as they lie with tails, which stand in longer rows."""
    line = linear_cross_entropy_walk.LINE
    cut = logits.shape[1] // line * line
    tails = torch.full((logits.shape[0], line), 7.0, dtype=logits.dtype)
    tails[:, : logits.shape[1] - cut] = logits[:, cut:]
    return logits[:, :cut].contiguous(), tails[:, : logits.shape[1] - cut]


def _shares() -> torch.Tensor:
    """Some rows take no part."""
    return torch.randn(5) * torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])


# (held, depth): rows that are kept in registers whole, in part and not at all
@pytest.fixture(params=[(99, 0), (3, 4), (2, 2), (0, 1)], ids=str)
def blocks_of_128(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    held, depth = request.param
    way = linear_cross_entropy_walk._Way(1e9, 1, held, depth, None, kind="any")
    monkeypatch.setattr(linear_cross_entropy_walk, "_WAYS", (way,))


@pytest.mark.usefixtures("blocks_of_128")
@pytest.mark.parametrize("vocabulary", [127, 128, 129, 1025, 1407])
@pytest.mark.parametrize(
    "setting",
    [Setting(outer=-2.5), Setting(outer=-3.0, inner=0.4, capped=True, smoothing=0.1)],
)
def test_every_walk_against_float64(vocabulary: int, setting: Setting) -> None:
    torch.manual_seed(0)
    z = 3 * torch.randn(3, -(-vocabulary // 4) * 4)[:, :vocabulary]
    target = torch.tensor([vocabulary - 1, 0, setting.ignore_index])
    share, losses = torch.tensor([1.5, -0.5, 1.0]), torch.empty(3)
    copy = torch.full((3, vocabulary + 3), 7.0)
    # wider than a block more than the vocabulary
    gradient = torch.full((3, -(-vocabulary // 128) * 128 + 160), 7.0)
    piece = Piece(z, target, losses, gradient, copy[:, :vocabulary])
    launch_rows(piece, Rows(share), setting)
    wide, theirs = torch.full_like(gradient, 7.0).double(), losses.double()
    reference_rows(Piece(z.double(), target, theirs, wide), Rows(share.double()), setting)
    torch.testing.assert_close(losses.double(), theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wide, rtol=3e-6, atol=1e-8)
    assert torch.equal(copy[:, :vocabulary], z)
    assert (copy[:, vocabulary:] == 7.0).all()


@pytest.mark.usefixtures("blocks_of_128")
@pytest.mark.parametrize(
    ("dtype", "vocabulary"),
    [
        *((torch.float32, n) for n in (1, 63, 65, 127, 129, 255, 257, 1407)),
        *((torch.bfloat16, n) for n in (1, 65, 257)),
    ],
)
def test_tails_are_as_if_they_stood_in_the_row(vocabulary: int, dtype: torch.dtype) -> None:
    """Copies begin anywhere in a sector; targets are the classes beside the cut; one is ignored."""
    torch.manual_seed(0)
    z = torch.zeros(6, -(-vocabulary // 8) * 8, dtype=dtype)[:, :vocabulary]
    z.copy_(3 * torch.randn(z.shape))
    made, tails = _cut(z)
    target = torch.tensor([made.shape[1] - 1, made.shape[1], vocabulary - 1, 0, -100, -1])
    found = []
    for parts in ((made, tails), (z, None)):
        losses = torch.empty(6)
        copy = torch.full((6, vocabulary + 3), 7.0, dtype=dtype)
        piece = Piece(parts[0], target, losses, copy=copy[:, :vocabulary], tails=parts[1])
        launch_rows(piece, Rows(), Setting(smoothing=0.1))
        found.append((losses, copy))
        assert torch.equal(copy[:, :vocabulary], z)
        assert (copy[:, vocabulary:] == 7.0).all()
    assert torch.equal(found[0][0].nan_to_num(-1.0), found[1][0].nan_to_num(-1.0))


@pytest.mark.usefixtures("blocks_of_128")
@pytest.mark.parametrize("least", [torch.finfo(torch.float32).min, -torch.inf])
@pytest.mark.parametrize("place", [0, 700, 1406])
def test_a_row_with_one_class_left(least: float, place: int) -> None:
    """Masked classes: no difference of theirs leaves the range of float32 for infinity."""
    z, losses = torch.full((1, 1408), least)[:, :1407], torch.empty(1)
    z[0, place] = 3.0
    launch_rows(Piece(z, torch.tensor([place]), losses, z), Rows(), Setting())
    assert losses.item() == 0.0
    assert (z == 0.0).all()


@pytest.mark.usefixtures("blocks_of_128")
def test_a_row_of_the_least_numbers_is_uniform() -> None:
    z, losses = torch.full((1, 1024), torch.finfo(torch.float32).min), torch.empty(1)
    launch_rows(Piece(z, torch.tensor([1]), losses, z), Rows(), Setting())
    assert z[0, 0].item() == pytest.approx(1 / 1024)
    assert z[0, 1].item() == pytest.approx(1 / 1024 - 1)


@pytest.mark.parametrize("label", [-1, 37, 1 << 40])
def test_a_target_out_of_range_gives_nan(label: int) -> None:
    z, losses = torch.randn(2, 40)[:, :37], torch.empty(2)
    launch_rows(Piece(z, torch.tensor([label, 3]), losses, z), Rows(), Setting())
    assert losses[0].isnan()
    assert z[0].isnan().all()
    assert z[1].isfinite().all()
