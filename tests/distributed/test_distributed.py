"""DDP, FSDP2 and collectives on two ranks: gradients equal eager's on both."""

from __future__ import annotations

import pytest

from tests.distributed import ranks
from tests.distributed.cases import CASES


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return ranks.run(CASES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(case: str, results: dict[str, list[str]]) -> None:
    assert results[case] == ["", ""], "\n".join(results[case])
