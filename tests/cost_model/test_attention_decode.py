"""Parts of the keys by price, and who decodes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from iocompiler.cost_model.attention_decode import (
    Decode,
    parts,
    programs_per_sm,
    template_is_better,
    template_time,
    tile,
)
from iocompiler.cost_model.device import DEVICES

H200 = DEVICES["h200"]
LLAMA = Decode(8, 8, 4, 1, 16384, 128, 128, 2)


def _floor(work: Decode) -> float:
    """Seconds of reading the keys and values once."""
    return work.heads * work.columns * work.row_bytes / H200.memory_rate


def test_every_sm_has_its_share() -> None:
    resident = H200.sm_count * programs_per_sm(tile(LLAMA), LLAMA, H200)
    programs = LLAMA.heads * parts(LLAMA, H200)
    assert programs / resident / math.ceil(programs / resident) > 0.9


def test_long_keys_are_read_near_copy_bandwidth() -> None:
    for work in (LLAMA, replace(LLAMA, rows=16), replace(LLAMA, batch=1, columns=2**17)):
        assert _floor(work) / template_time(work, H200, parts(work, H200)) > 0.85


def test_few_keys_are_not_shared_out_beyond_their_blocks() -> None:
    for columns in (1, 64, 65, 640):
        assert 1 <= parts(replace(LLAMA, columns=columns), H200) <= math.ceil(columns / 64)


def test_many_heads_need_few_parts() -> None:
    assert parts(replace(LLAMA, batch=264, groups=6), H200) == 1
    assert parts(replace(LLAMA, batch=1, groups=1), H200) > 100


def test_the_parts_of_any_length_are_found_at_once() -> None:
    for columns in (1000, 5000, 100000, 2**20):
        count = parts(replace(LLAMA, columns=columns), H200)
        best = template_time(replace(LLAMA, columns=columns), H200, count)
        assert all(
            best <= template_time(replace(LLAMA, columns=columns), H200, other)
            for other in range(1, 50)
        )


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("rows", [1, 4])
def test_groups_are_ours(kernel: str, rows: int) -> None:
    assert template_is_better(replace(LLAMA, rows=rows), H200, kernel)


def test_heads_that_share_nothing_stay_with_flash() -> None:
    alone = replace(LLAMA, groups=32, members=1)
    assert not template_is_better(alone, H200, "flash")
    assert not template_is_better(alone, H200, "cudnn")


def test_too_wide_a_head_has_no_tile() -> None:
    with pytest.raises(LookupError, match="heads of 512"):
        tile(replace(LLAMA, value_width=512))
