"""Results whose places share memory (`unfold`), where they are differentiated."""

from __future__ import annotations

from itertools import combinations

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.findings import Rewrite, record
from iocompiler.graph.match import graph_pass
from iocompiler.graph.sizes import equal

aten = torch.ops.aten


@graph_pass
def overlapping_results(gm: GraphModule) -> int:
    """A differentiated result that overlaps itself is copied, so that each place has a gradient.

    AOTAutograd copies the gradient of a result into a tensor that lies as the result does (torch
    2.11 to 2.15, whatever the backend): what shares memory keeps one of its gradients. Views of
    inputs, and of what another result is a view of too, it makes anew from what they show; an
    expanded result it takes as it is.
    """
    output, roots = gm.graph.output_node(), view.roots(gm)
    results = output.all_input_nodes
    learned = _differentiated(gm)
    lost = [
        node
        for node in results
        if node in learned
        and _overlaps(view.value(node))
        and all(root.op == "call_function" for root in roots[node])
        and not any(roots[other] & roots[node] for other in results if other is not node)
    ]
    for node in lost:
        options = {"memory_format": torch.contiguous_format}
        own = rewrite.call(gm, aten.clone.default, (node,), options, near=output)
        output.replace_input_with(node, own)
        record(gm, Rewrite("overlapping_results", view.where(node), "copied"))
    return len(lost)


def _differentiated(gm: GraphModule) -> set[Node]:
    regions, found = view.regions(gm), set[Node]()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            learned = bool(node.meta.get("requires_grad"))
        else:
            reads = node.target is not aten.detach.default and regions[node].grad
            learned = reads and any(read in found for read in node.all_input_nodes)
        if learned:
            found.add(node)
    return found


def _overlaps(result: object) -> bool:
    if not isinstance(result, torch.Tensor) or result.layout != torch.strided:
        return False
    if not (result.is_floating_point() or result.is_complex()):
        return False
    places = zip(result.stride(), result.shape, strict=True)
    dims = [(stride, size) for stride, size in places if not equal(size, 1)]
    if any(equal(stride, 0) or equal(size, 0) for stride, size in dims):
        return False
    if any(equal(one, other) for (one, _), (other, _) in combinations(dims, 2)):
        return True
    reach = 0
    for stride, size in sorted(dims) if all(map(_is_static, dims)) else ():
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _is_static(dim: tuple[object, object]) -> bool:
    return all(isinstance(number, int) for number in dim)
