"""Observers the runner calls between passes: they write the dump, verify and keep the table of
passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map_only

from iocompiler.errors import VerificationFailed
from iocompiler.graph.printer import show
from iocompiler.pipeline import Done

Price = Callable[[Node], Any]


@dataclass
class Summary:
    """One row a pass: name, sites, nodes, bytes after it, milliseconds. ``price`` prices a node,
    None prices none.
    """

    price: Price | None = None
    rows: list[tuple[str, int, int, Any, float]] = field(default_factory=list)

    def __call__(self, gm: GraphModule, done: Done) -> None:
        calls = [node for node in gm.graph.nodes if node.op == "call_function"]
        moved = sum(self.price(node) for node in calls) if self.price is not None else None
        self.rows.append((done.name, done.sites, len(calls), moved, done.seconds * 1e3))

    def __str__(self) -> str:
        lines = [
            f"{'pass':<24}{'sites':>8}{'nodes':>8}{'bytes before':>18}{'bytes after':>18}{'ms':>10}"
        ]
        before: Any = None
        for name, sites, nodes, moved, milliseconds in self.rows:
            shown = ("-" if bytes_ is None else str(bytes_) for bytes_ in (before, moved))
            first, second = shown
            lines.append(
                f"{name:<24}{sites:>8}{nodes:>8}{first:>18}{second:>18}{milliseconds:>10.1f}"
            )
            before = moved
        return "\n".join(lines) + "\n"


@dataclass
class Dump:
    """Writes ``00_capture.txt``, and ``03_attention.txt`` where a pass changed something.

    ``summary`` is an observer called before this one; its table goes into ``summary.txt``.
    """

    folder: Path
    summary: Summary

    def __call__(self, gm: GraphModule, done: Done) -> None:
        if done.number == 0 or done.sites:
            text = show(gm, self.summary.price)
            dump_text(self.folder / f"{done.number:02}_{done.name}.txt", text)
        if done.number == done.total:
            dump_text(self.folder / "summary.txt", str(self.summary))


_opened: dict[str, int] = {}
"""How many graphs this process has dumped into each folder; only file names depend on it."""


def dump_folder(root: str) -> Path:
    """Where a graph is dumped: the folder itself for the first one, then graph_1, graph_2 in it."""
    count = _opened[root] = _opened.get(root, -1) + 1
    return Path(root) / f"graph_{count}" if count else Path(root)


def dump_text(path: Path, text: str) -> None:
    """Write a file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@dataclass
class Verify:
    """Runs the graph on the example inputs after each pass and compares with the result before it.

    Inputs that are fake are not run. Random operators see the same seed each time.
    """

    example_inputs: Sequence[Any]
    before: list[Any] | None = None

    def __call__(self, gm: GraphModule, done: Done) -> None:
        if any(isinstance(x, (FakeTensor, torch.SymInt)) for x in self.example_inputs):
            return
        if done.number and not done.sites:
            return
        after = self._run(gm)
        if self.before is not None:
            self._compare(after, done.name)
        self.before = after

    def _run(self, gm: GraphModule) -> list[Any]:
        gm.recompile()
        inputs = tree_map_only(
            torch.Tensor, lambda x: x.detach().clone(), list(self.example_inputs)
        )
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            result = torch.fx.Interpreter(gm).run(*inputs)
        return [*tree_leaves(result), *inputs]

    def _compare(self, after: list[Any], name: str) -> None:
        assert self.before is not None
        for old, new in zip(self.before, after, strict=True):
            if not isinstance(old, torch.Tensor):
                continue
            loose = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(old.dtype, 1e-4)
            try:
                torch.testing.assert_close(new, old, rtol=loose, atol=loose, equal_nan=True)
            except AssertionError as error:
                raise VerificationFailed(name=name, detail=str(error).splitlines()[0]) from error
