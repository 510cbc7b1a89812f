"""One class an error. Where the user's own line is known, the message ends with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class IOCompilerError(Exception):
    """Base of every error of the compiler: ``message`` is the template of the class, ``where`` the
    user's line.

    Args:
        where: the user's line as "model.py:88", or "" where it is not known.
        values: fill the fields of the class's ``message``.
    """

    message: ClassVar[str] = "{detail}"

    def __init__(self, *, where: str = "", **values: object) -> None:
        self.where = where
        self.values = values
        text = self.message.format(**values)
        super().__init__(f"{text} (at {where})" if where else text)


class UnknownOption(IOCompilerError):
    """An option's name is not one of those that exist."""

    message = "unknown option {name!r}{hint}; the options are {known}"


class InvalidOption(IOCompilerError):
    """An option's value has the wrong type or is out of range."""

    message = "option {name!r} must be {expected}, not {value!r}"


class UnknownPass(IOCompilerError):
    """A pipeline was asked for a pass it does not have."""

    message = "no pass named {name!r}{hint}; the passes are {known}"


class NotAPass(IOCompilerError):
    """A pipeline was given what is no pass."""

    message = "a pass is what @iocompiler.graph_pass or @iocompiler.rewrite makes, not {value!r}"


class DuplicatePass(IOCompilerError):
    """Two passes of one pipeline would have the same name."""

    message = "the pipeline has a pass named {name!r} already"


class UnknownDevice(IOCompilerError):
    """A device was asked for that has no row in the table."""

    message = "no device {name!r}{hint}; the device rows are {known}"


class ReportFormat(IOCompilerError):
    """A report cannot be written in the format a path's suffix asks for."""

    message = "a report cannot be saved as {path!r}: {cause}"


class CannotExplain(IOCompilerError):
    """A model or its inputs cannot be planned without running them."""

    message = "{model} cannot be explained: {cause}"


class BadArgument(IOCompilerError):
    """An argument of the command line cannot be used."""

    message = "{argument}: {cause}"


class UnsupportedVersion(IOCompilerError):
    """torch or Triton is older than what the compiler works with."""

    message = "iocompiler needs {name} {oldest} or later, this is {found}"


class UnusualInput(IOCompilerError):
    """A tensor is given whose memory does not hold its values as they are."""

    message = "an input is {kind}"


class CaptureFailed(IOCompilerError):
    """Dynamo's graph could not be traced again to pre-dispatch ATen."""

    message = "the graph could not be captured: {cause}"


class BadPattern(IOCompilerError):
    """A pattern or replacement given to `rewrite` is not one the matcher can read."""

    message = "rewrite {name!r}: {detail}"


class BadReplacement(IOCompilerError):
    """A replacement computes a tensor of another shape, dtype or device than what it replaces."""

    message = "rewrite {name!r}: the replacement gives {new} where {old} stood"


class LateGuard(IOCompilerError):
    """A backward compiled after its forward ran assumes what the forward was not guarded for."""

    message = "compiling the backward assumed {guards} of the sizes, too late to be checked"


class ForwardOnAten(IOCompilerError):
    """A backward that writes over what its forward leaves to it: aten's may hand it a view."""

    message = "it was compiled for the planned forward, which runs on aten"


class CannotPlan(IOCompilerError):
    """A flat graph calls something that has no place in a plan."""

    message = "{operator} cannot stand in a plan"


class NotCacheable(IOCompilerError):
    """What is compiled for a graph cannot be kept for other processes; the graph runs all the
    same.
    """

    message = "{cause}"


class InvalidGraph(IOCompilerError):
    """A pass left a graph that is not well formed."""

    message = "pass {name!r} left an invalid graph: {cause}"


class VerificationFailed(IOCompilerError):
    """Under ``verify``, the graph after a pass does not compute what it computed before."""

    message = "pass {name!r} changed the result: {detail}"


class StrictFallback(IOCompilerError):
    """Under ``strict``, a step that failed, where otherwise its region would run on aten."""

    message = "strict: {region} failed: {cause}"


class FallbackTooLarge(IOCompilerError):
    """Under ``no_fallback``, a call of aten would write more bytes than allowed."""

    message = (
        "{node} = {operator} runs on aten ({reason}) and writes {bytes} bytes; "
        "no_fallback allows {allowed}"
    )


class UnboundedFallback(IOCompilerError):
    """Under ``no_fallback``, a region that would run on aten, whatever it writes there."""

    message = "no_fallback: {region} failed and would run on aten: {cause}"


class BadPlanFile(IOCompilerError):
    """A plan file cannot be read, or a graph in it cannot be replayed."""

    message = "plan file {path!r} cannot be replayed: {cause}; {advice} to choose anew"


class CompileError(IOCompilerError):
    """Triton, or the process it runs in, could not compile a kernel."""

    message = "kernel {kernel!r} does not compile: {cause}"


class LaunchError(IOCompilerError):
    """The CUDA driver refused to load or launch a kernel."""

    message = "kernel {kernel!r}: {action} failed: {cause}"


class CacheWarning(UserWarning):
    """The disk cache is damaged or cannot be used; the message says what is done instead."""


class FallbackWarning(UserWarning):
    """A region runs on aten, or unrewritten, because compiling it failed; the message names the
    cause.
    """


class AlgorithmWarning(UserWarning):
    """A library proposes for a product no longer the algorithm that was measured; the message names
    both.
    """


class BudgetWarning(UserWarning):
    """No way to run a training step keeps within the memory budget; the message has the bytes."""


def close_match(name: str, known: Iterable[str]) -> str:
    """A hint such as ``" (did you mean 'dump'?)"``, or "" where no known name is close."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def cause_of(error: BaseException) -> str:
    """As "CompileError: kernel 'k' does not compile": the first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'unknown'}"


def add_note(error: BaseException, note: str) -> None:
    """`BaseException.add_note`, also for Python 3.10: a traceback does not show it there, the
    messages that we make from `__notes__` do.
    """
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        error.__notes__ = [*getattr(error, "__notes__", ()), note]
