"""One call of an operator, watched, and written down as what it did: allocations, launches, calls
of aten. Views are not made again, but for those that aten reads: an address is one that was given,
or that of memory that was made, plus a number.

    def again(stream, given, p0, p1):
        x0, x1 = given
        m0 = empty((4096, 1024), (1024, 1), torch.bfloat16)
        call0(x0, reinterpret(x1, (1024, 768), (1, 1024), 0), out=m0)
        launch1(stream, 4096, 1, 1, m0.data_ptr(), p0)
        return m0
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten
Again: TypeAlias = Callable[..., Any]
"""``again(stream, given, *addresses)``: the tensors that a call is given, and their addresses."""

_MAKING = (
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)
_DEPENDING = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
)
"""On what is in memory, or changing what a tensor shows of it."""
_LITERALS = (int, bool, str, type(None))


class _Form(NamedTuple):
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(x: Tensor) -> _Form:
        return _Form(tuple(x.shape), x.stride(), x.dtype)


class _Root(NamedTuple):
    """What a variable holds: a tensor that is given ("x0"), or that the call has made ("m0")."""

    name: str
    form: _Form

    @property
    def is_made(self) -> bool:
        return self.name[0] == "m"


class _Place(NamedTuple):
    """A tensor, so many bytes behind the first of a root."""

    root: _Root
    form: _Form
    offset: int = 0

    def address(self) -> str:
        """As text."""
        name = self.root.name
        start = f"{name}.data_ptr()" if self.root.is_made else f"p{name[1:]}"
        return f"{start} + {self.offset}" if self.offset else start

    def tensor(self) -> str | None:
        """As text; None where its elements are not the root's."""
        size, stride, dtype = self.form
        if dtype != self.root.form.dtype:
            return None
        if not self.offset and self.form == self.root.form:
            return self.root.name
        elements = self.offset // dtype.itemsize
        return f"reinterpret({self.root.name}, {size}, {stride}, {elements})"


