"""The template for few queries over many keys on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import iocompiler as ioc
from iocompiler.compilation import Compilation
from iocompiler.ops.scored_attention import scored_attention
from tests.ops.score_checks import Shape, in_parts, problems
from tests.ops.score_programs import CASES, heads, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ODD: list[Shape] = [
    (1, 8, 1, 1, 1000, 64, 64),
    (2, 6, 2, 7, 333, 40, 24),
    (3, 4, 4, 1, 100, 33, 33),
    (1, 8, 2, 16, 777, 128, 64),
]


@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", [n for n in CASES if n != "relative"])  # its table is short
def test_programs(
    name: str, dtype: torch.dtype, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if parts:
        in_parts(parts, monkeypatch)
    assert not problems(name, (2, 8, 2, 3, 390, 64, 64), dtype, device="cuda", scale=0.125)


@pytest.mark.parametrize("shape", ODD, ids=str)
@pytest.mark.parametrize("name", [n for n in CASES if n != "relative"])
def test_odd_sizes_and_groups(name: str, shape: Shape) -> None:
    assert not problems(name, shape, torch.bfloat16, device="cuda", scale=0.125)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [16, 80, 128, 256])
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_widths(rows: int, width: int, dtype: torch.dtype) -> None:
    shape = (2, 8, 2, rows, 500, width, width)
    assert not problems("padding", shape, dtype, device="cuda", scale=width**-0.5)


def _cache(columns: int) -> list[Tensor]:
    return [x.cuda().bfloat16() for x in heads(2, 8, 2, 1, columns, 128)]


def test_long_keys_and_results_that_repeat_bit_for_bit() -> None:
    q, k, v = _cache(20000)
    program = CASES["full"].program(128**-0.5)
    runs = [scored_attention(q, k, v, program) for _ in range(3)]
    exact = reference(q.double(), k.double(), v.double(), program)
    torch.testing.assert_close(runs[0].double(), exact, atol=2e-3, rtol=2e-2)
    assert all(torch.equal(runs[0], other) for other in runs[1:])


def test_a_growing_cache_compiles_nothing() -> None:
    from iocompiler.codegen.kernels.attention_decode import attention_combine, attention_split

    program = CASES["full"].program(128**-0.5)
    q, k, v = _cache(9000)
    k, v = k.contiguous(), v.contiguous()

    def made() -> int:
        kernels = (attention_split, attention_combine)
        return sum(len(each[0]) for x in kernels for each in x.device_caches.values())

    scored_attention(q, k, v, program)
    before = made()
    for length in (1, 63, 64, 700, 4097, 8999):
        grown = [x[:, :, :length] for x in (k, v)]
        found = scored_attention(q, *grown, program)
        exact = reference(q.double(), *(x.double() for x in grown), program)
        torch.testing.assert_close(found.double(), exact, atol=4e-3, rtol=2e-2)
        scored_attention(q, *(x.contiguous() for x in grown), program)
    assert made() == before


def test_under_torch_compile() -> None:
    def decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    records: list[Compilation] = []
    torch._dynamo.reset()
    compiled = torch.compile(decode, backend=ioc.Compiler(on_compiled=records.append))
    with torch.no_grad():
        for length in (1000, 1001, 1500, 3000):
            q, k, v = _cache(length)
            exact = decode(q.double(), k.double(), v.double())
            torch.testing.assert_close(compiled(q, k, v).double(), exact, atol=4e-3, rtol=2e-2)
    assert len(records) == 2
    assert [each.variant for record in records for each in record.rewrites] == ["program+gqa"] * 2


def test_a_cache_of_static_length() -> None:
    def decode(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        seen = torch.arange(k.shape[2], device=k.device) <= position[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    torch._dynamo.reset()
    compiled = torch.compile(decode, backend=ioc.Compiler())
    q, k, v = _cache(2048)
    with torch.no_grad():
        for place in (0, 5, 100, 2047):
            position = torch.tensor([place], device="cuda")
            exact = decode(q.double(), k.double(), v.double(), position)
            found = compiled(q, k, v, position).double()
            torch.testing.assert_close(found, exact, atol=4e-3, rtol=2e-2)


def test_nan_and_infinity_go_where_eagers_go() -> None:
    q, k, v = _cache(600)
    k[0, 0, 300, 0] = float("nan")
    k[1, 1, 500, 0] = float("inf")
    program = CASES["full"].program(128**-0.5)
    found = scored_attention(q, k, v, program)
    exact = reference(q.double(), k.double(), v.double(), program)
    assert torch.equal(found.isnan(), exact.isnan())
