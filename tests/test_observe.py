from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import iocompiler as ioc
from iocompiler.errors import VerificationFailed
from iocompiler.graph import rewrite, view
from iocompiler.observe import Dump, Summary, Verify
from iocompiler.pipeline import Pipeline

aten = torch.ops.aten
Captured = Callable[..., GraphModule]


@ioc.rewrite(lambda x: aten.relu.default(aten.relu.default(x)))
def relu_of_relu(x: Any) -> Any:
    return aten.relu.default(x)


@ioc.graph_pass
def idle(gm: GraphModule) -> int:
    return 0


@ioc.graph_pass
def wrong(gm: GraphModule) -> int:
    for node in view.calls(gm, aten.sin.default):
        rewrite.respell(node, aten.cos.default, node.args)
    return 1


def test_dump_writes_what_changed(captured: Captured, tmp_path: Path) -> None:
    summary = Summary(price=lambda node: 8)
    gm = captured(lambda x: x.relu().relu(), torch.randn(4))
    Pipeline(idle, relu_of_relu).run(gm, [summary, Dump(tmp_path / "out", summary)])
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["00_capture.txt", "02_relu_of_relu.txt", "summary.txt"]
    rows = [
        line.split() for line in (tmp_path / "out" / "summary.txt").read_text().splitlines()[1:]
    ]
    assert [row[:5] for row in rows] == [
        ["capture", "0", "2", "-", "16"],
        ["idle", "0", "2", "16", "16"],
        ["relu_of_relu", "1", "1", "16", "8"],
    ]


def test_verify_accepts_what_is_right(captured: Captured) -> None:
    x = torch.randn(4)
    gm = captured(lambda x: x.relu().relu(), x)
    Pipeline(relu_of_relu).run(gm, [Verify([x])])


def test_verify_names_the_pass_that_is_wrong(captured: Captured) -> None:
    x = torch.randn(4)
    gm = captured(lambda x: x.sin(), x)
    with pytest.raises(VerificationFailed, match="pass 'wrong' changed the result"):
        Pipeline(idle, wrong).run(gm, [Verify([x])])


def test_verify_sees_the_same_random_numbers_and_no_mutation(captured: Captured) -> None:
    x = torch.randn(4)

    def f(x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return torch.nn.functional.dropout(x.relu().relu(), 0.5)

    gm = captured(f, x.clone())
    before = x.clone()
    Pipeline(relu_of_relu).run(gm, [Verify([x])])
    assert torch.equal(x, before)
