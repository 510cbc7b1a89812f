"""What is saved for the backward: bytes are a fact of the graph, so they are compared exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from iocompiler.aot import differentiated, name_sources
from iocompiler.graph import view
from iocompiler.graph.capture import capture
from iocompiler.graph.normalise import normalise
from iocompiler.ops import decompositions, target
from iocompiler.ops.attention import FORWARD
from iocompiler.ops.partition import Saved, partition, saved
from iocompiler.ops.random import SEEDS, UNIFORM
from iocompiler.passes.dropout import dropout

Parts = tuple[GraphModule, GraphModule]


def parts_of(
    function: Callable[..., Any],
    *args: Any,
    cut: Callable[..., Parts] = partition,
    ours: bool = True,
    **kwargs: Any,
) -> Parts:
    """The forward and the backward graph of one call."""
    found: list[Parts] = []

    def keep(joint: GraphModule, given: Any, **keywords: Any) -> Parts:
        found.append(cut(joint, given, **keywords))
        return found[-1]

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        graph = capture(gm, inputs)
        normalise(graph)
        if ours:
            with target.planned_for((9, 0)):
                for each in (graph, *(inner for _, inner in view.checkpoints(graph))):
                    dropout(each)
                    each.recompile()
        graph.recompile()
        name_sources(graph)
        compiler = lambda flat, _: make_boxed_func(flat.forward)
        return differentiated(
            graph,
            inputs,
            fw_compiler=compiler,
            bw_compiler=compiler,
            decompositions=decompositions.table(),
            partition_fn=keep,
        )

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*args, **kwargs)
    (parts,) = found
    return parts


def total(parts: Parts) -> int:
    return sum(each.bytes for each in saved(*parts))


def test_gpt2_saves_less_than_the_default_partition() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=99, n_positions=32, attn_implementation="eager",
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).to(torch.bfloat16)
    model.loss_type = "ForCausalLM"
    ids = torch.randint(0, 99, (2, 16))

    def step(ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss

    usual = parts_of(step, ids, cut=min_cut_rematerialization_partition, ours=False)
    cut = parts_of(step, ids)
    masks = (
        7 * 2 * 16 * 32
    )  # embedding, and per layer attention (2 x 2 x 16 x 16), its output and the MLP's
    assert total(cut) <= total(usual) - masks
    assert not [each for each in saved(*cut) if each.dtype == torch.bool and each.bytes > 2 * 16]
    assert not [
        each for each in saved(*cut) if each.dtype == torch.float32 and each.bytes > 2 * 16 * 4
    ]
    assert [each.name for each in saved(*cut) if each.name.startswith("seeds")]


def test_layer_norm_saves_its_statistics_only() -> None:
    """The input is there already: the mean and the reciprocal deviation of each row are what is
    added.
    """
    w, b = torch.randn(64, requires_grad=True), torch.randn(64, requires_grad=True)
    x = torch.randn(50, 64, requires_grad=True)
    parts = parts_of(lambda x: F.layer_norm(x, (64,), w, b), x)
    assert total(parts) == 2 * 50 * 4


def test_activations_are_made_again() -> None:
    x = torch.randn(50, 64, requires_grad=True, dtype=torch.bfloat16)
    parts = parts_of(lambda x: F.silu(F.gelu(x).square() + F.relu(x)), x)
    assert total(parts) == 0


def test_a_cast_is_saved_short() -> None:
    w = torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True)
    x = torch.randn(50, 64, dtype=torch.bfloat16, requires_grad=True)
    parts = parts_of(lambda x: (x @ w).float().exp().sin(), x)
    assert [(each.dtype, each.bytes) for each in saved(*parts)] == [(torch.bfloat16, 50 * 64 * 2)]


def test_the_embedding_is_gathered_again() -> None:
    table = nn.Embedding(100, 64)
    parts = parts_of(lambda ids: table(ids).sin(), torch.arange(30))
    assert total(parts) == 0


def test_contractions_and_random_numbers_are_not_made_again() -> None:
    w = nn.Parameter(torch.randn(64, 64))
    x = torch.randn(50, 64, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return (torch.sin(x @ w) * torch.rand_like(x)).cos()

    _, backward = parts_of(f, x)
    kinds = [node.target for node in backward.graph.nodes if node.op == "call_function"]
    assert kinds.count(torch.ops.aten.mm.default) == 2
    assert not any("rand" in str(kind) for kind in kinds)


def test_saved_counts_a_storage_once_and_no_inputs() -> None:
    w = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(50, 64)
    forward, backward = parts_of(lambda x: (x @ w.t()).t().sin().t(), x)
    assert list(saved(forward, backward)) == [Saved("mm", torch.float32, 50 * 64 * 4)]


def test_the_default_partition_is_left_as_it_was() -> None:
    from torch._functorch import partitioners

    before = partitioners.get_default_op_list
    x = torch.randn(4, requires_grad=True)
    parts_of(lambda x: x.sin().exp(), x)
    assert partitioners.get_default_op_list is before


@pytest.mark.parametrize(
    "extremum",
    [
        lambda x: x.amax(1),
        lambda x: x.amin(1, keepdim=True),
        lambda x: x.max(),
        lambda x: torch.linalg.vector_norm(x, float("inf"), 1),
    ],
)
def test_the_places_of_an_extremum_are_saved(extremum: Callable[[Tensor], Tensor]) -> None:
    """What it was taken of may have other last digits when another kernel makes it again."""

    def function(x: Tensor) -> Tensor:
        return extremum(F.layer_norm(x, (8,)).to(torch.bfloat16)) * x.sum()

    _, backward = parts_of(function, torch.randn(4, 8, requires_grad=True))
    for equal in backward.graph.find_nodes(op="call_function", target=torch.ops.aten.eq.Tensor):
        waiting = list(equal.args)
        while waiting:  # nothing that sums
            node = waiting.pop()
            assert node.op == "placeholder" or node.target in MOVES, backward.code
            waiting += node.all_input_nodes


MOVES = tuple(
    getattr(torch.ops.aten, name).default
    for name in ("unsqueeze", "expand", "view", "alias", "squeeze")
)


def _targets(graph: GraphModule) -> list[Any]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def test_attention_without_dropout_is_not_random() -> None:
    """A region around it needs no state of a generator; one around what is dropped does."""

    def step(x: Tensor, rate: float) -> Tensor:
        setting = None, 1.0, False, rate, "blockwise", "ssss"
        layer = lambda q: FORWARD(q.sin(), q, q, *setting)[0]
        return checkpoint(layer, x, use_reentrant=False).cos()

    x = torch.randn(2, 3, 40, 8, requires_grad=True)
    for part in parts_of(step, x, 0.0):
        assert _targets(part).count(FORWARD) == 1  # in the backward again: the region is kept
        assert not any("rng" in str(target) for target in _targets(part))
    for part in parts_of(step, x, 0.5):
        assert any("rng" in str(target) for target in _targets(part))


def test_seeds_in_a_region_are_saved() -> None:
    def step(x: Tensor) -> Tensor:
        return checkpoint(lambda t: F.dropout(t.sin(), 0.5).cos(), x, use_reentrant=False).sum()

    x = torch.randn(50, 64, requires_grad=True)
    forward, backward = parts_of(step, x)
    assert SEEDS in _targets(forward)
    assert SEEDS not in _targets(backward)
    assert UNIFORM in _targets(backward)
    assert not any("rng" in str(target) for target in _targets(forward))


def test_what_leaves_a_region_is_not_made_again() -> None:
    """A norm behind the last one needs it: the region's products would run again for that."""
    first, second = torch.randn(64, 64), torch.randn(64, 64)

    def layer(x: Tensor) -> Tensor:
        return (x @ first).sin() @ second

    def step(x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(layer, x, use_reentrant=False)
        return F.layer_norm(x, (64,))

    x = torch.randn(50, 64, requires_grad=True)
    forward, backward = parts_of(step, x)
    mm = torch.ops.aten.mm.default
    assert _targets(forward).count(mm) == 4
    # of each layer, the first again, and a gradient for each of both
    assert _targets(backward).count(mm) == 2 * (1 + 2)
