"""A random program: inputs, one line a step, outputs; it is Python text and runs as such."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FLOATS = ("float32", "bfloat16", "float16", "float64")
INTS = ("int64", "int32", "uint8", "bool")
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")


@dataclass(frozen=True)
class Given:
    """An input: its layout is one of `LAYOUTS`; whole numbers from 0 to ``most`` - 1."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    grad: bool = False
    most: int = 5

    def draw(self, generator: torch.Generator, device: str = "cpu") -> Tensor:
        shape = list(self.shape)
        if self.layout == "sliced" and shape:
            shape[-1] = 2 * shape[-1] + 1
        if self.layout == "expanded" and shape:
            shape[0] = min(shape[0], 1)
        if self.layout == "transposed":
            shape = shape[::-1]
        tensor = self._values(shape, generator).to(device)
        if self.layout == "sliced" and shape:
            return tensor[..., 1::2]
        if self.layout == "expanded" and shape:
            return tensor.expand(self.shape)
        return (
            tensor.permute(tuple(range(len(shape))[::-1]))
            if self.layout == "transposed"
            else tensor
        )

    def _values(self, shape: list[int], generator: torch.Generator) -> Tensor:
        dtype: torch.dtype = getattr(torch, self.dtype)
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(dtype)
        most = 2 if dtype == torch.bool else self.most
        return torch.randint(0, most, shape, generator=generator).to(dtype)


@dataclass(frozen=True)
class Step:
    """``name = text``, where ``text`` reads ``{0}``, ``{1}`` ...: the names in ``reads``.

    A step in place writes to its first operand, and its name stands for that from there on.
    """

    name: str
    text: str
    reads: tuple[str, ...]

    def line(self) -> str:
        return f"{self.name} = {self.text.format(*self.reads)}"


ATTENTION = "({0} @ {1}.mT).softmax(-1) @ {1}"
_FUSED = {
    ATTENTION: "F.scaled_dot_product_attention(*(t[(None,) * (4 - t.dim())] for t in ({0}, {1}, "
    "{1})), scale=1.0)[(0,) * (4 - max({0}.dim(), {1}.dim()))]"
}


@dataclass(frozen=True)
class Program:
    """``given`` under their names, steps in order, the names that are returned."""

    given: tuple[tuple[str, Given], ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    train: bool = True
    dynamic: bool = False

    def source(self) -> str:
        """``def program(...)``."""
        body = [step.line() for step in self.steps]
        names = ", ".join(name for name, _ in self.given)
        returned = "".join(f"{name}, " for name in self.outputs).strip()
        lines = [f"def program({names}):", *(f"    {line}" for line in body)]
        return "\n".join([*lines, f"    return ({returned})"])

    def function(self, wide: bool = False) -> Callable[..., tuple[Tensor, ...]]:
        """The program; if ``wide``, every float dtype it names is float64."""
        names: dict[str, Any] = {"torch": torch, "F": F}
        for name in (*FLOATS, *INTS):
            names[name] = getattr(torch, "float64" if wide and name in FLOATS else name)
        code = compile(self.source(), f"<fuzz {'wide' if wide else ''}>", "exec")
        exec(code, names)
        return names["program"]  # type: ignore[no-any-return]

    def fused(self) -> Program:
        """The same, with each attention that is spelled out as one call of torch's own kernel."""
        steps = tuple(replace(s, text=_FUSED.get(s.text, s.text)) for s in self.steps)
        return replace(self, steps=steps)

    def draw(self, seed: int, device: str = "cpu") -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [given.draw(generator, device) for _, given in self.given]

    def pruned(self) -> Program:
        """Without the steps and inputs that no output needs; steps in place stay."""
        needed = set(self.outputs)
        kept: list[Step] = []
        for step in reversed(self.steps):
            if step.name in needed or (in_place(step) and set(step.reads[:1]) & needed):
                kept.append(step)
                needed |= set(step.reads)
        given = tuple(pair for pair in self.given if pair[0] in needed)
        steps = tuple(reversed(kept))
        return replace(self, given=given, steps=steps)

    def as_test(self, title: str) -> str:
        """A test, ready to stand in tests/fuzz/test_found.py."""
        given = [f'        ("{name}", {given!r}),' for name, given in self.given]
        steps = [f"        {step!r}," for step in self.steps]
        rest = f"train={self.train}, dynamic={self.dynamic}"
        return "\n".join(
            [f"def test_{re.sub('[^a-z0-9]+', '_', title.lower())}() -> None:"]
            + [f"    # {line}" for line in self.source().splitlines()]
            + ["    given = (", *given, "    )", "    steps = (", *steps, "    )"]
            + [f"    assert not verdict(Program(given, steps, {self.outputs!r}, {rest}))"]
        )


def in_place(step: Step) -> bool:
    return bool(re.match(r"\{0\}(\[.*\])?\.\w+[a-z0-9]_\(", step.text))


def alive(names: Sequence[str], program: Program) -> tuple[str, ...]:
    """Those of ``names`` the program still has."""
    here = {n for n, _ in program.given} | {s.name for s in program.steps}
    return tuple(n for n in names if n in here)
