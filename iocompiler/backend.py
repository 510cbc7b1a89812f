"""The torch.compile backend: what users and Dynamo call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from iocompiler.compilation import Compilation
from iocompiler.errors import InvalidOption
from iocompiler.options import Options
from iocompiler.pipeline import DEFAULT, Pipeline
from iocompiler.walk import Compiled, compile_graph


class Compiler:
    """A backend with its own pipeline and options, for ``torch.compile(model, backend=...)``.

    Args:
        pipeline: the passes to run.
        on_compiled: called with the `Compilation` of each graph once its forward is compiled; a
            backward that AOTAutograd compiles later is added to the same object.
        options: the names and values of `Options`.

    Raises:
        UnknownOption, InvalidOption: as `Options.build`; also of a ``pipeline`` that is none.
    """

    __name__ = "iocompiler"  # Dynamo shows it in logs

    def __init__(
        self,
        pipeline: Pipeline = DEFAULT,
        *,
        on_compiled: Callable[[Compilation], None] | None = None,
        **options: Any,
    ) -> None:
        self.pipeline = _pipeline(pipeline)
        self.options = Options.build(options)
        self.on_compiled = on_compiled

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Compiled:
        given = {**({} if mode is None else {"mode": mode}), **(options or {})}
        compilation = Compilation()
        run = compile_graph(
            gm, example_inputs, self.options.updated(given), self.pipeline, compilation
        )
        if self.on_compiled is not None:
            self.on_compiled(compilation)
        return run


def _pipeline(given: Any) -> Pipeline:
    if not isinstance(given, Pipeline):
        expected = "a Pipeline, such as iocompiler.DEFAULT"
        raise InvalidOption(name="pipeline", expected=expected, value=given)
    return given


def iocompiler(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """The entry ``torch.compile(model, backend="iocompiler", mode=..., options={...})`` calls."""
    return Compiler()(gm, example_inputs, mode=mode, options=options)
