"""Calls of our operators done again without the operators' Python.

An operator that launches templates looks at its tensors, finds what was made for others like them,
makes memory, and launches: 100 to 200 us of the host's time for the gradients of an attention, and
for a head with its loss a dozen views a chunk. But for addresses, all of that follows from the plan
and its sizes. So one call is watched and written down (`straight_line.py`): what it allocates,
launches and calls. A call that does anything else stays the operator's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iocompiler.runtime.recording import recorded
from iocompiler.runtime.straight_line import Again, Watch
from iocompiler.tf32 import products_rounded

_ALIGNED = 16
"""Bytes: what a kernel is compiled for."""
_MOST_FORMS = 1024
_TRIES = 3
"""Calls that are watched: the first ones may make what is kept for all (tables of blocks)."""


class Replayed:
    """An operator at the places of a plan where it is called with the same arguments but for
    memory.

    Args:
        run: the operator's function.
        empty: ``empty(size, stride, dtype)`` on the device, which is current at every call.
    """

    def __init__(self, run: Callable[..., Any], empty: Callable[..., Tensor]):
        self._run, self._empty = run, empty
        self._call: Callable[[int, tuple[int, ...], tuple[Any, ...]], Any] = self._first
        self._again: dict[Any, Again] = {}
        self._seen: dict[Any, int] = {}

    def __call__(self, stream: int, sizes: tuple[int, ...], *args: Any) -> Any:
        """What the operator returns.

        Args:
            stream: the current one.
            sizes: all that the arguments depend on, but for addresses.
        """
        return self._call(stream, sizes, args)

    def _first(self, stream: int, sizes: tuple[int, ...], args: tuple[Any, ...]) -> Any:
        """The first call shows where tensors stand."""
        self._call = _finding(args, self._again, self._watched)
        return self._call(stream, sizes, args)

    def _watched(self, form: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> Any:
        """The call by the operator. What comes once is not watched: a cache may grow by a key each
        time.
        """
        if len(self._seen) >= _MOST_FORMS:
            self._seen.clear()
            self._again.clear()
        seen = self._seen[form] = self._seen.get(form, 0) + 1
        if not 1 < seen <= 1 + _TRIES:
            return self._run(*args)
        watch = Watch(tensors)
        with watch, recorded(watch.launched, watch.spoil):
            results = self._run(*args)
        again = watch.again(results, self._empty)
        if again is not None:
            self._again[form] = again
        return results


_FINDING = """\
def call(stream, sizes, args):
{loads}    form = {form}
    if ({union}) % aligned:
        form = form, ({offsets})
    again = known(form)
    if again is not None:
        return again(stream, ({tensors},), {addresses})
    return watched(form, args, [{tensors}])
"""


def _finding(
    args: tuple[Any, ...], known: dict[Any, Again], watched: Callable[..., Any]
) -> Callable[[int, tuple[int, ...], tuple[Any, ...]], Any]:
    """What looks for a call among those that are known, by sizes, by how the addresses are aligned,
    and, where the first tensor is of float32, by the switch of its products; ``watched`` has the
    others. Tensors stand among the arguments, and in lists of these, where they do in ``args``.
    """
    tensors = [f"args[{place}]" for place, value in enumerate(args) if isinstance(value, Tensor)]
    wide = bool(tensors) and next(x for x in args if isinstance(x, Tensor)).dtype == torch.float32
    for place, value in enumerate(args):
        if isinstance(value, (list, tuple)):
            tensors += [
                f"args[{place}][{number}]"
                for number, each in enumerate(value)
                if isinstance(each, Tensor)
            ]
    addresses = [f"p{number}" for number in range(len(tensors))]
    text = _FINDING.format(
        loads="".join(
            f"    {name} = {tensor}.data_ptr()\n"
            for name, tensor in zip(addresses, tensors, strict=True)
        ),
        form="(sizes, products_rounded())" if wide else "sizes",
        union=" | ".join(addresses) or "0",
        offsets=" ".join(f"{name} % aligned," for name in addresses),
        addresses=", ".join(addresses),
        tensors=", ".join(tensors),
    )
    namespace: dict[str, Any] = {"known": known.get, "watched": watched, "aligned": _ALIGNED}
    namespace["products_rounded"] = products_rounded
    exec(text, namespace)
    call: Callable[[int, tuple[int, ...], tuple[Any, ...]], Any] = namespace["call"]
    return call
