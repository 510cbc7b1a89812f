"""Linear + cross-entropy with no gradient, of which the caller keeps logits in rows that are not
aligned: they are made where they are, and the row kernel copies them to their place.

The logits of a chunk are made in the rows behind it, which nothing was written to yet; only those
of the last chunk, in a scratch:

    kept     | written   | chunk     | its logits      |           |
             0         first       stop          <= the end

A row of what is made is the vocabulary down to a multiple of `LINE` classes, so a chunk may be half
of the rows there are left, and products over the weight as it is are fast. The other classes of all
rows are one product before. (With a gradient this would not do: that of x is a sum over all
classes.)
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from iocompiler.ops.linear_cross_entropy_products import ROWS, project, wide, with_zeros
from iocompiler.ops.linear_cross_entropy_rows import Piece, Rows, Setting, evaluate
from iocompiler.ops.linear_cross_entropy_walk import LINE

# What the logits of the last chunk may take, in bytes: chunks below a thousand rows are slower.
SCRATCH_BYTES = 1 << 26


def scratch_bytes(rows: int, vocabulary: int, width: int, itemsize: int) -> int:
    """What `walk_copied` allocates beside its result, x being [rows, width]."""
    chunks = chunks_of(rows, vocabulary, itemsize)
    last = chunks[-1].stop - chunks[-1].start if chunks else 0
    return itemsize * (last * _cut(vocabulary) + (rows + width) * LINE)


def chunks_of(rows: int, vocabulary: int, itemsize: int) -> list[slice]:
    """The chunks: of each but the last there are at least as many rows behind it."""
    # fewer than 2 * ROWS are not halved
    most = max(SCRATCH_BYTES // max(_cut(vocabulary) * itemsize, 1), 2 * ROWS - 1)
    borders = [0]
    while rows - borders[-1] > most:
        borders.append(borders[-1] + (rows - borders[-1]) // 2 // ROWS * ROWS)
    borders += [rows] if rows else []
    return [slice(*both) for both in pairwise(borders)]


def walk_copied(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rows_of: Rows,
    setting: Setting,
    kept: Tensor,
) -> Tensor:
    """The losses [T].

    Args:
        x: [T, D], contiguous; weight: [V, D]; bias: [V]; target: [T] int64, contiguous.
        kept: [T, V], contiguous, allocated by itself: the logits are written there.
    """
    rows, vocabulary = kept.shape
    cut = _cut(vocabulary)
    losses = x.new_empty((rows,), dtype=wide(x))
    tails = _tails(x, weight, bias)
    weight, bias = weight[:cut], None if bias is None else bias[:cut]
    for some in chunks_of(rows, vocabulary, x.element_size()):
        made = made_in(kept, some)
        project(x[some], weight, bias, made)
        piece = Piece(made, target[some], losses[some], copy=kept[some], tails=tails[some])
        evaluate(piece, rows_of.part(some), setting)
    return losses


def made_in(kept: Tensor, some: slice) -> Tensor:
    """[rows, the vocabulary's multiple of `LINE`], contiguous: where logits of ``some`` rows are
    made.
    """
    vocabulary = kept.shape[1]
    shape = (some.stop - some.start, _cut(vocabulary))
    if some.stop == kept.shape[0]:
        return kept.new_empty(shape)
    # aligned, as `ROWS` rows of any length are
    return kept.view(-1)[some.stop * vocabulary :][: shape[0] * shape[1]].view(shape)


def _tails(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[T, less than `LINE`], in rows of `LINE`: the logits of the classes that are left over."""
    cut = _cut(weight.shape[0])
    made = x.new_empty((x.shape[0], LINE))
    filled = None if bias is None else with_zeros(bias[cut:], LINE)
    project(x, with_zeros(weight[cut:], LINE), filled, made)
    return made[:, : weight.shape[0] - cut]


def _cut(vocabulary: int) -> int:
    return vocabulary // LINE * LINE
