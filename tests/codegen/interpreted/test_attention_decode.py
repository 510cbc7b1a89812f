"""The template for few queries over many keys in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

from iocompiler.runtime.template_launch import Launch
from tests.ops.score_checks import Shape, in_parts, problems
from tests.ops.score_programs import CASES

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, of NaN that is meant
    # Triton's interpreter in loops
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]

FORWARD = ("attention_forward", "attention_split", "attention_combine")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels of a forward that ran."""
    names: list[str] = []
    run = Launch.run

    def noted(launch, programs, *tensors):
        name = launch.kernel.fn.__name__
        if name in FORWARD:
            names.append(name)
        run(launch, programs, *tensors)

    monkeypatch.setattr(Launch, "run", noted)
    return names


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", CASES)
def test_programs(name: str, parts: int, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(parts, monkeypatch)
    assert not problems(name, (1, 4, 2, 3, 100, 16, 16), torch.float32)
    assert ran == ["attention_split", "attention_combine"][: 1 + (parts > 1)]


@pytest.mark.parametrize("parts", [1, 3])
def test_what_rows_share_is_lifted_in_half_precision(
    parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_parts(parts, monkeypatch)
    assert not problems("alibi", (2, 4, 2, 3, 100, 16, 16), torch.float16)


@pytest.mark.parametrize("name", ["full", "alibi", "sunk", "padding", "padding, uniform"])
@pytest.mark.parametrize(
    "shape",
    [(1, 4, 1, 1, 300, 24, 20), (2, 3, 3, 1, 33, 16, 16), (1, 6, 2, 7, 50, 33, 16)],
    ids=str,
)
def test_odd_sizes_and_groups(name: str, shape: Shape, ran: list[str]) -> None:
    assert not problems(name, shape, torch.float32, gradients=name != "alibi")
    assert ran[0] == "attention_split"


@pytest.mark.parametrize("name", ["full", "padding", "sunk"])
def test_dropout(name: str) -> None:
    shape = (2, 4, 2, 3, 100, 16, 16)
    assert not problems(name, shape, torch.float32, gradients=False, dropout_p=0.3)


@pytest.mark.parametrize("name", ["causal", "softcap"])
def test_rows_of_several_tiles(name: str) -> None:
    assert not problems(name, (1, 8, 1, 5, 70, 16, 16), torch.float32)
