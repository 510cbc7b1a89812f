"""DDP, FSDP2 and collectives on two ranks: as accurate as eager on both."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import ranks
from tests.distributed.cases import CASES


@pytest.fixture(scope="module")
def on_cpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return ranks.run(CASES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(case: str, on_cpus: dict[str, list[str]]) -> None:
    assert on_cpus[case] == ["", ""], "\n".join(on_cpus[case])


@pytest.fixture(scope="module")
def on_gpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    if torch.cuda.device_count() < ranks.RANKS or not dist.is_nccl_available():
        pytest.skip("needs two CUDA devices and NCCL")
    return ranks.run(CASES, tmp_path_factory.mktemp("ranks"), "cuda", limit=480.0)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_two_gpus(case: str, on_gpus: dict[str, list[str]]) -> None:
    assert on_gpus[case] == ["", ""], "\n".join(on_gpus[case])


# --- the ranks themselves: what goes wrong is said, and does not hang


def good(device: torch.device) -> None:
    dist.barrier()


def wrong_on_one(device: torch.device) -> None:
    assert dist.get_rank() == 0, "of rank 1"


def hangs(device: torch.device) -> None:
    if dist.get_rank() == 0:
        time.sleep(3600)


def dies(device: torch.device) -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    time.sleep(3600)


def test_what_is_raised_is_of_its_rank(tmp_path: Path) -> None:
    first, second = ranks.run({"wrong": wrong_on_one, "good": good}, tmp_path)["wrong"]
    assert not first
    assert "of rank 1" in second


def test_a_hang_ends_at_the_limit(tmp_path: Path) -> None:
    found = ranks.run({"hangs": hangs, "good": good}, tmp_path, limit=10.0)
    assert found["good"][0].endswith("killed: the limit of time")
    assert found["good"][1]  # killed too, or it has just seen the other one go
    assert found["hangs"][0].endswith("killed: the limit of time")


def test_a_rank_that_dies_ends_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_GRACE", 0.5)
    first, second = ranks.run({"dies": dies}, tmp_path)["dies"]
    assert first == "cut off; killed: the other rank died"
    assert second == "cut off; ended with exit code 3"