class _Line(NamedTuple):
    """``makes``: the variable it sets, "" for none; ``reads``: those of its tensors. What only
    ``allocates`` is left out where nobody reads it.
    """

    text: str
    reads: frozenset[str]
    makes: str = ""
    allocates: bool = False


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What a call does, whose tensors are ``given``: `recording.recorded` tells it of launches.

    No tensor of the call's is held: it takes no more memory than without.
    """

    def __init__(self, given: Sequence[Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        # one tensor twice may be two another time
        self._whole = len(set(map(id, given))) == len(given) > 0
        self._given = len(given)
        self._device = given[0].device if given else None
        self._places: Any = WeakTensorKeyDictionary()
        self._lines: list[_Line] = []
        self._made = 0
        # by their names in the text; what stands there as an address must not be freed either
        self._constants: dict[str, Any] = {}
        for number, x in enumerate(given):
            self._places[x] = _Place(_Root(f"x{number}", _Form.of(x)), _Form.of(x))

    def spoil(self) -> None:
        """The call does what nobody sees, or what another may not do."""
        self._whole = False

    def launched(
        self, launch: Callable[..., None], numbers: Sequence[int], tensors: Sequence[Tensor | None]
    ) -> None:
        """Something was launched on these tensors; those of no known place are kept for all."""
        reads: set[str] = set()
        addresses = []
        for x in tensors:
            place = None if x is None else self._places.get(x)
            if place is not None:
                reads.add(place.root.name)
                addresses.append(place.address())
            elif x is None:
                addresses.append("0")
            else:
                self._constant(x)
                addresses.append(str(x.data_ptr()))
        arguments = ", ".join(["stream", *map(str, numbers), *addresses])
        self._lines.append(_Line(f"{self._constant(launch)}({arguments})", frozenset(reads)))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._whole or any(tag in func.tags for tag in _DEPENDING):
            self.spoil()
        elif func in _MAKING and result.device == self._device:
            root = self._root(result)
            text = f"{root.name} = empty({', '.join(map(str, root.form))})"
            self._lines.append(_Line(text, frozenset(), root.name, allocates=True))
        elif _is_view(func) and _is_tensor(result) and result.numel():
            self._shows(args[0], result)
        else:
            self._called(func, args, kwargs, result)
        return result

    def _root(self, x: Tensor) -> _Root:
        root = _Root(f"m{self._made}", _Form.of(x))
        self._made += 1
        self._places[x] = _Place(root, root.form)
        return root

    def _shows(self, base: Tensor, x: Tensor) -> None:
        place = self._places.get(base)
        if place is not None:
            offset = place.offset + x.data_ptr() - base.data_ptr()
            self._places[x] = _Place(place.root, _Form.of(x), offset)

    def _called(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """A call of aten."""
        alone = not isinstance(result, (list, tuple))
        # numbers beside tensors tell of shapes
        listed = {n: x for n, x in enumerate([result] if alone else result) if _is_tensor(x)}
        if alone and not listed:
            if any(map(_is_tensor, tree_leaves((args, kwargs)))):
                self.spoil()  # what it tells of a tensor may decide what is done next
            return
        read: set[str] = set()
        arguments = [self._text(x, read) for x in args]
        arguments += [f"{name}={self._text(x, read)}" for name, x in kwargs.items()]
        call, reads = f"{self._constant(func)}({', '.join(arguments)})", frozenset(read)
        allocates = func in _MAKING
        written = [self._places.get(x) for x in listed.values()]
        if None not in written:
            self._lines.append(_Line(call, reads))
            if [place.form for place in written] != [_Form.of(x) for x in listed.values()]:
                self.spoil()  # they were not as large as what is written
        elif alone:
            name = self._root(result).name
            self._lines.append(_Line(f"{name} = {call}", reads, name, allocates))
        else:
            whole = f"m{self._made}"
            self._made += 1
            self._lines.append(_Line(f"{whole} = {call}", reads, whole))
            for number, x in listed.items():
                name = self._root(x).name
                text = f"{name} = {whole}[{number}]"
                self._lines.append(_Line(text, frozenset([whole]), name, allocates=True))

    def _text(self, argument: Any, read: set[str]) -> str:
        """An argument of aten's as text; ``read``: the variables in it, added to."""
        if isinstance(argument, _LITERALS):
            return repr(argument)
        if isinstance(argument, (list, tuple)):
            return f"[{', '.join(self._text(x, read) for x in argument)}]"
        place = self._places.get(argument) if _is_tensor(argument) else None
        if place is None:
            return self._constant(argument)
        text: str | None = place.tensor()
        if text is None:
            self.spoil()
        read.add(place.root.name)
        return text or ""

    def _constant(self, value: Any) -> str:
        name = f"k{len(self._constants)}"
        self._constants[name] = value
        return name

    def again(self, results: Any, empty: Callable[..., Tensor]) -> Again | None:
        """The call as a function; None where it is more than its lines."""
        several = isinstance(results, (tuple, list))
        listed = results if several else [results]
        places = [self._places.get(x) if _is_tensor(x) else None for x in listed]
        shown = [
            "None" if x is None else place and place.root.is_made and place.tensor()
            for x, place in zip(listed, places, strict=True)
        ]
        returned = {place.root.name for place in places if place is not None}
        if not self._whole or not all(shown) or self._keeps(returned):
            return None
        given = [f"x{number}" for number in range(self._given)]
        lines = [f"{', '.join(given)}, = given", *self._written(returned)]
        values = ", ".join(map(str, shown))
        lines.append(f"return ({values},)" if several else f"return {values}")
        parameters = ", ".join(["stream", "given", *(f"p{name[1:]}" for name in given)])
        namespace = {"torch": torch, "empty": empty, **self._constants}
        namespace["reinterpret"] = torch._C._dynamo.guards._reinterpret_tensor  # type: ignore[attr-defined]
        exec(f"def again({parameters}):\n" + "".join(f"    {x}\n" for x in lines), namespace)
        again: Again = namespace["again"]
        return again

    def _keeps(self, returned: set[str]) -> bool:
        """Whether something that it made outlives the call and is in no result: the next call may
        find it.
        """
        roots = {place.root for place in self._places.values()}
        return any(root.is_made and root.name not in returned for root in roots)

    def _written(self, returned: set[str]) -> Iterator[str]:
        """The lines, with what dies behind each: the call has let go of it too."""
        backwards: list[str] = []
        read = {*returned, *(f"x{number}" for number in range(self._given))}
        for line in reversed(self._lines):
            if line.allocates and line.makes not in read:
                continue
            dying = {*line.reads, line.makes} - {""} - read
            if dying:
                backwards.append(f"del {', '.join(sorted(dying))}")
            backwards.append(line.text)
            read |= line.reads
        return reversed(backwards)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether all that an operator returns shows memory it is given, which it does not write."""
    infos = [each.alias_info for each in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)
