"""Dropout of the probabilities behind a score program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import iocompiler as ioc
from iocompiler.ops.random import SEEDS
from iocompiler.ops.scored_attention import FORWARD
from iocompiler.ops.target import planned_for
from iocompiler.passes.attention.running import choice
from iocompiler.tile.dropout import kept
from iocompiler.tile.score import parsed
from tests.passes.attention_cases import Compiled, heads


def softcap(q: Tensor, k: Tensor, v: Tensor, p: float = 0.4) -> Tensor:
    return F.dropout((torch.tanh(q @ k.mT / 30.0) * 30.0).softmax(-1), p) @ v


def padded(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    s = q @ k.mT * 0.3 + padding[:, None, None, :]
    return F.dropout(s.softmax(-1), 0.4) @ v


def library(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, keep, 0.4)


def seeded(count: int) -> Tensor:
    """The seeds that a graph draws after `torch.manual_seed(3)`."""
    torch.manual_seed(3)
    return SEEDS(count, torch.device("cpu"))


def spared(seed: Tensor, shape: tuple[int, ...], p: float = 0.4) -> Tensor:
    places = (
        torch.arange(n).reshape([-1 if d == dim else 1 for d in range(4)])
        for dim, n in enumerate(shape)
    )
    return kept(seed, *places, dropout_p=p) / (1.0 - p)


def gradients(function: Callable[..., Tensor], given: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(3)
    leaves = [x for x in given.values() if x.requires_grad]
    out = function(**given)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def test_forward_and_backward_drop_what_the_seed_says() -> None:
    given = heads(columns=9)
    compiled = Compiled(softcap)
    found = gradients(compiled, given)
    assert compiled.variants == ["program+score+dropout"]
    left = spared(seeded(1)[0], (2, 4, 7, 9))

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((torch.tanh(q @ k.mT / 30.0) * 30.0).softmax(-1) * left) @ v

    for one, true in zip(found, gradients(exact, given), strict=True):
        torch.testing.assert_close(one, true, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("engine", ["reference", "aten"])
def test_through_the_whole_compiler(engine: str) -> None:
    """The seed goes from the compiled forward to the compiled backward."""
    torch._dynamo.reset()
    compiled = torch.compile(softcap, backend=ioc.Compiler(cache=False, engine=engine))
    given = heads(columns=9)
    found = gradients(compiled, given)
    left = spared(seeded(1)[0], (2, 4, 7, 9))

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((torch.tanh(q @ k.mT / 30.0) * 30.0).softmax(-1) * left) @ v

    for one, true in zip(found, gradients(exact, given), strict=True):
        torch.testing.assert_close(one, true, atol=2e-5, rtol=1e-5)


def test_the_same_seed_gives_the_same_result_and_another_another() -> None:
    compiled, given = Compiled(softcap), heads()
    first, second = (gradients(compiled, given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(compiled(**given), compiled(**given))


@pytest.mark.parametrize("function", [padded, library])
def test_rows_that_a_mask_hides(
    function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every score is a finite number a row is dropped from 1 / n; with no score it is 0."""
    monkeypatch.setattr(choice, "wanted", lambda call, found: True)
    given = heads()
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[0, 3:] = False
    keep[1] = False
    least = torch.finfo(torch.float32).min
    extra = {"padding": torch.where(keep, 0.0, least)} if function is padded else {}
    extra = extra or {"keep": keep[:, None, None, :].expand(2, 1, 7, 7)}
    compiled = Compiled(function)
    found = gradients(compiled, {**given, **extra})
    assert compiled.variants[0].startswith("program")
    assert compiled.variants[0].endswith("dropout")
    left = spared(seeded(1)[0], (2, 4, 7, 7))

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.where(keep, 0.0, least)[:, None, None, :]
        if function is padded:
            return ((q @ k.mT * 0.3 + hidden).softmax(-1) * left) @ v
        weights = (q @ k.mT * 8**-0.5 + hidden).softmax(-1)
        return (weights * keep.any(-1)[:, None, None, None] * left) @ v

    for one, true in zip(found, gradients(exact, given), strict=True):
        torch.testing.assert_close(one, true)


