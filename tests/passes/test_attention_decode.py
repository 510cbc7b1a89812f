"""Few queries over many keys: by our template where it is priced below the library's kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler.ops.target import planned_for
from iocompiler.passes.attention.running import choice
from tests.passes.attention_cases import Compiled, heads


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(4, 1) for x in (k, v))
    return (q @ k.mT * 0.125).softmax(-1) @ v


class _Planned(Compiled):
    """What is decided for an H100, and nothing run."""

    def _backend(self, gm: Any, inputs: list[Any]) -> Callable[..., Any]:
        with planned_for((9, 0)):
            super()._backend(gm, inputs)
        return gm.forward


def variants(function: Callable[..., Tensor], **sizes: Any) -> list[str]:
    dtype = sizes.pop("dtype", torch.bfloat16)
    compiled = _Planned(function)
    with torch.no_grad():
        compiled(**{name: x.to(dtype) for name, x in heads(**sizes).items()})
    return compiled.variants


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("function", [sdpa, plain])
def test_groups_go_to_the_template(function: Callable[..., Tensor], rows: int) -> None:
    found = variants(function, heads=8, groups=2, rows=rows, columns=2048, width=64)
    assert found == ["program+gqa"]


@pytest.mark.parametrize(
    "sizes",
    [
        {"rows": 32, "columns": 2048},  # not few
        {"rows": 1, "columns": 64},  # launches are all there is
        {"rows": 1, "columns": 2048, "dtype": torch.float32},
        {"rows": 1, "columns": 2048, "groups": 8},  # nothing to share: flash splits keys too
    ],
    ids=str,
)
def test_the_rest_stays_with_the_libraries(sizes: dict[str, Any]) -> None:
    found = variants(sdpa, **{"heads": 8, "groups": 2, "width": 64, **sizes})
    assert found in (["gqa"], ["full"])


@pytest.mark.parametrize(
    ("sizes", "variant"),
    [
        ({"rows": 1}, "program"),
        ({"rows": 1, "dtype": torch.float32}, "full"),
        ({"rows": 2}, "full"),  # cuDNN takes two
        ({"rows": 32}, "full"),
    ],
    ids=str,
)
def test_one_query_in_training(sizes: dict[str, Any], variant: str) -> None:
    dtype = sizes.pop("dtype", torch.bfloat16)
    compiled = _Planned(sdpa)
    compiled(**{n: x.to(dtype) for n, x in heads(columns=197, width=64, **sizes).items()})
    assert compiled.variants == [variant]


def test_one_program_for_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A growing cache: one graph after the first, its length a run-time number."""
    monkeypatch.setattr(choice, "wanted", lambda call, found: True)
    compiled = Compiled(sdpa)
    with torch.no_grad():
        for columns in (40, 41, 42, 130):
            given = {n: x.detach() for n, x in heads(rows=1, groups=2, columns=columns).items()}
            torch.testing.assert_close(compiled(**given), sdpa(**given))
    assert len(compiled.graphs) == 2
    assert compiled.variants == ["program+gqa"] * 2


@pytest.mark.parametrize("rows", [1, 3])
def test_a_cache_of_static_length_has_its_mask_as_an_operand(rows: int) -> None:
    def decode(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        seen = torch.arange(k.shape[2]) <= position[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    given = {n: x.detach() for n, x in heads(rows=rows, groups=2, columns=70).items()}
    compiled = Compiled(decode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "wanted", lambda call, found: True)
        for start in (5, 40):
            position = torch.arange(start, start + rows)
            found = compiled(**given, position=position)
            torch.testing.assert_close(found, decode(**given, position=position))
    assert len(compiled.graphs) == 1
    assert compiled.variants == ["program+gqa+mask"]


@pytest.mark.parametrize("rows", [1, 3])
def test_what_differs_from_head_to_head_in_a_group(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, padding: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        far = torch.arange(k.shape[2]) - k.shape[2] + 1.0
        s = q @ k.mT * 0.3 + slopes[:, None, None] * far + padding[:, None, None, :]
        return s.softmax(-1) @ v

    monkeypatch.setattr(choice, "wanted", lambda call, found: True)
    given = {n: x.detach() for n, x in heads(rows=rows, groups=2, columns=70).items()}
    given["slopes"] = torch.tensor([0.1, 0.05, 0.02, 0.01])
    given["padding"] = torch.zeros(2, 70).index_fill(1, torch.arange(9), torch.finfo().min)
    compiled = Compiled(decode)
    torch.testing.assert_close(compiled(**given), decode(**given))
    assert compiled.variants[0].startswith("program")
