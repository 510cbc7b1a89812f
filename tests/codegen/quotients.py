"""Quotients and powers by hand, of the ends of float32's range too."""

from __future__ import annotations

from dataclasses import replace

import torch

from iocompiler.tile.index import Affine
from iocompiler.tile.program import Builder
from tests.codegen.programs import F32, X0, Case, axes, ins, outs, pointwise


def divided(divisor: float) -> Case:
    """out = a / divisor, to the last bit, infinite and denormal numbers too."""
    build = Builder()
    quotient = build.map("div", build.load("a", X0, F32), build.const(divisor, F32))
    build.store("out", X0, quotient)
    edges = [float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e-45, 3e-39, -5e-40, 3.4e38]
    values = torch.tensor([*edges, 1.0, 3.0, 1e-3, 12345.678])
    return Case(
        build.program(axes(13), (), ins(a=(F32, 13)) + outs(out=(F32, 13))),
        lambda: {"a": values},
        lambda t: {"out": t["a"] / divisor},
        pointwise(4),
        exact=True,
    )


def coarsely_divided(kind: str) -> Case:
    """out = a / b: of any two elements, by one (loaded, or passed by value), by a literal."""
    build = Builder()
    literal = kind not in ("an element", "one number", "an argument")
    index = X0 if kind == "an element" else Affine()
    divisor = build.const(float(kind), F32) if literal else build.load("b", index, F32)
    quotient = build.map("coarse_div", build.load("a", X0, F32), divisor)
    build.store("out", X0, quotient)
    edges = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1.0, -3.0, 7e-3])
    # the largest, the smallest normal and denormal numbers, and quotients of them that are neither
    edges = torch.cat([edges, torch.tensor([3.4e38, -2e38, 1.2e-38, 3e-39, -1e-44, 1e-45])])
    a, b = (each.reshape(-1) for each in torch.meshgrid(edges, edges, indexing="ij"))
    one = {"one number": torch.tensor([3e-39]), "an argument": torch.tensor([3e38])}
    divisors = one.get(kind, b)
    given = {"a": a} if literal else {"a": a, "b": divisors}
    count = a.numel()
    by = float(kind) if literal else 0.0

    def expected(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        wide = t["b"].double() if "b" in t else by
        return {"out": (t["a"].double() / wide).float()}

    buffers = ins(**{name: (F32, tensor.numel()) for name, tensor in given.items()})
    if kind == "an argument":
        buffers = (buffers[0], replace(buffers[1], role="scalar"))
    return Case(
        build.program(axes(count), (), buffers + outs(out=(F32, count))),
        lambda: given,
        expected,
        pointwise(16),
    )


def known_power(base: float) -> Case:
    """out = base ** a, for exponents of all sizes."""
    build = Builder()
    power = build.map("pow", build.const(base, F32), build.load("a", X0, F32))
    build.store("out", X0, power)
    edges = [float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 3.4e38]
    values = torch.tensor([*edges, -3.4e38, 2.0, 100.0, 777.0, 9999.0, -40.5, 1e-3])
    count, held = values.numel(), torch.tensor(base).item()
    return Case(
        build.program(axes(count), (), ins(a=(F32, count)) + outs(out=(F32, count))),
        lambda: {"a": values},
        lambda t: {"out": torch.pow(held, t["a"].double()).float()},
        pointwise(8),
        libdevice=base in (0.0, 1.0),
    )
