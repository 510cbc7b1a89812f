"""The attention templates compile with no GPU, in registers and shared memory that are there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton

from iocompiler.cost_model.attention_decode import programs_per_sm, tile
from iocompiler.cost_model.device import DEVICES
from iocompiler.ops.target import planned_for
from iocompiler.runtime import attention_decode
from iocompiler.runtime.attention import Problem
from iocompiler.versions import version_tuple
from tests.codegen.template_compiling import resources
from tests.ops.score_programs import CASES, COARSE_SOFTCAP

SHARED = {90: 227 * 1024, 80: 163 * 1024}
SPILLS = 512  # bytes: what wide or odd heads may spill
# bytes a thread writes and reads again: the tiles are Triton 3.6's best, and what 3.9 makes of them
# does not fit under their limits of registers; two gathers a score least of all
NEW = version_tuple(triton.__version__) >= (3, 9)
USUAL_SPILLS, DROPOUT_SPILLS, IMAGE_SPILLS = (160, 512, 2048) if NEW else (0, 80, SPILLS)


def problem(name: str, width: int, dtype: torch.dtype) -> Problem:
    case = COARSE_SOFTCAP if name == "coarse softcap" else CASES[name]
    q = torch.zeros(2, 256, 4, width, dtype=dtype).transpose(1, 2)
    operands = [x.to(dtype) if x.is_floating_point() else x for x in case.operands(2, 4, 256, 256)]
    return Problem(q, q, q, case.program(width**-0.5), tuple(operands))


@pytest.mark.parametrize(
    "name",
    ["causal", "window", "alibi", "softcap", "coarse softcap", "document", "relative", "sigmoid"],
)
def test_the_usual_tiles_spill_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = resources(problem(name, 64, torch.bfloat16), 90, monkeypatch)
    assert {"attention_forward", "attention_backward"} <= found.keys()
    assert all(each["spills"] <= USUAL_SPILLS for each in found.values()), found
    assert all(each["shared"] <= SHARED[90] for each in found.values()), found


def test_biases_by_the_row_and_the_column_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    found = resources(problem("image", 64, torch.bfloat16), 90, monkeypatch)
    assert "operand_parts" in found
    assert all(each["shared"] <= SHARED[90] for each in found.values()), found
    assert all(each["spills"] <= IMAGE_SPILLS for each in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("width", [33, 64, 128, 256])
@pytest.mark.parametrize(
    "name", ["alibi", "softcap", "relative", "bias", "padding, uniform", "sunk"]
)
def test_every_width_compiles(
    name: str, width: int, dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with planned_for(divmod(capability, 10)):
        found = resources(problem(name, width, dtype), capability, monkeypatch)
    assert all(each["shared"] <= SHARED[capability] for each in found.values()), found
    if dtype == torch.bfloat16 and capability == 90:
        assert all(each["spills"] <= SPILLS for each in found.values()), found


@pytest.mark.parametrize("name", ["causal", "alibi", "bias"])
def test_dropout_hardly_spills(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = replace(problem(name, 64, torch.bfloat16), dropout_p=0.1, seed=torch.tensor(1))
    found = resources(given, 90, monkeypatch)
    assert all(each["spills"] <= DROPOUT_SPILLS for each in found.values()), found
    assert all(each["shared"] <= SHARED[90] for each in found.values()), found


def decoding(name: str, width: int, rows: int, dtype: torch.dtype) -> Problem:
    case = CASES[name]
    q = torch.zeros(2, 32, rows, width, dtype=dtype)
    k = torch.zeros(2, 8, 2048, width, dtype=dtype)
    operands = [
        x.to(dtype) if x.is_floating_point() else x for x in case.operands(2, 32, rows, 2048)
    ]
    return Problem(q, k, k, case.program(width**-0.5), tuple(operands))


def _check_decoding(given: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing spills, and as many programs fit an SM as the price assumes."""
    found = resources(given, 90, monkeypatch, gradients=False)
    assert found.keys() == {"attention_split", "attention_combine"}
    assert all(each["spills"] == 0 for each in found.values()), found
    task = attention_decode.work(given.form)
    chosen = tile(task)
    a_program = found["attention_split"]
    resident = programs_per_sm(chosen, task, DEVICES["h200"])
    assert resident >= 2
    assert a_program["shared"] + 1024 <= (SHARED[90] + 1024) // resident
    assert -(-a_program["registers"] // 8) * 8 * 32 * chosen.warps * resident <= 65536


@pytest.mark.parametrize(("name", "rows"), [("full", 1), ("padding", 4), ("softcap", 8)])
def test_decoding_fits(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _check_decoding(decoding(name, 128, rows, torch.bfloat16), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("width", [33, 64, 128, 256])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("name", ["full", "alibi", "relative", "bias", "padding, uniform", "sunk"])
def test_decoding_fits_in_every_width(
    name: str, rows: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    _check_decoding(decoding(name, width, rows, dtype), monkeypatch)
