"""Launch overhead on a model too small to fill a GPU: host time a step, kernels a step, and how
long the GPU is idle.

"host us" is the host time to queue one step, the device not waited for; "step us" the device time
from step to step; "busy us" the sum of its kernels' times as the profiler has them; "idle %" what
is left of the step. ``--part steps`` has whole training steps by four clocks instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import timing
from benchmarks.harness import Session, add_geometric_mean, add_ratio, columns, parser, wanted
from benchmarks.model_zoo import MODELS, Model
from benchmarks.peers import Peer, chosen
from benchmarks.subjects import model_step
from benchmarks.table import Row, Table

# of each part, the peers and rows unless told
_DEFAULTS = {
    "small": ("eager,inductor,ours,inductor-graphs,ours-graphs", "gpt2,llama"),
    "steps": ("inductor,ours", ""),
}


def main() -> None:
    args = arguments()
    if args.part == "steps":
        from benchmarks.overhead_steps import run

        run(args)
        return
    if args.quick:
        args.only, args.phase = "gpt2", "forward"
    peers = chosen(args.peers)
    shown = ["name", *columns(peers, "host us"), "ours/inductor"]
    shown += [f"{p.name} {unit}" for p in peers for unit in ("kernels", "idle %")]
    session = Session(args, Table("overhead, small models (hidden 64, 2 layers), bf16", shown))
    for model in MODELS.values():
        for phase in args.phase.split(","):
            if wanted(f"{model.name} {phase}", args.only):
                row: Row = {"name": f"{model.name} {phase}"}
                session.table.rows.append(row)
                for peer in peers:
                    measure = partial(_measure, args, model, phase == "train", peer, row)
                    session.attempt(row, peer.name, measure)
                add_ratio(row, "host us")
    add_geometric_mean(session.table)
    session.table.finish(args.json)


def arguments() -> argparse.Namespace:
    found = parser(__doc__)
    add = found.add_argument
    add("--part", choices=tuple(_DEFAULTS), default="small", help="small models, or whole steps")
    add("--phase", default="forward,train", help="of small models")
    add("--length", type=int, default=4096, help="of the step that is attention alone")
    add("--width", type=int, default=64, help="of its heads")
    add("--no-flex", dest="flex", action="store_false", help="FlexAttention does not run it")
    found.set_defaults(steps=200, peers=None, only=None)
    args = found.parse_args()
    peers, only = _DEFAULTS[args.part]
    args.peers = peers if args.peers is None else args.peers
    args.only = only if args.only is None else args.only
    return args


def _measure(args: argparse.Namespace, model: Model, train: bool, peer: Peer, row: Row) -> None:
    call = model_step(model, train, peer, quick=True)
    row[f"{peer.name} step us"] = 1e3 * timing.steps(call, args.steps, args.budget, warm_up=10).ms
    row[f"{peer.name} host us"] = 1e3 * timing.queueing(call, min(args.steps, 50), args.budget).ms
    if timing.on_gpu():
        kernels, busy_us = _profile(call, 10)
        row[f"{peer.name} kernels"], row[f"{peer.name} busy us"] = kernels, busy_us
        row[f"{peer.name} idle %"] = 100 * max(
            0.0, 1 - busy_us / float(row[f"{peer.name} step us"])
        )  # type: ignore[arg-type]


def _profile(call: Callable[[], Any], repetitions: int) -> tuple[float, float]:
    """Kernels a step and the microseconds they take together."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repetitions):
            call()
        torch.cuda.synchronize()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy_us = sum(e.device_time for e in on_device)
    return len(on_device) / repetitions, busy_us / repetitions


if __name__ == "__main__":
    main()
