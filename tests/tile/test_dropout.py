"""Which probabilities are dropped: as many as asked for, and nothing of it depends on lengths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from iocompiler.tile.dropout import kept, threshold


def mask(seed: int, shape: tuple[int, int, int, int], dropout_p: float) -> Tensor:
    b, h, i, j = (
        torch.arange(n).reshape([-1 if d == dim else 1 for d in range(4)])
        for dim, n in enumerate(shape)
    )
    return kept(torch.tensor(seed), b, h, i, j, dropout_p)


@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5, 0.9])
def test_as_many_as_asked_for(dropout_p: float) -> None:
    found = mask(2**61 + 3, (2, 3, 128, 256), dropout_p)
    deviation = (dropout_p * (1 - dropout_p) / found.numel()) ** 0.5
    assert abs(found.double().mean().item() - (1 - dropout_p)) < 5 * deviation


def test_a_place_has_its_mask_whatever_the_lengths() -> None:
    whole = mask(11, (3, 4, 33, 70), 0.4)
    assert torch.equal(mask(11, (2, 2, 17, 41), 0.4), whole[:2, :2, :17, :41])


def test_batches_heads_rows_columns_and_seeds_are_independent() -> None:
    found = mask(5, (4, 4, 64, 64), 0.5).double() - 0.5
    for dim in range(4):
        pairs = (found * found.roll(1, dim)).mean() * 4
        assert abs(pairs) < 5 / found.numel() ** 0.5
    other = mask(6, (4, 4, 64, 64), 0.5).double() - 0.5
    assert abs((found * other).mean() * 4) < 5 / found.numel() ** 0.5


def test_no_place_follows_another() -> None:
    """Correlations at every distance in a head, and of a head with every other one moved."""
    heads = (mask(7, (2, 2, 256, 256), 0.5).double() * 2 - 1).flatten(0, 1)
    spectra = torch.fft.rfft2(heads)
    for a in range(4):
        for b in range(a, 4):
            found = torch.fft.irfft2(spectra[a] * spectra[b].conj()) / 256
            if a == b:
                found[0, 0] = 0
            assert found.abs().max() < 6, "the largest of 65536 normal numbers is about 4.5"


def test_corners_of_rectangles_are_independent() -> None:
    """A sum of a row's and a column's word, not hashed, would fail."""
    found = mask(3, (2, 2, 256, 256), 0.5).double() * 2 - 1
    for down in (1, 2, 4, 8, 16, 24, 100):
        sides = found * found.roll(down, 2)
        for across in (1, 2, 4, 7, 8, 16, 24, 100):
            corners = (sides * sides.roll(across, 3)).mean() * found.numel() ** 0.5
            assert abs(corners) < 5


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_the_four_places_of_a_hash_are_independent(dropout_p: float) -> None:
    """All sixteen patterns are as frequent as those of four coins."""
    found = ~mask(13, (2, 4, 512, 512), dropout_p)
    blocks = found.reshape(2, 4, 32, 2, 8, 32, 2, 8).movedim((3, 6), (0, 1)).flatten(2)
    pattern = blocks[0, 0] + 2 * blocks[0, 1] + 4 * blocks[1, 0] + 8 * blocks[1, 1]
    counts = pattern.bincount(minlength=16).double()
    dropped = torch.tensor([n.bit_count() for n in range(16)])
    rate = threshold(dropout_p) / 2**32
    expected = rate**dropped * (1 - rate) ** (4 - dropped) * counts.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 45, "15 degrees of freedom: one in 10,000"


@pytest.mark.parametrize("dropout_p", [2**-16, 0.1, 1 / 3, 0.5])
def test_a_rate_has_16_bits(dropout_p: float) -> None:
    assert 0 <= threshold(dropout_p) / 2**32 - dropout_p < 2**-16
    assert threshold(dropout_p) % 2**16 == 0
