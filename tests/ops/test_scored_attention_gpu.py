"""The attention templates on a GPU, against float64, in each dtype, for each kind of program."""

from __future__ import annotations

import pytest
import torch

from iocompiler.ops.scored_attention import scored_attention
from tests.ops.score_checks import Shape, problems
from tests.ops.score_programs import CASES, heads, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ODD: list[Shape] = [
    (1, 4, 2, 150, 190, 64, 64),
    (2, 3, 1, 190, 133, 40, 24),
    (1, 2, 2, 1, 140, 33, 33),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_programs(name: str, dtype: torch.dtype) -> None:
    assert not problems(name, (2, 4, 4, 192, 192, 64, 64), dtype, device="cuda", scale=0.125)


@pytest.mark.parametrize("shape", ODD, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_odd_sizes_and_groups(name: str, shape: Shape) -> None:
    assert not problems(name, shape, torch.bfloat16, device="cuda", scale=0.125)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [16, 80, 96, 128, 256])
@pytest.mark.parametrize("name", ["alibi", "softcap", "relative", "document"])
def test_widths(name: str, width: int, dtype: torch.dtype) -> None:
    shape = (1, 4, 2, 192, 192, width, width)
    assert not problems(name, shape, dtype, device="cuda", scale=width**-0.5)


@pytest.mark.parametrize("name", ["alibi", "relative", "bias"])
def test_results_repeat_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    operands = [x.cuda().bfloat16() for x in case.operands(2, 4, 190, 190)]
    given = [x.cuda().bfloat16() for x in heads(2, 4, 2, 190, 190, 64)]
    runs = []
    for _ in range(3):
        leaves = [x.detach().requires_grad_() for x in (*given, *operands)]
        out = scored_attention(*leaves[:3], case.program(0.125), leaves[3:])
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_long_rows() -> None:
    torch.manual_seed(0)
    case = CASES["window"]
    q, k, v = (x.cuda().bfloat16() for x in heads(1, 2, 2, 2048, 2048, 64))
    ours = scored_attention(q, k, v, case.program(0.125))
    exact = reference(q.double(), k.double(), v.double(), case.program(0.125))
    torch.testing.assert_close(ours.double(), exact, atol=2e-2, rtol=2e-2)


def test_another_length_compiles_nothing() -> None:
    from iocompiler.codegen.kernels.attention import attention_forward

    q, k, v = (x.cuda().bfloat16() for x in heads(1, 2, 2, 256, 256, 64))
    program = CASES["causal"].program(0.125)

    def made() -> int:
        return sum(len(each[0]) for each in attention_forward.device_caches.values())

    scored_attention(q, k, v, program)
    before = made()
    for length in (128, 192, 240, 255):
        scored_attention(q[:, :, :length], k[:, :, :length], v[:, :, :length], program)
    assert made() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["alibi", "softcap", "sunk", "document"])
def test_rows_with_a_gradient(name: str, dtype: torch.dtype) -> None:
    given = {"device": "cuda", "scale": 0.125, "by_rows": True}
    assert not problems(name, (2, 4, 2, 150, 190, 64, 64), dtype, **given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [n for n, x in CASES.items() if x.empty in ("nan", "zero")])
def test_dropout(name: str, dtype: torch.dtype) -> None:
    for shape in ((2, 4, 2, 192, 192, 64, 64), (1, 4, 2, 150, 190, 64, 64)):
        given = {"device": "cuda", "scale": 0.125, "dropout_p": 0.2}
        assert not problems(name, shape, dtype, **given)


@pytest.mark.parametrize("width", [40, 128, 256])
def test_dropout_of_other_widths(width: int) -> None:
    given = {"device": "cuda", "scale": width**-0.5, "dropout_p": 0.1}
    assert not problems("alibi", (1, 4, 2, 192, 130, width, width), torch.bfloat16, **given)


@pytest.mark.parametrize("rows", [1, 6])
def test_dropout_of_few_queries(rows: int) -> None:
    given = {"device": "cuda", "scale": 0.125, "dropout_p": 0.2}
    assert not problems("padding", (2, 8, 2, rows, 500, 64, 64), torch.bfloat16, **given)


def test_dropout_is_that_of_the_cpu_and_repeats() -> None:
    given = [x.float() for x in heads(2, 4, 2, 130, 150, 32)]
    program = CASES["causal"].program()
    drop = {"dropout_p": 0.3}
    cpu = scored_attention(*given, program, seed=torch.tensor(2**50 + 1), **drop)
    seeds = torch.tensor([5, 2**50 + 1], device="cuda")
    gpu = [
        # an aligned and an unaligned seed
        scored_attention(*(x.cuda() for x in given), program, seed=seed, **drop)
        for seed in (seeds[1], seeds[1].clone())
    ]
    assert torch.equal(*gpu)
    torch.testing.assert_close(gpu[0].cpu(), cpu, atol=3e-5, rtol=1e-4)
