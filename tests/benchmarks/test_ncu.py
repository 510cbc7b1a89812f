"""Reading ncu, and telling launches from planned kernels."""

from __future__ import annotations

import pytest

from benchmarks import ncu
from benchmarks.ncu import Launch

NAMES = ["ID", "Process ID", "Kernel Name", ncu._READ, ncu._WRITTEN, ncu._TIME, ncu._TO_L2]
CSV = f"""==PROF== Connected to process 7
{",".join(f'"{name}"' for name in NAMES)}
"","","","byte","byte","ns","sector"
"0","7","norm_0","1,024","512","2000","64"
"1","7","void at::native::add<int, 2>","10","0","5","n/a"
==PROF== Disconnected
"""


def test_a_raw_page_is_read_in_order() -> None:
    first, second = ncu.parse(CSV)
    assert first == Launch("norm_0", 1024, 512, 2048, 2000, first.cache)
    assert second == Launch("void at::native::add<int, 2>", 10, 0, 0, 5, second.cache)
    assert ncu.parse("==ERROR== no permission") == []


@pytest.mark.parametrize(
    ("cache", "measured"),
    [(0, 1536), (100, 1636), (10_000, 1024 + 2048)],
    ids=["none", "some", "all"],
)
def test_pending_writes_are_at_most_the_cache(cache: int, measured: int) -> None:
    launch = Launch("k", read=1024, written=512, to_l2=2048, nanoseconds=1, cache=cache)
    assert launch.dram == 1536
    assert launch.measured == measured


def test_names_with_a_number_appended_are_ours() -> None:
    names = {"norm", "add_3"}
    assert ncu.is_named("norm", names)
    assert ncu.is_named("norm_1", names)
    assert ncu.is_named("add_3", names)
    assert not ncu.is_named("gemm", names)


def test_matching_in_order_and_by_name() -> None:
    planned = [{"name": "a"}, {"name": "b"}, {"name": "a"}]
    launches = [Launch(n, i, 0, 0, 0) for i, n in enumerate(("a", "a", "b"))]
    assert [launch for _, launch in ncu.matched(planned, launches)] == launches
    found = [launch and launch.read for _, launch in ncu.matched(planned, launches[1:])]
    assert found == [1, 2, None]
