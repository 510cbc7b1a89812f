"""How a compiled graph is called, read from what AOTAutograd found out about it: frozen data, with
a form in JSON.

Only the plain cases are taken: dense tensors and sizes in; fresh tensors, sizes and inputs out;
inputs overwritten by the graph itself. Everything else is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from iocompiler.errors import NotCacheable
from iocompiler.runtime.tangents import FRESH
from iocompiler.runtime.tangents import takers as takers_of

_KEPT = ("NOT_MUTATED", "MUTATED_IN_GRAPH")
# fields of the metadata that are read below, or that say nothing the call depends on
_READ = {
    "input_info", "output_info", "num_intermediate_bases", "keep_input_mutations", "deterministic",
    "traced_tangents", "traced_tangents_descs", "traced_tangent_metas", "subclass_inp_meta",
    "subclass_fw_graph_out_meta", "subclass_tangent_meta", "num_symints_saved_for_bw",
    "num_tensors_saved_with_no_vc_check", "static_input_indices", "bw_donated_idxs",
    "compile_id_str", "tangent_source_stack_traces", "is_train", "saved_tensor_is_graph_input",
}  # fmt: skip


@dataclass(frozen=True)
class Output:
    """One result of the user's graph.

    Attributes:
        source: the position of the input it is; None for a tensor or size the graph makes.
        differentiable: whether autograd is to know it.
        dynamic: dimensions whose size is symbolic, None for what is no tensor.
    """

    source: int | None
    differentiable: bool
    dynamic: tuple[int, ...] | None


@dataclass(frozen=True)
class Tangent:
    """The output whose gradient the backward takes, and the layout it was traced for: a memory
    format's name, or size and strides in elements.
    """

    output: int
    memory_format: str
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Training:
    """What stands between a forward and its backward.

    The forward returns outputs, ``checked`` tensors, ``unchecked`` ones (whose version counters are
    not checked), ``sizes``; the backward takes sizes, tensors, tangents, and returns one gradient
    an input. Inputs in ``detached`` are not to reach autograd.
    """

    checked: int
    unchecked: int
    sizes: int
    tangents: tuple[Tangent, ...]
    detached: tuple[int, ...]
    deterministic: bool


@dataclass(frozen=True)
class Convention:
    """Number of inputs, outputs in order, inputs the graph overwrites where autograd can see it."""

    inputs: int
    outputs: tuple[Output, ...]
    overwritten: tuple[int, ...]
    training: Training | None

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Convention:
        """Raises KeyError, TypeError or ValueError where the data are not a convention's."""
        training = data["training"]
        return Convention(
            int(data["inputs"]),
            tuple(_output(row) for row in data["outputs"]),
            tuple(map(int, data["overwritten"])),
            None if training is None else _training(training),
        )


def _output(row: Mapping[str, Any]) -> Output:
    source, dynamic = row["source"], row["dynamic"]
    return Output(
        None if source is None else int(source),
        bool(row["differentiable"]),
        None if dynamic is None else tuple(map(int, dynamic)),
    )


def _training(data: Mapping[str, Any]) -> Training:
    tangents = (
        Tangent(int(t["output"]), str(t["memory_format"]), tuple(t["size"]), tuple(t["stride"]))
        for t in data["tangents"]
    )
    return Training(
        checked=int(data["checked"]),
        unchecked=int(data["unchecked"]),
        sizes=int(data["sizes"]),
        tangents=tuple(tangents),
        detached=tuple(map(int, data["detached"])),
        deterministic=bool(data["deterministic"]),
    )


def read(metadata: Any, forward: GraphModule, backward: GraphModule | None = None) -> Convention:
    """The convention of flat graphs, from AOTAutograd's metadata about them.

    Args:
        metadata: its ``ViewAndMutationMeta``.
        forward: the forward or inference graph.
        backward: None for inference.

    Raises:
        NotCacheable: the call needs more than a `Convention` can say, or this version of torch says
            something unknown about it.
    """
    try:
        _refuse(metadata)
        outputs = tuple(_read_output(info) for info in metadata.output_info)
        training = None
        if backward is not None:
            training = _read_training(metadata, forward, backward, outputs)
    except AttributeError as error:  # a version of torch that tells it otherwise
        raise NotCacheable(cause=f"AOTAutograd's metadata: {error}") from error
    overwritten = [
        position
        for position, info in enumerate(metadata.input_info)
        if info.mutation_type.name != "NOT_MUTATED" and not info.mutations_hidden_from_autograd
    ]
    _expect("inputs", len(forward.graph.find_nodes(op="placeholder")), len(metadata.input_info))
    if backward is None:
        _expect("outputs", len(_results(forward)), len(outputs))
    return Convention(len(metadata.input_info), outputs, tuple(overwritten), training)