@pytest.mark.parametrize(("p", "train"), [(0.0, True), (0.4, False)])
def test_what_drops_nothing_draws_nothing(p: float, train: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (torch.tanh(q @ k.mT / 30.0) * 30.0).softmax(-1)
        return F.dropout(weights, p, training=train) @ v

    compiled, given = Compiled(function), heads()
    torch.testing.assert_close(compiled(**given), function(**given))
    assert compiled.variants == ["program+score"]
    assert not [n for n in compiled.graphs[0].graph.nodes if n.target is SEEDS]


def test_a_dropout_of_everything_is_left_alone() -> None:
    compiled, given = Compiled(softcap), heads()
    assert not compiled(**given, p=1.0).any()
    assert compiled.variants == []
    assert any("dropout of everything" in miss for miss in compiled.misses)


def test_with_a_graph_of_changing_length() -> None:
    compiled = Compiled(softcap, dynamic=True)
    for length in (7, 12, 40):
        given = heads(rows=length, columns=length)
        torch.manual_seed(3)
        found = compiled(**given)
        left = spared(seeded(1)[0], (2, 4, length, length))
        q, k, v = given.values()
        exact = ((torch.tanh(q @ k.mT / 30.0) * 30.0).softmax(-1) * left) @ v
        torch.testing.assert_close(found, exact)
    assert len(compiled.graphs) == 1


def test_a_mask_with_dropout_stays_structure() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = torch.tanh(q @ k.mT / 30.0) * 30.0
        hidden = torch.ones(s.shape[-2:], dtype=torch.bool).triu(1)
        return F.dropout(s.masked_fill(hidden, -1e9).softmax(-1), 0.4) @ v

    compiled = Compiled(function)
    compiled(**heads())
    (call,) = (n for n in compiled.graphs[0].graph.nodes if n.target is FORWARD)
    program: Any = parsed(call.args[5])
    assert program.keep is not None
    assert not program.deep


class Planned(Compiled):
    """What is decided for a device, and nothing run."""

    def __init__(self, function: Callable[..., Any], capability: Any) -> None:
        super().__init__(function)
        self.capability = capability

    def _backend(self, gm: Any, inputs: list[Any]) -> Callable[..., Any]:
        with planned_for(self.capability):
            super()._backend(gm, inputs)
        return gm.forward


def plain(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    return F.dropout((q @ k.mT * 0.125).softmax(-1), p) @ v


@pytest.mark.parametrize(
    ("width", "dtype", "p", "capability", "variant"),
    [
        (64, torch.bfloat16, 0.1, (9, 0), "program+dropout"),
        (64, torch.float16, 0.5, (9, 0), "program+dropout"),
        (64, torch.bfloat16, 0.0, (9, 0), "full"),
        (128, torch.bfloat16, 0.1, (9, 0), "dropout"),
        (32, torch.bfloat16, 0.1, (9, 0), "dropout"),
        (64, torch.float32, 0.1, (9, 0), "dropout"),
        (64, torch.bfloat16, 0.1, (8, 0), "dropout"),
        (64, torch.bfloat16, 0.1, None, "dropout"),
    ],
)
def test_where_our_dropout_is_faster_than_the_libraries(
    width: int, dtype: torch.dtype, p: float, capability: Any, variant: str
) -> None:
    compiled = Planned(plain, capability)
    compiled(*(torch.randn(1, 2, 64, width, dtype=dtype) for _ in range(3)), p)
    assert compiled.variants == [variant]


def documents(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """Causal within documents, of which the positions say that there is one."""
    places = torch.arange(q.shape[2]).unsqueeze(0)
    document = (torch.diff(places, prepend=places[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    same = document[:, None, :, None] == document[:, None, None, :]
    lower = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    s = (q @ k.mT * 0.125).masked_fill(~(same & lower), float("-inf"))
    return F.dropout(s.softmax(-1), p) @ v


def test_a_program_reads_no_mask_that_is_proved() -> None:
    compiled = Planned(documents, (9, 0))
    compiled(*(torch.randn(2, 2, 64, 64, dtype=torch.bfloat16) for _ in range(3)), 0.1)
    assert compiled.variants == ["program+mask+dropout"]
    calls = [n for gm in compiled.graphs for n in gm.graph.nodes if n.target is FORWARD]
    assert [node.args[3] for node in calls] == [[]]
