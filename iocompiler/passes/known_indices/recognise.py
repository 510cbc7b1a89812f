"""Gathers whose indices the graph itself makes, as slices of the table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.findings import Miss, Rewrite, record
from iocompiler.graph.match import graph_pass
from iocompiler.graph.sizes import known
from iocompiler.passes.known_indices.affine import Affine, guarded
from iocompiler.passes.known_indices.reader import Reader
from iocompiler.passes.known_indices.rows import NoSlice, Rows, rows_of, spread
from iocompiler.passes.known_indices.rules import shape
from iocompiler.passes.known_indices.spelling import Sizes, Unspelled

aten = torch.ops.aten
_GATHERS = (aten.embedding.default, aten.index_select.default, aten.index.Tensor)


class _Declined(Exception):
    """Why a gather with known indices stays; "" where that is no news."""


@dataclass(frozen=True)
class _Gather:
    """``node`` takes rows of ``table`` along ``dim`` at ``index``; ``wraps`` where a negative one
    counts from the end.
    """

    node: Node
    table: Node
    dim: int
    index: Node
    wraps: bool


@graph_pass
def known_indices(gm: GraphModule) -> int:
    """A gather at places that the graph computes from nothing but sizes is a slice, repeated.

    Before::

        places = aten.unsqueeze.default(aten.arange.default(128), 0)
        y = aten.embedding.default(table, places)                     # table [512, 64]

    After::

        rows = aten.unsqueeze.default(aten.slice.Tensor(table, 0, 0, 128), 0)
        y = aten.clone.default(aten.expand.default(rows, [1, 128, -1]))

    So for every index that is an affine function of its own place (`Affine`): ranges, constants,
    their sums, views and broadcasts; for ``index_select`` and ``x[index]``, too. Its gradient is a
    plain sum over what is repeated, put in place: no sort, no atomics. Declined: rows that may lie
    outside the table (eager raises), ``padding_idx`` among them, ``scale_grad_by_freq`` and
    ``sparse``, dims whose steps overlap; indices in a buffer, whose values nobody knows yet.
    """
    reader = Reader(gm)
    sites = 0
    for node in list(view.calls(gm, *_GATHERS)):
        gather = _gather(node)
        if gather is None:
            continue
        index = reader.read(gather.index)
        reason = _buffer(gather.index) if index is None else ""
        if index is not None:
            try:
                _replace(gm, gather, index)
                reader, sites = Reader(gm), sites + 1  # it knows the graph as it was
            except _Declined as declined:
                reason = str(declined)
        if reason:
            record(gm, Miss("known_indices", view.where(node), reason))
    return sites


def _gather(node: Node) -> _Gather | None:
    """The call as a gather along one dim; None where it is none, or not of plain tensors."""
    args = view.spelled_out(node)
    if node.target is aten.embedding.default:
        table, dim, index = args[0], 0, args[1]
    elif node.target is aten.index_select.default:
        table, dim, index = args[:3]
    else:
        given = [(d, each) for d, each in enumerate(args[1]) if each is not None]
        if len(given) != 1:
            return None
        table, (dim, index) = args[0], given[0]
    if not all(isinstance(view.value(each), torch.Tensor) for each in (table, index)):
        return None
    rank = len(shape(table))
    if not rank or view.value(index).dtype not in (torch.int64, torch.int32):
        return None
    return _Gather(node, table, dim % rank, index, node.target is aten.index.Tensor)


def _replace(gm: GraphModule, gather: _Gather, index: Affine) -> None:
    total = shape(gather.table)[gather.dim]
    if gather.node.target is aten.index_select.default and not index.rank:
        index = Affine(index.const, (0,), (1,))  # it keeps the dim
    rows, index = _rows(gather, index, total)
    if gather.node.target is aten.embedding.default:
        _check_gradient(gather.node, rows)
    sizes = Sizes(gm, gather.index)
    try:
        for value in (rows.first, rows.end, rows.step, *rows.sizes, *index.sizes):
            sizes.check(value)
    except Unspelled as error:
        raise _Declined(str(error)) from error
    whole = known(rows.first == 0) and known(rows.count == total) and known(rows.step == 1)
    rank = len(shape(gather.table))

    def build(table: Any, *proxies: Any) -> Any:
        spell = sizes.speller(list(proxies))
        return spread(table, rank, gather.dim, rows, index, spell, whole)

    repeated = "" if len(rows.dims) == index.rank else ", repeated"
    record(gm, Rewrite("known_indices", view.where(gather.node), f"{rows}{repeated}"))
    rewrite.substitute(gm, gather.node, build, gather.table, *sizes.nodes)


def _rows(gather: _Gather, index: Affine, total: Any) -> tuple[Rows, Affine]:
    if any(known(size == 0) for size in index.sizes):
        raise _Declined  # nothing is read
    try:
        rows = rows_of(index)
        if gather.wraps and known(rows.end <= 0):
            index = replace(index, const=index.const + total)
            rows = rows_of(index)
    except NoSlice as error:
        raise _Declined(str(error)) from error
    if not guarded(rows.first >= 0) or not guarded(rows.end <= total):
        raise _Declined(f"{rows} may lie outside the table, which has {total}")
    return rows, index


def _check_gradient(node: Node, rows: Rows) -> None:
    _, _, padding, by_frequency, sparse = view.spelled_out(node)
    if by_frequency:
        raise _Declined("the gradient is scaled by how often a row is read")
    if sparse:
        raise _Declined("the gradient is sparse")
    if not isinstance(padding, int) or (padding >= 0 and rows.holds(padding)):
        raise _Declined(f"row {padding}, which has no gradient, is among {rows}")


def _buffer(index: Node) -> str:
    """Why an index that comes from buffers alone is not known; "" for any other."""
    seen, waiting, buffers = {index}, [index], []
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder" and isinstance(view.value(node), torch.Tensor):
            if "_dynamo_static_input_type" not in node.meta.get("tensor_dict", {}):
                return ""
            buffers.append(node.name)
        new = [read for read in node.all_input_nodes if read not in seen]
        seen.update(new)
        waiting += new
    if not buffers:
        return ""
    names = ", ".join(sorted(buffers))
    return f"the indices lie in a buffer, {names}: its values are not known when compiling"
