"""Calls of our operators done again without the operators' Python.

An operator that launches templates looks at its tensors, finds what was made for others like them,
makes memory, and launches: 100 to 200 us of the host's time for the gradients of an attention. But
for addresses, all of that follows from the plan and its sizes. So one call is watched (which memory
it makes, and what it launches on which addresses) and written down as a function:

    def again(stream, p0, p1, p2):
        m0 = empty((8, 12, 1024, 64), (786432, 64, 768, 1), bfloat16)
        launch0(stream, 1536, 1, 1, p0, p1, p2, m0.data_ptr(), 140431089497600)
        return m0

A call that does anything else, to a tensor or with one, stays the operator's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from iocompiler.runtime.launch import Launch
from iocompiler.runtime.template_launch import recorded
from iocompiler.tf32 import products_rounded

aten = torch.ops.aten
Again: TypeAlias = Callable[..., Any]
"""``again(stream, *addresses)``: of the tensors that a call is given, in their order."""

_MAKING = (
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)
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
        watch = _Watch(tensors)
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
        return again(stream, {addresses})
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


class _Place(NamedTuple):
    """So many bytes behind the first of a tensor that is given, or that the call has made."""

    made: bool
    number: int
    offset: int = 0

    def __str__(self) -> str:
        """As text, by the name of the variable that has the address."""
        variable = f"{'a' if self.made else 'p'}{self.number}"
        return f"{variable} + {self.offset}" if self.offset else variable


class _Made(NamedTuple):
    """Memory that a call makes."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What a call does, whose tensors are ``given``."""

    def __init__(self, given: Sequence[Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        # one tensor twice may be two another time; nothing has no address
        self._whole = len(set(map(id, given))) == len(given) > 0 and all(x.numel() for x in given)
        self._given = len(given)
        self._place = {id(x): _Place(False, number) for number, x in enumerate(given)}
        self._made: list[_Made] = []
        self._launches: list[tuple[Launch, int, list[_Place | int]]] = []
        self._kept: list[Tensor] = list(given)  # as long as their ids count

    def spoil(self) -> None:
        """The call does what nobody sees."""
        self._whole = False

    def launched(self, launch: Launch, programs: int, tensors: Sequence[Tensor]) -> None:
        """A kernel was launched on these tensors; those of no known place are kept for all."""
        self._kept += tensors
        at = [self._place.get(id(x), x.data_ptr()) for x in tensors]
        self._launches.append((launch, programs, at))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _MAKING:
            self._makes(result)
        elif _is_view(func) and isinstance(result, Tensor) and result.numel():
            self._shows(args[0], result)
        else:
            self.spoil()
        return result

    def _makes(self, x: Tensor) -> None:
        self._kept.append(x)
        self._place[id(x)] = _Place(True, len(self._made))
        self._made.append(_Made(tuple(x.shape), x.stride(), x.dtype))
        if x.device != self._kept[0].device:
            self.spoil()

    def _shows(self, base: Tensor, x: Tensor) -> None:
        self._kept += [base, x]
        place = self._place.get(id(base))
        if place is not None:
            behind = x.data_ptr() - base.data_ptr()
            self._place[id(x)] = place._replace(offset=place.offset + behind)

    def again(self, results: Any, empty: Callable[..., Tensor]) -> Again | None:
        """The call as a function of addresses; None where it is more than that."""
        several = isinstance(results, (tuple, list))
        listed = results if several else [results]
        shown = [self._result(x) for x in listed]
        if not self._whole or None in shown:
            return None
        read = {at for _, _, places in self._launches for at in places if isinstance(at, _Place)}
        addressed = {at.number for at in read if at.made}
        returns = {self._place[id(x)].number for x in listed if x is not None}
        lines = []
        for number, (size, stride, dtype) in enumerate(self._made):
            if number in addressed | returns:
                lines.append(f"m{number} = empty({size}, {stride}, {dtype})")
            if number in addressed:
                lines.append(f"a{number} = m{number}.data_ptr()")
        for number, (_, programs, places) in enumerate(self._launches):
            given = ["stream", f"{programs}, 1, 1", *map(str, places)]
            lines.append(f"launch{number}({', '.join(given)})")
        returned = ", ".join(map(str, shown))
        lines.append(f"return ({returned},)" if several else f"return {returned}")
        parameters = ["stream", *(f"p{place}" for place in range(self._given))]
        body = "".join(f"    {line}\n" for line in lines)
        launches = {f"launch{n}": launch for n, (launch, _, _) in enumerate(self._launches)}
        reinterpret = torch._C._dynamo.guards._reinterpret_tensor  # type: ignore[attr-defined]
        # what stands as a number in the text must not be freed
        constants = [x for x in self._kept if id(x) not in self._place]
        namespace = {"torch": torch, "empty": empty, "reinterpret": reinterpret, **launches}
        namespace |= {"constants": constants}
        exec(f"def again({', '.join(parameters)}):\n{body}", namespace)
        again: Again = namespace["again"]
        return again

    def _result(self, x: Any) -> str | None:
        """A result as text; None where it is no memory that the call makes."""
        if x is None:
            return "None"
        place = self._place.get(id(x)) if isinstance(x, Tensor) else None
        if place is None or not place.made:
            return None
        made = self._made[place.number]
        if made == (tuple(x.shape), x.stride(), x.dtype) and not place.offset:
            return f"m{place.number}"
        if made.dtype != x.dtype:
            return None
        offset = place.offset // x.dtype.itemsize
        return f"reinterpret(m{place.number}, {tuple(x.shape)}, {x.stride()}, {offset})"


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether all that an operator returns shows memory it is given, which it does not write."""
    infos = [each.alias_info for each in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)
