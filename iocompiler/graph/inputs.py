"""Inputs that are no plain dense tensors: told apart before a graph is captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from iocompiler.errors import UnusualInput

_PLAIN = (Tensor, Parameter, FakeTensor)


def refuse_unusual(inputs: Sequence[Any]) -> Sequence[Any]:
    """The inputs, where none is what only eager reads rightly: generated code takes numbers from
    memory as they lie.

    Raises:
        UnusualInput: a tensor's values are the negatives of its memory (the imaginary part of a
            lazy conjugate), its memory is a library's own (MKL-DNN), or it has none.
    """
    for x in inputs:
        if not isinstance(x, Tensor):
            continue
        if x.layout is torch._mkldnn:  # type: ignore[attr-defined]
            raise UnusualInput(kind="in a layout of MKL-DNN")
        if x._is_zerotensor():
            raise UnusualInput(kind="a tensor of zeros without memory")
        if x.is_neg():
            raise UnusualInput(kind="the lazy negative of what lies in its memory")
    return inputs


def come_in_a_list(inputs: Sequence[Any]) -> bool:
    """Whether this is a graph of compiled autograd, whose tensors come in one list."""
    return any(isinstance(x, (list, tuple, dict)) for x in inputs)


def without_subclasses(run: Callable[..., Any], inputs: Sequence[Any]) -> Callable[..., Any]:
    """``run``, given plain tensors in place of those of a class that only overrides functions of
    torch (an image of torchvision's): Dynamo has seen to the functions, and AOTAutograd's check of
    the first call refuses operators on them.
    """
    places = [at for at, x in enumerate(inputs) if _only_overrides(x)]
    if not places:
        return run

    def call(*args: Any) -> Any:
        plain = list(args)
        for at in places:
            plain[at] = args[at].as_subclass(Tensor)
        return run(*plain)

    return call


def _only_overrides(x: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and type(x) not in _PLAIN
        and not isinstance(x, FakeTensor)
        and not is_traceable_wrapper_subclass(x)
    )
