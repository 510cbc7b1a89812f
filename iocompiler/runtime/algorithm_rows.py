"""The algorithms of products as rows of JSON, in plan files.

    {"product": {"batch": 1, "m": 8192, "n": 768, "k": 3072, "dtype": "bfloat16",
                 "a": [0, 3072, 1], "b": [0, 1, 3072], "out": [0, 768, 1], "added": [0, 0, 1],
                 "bias": false, "sums": null, "stored": null, "activation": null},
     "algorithm": {"id": 66, "tile": 20, "split_k": 1, ...}}

Fields are those of `LibraryProduct` and `Algorithm`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, get_args

import torch

from iocompiler.ops.library_product import Activation, Algorithm, LibraryProduct, Problem

_ALGORITHM = tuple(field.name for field in dataclasses.fields(Algorithm))
_PRODUCT = tuple(field.name for field in dataclasses.fields(LibraryProduct))
_EXTENTS = ("batch", "m", "n", "k")
_STRIDES = ("a", "b", "out", "added", "sums")
_MAY_BE_NONE = ("added", "sums", "stored", "activation")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
}


def algorithm_rows(algorithms: Iterable[tuple[Problem, Algorithm]]) -> list[dict[str, Any]]:
    """`Plan.algorithms` as a plan file has it."""
    return [
        {"product": _product_row(product), "algorithm": dataclasses.asdict(algorithm)}
        for product, algorithm in algorithms
    ]


def algorithms_of(rows: Any) -> tuple[tuple[Problem, Algorithm], ...]:
    """`Plan.algorithms` as a plan file has it.

    Raises:
        ValueError: it does not.
    """
    if not isinstance(rows, list):
        raise ValueError("it is no list")
    return tuple(_pair(row) for row in rows)


def _product_row(product: Problem) -> dict[str, Any]:
    found = dataclasses.asdict(product)
    return {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in found.items()
    }


def _pair(row: Any) -> tuple[Problem, Algorithm]:
    if not isinstance(row, dict) or set(row) != {"product", "algorithm"}:
        raise ValueError("a row has the fields product, algorithm")
    return _product(row["product"]), _algorithm(row["algorithm"])


def _algorithm(row: Any) -> Algorithm:
    _check_fields("an algorithm", row, _ALGORITHM)
    for name, value in row.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} is {value!r}, not a number")
    return Algorithm(**row)


def _product(row: Any) -> Problem:
    _check_fields("a product", row, _PRODUCT)
    given = {name: value for name, value in row.items() if value is not None}
    missing = set(_PRODUCT) - set(_MAY_BE_NONE) - set(given)
    if missing:
        raise ValueError(f"a product needs {', '.join(sorted(missing))}")
    for name in _EXTENTS:
        if type(given[name]) is not int or given[name] < 1:
            raise ValueError(f"{name} is {given[name]!r}, not a number")
    for name in filter(given.__contains__, _STRIDES):
        strides = given[name]
        if not isinstance(strides, list) or [type(each) for each in strides] != [int] * 3:
            raise ValueError(f"{name} is {strides!r}, not three strides")
        given[name] = tuple(strides)
    if type(given["bias"]) is not bool:
        raise ValueError(f"bias is {given['bias']!r}, not true or false")
    for name in filter(given.__contains__, ("dtype", "stored")):
        if given[name] not in _DTYPES:
            raise ValueError(f"there is no {name} {given[name]!r}: {', '.join(_DTYPES)}")
        given[name] = _DTYPES[given[name]]
    if given.get("activation", "gelu") not in get_args(Activation):
        known = ", ".join(get_args(Activation))
        raise ValueError(f"there is no activation {given['activation']!r}: {known}")
    return Problem(**given)


def _check_fields(of: str, row: Any, fields: tuple[str, ...]) -> None:
    if not isinstance(row, dict) or set(row) != set(fields):
        raise ValueError(f"{of} has the fields {', '.join(fields)}")
