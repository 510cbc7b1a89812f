"""Every option of the compiler, typed and validated: an unknown one is an error that names those
that exist.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from iocompiler.cost_model.device import DEVICES
from iocompiler.errors import InvalidOption, UnknownOption, close_match

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
ENGINES = ("auto", "reference", "aten")


@dataclass(frozen=True)
class Options:
    """What a compilation may be told. The same names are accepted by ``torch.compile(...,
    options={...})``.

    Attributes:
        mode: "default"; "reduce-overhead" replays CUDA graphs; "max-autotune" measures tiles
            too, and so, as neither records CUDA graphs, does "max-autotune-no-cudagraphs".
        dump: a folder to write the graph, the kernels and a summary into, from "~" on if it begins
            with that; "" writes nothing.
        strict: what would fall back to aten, or run unrewritten, is an error instead of a warning.
        verify: run the graph before and after every pass on the example inputs and compare.
        device: price for this row of the device table instead of the device the graph runs on.
        engine: what runs a planned graph: "auto" (Triton on CUDA, Inductor's C++ on the CPU),
            "reference" (the
            tile interpreter, on the CPU, slow: for tests) or "aten" (no plan); or a function
            ``(plan, graph) -> callable(list) -> list`` of one's own.
        no_fallback: bytes; a call of an aten operator that is no library's kernel and writes more
            than this is an error, and so is a region that would run on aten. None allows any. Where
            Inductor runs the graph (on the CPU, "auto") nothing is planned, and nothing refused.
        memory_budget: bounds the peak of each training step's activations, gradients and
            temporaries: bytes, or as a float in (0, 1] the fraction of the peak without a bound.
            None bounds nothing.
        plan: a JSON file of schedules; "" for none. The graphs it has are replayed with its
            schedules, nothing is measured for them; others are added to it.
        cache: look for the graph in the disk cache before compiling it, and keep it there. Passes
            do not run for a graph that is found.
    """

    mode: str = "default"
    dump: str = ""
    plan: str = ""
    strict: bool = False
    verify: bool = False
    device: str = ""
    engine: str | Callable[..., Any] = "auto"
    cache: bool = True
    no_fallback: int | None = None
    memory_budget: int | float | None = None

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, MODES)
        for name in ("dump", "plan"):
            if not isinstance(getattr(self, name), str):
                raise InvalidOption(name=name, expected="a path", value=getattr(self, name))
        for name in ("strict", "verify", "cache"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidOption(name=name, expected="True or False", value=getattr(self, name))
        allowed = self.no_fallback
        if allowed is not None and (type(allowed) is not int or allowed < 0):
            raise InvalidOption(name="no_fallback", expected="bytes or None", value=allowed)
        _budget(self.memory_budget)
        _one_of("device", self.device, ("", *DEVICES))
        if not callable(self.engine):
            _one_of("engine", self.engine, ENGINES)

    @property
    def measures(self) -> bool:
        """Whether the mode is one under which kernels are measured."""
        return self.mode.startswith("max-autotune")

    @staticmethod
    def build(given: Mapping[str, Any]) -> Options:
        """Options from a mapping of names to values.

        Raises:
            UnknownOption: a name is not an option; the message names those that are.
            InvalidOption: a value is not one the option takes.
        """
        return Options().updated(given)

    def updated(self, given: Mapping[str, Any]) -> Options:
        """These options with some replaced; raises as `build` does."""
        known = tuple(field.name for field in fields(Options))
        for name in given:
            if name not in known:
                raise UnknownOption(
                    name=name, hint=close_match(str(name), known), known=", ".join(known)
                )
        values = dict(given)
        for name in ("dump", "plan"):
            if values.get(name, "") is None:
                values[name] = ""
            elif isinstance(values.get(name), (str, Path)):
                values[name] = os.path.expanduser(values[name])
        return dataclasses.replace(self, **values)


def _budget(value: object) -> None:
    fraction = type(value) is float and 0 < value <= 1
    if value is not None and not fraction and not (type(value) is int and value > 0):
        expected = "bytes (an int above 0), a fraction (a float in (0, 1]) or None"
        raise InvalidOption(name="memory_budget", expected=expected, value=value)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        shown = ", ".join(repr(a) for a in allowed if a)
        raise InvalidOption(name=name, expected=f"one of {shown}", value=value)
