"""One draw for the seeds of all dropouts of a graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

import iocompiler as ioc
from iocompiler.graph import rewrite
from iocompiler.ops.random import SEEDS, UNIFORM
from iocompiler.passes.seeds import seeds_together
from iocompiler.tile import philox

aten = torch.ops.aten
CPU = torch.device("cpu")


def graph(*, also_summed: bool = False) -> GraphModule:
    """The first seed of one draw, numbers under the second of two; all seeds of a third."""
    made = Graph()
    one, two = (made.call_function(SEEDS, (n, CPU)) for n in (1, 2))
    results: list[Node] = [
        made.call_function(aten.select.int, (one, 0, 0)),
        made.call_function(UNIFORM, (two, 1, [3])),
    ]
    if also_summed:
        results.append(made.call_function(aten.sum.default, (two,)))
    made.output(tuple(results))
    gm = GraphModule(torch.nn.Module(), made)
    rewrite.fill_values(gm)
    return gm


def draws(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.target is SEEDS]


def test_one_draw_whose_readers_read_on() -> None:
    gm = graph()
    assert seeds_together(gm) == 2
    gm.graph.lint()
    gm.recompile()
    assert [node.args for node in draws(gm)] == [(3, CPU)]
    torch.manual_seed(7)
    seed, numbers = gm()
    torch.manual_seed(7)
    seeds = SEEDS(3, CPU)
    assert seed == seeds[0]
    assert torch.equal(numbers, philox.uniform(seeds[2], torch.arange(3)))


def test_seeds_with_another_reader_stay() -> None:
    gm = graph(also_summed=True)
    assert seeds_together(gm) == 0
    assert [node.args[0] for node in draws(gm)] == [1, 2]


def test_of_layers_with_dropout_inside_attention_and_behind_it() -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = F.dropout((q @ k.mT * 0.125).softmax(-1), 0.1)
        return F.dropout(weights @ v, 0.2)

    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return layer(layer(q, k, v), k, v)

    given = [torch.randn(2, 3, 128, 64, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"]
    report = ioc.explain(layers, *given, device="h100", training=True, compile_kernels=False)
    (draw,) = [kernel for kernel in report.kernels if "seeds" in kernel.name]
    assert draw.layout == "i64[4]"
