"""What a forward leaves to its backward alone: memory that the forward's plan allocates and none of
its other results shows. Parameters, inputs, what the user gets, and views of them are not among it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from iocompiler.plan.data import Plan, Ref
from iocompiler.plan.inplace import owned
from iocompiler.plan.moving import bases_of, storage


def donated(forward: Plan, handed_over: Mapping[str, int]) -> frozenset[str]:
    """Of the inputs of a backward those in such memory.

    Args:
        forward: as it runs, results in place of others included.
        handed_over: the backward's inputs by name, with the position of each among the outputs of
            the forward.
    """
    bases = bases_of(forward.steps)
    roots = [storage(o.name, bases) if isinstance(o, Ref) else "" for o in forward.outputs]
    shown = Counter(roots)
    own = {name for step in forward.steps for name in owned(step)}
    return frozenset(
        name for name, at in handed_over.items() if roots[at] in own and shown[roots[at]] == 1
    )
