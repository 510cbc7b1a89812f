"""Kernels over many sets of tensors compile with no GPU, and read whole rows 16 bytes at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.adamw import AdamW
from benchmarks.schedules import plan_of_adamw
from iocompiler.codegen.batch import SIGNATURE
from iocompiler.cost_model.candidates import candidates
from iocompiler.cost_model.device import DEVICES
from iocompiler.cost_model.schedule import choose
from iocompiler.plan.data import BatchStep
from iocompiler.runtime.compile import compile_kernels
from iocompiler.runtime.measure import GpuBench
from iocompiler.runtime.subject import Subject
from iocompiler.runtime.tune import subjects_of
from iocompiler.tile.flat import LENGTH, PARTS, folds
from tests.codegen.compiling import instructions
from tests.tile.test_flat import column_sums

CANDIDATES = {
    "the choice": {},
    "more programs of a multiprocessor": {"registers": 64},
    "larger blocks": {"x_block": 2048, "num_warps": 8},
    "a walk": {"programs": 1056},
    "a walk over larger blocks": {"x_block": 2048, "num_warps": 8, "programs": 4224},
}


@pytest.fixture(scope="module")
def adamw() -> Subject:
    """AdamW over a few tensors in bfloat16, with the schedule of many."""
    (large, _) = subjects_of(plan_of_adamw(AdamW(16384, 2)), DEVICES["h200"], {}, shortest=0.0)
    return large


@pytest.mark.parametrize("name", CANDIDATES)
def test_adamw_compiles_without_spills(name: str, adamw: Subject) -> None:
    schedule = replace(adamw.chosen, **CANDIDATES[name])
    sizes = {LENGTH.name: 100 * 82 * 16384}
    assert schedule in candidates(adamw.program, DEVICES["h200"], sizes, 99, adamw.chosen)
    (built,) = compile_kernels([(adamw.job(schedule, 90), "adamw.py")])
    assert built.metadata["spills"] == 0
    assert built.metadata["registers"] <= (schedule.registers or 255)
    text = instructions(built)
    assert ("LDG.E.128" in text, "STG.E.128" in text) == (True, True)


@pytest.mark.gpu
def test_every_candidate_computes_the_same(adamw: Subject) -> None:
    """Members of a length that no block divides too."""
    assert isinstance(adamw.step, BatchStep)
    (first, length), (second, _) = adamw.step.members
    step = replace(adamw.step, members=((first, length), (second, length - 7)))
    subject, device = replace(adamw, step=step), torch.device("cuda")
    sizes = {LENGTH.name: 1 << 27}  # of many: so that there is something to walk
    found = candidates(subject.program, DEVICES["h200"], sizes, 99, subject.chosen)
    bench, expected = GpuBench(device), list[torch.Tensor]()
    images = bench.compile([(subject, schedule) for schedule in found])
    ran = set[bool]()
    for schedule, image in zip(found, images, strict=True):
        assert image is not None, schedule
        sets = bench._argument_sets(subject)[:1]
        given = [tensor for member in sets[0] for tensor in member]
        for seed, tensor in enumerate(given):
            tensor.copy_(torch.rand(len(tensor), generator=seeded(seed, device), device=device))
        for call in bench._calls(subject, schedule, image, sets):  # none if too large to launch
            call()
            ran.add(schedule.programs > 0)
            expected = expected or [tensor.clone() for tensor in given]
            torch.testing.assert_close(given, expected, msg=lambda m, s=schedule: f"{s}: {m}")
    assert ran == {True, False}


def seeded(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def test_a_fold_of_many_members() -> None:
    fold = folds(column_sums((1024,), 264))[0]
    sizes = {LENGTH.name: 43 * 1024, PARTS.name: 264}
    schedule = choose(fold.program, DEVICES["h200"], sizes)
    step = BatchStep("folds", fold.program, schedule, ((("a", "b"), 1024),), (), parts=(264,))
    job = Subject(step, "folds", SIGNATURE, sizes).job(schedule, 90)
    (built,) = compile_kernels([(job, "folds.py")])
    assert built.metadata["spills"] == 0
    assert "LDG.E.128" in instructions(built)
    assert fold.program.buffers[1].dtype == torch.bfloat16
