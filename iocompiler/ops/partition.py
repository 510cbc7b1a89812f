"""What is saved for the backward and what is computed again there: a minimum cut by bytes, with our
classes of operators.

The cut itself is AOTAutograd's. Told to it here: what our kernels compute inside another kernel at
no cost in memory traffic (pointwise functions, gathers, numbers made from a seed), and what must
never run twice (contractions, attention, anything random, anything that is a kernel of its own).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest import mock

import networkx
import torch
from networkx.algorithms.flow import boykov_kolmogorov
from torch._functorch import config, partitioners
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from iocompiler.graph import view
from iocompiler.ops import attention
from iocompiler.ops.equal_calls import merge_equal_calls
from iocompiler.ops.fma import FMA
from iocompiler.ops.random import SEEDS, UNIFORM

aten = torch.ops.aten
prims = torch.ops.prims

# recomputed at no traffic of their own beside what stands in the default list, which is pointwise
# operators and views
_ALSO_FREE = frozenset({
    UNIFORM,
    aten.embedding.default,
    aten.constant_pad_nd.default,
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.cat.default,
    aten.tril.default,
    aten.square.default,
    aten.flip.default,
    aten.index_select.default,
    aten.amin.default,
    aten.new_full.default,
    aten.new_ones.default,
    aten.ones_like.default,
    aten.detach.default,
    aten.fill.Scalar,
    aten.logical_and.default,
    aten.logical_or.default,
    aten.logical_not.default,
    aten.logical_xor.default,
    aten.bitwise_and.Tensor,
    aten.bitwise_or.Tensor,
    aten.bitwise_xor.Tensor,
    aten.bitwise_and.Scalar,
    aten.isnan.default,
    aten.minimum.default,
    aten.sign.default,
    aten.copysign.Tensor,
    aten.exp2.default,
    FMA,
})  # fmt: skip


# in the metadata of what may run again though it is dear
_AGAIN = "iocompiler_again"

# bans of AOTAutograd's on what is cheap to run again
_BANS = (
    "ban_recompute_used_far_apart",
    "ban_recompute_long_fusible_chains",
    "ban_recompute_materialized_backward",
)


_EXTREMA = (aten.amax.default, aten.amin.default, aten.max.default, aten.min.default)
_CASTS = (aten._to_copy.default, prims.convert_element_type.default, aten.squeeze.dims)


class _OurOps(partitioners.OpTypes):
    """The default classes of operators, and ours by overload."""

    def is_fusible(self, node: Node) -> bool:
        return node.target in _ALSO_FREE or super().is_fusible(node)

    def is_recomputable(self, node: Node) -> bool:
        if node.meta.get(_AGAIN):
            return True
        if self.is_random(node):
            return False
        return node.target in _ALSO_FREE or super().is_recomputable(node)

    def is_random(self, node: Node) -> bool:
        tags = getattr(node.target, "tags", ())
        return torch.Tag.nondeterministic_seeded in tags or super().is_random(node)


@cache
def _op_types() -> _OurOps:
    default = partitioners.get_default_op_list()
    return _OurOps(
        default.fusible_ops,
        default.compute_intensive_ops,
        default.random_ops,
        default.view_ops,
        default.recomputable_ops,
    )


def partition(joint: GraphModule, inputs: Any, **keywords: Any) -> tuple[GraphModule, GraphModule]:
    """For AOTAutograd's ``partition_fn``: the forward and the backward graph of a joint one.

    Args:
        joint: the functional graph of forward and backward.
        inputs: its inputs, as AOTAutograd gives them.
        keywords: ``num_fwd_outputs`` and what else AOTAutograd passes.
    """
    _keep_copies(joint)
    _keep_compared(joint)
    _keep_seeds(joint)
    _keep_results(joint)
    _retarget(joint, attention.FORWARD, attention.WITHOUT_DROPOUT)
    merge_equal_calls(joint)
    ours = _op_types()
    # which cut is least does not hang on the algorithm, how long it takes does
    cut = partial(networkx.minimum_cut, flow_func=boykov_kolmogorov)
    with (
        config.patch(cse=False),
        mock.patch.object(networkx, "minimum_cut", cut),
        mock.patch.object(partitioners, "get_default_op_list", return_value=ours),
    ):
        parts = partitioners.min_cut_rematerialization_partition(joint, inputs, **keywords)
    for part in parts:
        _retarget(part, attention.WITHOUT_DROPOUT, attention.FORWARD)
    found: tuple[GraphModule, GraphModule] = parts
    return found


def partition_again(
    joint: GraphModule,
    inputs: Any,
    again: Collection[str],
    keep: Collection[str],
    relaxed: bool,
    **keywords: Any,
) -> tuple[GraphModule, GraphModule]:
    """As `partition`, on a copy of the joint graph.

    Args:
        again: nodes that may run again though they are dear.
        keep: nodes that must not.
        relaxed: cheap nodes run again wherever that saves memory.
    """
    graph = view.copied(joint)
    for node in graph.graph.nodes:
        if node.name in again:
            node.meta[_AGAIN] = True
        if node.name in keep:  # what the user checkpoints stays so
            node.meta.setdefault("recompute", CheckpointPolicy.MUST_SAVE)
    bans = dict.fromkeys(_BANS, False) if relaxed else {}
    with config.patch(bans):
        return partition(graph, inputs, **keywords)


def runs_again(node: Node) -> bool:
    """Whether a minimum cut by bytes may compute the node again without being told to."""
    return _op_types().is_recomputable(node)


def _keep_copies(joint: GraphModule) -> None:
    """Have AOTAutograd's own copies of inputs saved as they are, not made again from the inputs.

    It copies what the caller's tensor is overwritten with after the graph, where autograd sees it:
    the input, saved in place of the copy, would be found changed by the backward. A copy that the
    user wrote has the user's line.
    """
    for node in joint.graph.find_nodes(op="placeholder"):
        for user in node.users:
            if user.target is aten.clone.default and not user.meta.get("stack_trace"):
                user.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _keep_compared(joint: GraphModule) -> None:
    """Have what an extremum is taken of saved, where its gradient looks for the places that are
    equal to it (or these places, found in the forward).

    Made again in another kernel it may have other last digits where sums are taken in another
    order: no element is equal to the extremum then, and the gradient, divided by how many are, is
    NaN.
    """
    for node in joint.graph.find_nodes(op="call_function", target=aten.eq.Tensor):
        for extremum in (_behind(side, _CASTS) for side in node.args):
            if extremum.target in _EXTREMA:
                source = _behind(extremum.args[0])
                if source.op == "call_function":
                    source.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _keep_seeds(joint: GraphModule) -> None:
    """Have seeds saved: of a checkpointed region AOTAutograd would save the generator's state, and
    draw them again from that.
    """
    for node in joint.graph.find_nodes(op="call_function", target=SEEDS):
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _keep_results(joint: GraphModule) -> None:
    """Have what leaves a checkpointed region saved where the backward reads it, as eager does.

    AOTAutograd keeps what the next region reads. What a norm behind the last one reads would be
    computed again from what that region was given, through all of it.
    """
    for node in view.calls(joint):
        if partitioners.must_recompute(node) and any(map(_is_outside, node.users)):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _is_outside(node: Node) -> bool:
    """Whether a node belongs to the forward, and to no region."""
    forward = node.op == "call_function" and not partitioners._has_tag_is_backward(node)
    return forward and "ac_graph_id" not in node.meta


def _retarget(graph: GraphModule, old: Any, new: Any) -> None:
    """Attention with no dropout by its other name.

    AOTAutograd takes what may be random, by its name, to be random: of a checkpointed region it
    saves the generator's state for it, and has both calls made by operators that set that.
    """
    for node in graph.graph.find_nodes(op="call_function", target=old):
        if not view.named(node)["dropout_p"]:
            node.target = new


def _behind(node: Any, others: tuple[Any, ...] = ()) -> Node:
    """The tensor that a view shows, or that one of the other operators was given."""
    while view.is_view(node) or node.target in others:
        node = node.args[0]
    found: Node = node
    return found


@dataclass(frozen=True)
class Saved:
    """A tensor the forward makes and hands to the backward."""

    name: str
    dtype: torch.dtype
    bytes: int


def saved(forward: GraphModule, backward: GraphModule) -> tuple[Saved, ...]:
    """What a partitioned forward keeps for its backward: each storage once, those of its inputs
    left out.
    """
    made = {node.name: node for node in forward.graph.nodes}
    found: dict[Node, Saved] = {}
    for node in backward.graph.find_nodes(op="placeholder"):
        if node.name not in made:
            continue
        owner = view.owner(made[node.name])
        value = owner.meta.get("val")
        if owner.op == "call_function" and isinstance(value, torch.Tensor):
            found[owner] = Saved(owner.name, value.dtype, value.numel() * value.itemsize)
    return tuple(found.values())