def _refuse(metadata: Any) -> None:
    for position, info in enumerate(metadata.input_info):
        if info.mutation_type.name not in _KEPT or info.mutates_metadata:
            raise NotCacheable(cause=f"input {position} is changed outside of the graph")
    if metadata.tokens:
        raise NotCacheable(cause="it has effects, which run in order")
    for field in dataclasses.fields(metadata):
        if field.name not in _READ and getattr(metadata, field.name) not in (None, 0, [], {}, ()):
            raise NotCacheable(cause=f"AOTAutograd's {field.name}")
    if metadata.num_intermediate_bases:
        raise NotCacheable(cause="outputs alias an intermediate")
    if metadata.is_rng_op_functionalized:
        raise NotCacheable(cause="random state is an input")
    subclasses = (metadata.subclass_inp_meta, metadata.subclass_fw_graph_out_meta)
    for each in (*subclasses[0], *subclasses[1], *metadata.subclass_tangent_meta):
        if not isinstance(each, int) and type(each).__name__ != "PlainTensorMeta":
            raise NotCacheable(cause="a tensor subclass")


def _read_output(info: Any) -> Output:
    kind = info.output_type.name
    if kind not in (*FRESH, "is_input"):
        raise NotCacheable(cause=f"an output is an {kind.replace('_', ' ')}")
    source = info.base_idx if kind == "is_input" else None
    dynamic = tuple(sorted(info.dynamic_dims)) if info.dynamic_dims is not None else None
    return Output(source, bool(info.requires_grad), dynamic)


def _read_training(
    metadata: Any, forward: GraphModule, backward: GraphModule, outputs: Sequence[Output]
) -> Training:
    sizes = metadata.num_symints_saved_for_bw
    unchecked = getattr(metadata, "num_tensors_saved_with_no_vc_check", 0) or 0
    checked = len(_results(forward)) - len(outputs) - unchecked - sizes
    takers = takers_of(metadata)
    layouts = metadata.subclass_tangent_meta
    _expect("tangents", len(layouts), len(takers))
    needed = len(backward.graph.find_nodes(op="placeholder"))
    _expect("values for the backward", needed, sizes + checked + unchecked + len(takers))
    gradients = _results(backward)
    _expect("gradients", len(gradients), len(metadata.input_info))
    detached = [
        position
        for position, (info, gradient) in enumerate(
            zip(metadata.input_info, gradients, strict=True)
        )
        if gradient is None and info.requires_grad and not info.is_leaf
    ]
    tangents = (_tangent(at, meta.memory_format) for at, meta in zip(takers, layouts, strict=True))
    deterministic = metadata.deterministic is not False
    return Training(checked, unchecked, sizes, tuple(tangents), tuple(detached), deterministic)


def _tangent(output: int, layout: Any) -> Tangent:
    if layout is None:
        raise NotCacheable(cause=f"the layout of output {output}'s gradient is not known")
    if isinstance(layout, torch.memory_format):
        return Tangent(output, str(layout).removeprefix("torch."), (), ())
    if layout.memory_format is not None:
        return Tangent(output, str(layout.memory_format).removeprefix("torch."), (), ())
    size, stride = ([int(n) for n in row] for row in (layout.size, layout.stride))
    return Tangent(output, "", tuple(size), tuple(stride))


def _results(gm: GraphModule) -> Sequence[Any]:
    (output,) = gm.graph.find_nodes(op="output")
    found: Sequence[Any] = output.args[0]
    return found


def _expect(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise NotCacheable(cause=f"{found} {what} where {expected} were expected")
