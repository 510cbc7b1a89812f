"""What each node of a flat graph is to the planner, and which tensors in memory it reads.

- a *view* costs nothing;
- a *virtual* node is recomputed inside every kernel that reads it: reading its operands
  costs no more than reading it;
- a *kernel* node is computed by a generated kernel, in the group planning puts it in;
- an *opaque* node is a call of an operator that exists (cuBLAS, cuDNN, sort ...), with the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from iocompiler.errors import CannotPlan
from iocompiler.plan.found import Symbolic, finders, needed
from iocompiler.plan.lower import Lowered
from iocompiler.plan.lowering import Unsupported
from iocompiler.plan.memo import Memo
from iocompiler.plan.ordered import ordered
from iocompiler.plan.overwriting import overwritten, writes_in_part
from iocompiler.plan.rules import DTYPES, has_rule, is_elementwise, is_reduction
from iocompiler.plan.sizes import equal, size_of, value_at
from iocompiler.plan.views import SPLITS, is_view, storage_owner
from iocompiler.tile.index import product

aten = torch.ops.aten

# Calls made for what they raise, not for what they return.
_CHECKS = frozenset(
    {aten._assert_async.msg, aten._assert_async.default, aten._assert_scalar.default}
)

# What a library does best: a call of it is no gap in the planner.
_LIBRARY = {
    **dict.fromkeys(
        ("mm", "addmm", "_addmm_activation", "bmm", "baddbmm", "aligned_mm", "sum_of_products"),
        "contraction: cuBLAS",
    ),
    "wide_product": "contraction: cuBLAS",
    **dict.fromkeys(("convolution", "convolution_backward"), "contraction: cuDNN"),
    **dict.fromkeys(
        ("attention_forward", "attention_backward"), "attention: cuDNN, flash or efficient"
    ),
    **dict.fromkeys(
        ("linear_cross_entropy_losses", "linear_cross_entropy_gradients"),
        "linear + cross-entropy in chunks: cuBLAS and a row kernel",
    ),
    **dict.fromkeys(
        ("linear_divergence_losses", "linear_divergence_gradients"),
        "linear + divergence in chunks: cuBLAS and a row kernel",
    ),
    **dict.fromkeys(
        ("embedding_gradient", "embedding_gradient_onto"), "embedding gradient: our templates"
    ),
    **dict.fromkeys(
        (
            *("scored_attention", "scored_attention_backward", "scored_attention_operand"),
            *("scored_attention_backward_packed", "scored_attention_backward_summed"),
            "scored_attention_backward_packed_summed",
        ),
        "attention: our template with a score program",
    ),
    "attention_classes": "attention: which blocks a mask leaves",
    "attention_table": "attention: the lists of the blocks a mask leaves",
}

LIBRARY_REASONS = frozenset(_LIBRARY.values())
WHY = "; "
"""Behind the reason for a call may stand why nothing else does its work."""

# Beyond this many operations a shared value is stored, not recomputed by each of its readers.
_RECOMPUTE_OPS = 40

# What is computed from so few numbers is no kernel of its own: each of its readers does it.
_FEW_SCALARS = 4


def tensors(node: Node) -> list[torch.Tensor]:
    """The tensors a node produces."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple, dict)):
        return [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
    return []


def nbytes(node: Node, hints: dict[str, int]) -> int:
    """Bytes of the node's result, at the hinted sizes."""
    return sum(
        value_at(product([size_of(s) for s in t.shape]), hints) * t.element_size()
        for t in tensors(node)
    )


def _is_scalar(node: Node) -> bool:
    return [tensor.dim() for tensor in tensors(node)] == [0]


def _is_called_for_its_effect(node: Node) -> bool:
    """A call without a tensor in what it returns, which is there all the same."""
    operators = (OpOverload, HigherOrderOperator)
    return isinstance(node.target, operators) and not tensors(node) and node.is_impure()


@dataclass
class Dataflow:
    """The classified graph.

    ``readers[n]``: kernel and opaque nodes that read n's storage (through views, virtuals);
    ``before[n]``: the call that must have run before n, though it reads none of its results.
    """

    graph: Graph
    device: torch.device
    hints: dict[str, int]
    order: dict[Node, int] = field(default_factory=dict)
    kernel: dict[Node, None] = field(default_factory=dict)
    virtual: dict[Node, None] = field(default_factory=dict)
    opaque: dict[Node, str] = field(default_factory=dict)
    leaves: dict[Node, frozenset[Node]] = field(default_factory=dict)
    readers: dict[Node, set[Node]] = field(default_factory=dict)
    before: dict[Node, Node] = field(default_factory=dict)
    outputs: set[Node] = field(default_factory=set)
    singles: dict[Node, Lowered] = field(default_factory=dict)
    _nbytes: dict[Node, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.memo = Memo(self.order)
        self._classify()
        self._choose_virtual()
        self._lower_singles()
        self._connect()
        self.before = ordered(self.graph, self.opaque)

    # --- which operators are generated

    def _classify(self) -> None:
        for node in finders(self.graph).values():
            if is_view(node):  # a slice from one value read to another: no call finds its size
                raise CannotPlan(operator=f"{node.target} between sizes that only a run finds")
        for node in self.graph.nodes:
            if node.target in _CHECKS:
                self.opaque[node] = "a check of the user's values"
            elif _is_called_for_its_effect(node):
                self.opaque[node] = "called for its effect"
            if node.target is aten._local_scalar_dense.default and isinstance(
                node.meta["val"], Symbolic
            ):
                self.opaque[node] = "a number the host reads"
            if node.op != "call_function" or is_view(node) or not tensors(node):
                continue
            if node.target is operator.getitem or node.target in SPLITS:
                continue
            reason = self._why_opaque(node)
            if reason is None:
                self.kernel[node] = None
            else:
                self.opaque[node] = reason
        for node in self._host_scalars():
            self.virtual[node] = None
            del self.opaque[node]

    def _why_opaque(self, node: Node) -> str | None:
        if isinstance(node.target, HigherOrderOperator):
            return f"the higher-order operator {node.target}"
        if not has_rule(node):
            name = str(node.target).split(".")[1] if "." in str(node.target) else str(node.target)
            return _LIBRARY.get(name, f"no rule for {node.target}")
        made = tensors(node)
        if made[0].device != self.device:
            return f"on {made[0].device}"
        read = [t for a in node.all_input_nodes for t in tensors(a)]
        for tensor in made + read:
            if tensor.dtype not in DTYPES:
                return f"dtype {tensor.dtype}"
            if tensor.layout != torch.strided:
                return f"layout {tensor.layout}"
        if any(equal(size_of(s), 0) for t in made + read for s in t.shape):
            return "an empty tensor"
        if any(t.device != self.device and t.dim() > 0 for t in read):
            return "operands on several devices"
        try:
            self.memo.lower(frozenset({node}), (), (node,))
        except Unsupported as error:
            return str(error)
        return None

    def _host_scalars(self) -> list[Node]:
        """0-dim CPU arithmetic that only accelerator kernels read is done inside them.

        The bias corrections of an optimizer are of this kind.
        """
        found: dict[Node, None] = {}
        for node in reversed(self.graph.nodes):
            if node not in self.opaque or self.device.type == "cpu" or not is_elementwise(node):
                continue
            if any(
                t.dim() > 0 or t.device.type != "cpu"
                for a in (node, *node.all_input_nodes)
                for t in tensors(a)
            ):
                continue
            if node.users and all(user in self.kernel or user in found for user in node.users):
                found[node] = None
        return list(reversed(found))

    # --- which of those are recomputed by every reader

    def _choose_virtual(self) -> None:
        stored = self._must_be_stored()
        updates = self._updates()
        old = set(updates.values())
        changing = {node.args[0] for node in self.kernel | self.opaque if writes_in_part(node)}
        weight: dict[Node, int] = {}
        reads: dict[Node, dict[Node, int]] = {}
        for node in sorted([*self.kernel, *self.virtual], key=lambda n: self.order[n]):
            reads[node] = self._bytes_read(node, reads)
            owners = {storage_owner(a) for a in node.all_input_nodes}
            weight[node] = 1 + sum(weight[owner] for owner in owners if owner in self.virtual)
            if (
                node in self.virtual
                or node in stored
                or is_reduction(node)
                or overwritten(node) is not None
                or changing & reads[node].keys()  # which are read before they change
            ):
                continue
            if node in updates and (old & reads[node].keys()) - {updates[node]}:
                continue  # another update may stand before this one, or wait for it as this for it
            free = not reads[node]
            cheap = weight[node] <= _RECOMPUTE_OPS or len(node.users) == 1
            few = len(reads[node]) <= _FEW_SCALARS and not old & reads[node].keys()
            scalars = few and all(map(_is_scalar, reads[node]))
            less = sum(reads[node].values()) <= self.nbytes(node)
            if free or (cheap and (less or scalars)):
                self.virtual[node] = None
        for node in self.virtual:
            self.kernel.pop(node, None)

    def _must_be_stored(self) -> set[Node]:
        stored: set[Node] = set()
        for node in self.graph.nodes:
            if node.op == "output" or node in self.opaque:
                stored |= {storage_owner(a) for a in node.all_input_nodes}
            if node.op == "output":
                self.outputs = {storage_owner(a) for a in node.all_input_nodes}
        return stored

    def _updates(self) -> dict[Node, Node]:
        """What inputs become, and those that are written into: their old elements are gone for
        later readers.
        """
        updates = self.graph.find_nodes(op="call_function", target=aten.copy_.default)
        return {storage_owner(n.args[1]): storage_owner(n.args[0]) for n in updates}

    def _bytes_read(self, node: Node, reads: dict[Node, dict[Node, int]]) -> dict[Node, int]:
        """Bytes of each stored tensor read for ``node``, at most as many elements as it has."""
        found: dict[Node, int] = {}
        most = value_at(product([size_of(s) for s in node.meta["val"].shape]), self.hints)
        for operand in node.all_input_nodes:
            owner = storage_owner(operand)
            if not tensors(owner):
                continue
            below = reads[owner] if owner in self.virtual else {owner: self.nbytes(operand)}
            for leaf, count in below.items():
                limit = most * tensors(leaf)[0].element_size() if not is_reduction(node) else count
                found[leaf] = max(found.get(leaf, 0), min(count, limit))
        return found

    def _lower_singles(self) -> None:
        """Lower every kernel node alone.

        Where recomputing its operands inside does not work out, store them.
        """
        pending = list(self.kernel)
        while pending:
            node = pending.pop()
            try:
                self.singles[node] = self.memo.lower(frozenset({node}), self.virtual, (node,))
            except Unsupported:
                owners = dict.fromkeys(map(storage_owner, node.all_input_nodes))
                stored = [owner for owner in owners if owner in self.virtual]
                assert stored, f"{node.name} lowers alone but not in its graph"
                for operand in stored:
                    del self.virtual[operand]
                    self.kernel[operand] = None
                pending = list(self.kernel)  # others may have recomputed them too

    # --- who reads what from memory

    def _connect(self) -> None:
        found = finders(self.graph)
        for node in self.graph.nodes:
            if (
                node in self.virtual
                or node in self.kernel
                or node in self.opaque
                or node.op == "output"
            ):
                self.leaves[node] = frozenset(self._stored_operands(node)) | frozenset(
                    needed(node, found)
                )
        for node in [*self.kernel, *self.opaque]:
            for leaf in self.leaves[node]:
                self.readers.setdefault(leaf, set()).add(node)

    def _stored_operands(self, node: Node) -> Iterable[Node]:
        operands = list(node.all_input_nodes)
        if overwritten(node) is not None:
            operands = operands[1:]  # the target is written, not read
        for operand in operands:
            owner = storage_owner(operand)
            if owner in self.virtual:
                yield from self.leaves[owner]
            elif tensors(owner):
                yield owner

    def nbytes(self, node: Node) -> int:
        """As `nbytes`, kept: grouping asks again and again."""
        found = self._nbytes.get(node)
        if found is None:
            found = self._nbytes[node] = nbytes(node, self.hints)
        return found

    def item_source(self, node: Node) -> Node:
        """The opaque call behind a ``getitem``, or the node itself."""
        source = node
        while source.target is operator.getitem and isinstance(source.args[0], Node):
            source = source.args[0]
        return source if source in self.opaque else node
