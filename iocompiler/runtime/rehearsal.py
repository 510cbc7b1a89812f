"""The first calls of a library, made while kernels are being compiled.

cuDNN makes a plan for each shape of an attention in each thread that calls it: half a second of an
H100's host. Who waits for kernels makes these calls meanwhile, on memory that holds nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map_only

from iocompiler.ops import library
from iocompiler.plan.data import Plan
from iocompiler.runtime.ahead import Place, calls, memory
from iocompiler.runtime.values import resolve, size_values, storage_elements

_ATTENTIONS = ("attention_forward", "attention_backward")
_SHARE = 16
"""A call takes at most this part of the memory that is free."""


def rehearse(plan: Plan, device: torch.device, hints: Mapping[str, int]) -> None:
    """Call each kind of attention that cuDNN runs in ``plan`` once, in this thread.

    Args:
        hints: values of the plan's size symbols; calls that read others are left out, and those
            with a dropout, which draw random numbers.
    """
    seen = set()
    # who calls it in earnest will meet what fails
    with torch.no_grad(), unset_fake_temporarily(), contextlib.suppress(Exception):
        for name, step, places in calls(plan, lambda name: name in _ATTENTIONS):
            if not _is_planned(step.args):
                continue
            with contextlib.suppress(KeyError):
                given = resolve(step.args, places, hints, device)
                kind = repr((name, given))
                if kind not in seen and _fits(given, device, hints):
                    library.function(name)(
                        *tree_map_only(Place, lambda place: memory(place, device, hints), given)
                    )
                seen.add(kind)


def _is_planned(args: tuple[Any, ...]) -> bool:
    """Whether cuDNN runs the call, without a dropout: its rate stands before the kernel."""
    return "cudnn" in args and args[args.index("cudnn") - 1] == 0.0


def _fits(given: Any, device: torch.device, hints: Mapping[str, int]) -> bool:
    taken = sum(
        storage_elements(size_values(x.spec.shape, hints), size_values(x.spec.stride, hints))
        * x.spec.dtype.itemsize
        for x in tree_leaves(given)
        if isinstance(x, Place)
    )
    return 2 * taken <= torch.cuda.mem_get_info(device)[0] // _SHARE  # results as large as inputs
