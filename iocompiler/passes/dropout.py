"""Dropout whose mask is made again in the backward instead of being stored."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.findings import Miss, Rewrite, record
from iocompiler.graph.match import graph_pass
from iocompiler.ops import target
from iocompiler.ops.random import SEEDS, UNIFORM

aten = torch.ops.aten
_OTHERS = (aten.feature_dropout.default, aten.feature_alpha_dropout.default)
# of the graph, of a decomposition, into what is given where others see it, and for SELU
_PLAIN = (
    aten.dropout.default,
    aten.native_dropout.default,
    aten.dropout_.default,
    aten.alpha_dropout.default,
)
# what SELU tends to, negated (Klambauer et al. 2017, Self-Normalizing Neural Networks, section 2)
_ALPHA = 1.7580993408473766
# the mean of the result is that of the input to 1e-4, and nearer
_MOST = 0.9


@graph_pass
def dropout(gm: GraphModule) -> int:
    """Each training dropout on a GPU draws its mask from a seed; one call draws all seeds of a
    graph.

    Before::

        y = aten.dropout.default(x, 0.1, True)

    After::

        seeds = iocompiler.seeds(1, device)
        keep = aten.ge.Scalar(iocompiler.uniform(seeds, 0, x.shape), 0.1)
        y = aten.mul.Tensor(aten.mul.Tensor(x, keep), 1 / 0.9)

    ``alpha_dropout`` has another formula of the same mask. Left alone: what drops nothing (p = 0,
    evaluation) or everything (p = 1), the dropout inside attention, dropouts that are not
    elementwise (feature_dropout), and rates above 0.9: of the 16 bits of a number a rate errs by
    2 ** -17 at most, which of what is kept is 8e-5 there, and more beyond.
    """
    sites: dict[torch.device, list[Node]] = {}
    for node in view.calls(gm):
        reason = _declined(node)
        if reason is None:
            device = view.tensors(node)[0].device
            if target.device_type(view.tensors(node)[0]) == "cuda":
                sites.setdefault(device, []).append(node)
        elif reason:
            record(gm, Miss("dropout", view.where(node), reason))
    for device, nodes in sites.items():
        seeds = rewrite.call(gm, SEEDS, (len(nodes), device), {}, near=nodes[0])
        for which, node in enumerate(nodes):
            record(gm, Rewrite("dropout", view.where(node), f"p={_probability(node)}"))
            _replace(gm, node, seeds, which)
    return sum(map(len, sites.values()))


def _probability(node: Node) -> Any:
    return node.args[1]


def _declined(node: Node) -> str | None:
    """None for a dropout to replace, "" for what is none (or drops nothing), else why it is left
    alone.
    """
    if node.target in _OTHERS:
        return "the mask is not one number an element" if node.args[2] and node.args[1] else ""
    if node.target not in _PLAIN:
        return ""
    p, train = node.args[1:3]
    as_pair = node.target is aten.native_dropout.default
    if as_pair and any(user.target is not operator.getitem for user in node.users):
        return "the pair of result and mask is read as a whole"
    if not isinstance(p, (int, float)) or not isinstance(train, (bool, type(None))):
        return "the probability is not a constant"
    if train is False or not 0 < p < 1:
        return ""
    if p > _MOST:
        return f"a rate above {_MOST} takes finer random numbers"
    if not isinstance(node.args[0], Node) or not view.tensors(node.args[0])[0].is_floating_point():
        return "the input is not real floating point"
    return None


def _replace(gm: GraphModule, node: Node, seeds: Node, which: int) -> None:
    x, p = node.args[0], float(_probability(node))
    assert isinstance(x, Node)
    shape, dtype = view.tensors(x)[0].shape, view.tensors(x)[0].dtype

    def dropped(x: Any, seeds: Any) -> Any:
        sizes = [
            size if isinstance(size, int) else aten.sym_size.int(x, dim)
            for dim, size in enumerate(shape)
        ]
        keep = aten.ge.Scalar(UNIFORM(seeds, which, sizes), p)
        kept = aten.mul.Tensor(x, keep)
        if node.target is aten.alpha_dropout.default:
            return _selu(kept, keep, p, dtype), keep
        return aten.mul.Tensor(kept, 1 / (1 - p)), keep

    result, keep = rewrite.insert(gm, dropped, x, seeds, near=node)
    if node.target is aten.dropout_.default:
        rewrite.respell(node, aten.copy_.default, (x, result))
        return
    if node.target is not aten.native_dropout.default:
        rewrite.redirect(gm, node, result)
        return
    for user in list(node.users):
        rewrite.bypass(gm, user, (result, keep)[user.args[1]])  # type: ignore[index]


def _selu(kept: Any, keep: Any, p: float, dtype: torch.dtype) -> Any:
    """What is dropped becomes -alpha; then mean and variance are brought back to 0 and 1."""
    scale = 1 / math.sqrt((_ALPHA**2 * p + 1) * (1 - p))
    shift = aten.mul.Tensor(aten._to_copy.default(keep, dtype=dtype), _ALPHA * scale)
    moved = aten.sub.Tensor(shift, _ALPHA * scale * (1 - p))
    return aten.add.Tensor(aten.mul.Tensor(kept, scale), moved)
