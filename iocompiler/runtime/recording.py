"""Who is told of launches that torch's dispatcher does not see: of templates, and of a library's
products by addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, TypeAlias

from torch import Tensor

Note: TypeAlias = Callable[[Callable[..., None], Sequence[int], Sequence[Tensor | None]], None]
"""``note(launch, numbers, tensors)``, before ``launch(stream, *numbers, *addresses)``; the address
of None is 0.
"""


class Recorder(NamedTuple):
    """``unseen()`` is called before a launch that is not by addresses."""

    note: Note
    unseen: Callable[[], None]


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)
recorder: Callable[[], Recorder | None] = _recorder.get


@contextmanager
def recorded(note: Note, unseen: Callable[[], None]) -> Iterator[None]:
    """In here, and in this thread, a `Recorder` is told of launches on a GPU."""
    token = _recorder.set(Recorder(note, unseen))
    try:
        yield
    finally:
        _recorder.reset(token)
