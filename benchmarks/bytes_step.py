"""One training step in a process of its own, for `benchmarks.bytes` to hold under ncu:
``python -m benchmarks.bytes_step bert ours --plan plan.json``.

It compiles, warms up, writes down what the compiler says it moves, and runs one step between the
profiler's start and stop. Without a GPU nothing is run of ours: the step is planned for an H200.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import models, modules, timing
from benchmarks.model_zoo import MODELS
from benchmarks.module_zoo import CASES

_MODULES = {case.name: case for case in CASES if case.name == "encoder layer"}
STEPS = (*MODELS, *_MODULES)
"""What there is to measure: the models, and one layer of BERT-large (B8 S512)."""

Step = Callable[[], object]


def main() -> None:
    found = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    found.add_argument("name", choices=STEPS)
    found.add_argument("peer", choices=["ours", "inductor"])
    found.add_argument("--plan", required=True, help="where what the compiler says goes")
    found.add_argument("--attention", default="eager", choices=["eager", "sdpa"])
    found.add_argument("--quick", action="store_true")
    found.add_argument("--warm", action="store_true", help="fill caches: nothing is written")
    args = found.parse_args()
    said, step = (_ours if args.peer == "ours" else _inductor)(args)
    if args.warm:
        return
    Path(args.plan).write_text(json.dumps(said))
    if step is not None:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def _ours(args: argparse.Namespace) -> tuple[dict[str, Any], Step | None]:
    """The kernels of the plan and the bytes of all of it, library calls included."""
    from iocompiler import Compiler
    from iocompiler.cost_model.device import DEVICES, current_device
    from iocompiler.report.explain import explain, report_of

    module, inputs = _subject(args)
    step = None
    if timing.on_gpu():
        records: list[Any] = []
        backend = Compiler(on_compiled=records.append, cache=False)
        step = _warmed(args.name, module, torch.compile(module, backend=backend), inputs)
        report = report_of(records, current_device(torch.device("cuda")), False, Counter())
    else:
        h200 = DEVICES["h200"].name
        report = explain(module, device=h200, training=True, compile_kernels=False, **inputs)
    fields = ("name", "graph", "bytes", "bound")
    kernels = [{f: getattr(k, f) for f in fields} for k in report.kernels if k.generated]
    return {"kernels": kernels, "bytes": report.bytes_moved}, step


def _inductor(args: argparse.Namespace) -> tuple[dict[str, Any], Step | None]:
    """The bytes that Inductor counts itself: what its kernels and library calls read and write."""
    from torch._inductor import metrics

    torch._logging.set_logs(inductor_metrics=True)  # it counts only for its log
    module, inputs = _subject(args)
    step = _warmed(args.name, module, torch.compile(module, backend="inductor"), inputs)
    said = {"kernels": [], "bytes": metrics.num_bytes_accessed}
    return said, step if timing.on_gpu() else None


def _subject(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    device, bf16 = timing.device(), torch.bfloat16
    if case := _MODULES.get(args.name):
        return case.module(args.quick, device).to(bf16), case.inputs(args.quick, device, seed=1)
    model = MODELS[args.name]
    module = model.module(args.attention, args.quick, device).to(bf16).train()
    return module, model.inputs(args.quick, device, bf16, seed=1)


def _warmed(name: str, module: nn.Module, function: Any, inputs: dict[str, Any]) -> Step:
    """The training step, which has run twice."""
    make = modules.training_step if name in _MODULES else models.training_step
    step = make(module, function, inputs)
    for _ in range(2):
        step()
    return step


if __name__ == "__main__":
    main()
