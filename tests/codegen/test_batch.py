"""Kernels over many sets of tensors compile with no GPU, and read whole rows 16 bytes at once."""

from __future__ import annotations

import torch

from iocompiler.codegen.batch import SIGNATURE
from iocompiler.cost_model.device import DEVICES
from iocompiler.cost_model.schedule import choose
from iocompiler.plan.data import BatchStep
from iocompiler.runtime.compile import compile_kernels
from iocompiler.runtime.subject import Subject
from iocompiler.tile.flat import LENGTH, PARTS, folds
from tests.codegen.compiling import instructions
from tests.tile.test_flat import column_sums


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
