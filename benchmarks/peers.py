"""Who is compared: each peer is a way to turn a module or function into the callable that is
timed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

Function = Callable[..., Any]


@dataclass(frozen=True)
class Peer:
    """``backend`` None is eager; "iocompiler" is resolved by `ours`, with or without the package
    installed. ``attention`` is the one that models are written with, where it is not the table's.
    """

    name: str
    backend: str | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    attention: str = ""

    def compile(self, function: Function) -> Function:
        """The function as this peer runs it; nothing is compiled before its first call."""
        if self.backend is None:
            return function
        backend = ours() if self.backend == "iocompiler" else self.backend
        compiled: Function = torch.compile(function, backend=backend, **self.settings)
        return compiled


def ours() -> str | Function:
    """The registered backend name, or the function itself where only a copy of the repository is
    there."""
    if "iocompiler" in torch._dynamo.list_backends(exclude_tags=()):
        return "iocompiler"
    from iocompiler.backend import iocompiler

    return iocompiler


PEERS = {
    peer.name: peer
    for peer in (
        Peer("eager", None),
        Peer("inductor", "inductor"),
        Peer("ours", "iocompiler"),
        Peer("inductor-graphs", "inductor", {"mode": "reduce-overhead"}),
        Peer("ours-graphs", "iocompiler", {"mode": "reduce-overhead"}),
        Peer("inductor-autotune", "inductor", {"mode": "max-autotune-no-cudagraphs"}),
        Peer("ours-autotune", "iocompiler", {"mode": "max-autotune"}),
        Peer("ours-aten", "iocompiler", {"options": {"engine": "aten"}}),
    )
}
PEERS |= {
    f"{name}-sdpa": replace(PEERS[name], name=f"{name}-sdpa", attention="sdpa")
    for name in ("eager", "inductor", "inductor-autotune")
}
DEFAULT_PEERS = ("eager", "inductor", "ours")


def chosen(names: str) -> tuple[Peer, ...]:
    """The peers of a comma-separated list; a wrong name exits with those that exist."""
    return tuple(PEERS[name] for name in known(names, PEERS))


def known(names: str, among: Collection[str]) -> tuple[str, ...]:
    """The names of a comma-separated list; one that is not ``among`` the peers exits with those
    that are."""
    wanted = tuple(name for name in names.split(",") if name)
    for name in wanted:
        if name not in among:
            raise SystemExit(f"no peer {name!r}; the peers are {', '.join(among)}")
    return wanted
