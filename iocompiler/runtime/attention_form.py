"""All of an attention of the templates but its memory, and what is made once for it: calls that
differ in their memory alone find it again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Literal, NamedTuple, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor

from iocompiler.codegen.score_functions import module_text
from iocompiler.cost_model.attention_order import heads_together, rows_ahead
from iocompiler.cost_model.attention_tiles import Row, chosen, padded
from iocompiler.cost_model.device import DEVICES, Device, current_device, kin
from iocompiler.ops.target import Capability, planned
from iocompiler.runtime.load import imported, module_file
from iocompiler.runtime.template_launch import members
from iocompiler.tf32 import products_rounded
from iocompiler.tile.score import ScoreProgram
from iocompiler.tile.score_blocks import Grid, classes_shape, classify

P = ParamSpec("P")
T = TypeVar("T")
_MOST = 1024
_BLOCK, _SHORT = 64, 16
"""Rows of so few blocks of so many keys are short."""
_ANY = "h200"  # the interpreter: any rows will do
Parts: TypeAlias = Literal["both", "keys", "queries"]
"""Of a kernel: what its programs are of."""
_forms: dict[tuple[Hashable, ...], Form] = {}


class Like(NamedTuple):
    """A tensor but for its memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(x: Tensor) -> Like:
        return Like(x.shape, x.stride(), x.dtype)


@dataclass(frozen=True, eq=False)
class Form:
    """The fields are those of `attention.Problem`, for tensors what they are like."""

    query: Like
    key: Like
    value: Like
    program: ScoreProgram
    operands: tuple[Like, ...]
    numbers: tuple[int, ...]
    tiles: Row | None
    parts: int
    dropout_p: float
    device: torch.device
    planned: Capability | None
    precision: str
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, name: Hashable, make: Callable[P, T], *given: P.args, **how: P.kwargs) -> T:
        """What ``make`` gives, made at the first call with this name."""
        found: T | None = self._made.get(name)
        if found is None:
            found = self._made[name] = make(*given, **how)
        return found

    @functools.cached_property
    def functions(self) -> ModuleType:
        return self.functions_of(lifts=self.query.dtype.itemsize < 4)

    def functions_of(self, gradients: tuple[int, ...] = (), *, lifts: bool = False) -> ModuleType:
        ranks = tuple(len(x.shape) for x in self.operands)
        return functions(self.program, ranks, gradients, self.dropout_p, lifts=lifts)

    @functools.cached_property
    def row(self) -> Row:
        if self.tiles is not None:
            return self.tiles
        width = max(self.query.shape[3], self.value.shape[3])
        capability = device_row(self.device, self.planned).capability
        assert capability is not None
        found = chosen(self.program, capability, self.query.dtype.itemsize, width)
        if found.crowded is not None and self._is_crowded:
            found = replace(found, forward=found.crowded)
        return found

    @property
    def _is_crowded(self) -> bool:
        """Of masks of positions alone, without a dropout (measured on an H100: scores with a
        function gain 3 to 4 %, a window of 512 gains 5 %; a plain causal mask loses 3 %, listed
        blocks 12 %).
        """
        if self.reads or self.dropout_p:
            return False
        made = self.functions
        return made.new_score is not None or made.lift is not None or self._has_short_rows

    @property
    def _has_short_rows(self) -> bool:
        """Whether rows of blocks have fewer than a causal mask leaves of as many."""
        grid = self.grid(_BLOCK, _BLOCK)
        some, _ = classify(self.program, grid, (), self.numbers)
        return float(some.sum(-1, dtype=torch.float32).mean()) <= min(_SHORT, some.shape[3] / 3)

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    @functools.cached_property
    def reads(self) -> bool:
        """Whether the mask reads a tensor."""
        return bool(self.program.loads(self.program.keep))

    @functools.cached_property
    def grain(self) -> Grid:
        """The largest blocks that tiles of all kernels are made of."""
        return self.grid(*self.row.grain)

    def grid(self, m: int, n: int) -> Grid:
        batch, heads, rows, _ = self.query.shape
        return Grid(batch, heads, rows, self.key.shape[2], m, n)

    @functools.cached_property
    def classes_shape(self) -> tuple[int, int, int, int]:
        """Of the classes of its blocks, of the grain's size."""
        return classes_shape(self.program, self.grain)

    @functools.cached_property
    def common(self) -> dict[str, Any]:
        """The arguments all templates have, but their tensors."""
        functions, width, wide = self.functions, self.query.shape[3], self.value.shape[3]
        return {
            **({} if self.operands else {"operands": ()}),
            "strides": tuple(s for x in self.operands for s in x.stride),
            "numbers": self.numbers,
            "score": functions.new_score,
            "lift": functions.lift,
            "FACTOR": functions.FACTOR,
            "keep": functions.keep,
            "drop": functions.drop,
            "GROUP": self.group,
            "D": width,
            "E": wide,
            "BLOCK_D": padded(width),
            "BLOCK_E": padded(wide),
            "PLANES": self.program.planes,
            "PRECISION": self.precision,
        }

    @functools.cached_property
    def tensors(self) -> tuple[str, ...]:
        """The names of the tensors all templates take, as they follow each other."""
        return ("Q", "K", "V", *members("operands", len(self.operands)), "Seed")

    @functools.cached_property
    def rows_shape(self) -> tuple[int, ...]:
        """Of what is kept of each row: planes, B, H, S."""
        return (self.program.planes, *self.query.shape[:3])

    @functools.cached_property
    def strides(self) -> dict[str, Any]:
        """The strides of query, key and value, as the templates take them."""
        inputs = {"q": self.query, "k": self.key, "v": self.value}
        return {f"{name}_strides": x.stride for name, x in inputs.items()}

    def order(self, programs: Literal["forward"] | Parts, *, listed: bool) -> dict[str, int]:
        """How many heads take turns (`heads_together`), and how many of the rows of each start
        before them (`rows_ahead`).

        Args:
            listed: rows of blocks differ in length as they will: their blocks are listed.
            programs: those of a "forward", each of one head, walk over the keys that the heads of a
                group share. Those of a backward are of a group: of its "keys", over the queries of
                all its heads, of its "queries", over keys, or of "both".
        """
        batch, groups, columns, width = self.key.shape
        each = (width + self.value.shape[3]) * self.query.dtype.itemsize
        heads, read = batch * groups, 0
        if programs in ("keys", "both"):
            read += self.group * self.query.shape[2] * each
        if programs in ("queries", "both"):
            read += columns * each
        if programs == "forward":
            heads, read = heads * self.group, columns * each // self.group
        device = device_row(self.device, self.planned)
        ahead = rows_ahead(heads, device) if listed else 0
        return {"together": heads_together(heads, read, device), "ahead": ahead}

    @property
    def slopes(self) -> dict[str, Any]:
        """The arguments of the templates that differentiate by the dot product."""
        return {"slope": self.functions.slope, "SCALE": self.functions.SCALE}


