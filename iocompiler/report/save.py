"""Reports on disk, one format a suffix, and JSON read back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from iocompiler.errors import ReportFormat
from iocompiler.graph.findings import Miss, Rewrite
from iocompiler.recompute.trade import trade_of
from iocompiler.report.ledger import Copied, Edge, Kernel, Lost, Report, Resources, Template
from iocompiler.report.text import as_svg, as_text

_SCHEMA = 4
_LISTS: dict[str, type[Any]] = {
    "rewrites": Rewrite,
    "misses": Miss,
    "unfused": Edge,
    "copies": Copied,
    "fallbacks": Lost,
}


def save(report: Report, path: str | PathLike[str]) -> None:
    """Write ``report`` in the format of the path's suffix.

    Raises:
        ReportFormat: a suffix that is not one of `FORMATS`, or .mlir without what it needs.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        cause = f"the suffixes are {', '.join(FORMATS)}"
        raise ReportFormat(path=str(path), cause=cause)
    text = FORMATS[path.suffix](report)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def as_json(report: Report) -> str:
    """The report as JSON; `from_json` reads it back. The graphs stay out."""
    plain = {
        field.name: getattr(report, field.name)
        for field in dataclasses.fields(report)
        if field.name != "graphs"
    }
    totals = {name: getattr(report, name) for name in ("bytes_moved", "flops", "time_us")}
    return json.dumps({"schema": _SCHEMA, **totals, **plain}, default=_plain, indent=1)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} in a report")


def from_json(text: str) -> Report:
    """The report `as_json` wrote.

    Raises:
        ReportFormat: another schema.
    """
    data = json.loads(text)
    if data.get("schema") != _SCHEMA:
        raise ReportFormat(path="json", cause=f"schema {data.get('schema')!r}, not {_SCHEMA}")
    lists: dict[str, Any] = {
        name: tuple(row(**item) for item in data[name]) for name, row in _LISTS.items()
    }
    return Report(
        device=data["device"],
        kernels=tuple(_kernel(item) for item in data["kernels"]),
        bytes_bound=data["bytes_bound"],
        trades=tuple(map(trade_of, data["trades"])),
        time_bound_us=data["time_bound_us"],
        sizes=tuple((name, value) for name, value in data["sizes"]),
        **lists,
    )


def _kernel(item: dict[str, Any]) -> Kernel:
    plain = {**item, "ops": tuple(item["ops"]), "where": tuple(item["where"])}
    templates = tuple(Template(t["name"], _resources(t)) for t in item["templates"])
    return Kernel(**{**plain, "resources": _resources(item), "templates": templates})


def _resources(item: dict[str, Any]) -> Resources | None:
    return item["resources"] and Resources(**item["resources"])


def as_mlir(report: Report) -> str:
    """The flat graphs in torch-mlir's "torch" dialect, one module a graph.

    Raises:
        ReportFormat: torch-mlir is not installed, or the report was read back from a file.
    """
    try:
        from torch_mlir.fx import stateless_fx_import
    except ImportError:
        cause = "torch-mlir is not installed (the extra is iocompiler[mlir])"
        raise ReportFormat(path=".mlir", cause=cause) from None
    if not report.graphs:
        raise ReportFormat(
            path=".mlir", cause="this report has no graphs: it was not made by explain"
        )
    modules = [
        str(stateless_fx_import(gm.graph, model_name=name)) for name, gm in report.graphs.items()
    ]
    return "// -----\n".join(modules)


FORMATS: dict[str, Callable[[Report], str]] = {
    ".json": as_json,
    ".txt": as_text,
    ".svg": as_svg,
    ".mlir": as_mlir,
}
