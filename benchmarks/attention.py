"""Attention written plainly, forward and forward + backward: eager, Inductor, ours on the same
code; FlexAttention, for which the user rewrites the model; and, where its kernels take it without a
mask, `scaled_dot_product_attention`, in eager mode.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.attention_inputs import inputs, sizes
from benchmarks.attention_zoo import CASES, Case, Sizes
from benchmarks.harness import Session, columns, note, parser, verdict, wanted
from benchmarks.peers import Peer, chosen
from benchmarks.table import Row, Table, ratio
from tests.accuracy import compare_with_eager

PHASES = ("forward", "step")
FLEX, LIBRARY = "flex", "sdpa"
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def main() -> None:
    args = arguments()
    if args.sweep:
        from benchmarks.attention_sweep import sweep

        sweep(args)
        return
    peers = chosen(args.peers)
    shown = ["name", *columns(peers, "ms"), "flex ms", "ours/flex", "ours/inductor"]
    shown += [*columns(peers, "device ms"), "flex device ms", "ours/flex device"]
    shown += ["sdpa ms", "ours/sdpa", "sdpa device ms", "ours/sdpa device"]
    shown += ["ours % copy", *columns(peers, "GiB"), "flex GiB", "check"]
    session = Session(args, Table("attention", shown))
    session.table.facts["copy GB/s"] = copy_rate(args.quick) / 1e9
    for case in CASES:
        phases = ("step",) if args.quick else tuple(args.phase.split(","))
        for phase in ("forward",) if case.queries else phases:
            if wanted(f"{case.name} {phase}", args.only):
                _row(session, case, phase)
    session.table.finish(args.json)


def arguments() -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--phase", default=",".join(PHASES), help="forward, step (with backward)")
    found.add_argument("--sweep", action="store_true", help="time tiles of our template instead")
    found.add_argument("--length", type=int, default=4096)
    found.add_argument("--width", type=int, default=64)
    found.add_argument("--no-flex", dest="flex", action="store_false")
    found.set_defaults(budget=0.3)
    return found.parse_args()


@functools.cache
def copy_rate(quick: bool) -> float:
    """Bytes/s of a copy of 1 GiB."""
    return timing.copy_bandwidth(2**24 if quick else 2**30, quick)


def _side_by_side(mixed: Tensor) -> Tensor:
    """[B, H, S, D] as [B, S, H * D], which a model multiplies next: what it takes to lie so is the
    attention's, whoever does it.
    """
    return mixed.transpose(1, 2).flatten(2)


class _Plain(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.plain = case.plain

    def forward(self, **given: Tensor) -> Tensor:
        return _side_by_side(self.plain(**given))


def _row(session: Session, case: Case, phase: str) -> None:
    row: Row = {"name": f"{case.name} {phase}"}
    session.table.rows.append(row)
    train = phase == "step"
    for peer in session.peers:
        if session.args.check and peer.name == "ours":
            session.attempt(row, "check", partial(_check, case, train, peer, row))
        measure = partial(_measure, session.args, case, train, peer.name, peer.compile, row)
        session.attempt(row, peer.name, measure)
    if session.args.flex and case.flex is not None and not session.args.quick:
        measure = partial(_measure, session.args, case, train, FLEX, partial(flex, case), row)
        session.attempt(row, FLEX, measure)
    if case.library is not None:
        library = replace(case, plain=case.library)
        measure = partial(_measure, session.args, library, train, LIBRARY, lambda f: f, row)
        session.attempt(row, LIBRARY, measure)
    for other in (FLEX, LIBRARY, "inductor"):
        row[f"ours/{other}"] = ratio(row.get("ours ms"), row.get(f"{other} ms"))
    for other in (FLEX, LIBRARY):
        row[f"ours/{other} device"] = ratio(
            row.get("ours device ms"), row.get(f"{other} device ms")
        )


def _measure(
    args: argparse.Namespace,
    case: Case,
    train: bool,
    name: str,
    compile_: Compile,
    row: Row,
) -> None:
    make = training_step if train else _forward
    call, given = make(case, sizes(args, case), compile_)
    timing.first_call(call)
    for leaf in given.values():
        leaf.grad = None
    with timing.PeakMemory() as peak:
        call()
    row[f"{name} GiB"] = peak.gib
    time = timing.steps(call, args.steps, args.budget, flush=True)
    row[f"{name} ms"], row[f"{name} spread ms"] = time.ms, time.spread_ms
    queued = timing.steps(call, args.steps, args.budget, flush=True, queued=True)
    row[f"{name} device ms"] = queued.ms
    if name == "ours":
        note(row, "ours", _variant(case, given))
        if case.queries:
            read = sum(given[x].numel() * given[x].element_size() for x in "kv")
            row["ours % copy"] = 100 * read / (time.ms * 1e-3) / copy_rate(args.quick)


def training_step(
    case: Case, size: Sizes, compile_: Compile
) -> tuple[Callable[[], None], dict[str, Tensor]]:
    """Forward and backward from a fixed random cotangent, and the inputs, whose gradients it makes
    anew.
    """
    given = inputs(case, size)
    function = compile_(_Plain(case))
    cotangent = torch.randn_like(_side_by_side(given["q"].detach()))  # no call in another mode

    def step() -> None:
        for leaf in given.values():
            leaf.grad = None
        function(**given).backward(cotangent)

    return step, given


def _forward(
    case: Case, size: Sizes, compile_: Compile
) -> tuple[Callable[[], None], dict[str, Tensor]]:
    given = inputs(case, size)
    function = compile_(_Plain(case))

    @torch.no_grad()
    def forward() -> None:
        function(**given)

    return forward, given


def _variant(case: Case, given: dict[str, Tensor]) -> str:
    """What the recogniser says of the code."""
    import iocompiler as ioc

    report = ioc.explain(_Plain(case), **given)
    found = [str(each.variant) for each in report.rewrites if each.pattern == "attention"]
    return ", ".join(found) or "; ".join(str(each.reason) for each in report.misses)


def flex(case: Case, plain: Callable[..., Any]) -> Callable[..., Any]:
    """What FlexAttention's user runs in place of ``plain``."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    assert case.flex is not None
    parts, end = case.flex, case.end

    def attended(given: dict[str, Tensor], **how: Any) -> Any:
        found = flex_attention(*(given[name] for name in "qkv"), return_lse=end is not None, **how)
        return _side_by_side(found if end is None else end(*found, given))

    compiled = torch.compile(attended, dynamic=False)
    made: list[Any] = []

    def run(**given: Tensor) -> Any:
        q, k = given["q"], given["k"]
        if not made:  # once: what a model does that keeps its mask from layer to layer
            score_mod, mask_mod = parts(given)
            lengths = (q.shape[0], None, q.shape[2], k.shape[2])
            mask = mask_mod and create_block_mask(mask_mod, *lengths, device=q.device)
            made.append({"score_mod": score_mod, "block_mask": mask, "enable_gqa": True})
        return compiled(given, **made[0])

    return run


def _check(case: Case, train: bool, ours: Peer, row: Row) -> None:
    size = Sizes(2, 4, 384, 32) if timing.on_gpu() else Sizes(1, 2, 128, 16)
    given = {name: x.detach() for name, x in inputs(case, size).items()}
    for name in ("q", "k", "v", *case.learned):
        given[name].requires_grad_()
    row["check"] = verdict(
        compare_with_eager(
            lambda: _Plain(case),
            given,
            ours.compile,
            dtype=torch.bfloat16,
            device=timing.device(),
            train=train,
        )
    )


if __name__ == "__main__":
    main()
