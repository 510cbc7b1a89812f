"""Attention on a CPU that Inductor compiles for: taken where the library's kernel is no slower than
the plain operators, which Inductor fuses.

Measured with one thread, torch 2.13, four heads of 64, as ours over Inductor's:

    forward by the library, 32 to 1024 keys              0.2 to 1
    and backward, float32                                0.4 to 1
    and backward, bfloat16, at 128, 512, 1024 keys       2.2, 1, 0.5
    score programs, block by block                       1.2 to 4
    and backward, the probabilities returned too         1 to 3.6
"""

from __future__ import annotations

import torch
from torch.fx import Node

from iocompiler.graph.sizes import known
from iocompiler.passes.attention.reading.description import Declined
from iocompiler.passes.attention.reading.results import is_differentiated
from iocompiler.passes.attention.running.forward import Call
from iocompiler.passes.attention.running.scored import ScoredCall

_LONG = 512  # keys from which on the library's 16-bit backward is no slower


def check(call: Call | ScoredCall) -> None:
    """Raise `Declined` where Inductor's way is the faster one."""
    found = call.found
    if isinstance(call, ScoredCall):
        raise Declined("a score program runs block by block on a CPU: Inductor is faster")
    if found.is_shared:
        raise Declined("its weights are read too, a product with them is no slower on a CPU")
    if found.dropout_p > 0.0:
        raise Declined("no library kernel of a CPU drops out: Inductor is faster")
    if not known(found.width.size == found.value_width.size):
        raise Declined("heads that differ in width run block by block: Inductor is faster")
    if not is_differentiated(found.anchor):
        return
    if found.dtype in (torch.bfloat16, torch.float16) and _is_short(found.column.size):
        raise Declined(f"the CPU library's 16-bit backward is slow below {_LONG} keys")
    if any(_has_gradient(term.node) for term in call.masking.terms):
        raise Declined("the CPU library's backward has no gradient of a bias: Inductor is faster")


def _is_short(keys: object) -> bool:
    return isinstance(keys, int) and keys < _LONG


def _has_gradient(node: Node) -> bool:
    """Whether an input that wants a gradient is among what the node is made of."""
    seen, waiting = {node}, [node]
    while waiting:
        each = waiting.pop()
        if _wants_gradient(each):
            return True
        waiting += [x for x in each.all_input_nodes if x not in seen]
        seen.update(each.all_input_nodes)
    return False


def _wants_gradient(node: Node) -> bool:
    return bool(node.meta.get("requires_grad"))
