"""Outputs of CUDA graphs that the caller keeps for longer than a step.

They lie in the graphs' pool, and the next step writes there again. Before it begins, what of them
is still alive is moved to memory of its own: outputs themselves, and gradients that autograd left
in the ``.grad`` of parameters, so that gradients accumulate over steps. A view of an output is not
followed: one the caller made, or one returned beside it while gradients are recorded, which
AOTAutograd makes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, UntypedStorage

_Refs = list["ReferenceType[Tensor]"]


class Kept:
    """What the graphs of one device have handed out since the step began."""

    def __init__(self) -> None:
        self._outputs: _Refs = []
        self._parameters: dict[int, ReferenceType[Tensor]] = {}
        self._gradients: set[int] = set()

    def hand_out(self, outputs: Sequence[Any], count: int) -> list[Any]:
        """``outputs``, the first ``count`` of them as tensors that only the caller holds.

        Replays return the same tensors again: what the caller keeps must be another, on the same
        storage.
        """
        handed = [_alias(out) if type(out) is Tensor else out for out in outputs[:count]]
        self._outputs += [ref(out) for out in handed if type(out) is Tensor]
        return [*handed, *outputs[count:]]

    def watch(self, parameters: Iterable[Any]) -> None:
        """Gradients may be left in the ``.grad`` of these."""
        for each in parameters:
            if isinstance(each, Tensor) and each.requires_grad and each.is_leaf:
                self._parameters[id(each)] = ref(each)

    def gradients(self, outputs: Iterable[Any]) -> None:
        """What a backward made."""
        self._gradients.update(out.data_ptr() for out in outputs if isinstance(out, Tensor))

    def move(self) -> None:
        """The step is over: what is still held gets memory of its own."""
        held = [tensor for each in self._outputs if (tensor := each()) is not None]
        self._outputs.clear()
        if self._gradients:
            held += self._held_gradients()
            self._gradients.clear()
        moved: dict[int, UntypedStorage] = {}
        for tensor in held:
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            if place not in moved:
                moved[place] = storage.clone()  # type: ignore[no-untyped-call]
            with torch.inference_mode(tensor.is_inference()):
                tensor.data = _lying(tensor, moved[place])

    def _held_gradients(self) -> list[Tensor]:
        found = []
        for key, each in list(self._parameters.items()):
            parameter = each()
            if parameter is None:
                del self._parameters[key]
            elif parameter.grad is not None and parameter.grad.data_ptr() in self._gradients:
                found.append(parameter.grad)
        return found


_kept: dict[int, Kept] = {}


def on_device(index: int) -> Kept:
    """What the graphs of this device, which share a pool, have handed out."""
    return _kept.setdefault(index, Kept())


def _alias(tensor: Tensor) -> Tensor:
    """Another tensor on the same storage, which autograd does not take for a view."""
    return _lying(tensor, tensor.untyped_storage())


def _lying(tensor: Tensor, storage: UntypedStorage) -> Tensor:
    """What ``tensor`` is, on a storage like its own."""
    with torch.no_grad():
        return tensor.new_empty(0).set_(
            storage, tensor.storage_offset(), tensor.shape, tensor.stride()
        )