def form(
    inputs: tuple[Tensor, Tensor, Tensor],
    program: ScoreProgram,
    operands: Sequence[Tensor],
    numbers: tuple[int, ...],
    tiles: Row | None,
    parts: int,
    dropout_p: float,
) -> Form:
    """The form of a problem, found again where there was one like it."""
    query, key, value = inputs
    dtype, device = query.dtype, query.device
    precision, instead = _precision(dtype), planned()
    # the tensors first: where two keys differ, they do so there
    known = (
        *(query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride()),
        *(dtype, device, instead, precision, numbers, dropout_p, program, tiles, parts),
        *[(x.shape, x.stride(), x.dtype) for x in operands],
    )
    found = _forms.get(known)
    if found is None:
        if len(_forms) >= _MOST:
            _forms.clear()
        likes = tuple(Like.of(x) for x in operands)
        found = _forms[known] = Form(
            Like.of(query), Like.of(key), Like.of(value), program, likes, numbers, tiles, parts,
            dropout_p, device, instead, precision,
        )  # fmt: skip
    return found


@functools.lru_cache(maxsize=64)
def device_row(device: torch.device, instead: Capability | None) -> Device:
    """What the device is priced by, or the one that is planned for instead."""
    if instead is not None:
        return kin(instead)
    return current_device(device) if device.type == "cuda" else DEVICES[_ANY]


def _precision(dtype: torch.dtype) -> str:
    tf32 = dtype != torch.float32 or products_rounded()
    return "tf32" if tf32 else "ieee"


@functools.lru_cache(maxsize=512)
def functions(
    program: ScoreProgram,
    ranks: tuple[int, ...],
    gradients: tuple[int, ...] = (),
    dropout_p: float = 0.0,
    *,
    lifts: bool = False,
) -> ModuleType:
    """The module with the Triton functions of a program, imported from a real file."""
    path = module_file(module_text(program, ranks, gradients, dropout_p, lifts=lifts), "score")
    return imported(path, "iocompiler_score")
