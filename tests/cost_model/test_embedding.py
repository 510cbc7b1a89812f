"""The gradient of an embedding table: what it moves, by what its tokens are put in order."""

from __future__ import annotations

import torch

from iocompiler.cost_model.call import Call, Operand
from iocompiler.cost_model.device import DEVICES
from iocompiler.cost_model.embedding import CHUNK, by_counting, scratch_bytes, tiles
from iocompiler.cost_model.rules import has_rule, price
from iocompiler.plan.data import TensorSpec
from iocompiler.plan.workspace import workspace_bytes

TABLE, ROWS = 1000 * 64 * 2, 100 * 64 * 2


def call(form: str, *, base: bool, result: bool, tokens: int = 100) -> Call:
    """100 tokens of 64 bfloat16 numbers, a table of 1000 rows."""

    def spec(*shape: int, dtype: torch.dtype = torch.bfloat16) -> TensorSpec:
        strides = tuple(torch.empty(shape, device="meta").stride())
        return TensorSpec(shape, strides, dtype, "cuda:0")

    grad, indices = spec(tokens, 64), spec(tokens, dtype=torch.int64)
    args = [Operand("base", spec(1000, 64))] if base else []
    args += [Operand("grad", grad), Operand("indices", indices)]
    args += [-1] if base else [1000, -1]  # type: ignore[list-item]
    target = f"iocompiler.embedding_gradient{form}.default"
    return Call(target, tuple(args), {}, (spec(1000, 64),) if result else ())


def test_bytes() -> None:
    """The gradient and the positions once; the table for a fill or a copy; rows of tokens."""
    fresh = price(call("", base=False, result=True))
    assert (fresh.read_bytes, fresh.written_bytes) == (ROWS + 800, ROWS + TABLE)
    copied = price(call("_onto", base=True, result=True))
    assert (copied.read_bytes, copied.written_bytes) == (TABLE + ROWS + 800, ROWS + TABLE)
    into = price(call("_", base=True, result=False))
    assert (into.read_bytes, into.written_bytes) == (2 * ROWS + 800, ROWS)
    many = price(call("_", base=True, result=False, tokens=5000))
    assert many.written_bytes == TABLE  # no more rows than there are
    assert has_rule("iocompiler.embedding_gradient_.default")


def test_workspace() -> None:
    for form, base in (("", False), ("_onto", True), ("_", True)):
        found = workspace_bytes(call(form, base=base, result=form != "_"), {})
        assert found == scratch_bytes(100, 64) == 8 * 100 + 4 * 2 * 7 * 64


def test_counting_is_for_few_tokens() -> None:
    for row in (DEVICES["h200"], DEVICES["h100"], DEVICES["a100"]):
        assert by_counting(8192, row)
        assert not by_counting(32768, row)


def test_tiles() -> None:
    row = DEVICES["h200"]
    assert tiles(8192, 768, torch.bfloat16, row).columns == 256
    assert tiles(8192, 768, torch.float32, row).columns == 128
    assert tiles(8192, 5, torch.float32, row).columns == 8
    for tokens in (1, 100, 2000, 4096, 16384):
        found = tiles(tokens, 768, torch.bfloat16, row)
        assert found.others % found.counted == 0
        assert found.counted == 8 or tokens >= found.counted * row.sm_count
    assert CHUNK > 1
