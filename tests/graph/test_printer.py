from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule

from iocompiler.graph.printer import describe, show

Captured = Callable[..., GraphModule]


def test_one_node_a_line_under_the_users_line(captured: Captured) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        return y + 1

    text = show(captured(f, torch.randn(2, 5)), price=lambda node: 80)
    line = f.__code__.co_firstlineno
    assert text == (
        "  l_x_: f32[2, 5]\n"
        f"# test_printer.py:{line + 1}  y = x.exp()\n"
        "  exp: f32[2, 5] = aten.exp(l_x_)  # 80 B\n"
        f"# test_printer.py:{line + 2}  return y + 1\n"
        "  add: f32[2, 5] = aten.add.Tensor(exp, 1)  # 80 B\n"
        "  return (add,)\n"
    )


def test_symbols_and_no_path_or_address(captured: Captured) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x,)) * x.shape[0]

    text = show(captured(f, torch.randn(3, 4), dynamic=True))
    assert "f32[s" in text
    assert "/" not in text
    assert "0x" not in text


def test_describe() -> None:
    assert describe(torch.empty(2, 3, dtype=torch.bfloat16)) == "bf16[2, 3]"
    assert describe((torch.empty(()), None)) == "(f32[], )"
    assert describe(3) == ""
