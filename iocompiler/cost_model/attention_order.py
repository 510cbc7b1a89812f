"""In which order the programs of an attention run: what they read should stay in L2, and long ones
should start early.
"""

from __future__ import annotations

from iocompiler.cost_model.device import Device

_SHARE = 2
"""Of L2, one part in so many: the rest is for what passes through, results and queries."""


def heads_together(heads: int, bytes_each: int, device: Device) -> int:
    """How many heads take turns, so that what their programs read again fits in L2.

    Args:
        heads: all that there are, at least one.
        bytes_each: what the programs of one head read again.
    """
    fitting = max(1, device.l2_bytes // _SHARE // max(1, bytes_each))
    turns = -(-heads // fitting)
    return -(-heads // turns)


def rows_ahead(heads: int, device: Device) -> int:
    """How many rows of blocks of each head start before heads take turns, longest first: what is
    many times as long as the others (a row that sees all) would end long after them, begun in the
    last turn. One at least, and with those of the other heads no more than half as many programs as
    there are multiprocessors: they read the keys of all heads. (A flat butterfly of 64 heads, on an
    H100: 149 us with one row, 152 with three, 157 with eight, 155 with none.)

    Args:
        heads: all that there are, at least one.
    """
    return max(1, device.sm_count // (2 * heads))
