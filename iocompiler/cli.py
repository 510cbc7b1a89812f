"""The command ``iocompiler``: explain, devices, doctor, cache. Errors are one line on stderr and
exit code 2."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from iocompiler.errors import BadArgument, IOCompilerError

USAGE_ERROR = 2
_UNUSABLE = "the cache folder cannot be used"
_NAMES_OF_INPUTS = ("example_inputs", "inputs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 1 where `doctor` finds something needed missing, 2
    for an error."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except IOCompilerError as error:
        print(f"iocompiler: {error}", file=sys.stderr)
        return USAGE_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="iocompiler", description="A torch.compile backend that minimises memory traffic."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_explain(commands)
    devices = commands.add_parser("devices", help="the devices that can be priced, with sources")
    devices.set_defaults(run=_devices)
    doctor = commands.add_parser("doctor", help="what works on this machine, and what to install")
    doctor.set_defaults(run=_doctor)
    cache = commands.add_parser("cache", help="the cache of compiled kernels")
    actions = cache.add_subparsers(required=True, metavar="action")
    actions.add_parser("info", help="where it is and what it holds").set_defaults(run=_cache_info)
    actions.add_parser("clear", help="remove every entry").set_defaults(run=_cache_clear)
    return parser


def _add_explain(commands: Any) -> None:
    explain = commands.add_parser(
        "explain",
        help="plan and compile a model for a device that need not be here",
        description="A class, or a function without parameters, is called to make the model.",
    )
    explain.add_argument("model", help="model.py:Model or package.module:Model")
    explain.add_argument(
        "--device", default="h200", help="a row of `iocompiler devices` (default h200)"
    )
    explain.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="8x512:int64",
        help="shape and dtype (float32 if left out) of one input; once for each. "
        f"Without it, the file's {' or '.join(_NAMES_OF_INPUTS)} is used",
    )
    explain.add_argument("--training", action="store_true", help="also the backward pass")
    explain.add_argument(
        "--memory-budget",
        metavar="0.5",
        help="of a training step: a fraction of its peak (0.5), or bytes (a whole number)",
    )
    explain.add_argument(
        "--no-compile", action="store_true", help="plan only: no registers and spills"
    )
    explain.add_argument(
        "--save", metavar="PATH", action="append", default=[], help=".txt, .json, .svg or .mlir"
    )
    explain.set_defaults(run=_explain)


def _explain(options: argparse.Namespace) -> int:
    from iocompiler.report.explain import explain

    module, found = _load(options.model)
    inputs = [parse_input(text) for text in options.input] or _inputs_of(module)
    report = explain(
        _model(found, options.training),
        *inputs,
        device=options.device,
        training=options.training,
        compile_kernels=not options.no_compile,
        memory_budget=parse_budget(options.memory_budget),
    )
    for path in options.save:
        report.save(path)
    _console().print(report)
    return 0


def _load(text: str) -> tuple[Any, Any]:
    """The module and the object ``file.py:Name`` or ``package.module:Name`` says."""
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise BadArgument(argument=text, cause="it must be model.py:Name or package.module:Name")
    module = _module(place, text)
    if not hasattr(module, name):
        raise BadArgument(argument=text, cause=f"{place} has no {name}")
    return module, getattr(module, name)


def _module(place: str, text: str) -> Any:
    try:
        if not place.endswith(".py"):
            sys.path.insert(0, "")
            return importlib.import_module(place)
        path = Path(place)
        if not path.is_file():
            raise BadArgument(argument=text, cause=f"there is no file {place}")
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # Dynamo looks a function's module up there
        spec.loader.exec_module(module)
        return module
    except IOCompilerError:
        raise
    except Exception as error:
        raise BadArgument(argument=text, cause=f"{type(error).__name__}: {error}") from error


def _model(found: Any, training: bool) -> Callable[..., Any]:
    """The model itself: a class, or a function that needs no argument, is called to make it."""
    import torch

    if isinstance(found, type) or (
        inspect.isfunction(found) and not inspect.signature(found).parameters
    ):
        try:
            found = found()
        except Exception as error:
            raise BadArgument(argument="model", cause=f"{type(error).__name__}: {error}") from error
    if isinstance(found, torch.nn.Module):
        found.train(training)
    if not callable(found):
        raise BadArgument(argument="model", cause=f"a {type(found).__name__} cannot be called")
    model: Callable[..., Any] = found
    return model


def _inputs_of(module: Any) -> list[Any]:
    for name in _NAMES_OF_INPUTS:
        found = getattr(module, name, None)
        if found is not None:
            values = found() if callable(found) else found
            return list(values) if isinstance(values, (tuple, list)) else [values]
    raise BadArgument(argument="--input", cause="the model needs inputs: as --input 8x512:int64")


def parse_input(text: str) -> Any:
    """A tensor with nothing written into it from "8x512:int64"; no dtype means float32, no shape
    0-dim.

    Raises:
        BadArgument: the text is not a shape and a dtype.
    """
    import torch

    shape, _, dtype = text.partition(":")
    if not re.fullmatch(r"(\d+(x\d+)*)?", shape):
        raise BadArgument(argument=f"--input {text}", cause="a shape is written 8x512")
    found = getattr(torch, dtype or "float32", None)
    if not isinstance(found, torch.dtype):
        raise BadArgument(argument=f"--input {text}", cause=f"torch has no dtype {dtype!r}")
    return torch.empty([int(size) for size in shape.split("x") if size], dtype=found)


def parse_budget(text: str | None) -> int | float | None:
    """Bytes from "2000000", a fraction from "0.5" or "1.0".

    Raises:
        BadArgument: the text is no number.
    """
    if text is None:
        return None
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise BadArgument(argument=f"--memory-budget {text}", cause="it is no number") from None


def _devices(options: argparse.Namespace) -> int:
    import torch

    from iocompiler.cost_model.device import DEVICES

    table = _table("device", "sm", "SMs", "GB", "TB/s", "bf16", "fp8", "tf32", "fp32", "launch us")
    for row in DEVICES.values():
        rates = (
            row.matmul_flops.get(torch.bfloat16, 0),
            row.matmul_flops.get(torch.float8_e4m3fn, 0),
            row.tf32_flops,
            row.matmul_flops[torch.float32],
        )
        table.add_row(
            row.name,
            "{}.{}".format(*row.capability) if row.capability else "",
            str(row.sm_count),
            f"{row.memory_bytes / 1e9:.0f}",
            f"{row.hbm_bytes_per_s / 1e12:.3g}",
            *(f"{rate / 1e12:.4g}" if rate else "" for rate in rates),
            f"{row.launch_s * 1e6:.2g}",
        )
    console = _console()
    console.print(table)
    console.print("Rates of matmuls in TFLOP/s, dense. Sources:")
    for row in DEVICES.values():
        console.print(f"  {row.name}: {row.source}", markup=False, highlight=False)
    return 0


def _console() -> Console:
    """The terminal's width; a pipe gets the width reports are made for."""
    from iocompiler.report.text import WIDTH

    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading)
    return table


def _doctor(options: argparse.Namespace) -> int:
    from iocompiler.report.doctor import examine, exit_code

    checks = examine()
    table = _table("", "what", "found", "to do")
    colours = {"ok": "green", "missing": "yellow", "broken": "red"}
    for check in checks:
        state = Text(check.state, style=colours[check.state])
        table.add_row(state, *map(Text, (check.name, check.found, check.advice)))
    _console().print(table)
    return exit_code(checks)


def _cache_info(options: argparse.Namespace) -> int:
    from iocompiler.runtime import cache

    found = cache.info()
    if found is None:
        raise BadArgument(argument="cache", cause=_UNUSABLE)
    counts = (
        ", ".join(f"{count} {kind}" for kind, count in sorted(found.entries.items())) or "empty"
    )
    print(f"{found.root}: {counts}, {found.bytes / 1e6:.1f} of {found.limit / 1e6:.0f} MB")
    return 0


def _cache_clear(options: argparse.Namespace) -> int:
    from iocompiler.runtime import cache

    removed = cache.clear()
    if removed is None:
        raise BadArgument(argument="cache", cause=_UNUSABLE)
    print(f"{removed} entries removed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
