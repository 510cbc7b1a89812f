"""How an attention's axes lie in the layout of the semantic ops, [B, H, S, D]; and where its output
has the dims that were written.
"""

from __future__ import annotations

from torch.fx import Node

from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.axes import Dims, Group, flat, resolve, resolved
from iocompiler.passes.attention.reading.description import Attention


class Frame:
    """How an attention's axes are laid out: batch, heads (of which keys and values have the first
    ``groups``).
    """

    def __init__(self, found: Attention) -> None:
        batch = [axis for axis in found.rows if axis is not found.row]
        of_keys = {*flat(found.key.dims), *flat(found.value.dims)}
        repeated = [
            a for n, a in enumerate(batch) if a not in of_keys and (n > 0 or len(batch) == 1)
        ]
        kept = [axis for axis in batch if axis not in repeated]
        groups = kept[-1:] if len(kept) > 1 else []
        self.batch: Group = tuple(kept[: len(kept) - len(groups)])
        self.groups: Group = tuple(groups)
        self.heads: Group = (*groups, *repeated)
        row: Group = (found.row,) if found.row is not None else ()
        column, width, value_width = (
            resolve((a,)) for a in (found.column, found.width, found.value_width)
        )
        self.query: Dims = (self.batch, self.heads, row, width)
        self.key: Dims = (self.batch, self.groups, column, width)
        self.value: Dims = (self.batch, self.groups, column, value_width)
        self.scores: Dims = (self.batch, self.heads, row, column)
        self.out: Dims = (self.batch, self.heads, row, value_width)


def forward_views(found: Attention) -> tuple[Node, Dims]:
    """Where the output's dims are merged, as bmm's are: the view after it that parts them again, if
    it is alone.
    """
    node, dims = found.anchor, resolved(found.dims)
    while any(len(group) > 1 for group in dims) and len(node.users) == 1:
        user = next(iter(node.users))
        later = views.after(user, dims) if user.target in views.RESHAPES else None
        if later is None:
            break
        node, dims = user, resolved(later)
    return (
        (found.anchor, resolved(found.dims))
        if any(len(group) > 1 for group in dims)
        else (node, dims)
    )
