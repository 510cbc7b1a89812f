"""The row kernel of linear + divergence compiles with no GPU, in registers that are there."""

from __future__ import annotations

import pytest
import torch

from iocompiler.ops.linear_cross_entropy_rows import Rows, Setting, hard_rows
from iocompiler.ops.linear_divergence_rows import Divergence, Pair, launch_rows, reference_rows
from tests.codegen.template_compiling import launched


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "capability", "setting", "divergence", "hard"),
    [
        (32000, torch.bfloat16, 90, Setting(), Divergence(0.5, "logits", 0.5), False),
        (32000, torch.bfloat16, 90, Setting(), Divergence(0.5, "logits", 0.5), True),
        (50257, torch.float16, 80, Setting(smoothing=0.1), Divergence(reversed=True), True),
        (1000, torch.float32, 90, Setting(capped=True), Divergence(capped=True), True),
        (
            50257,
            torch.bfloat16,
            90,
            Setting(),
            Divergence(1.0, "probabilities", entropy=False, spread=0.1),
            True,
        ),
    ],
)
def test_two_programs_share_a_multiprocessor(
    vocabulary: int,
    dtype: torch.dtype,
    capability: int,
    setting: Setting,
    divergence: Divergence,
    hard: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels = launched(monkeypatch, capability)
    logits = torch.empty(2, -(-vocabulary // 64) * 64, dtype=dtype)
    other, losses = torch.empty_like(logits), torch.empty(2)
    both = divergence.kind == "logits"
    given = other[:, :vocabulary] if both else torch.empty(2, vocabulary)
    target = torch.zeros(2, dtype=torch.int64) if hard else None
    pair = Pair(
        logits[:, :vocabulary], given, target, losses, losses, logits, other if both else None
    )
    launch_rows(pair, Rows(losses if hard else None, None), setting, divergence)
    (found,) = kernels.values()
    assert found["spills"] == 0, found
    assert 2 * 32 * found["warps"] * found["registers"] <= 65536, found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [7, 1000, 30522, 32000, 50257, 128256])
@pytest.mark.parametrize("reversed_", [False, True])
@pytest.mark.parametrize("kind", ["logits", "log-probabilities"])
def test_every_element_on_the_gpu(
    dtype: torch.dtype, vocabulary: int, reversed_: bool, kind: str
) -> None:
    """Each is within half a unit in its last place, and a little of the row's, of float64's."""
    torch.manual_seed(0)
    width = -(-vocabulary // 64) * 64
    logits, other = (2 * torch.randn(300, width, device="cuda") for _ in range(2))
    if kind == "log-probabilities":
        other = other[:, :vocabulary].log_softmax(1)
    logits, other = logits.to(dtype), other.to(dtype)
    target = torch.randint(0, vocabulary, (300,), device="cuda")
    target[::7] = -100
    share = torch.rand(300, device="cuda")
    divergence = Divergence(0.5, kind, 0.5, reversed=reversed_)
    both = kind == "logits"
    found = []
    for run, wide in ((launch_rows, False), (reference_rows, True)):
        mine, theirs = (x.double() if wide else x.clone() for x in (logits, other))
        losses = torch.empty(300, device="cuda", dtype=torch.float64 if wide else torch.float32)
        pair = Pair(
            mine[:, :vocabulary],
            theirs[:, :vocabulary],
            target,
            share,
            losses,
            mine,
            theirs if both else None,
        )
        run(pair, Rows(), Setting(), divergence)
        found.append((losses, mine, theirs))
    half = torch.finfo(dtype).eps / 2
    for one, exact in zip(*found, strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=half + 1e-5, atol=2e-6)


def test_the_cross_entropy_beside_it_is_the_one_alone() -> None:
    torch.manual_seed(0)
    z, target = torch.randn(5, 11), torch.tensor([0, 10, 3, -100, 4])
    losses, gradient = torch.empty(5), torch.empty(5, 11)
    pair = Pair(z, z, target, torch.zeros(5), losses, gradient)
    reference_rows(pair, Rows(), Setting(), Divergence())
    loss, d = hard_rows(z, target, Rows(), Setting())
    torch.testing.assert_close((losses, gradient), (loss, d))
