"""Plan data as Python text: sizes, shapes, operator arguments and the names of values."""

from __future__ import annotations

import json
import keyword
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import sympy
import torch
from torch._ops import OpOverload
from torch.utils._sympy.printers import PythonPrinter

from iocompiler.plan.data import Argument, Ref, Region
from iocompiler.tile.index import Size

RESERVED = frozenset({
    "args", "call", "module", "torch", "triton", "tl", "math", "libdevice", "stream", "results",
    "empty", "reinterpret", "laid_out", "current_stream", "open_module", "function",
    "example_inputs", "is_last_reader", "Problem",
})  # fmt: skip


class _SizePrinter(PythonPrinter):
    """Integer arithmetic only: a quotient under floor or ceiling is one Python floor division."""

    def _print_floor(self, expr: sympy.Expr) -> str:
        numerator, denominator = expr.args[0].as_numer_denom()
        # whole in parentheses: sympy takes a function for an atom, in a product of several too
        return f"(({self._print(numerator)}) // ({self._print(denominator)}))"

    def _print_ceiling(self, expr: sympy.Expr) -> str:
        numerator, denominator = expr.args[0].as_numer_denom()
        return f"(-(-({self._print(numerator)}) // ({self._print(denominator)})))"

    def _print_Mul(self, expr: sympy.Expr) -> str:  # noqa: N802  # sympy's name
        numerator, denominator = expr.as_numer_denom()
        if denominator == 1:
            return str(super()._print_Mul(expr))
        # a size is an integer, so what is divided here divides exactly
        return f"({self._print(numerator)}) // ({self._print(denominator)})"


_PRINTER = _SizePrinter()


def size_text(size: Size | sympy.Basic) -> str:
    """A size as a Python expression over its symbols, in parentheses unless it is a name or a
    number.
    """
    if isinstance(size, int):
        return str(int(size))
    text = str(_PRINTER.doprint(size))
    return text if text.isidentifier() or text.isdigit() else f"({text})"


def tuple_text(sizes: tuple[Size, ...]) -> str:
    """``(8, s0)``, ``(8,)`` or ``()``."""
    inner = ", ".join(size_text(s) for s in sizes)
    return f"({inner},)" if len(sizes) == 1 else f"({inner})"


def argument_text(argument: Argument, names: Mapping[str, str]) -> str:
    """An operator's argument; ``names`` gives the variable of each plan value.

    Raises:
        TypeError: an argument of this type cannot be written down.
    """
    match argument:
        case Ref(name):
            return names[name]
        case list() | tuple():
            items = [argument_text(a, names) for a in argument]
            if isinstance(argument, list):
                return f"[{', '.join(items)}]"
            return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
        case dict():
            pairs = [f"{quoted(str(k))}: {argument_text(a, names)}" for k, a in argument.items()]
            return f"{{{', '.join(pairs)}}}"
        case Region(name):
            return names[name]
        case OpOverload():
            return f"torch.ops.{argument}"
        case None | bool() | int():
            return repr(argument)
        case complex():  # an inf or nan among its parts has no literal
            return f'complex("{argument}")'
        case str():
            return quoted(argument)
        case float():
            return repr(argument) if math.isfinite(argument) else f'float("{argument}")'
        case torch.device():
            return f'torch.device("{argument}")'
        case torch.dtype() | torch.layout() | torch.memory_format():
            return str(argument)
        case sympy.Basic():
            return _symbolic(argument)
    raise TypeError(f"{type(argument).__name__} cannot be an argument of a generated call")


def _symbolic(expr: sympy.Basic) -> str:
    if expr.is_integer or expr.is_Boolean or expr.is_Relational:
        return size_text(expr)
    return f"({PythonPrinter().doprint(expr)})"


def elements_text(values: Sequence[float | int | bool]) -> str:
    """A list of elements; long ones that are all equal, or count up by one, are written as what
    they are.
    """
    first = values[0] if values else 0
    if len(values) > 8 and len({repr(v) for v in values}) == 1:
        return f"[{argument_text(first, {})}] * {len(values)}"
    if (
        len(values) > 8
        and isinstance(first, int)
        and list(values) == list(range(first, first + len(values)))
    ):
        return f"list(range({first}, {first + len(values)}))"
    return argument_text(list(values), {})


def helpers_for(prelude: str, kernels: str) -> str:
    """The prelude without the helper functions that ``kernels`` do not use."""
    head, *helpers = prelude.split("@triton.jit\n")
    used: list[str] = []
    text = kernels
    for helper in reversed(helpers):  # a helper uses earlier ones only
        name = helper.removeprefix("def ").split("(")[0]
        if re.search(rf"\b{name}\b", text):
            used.insert(0, f"@triton.jit\n{helper.strip()}\n")
            text += helper
    return "\n\n".join([head.strip() + "\n", *used])


def quoted(text: str) -> str:
    """The text as a Python literal in double quotes."""
    return json.dumps(text)


def wrapped(line: str, width: int = 100) -> list[str]:
    """A statement on as many lines as it needs; one that cannot be broken inside brackets stays as
    it is.
    """
    if len(line) <= width or '"' in line or line.lstrip().startswith("#"):
        return [line]
    indent = line[: len(line) - len(line.lstrip())]
    parts = textwrap.wrap(
        line.strip(),
        width,
        initial_indent=indent,
        subsequent_indent=indent + "    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    depth = 0
    for part in parts[:-1]:
        depth += sum(part.count(c) for c in "([") - sum(part.count(c) for c in ")]")
        if depth <= 0:
            return [line]
    return parts


class Names:
    """Python names of plan values: as they are where they can be, apart from each other and from
    the module's own.
    """

    def __init__(self, taken: Iterable[str] = ()):
        self.of: dict[str, str] = {}
        self._taken = {*RESERVED, *taken}

    def add(self, value: str) -> str:
        """A name for a new plan value; defining a value again keeps its name."""
        if value in self.of:
            return self.of[value]
        self.of[value] = self.claim(value)
        return self.of[value]

    def alias(self, value: str, other: str) -> str:
        """``value`` goes by the name of ``other`` from here on."""
        self.of[value] = self.of[other]
        return self.of[value]

    def inner(self) -> Names:
        """Names for the values of another plan in the same module."""
        names = Names()
        names._taken = self._taken
        return names

    def claim(self, wish: str) -> str:
        """The wish, made a valid and unused identifier."""
        name = "".join(c if c.isalnum() or c == "_" else "_" for c in wish)
        if not name.isidentifier() or keyword.iskeyword(name):
            name = f"_{name}"
        base, count = name, 1
        while name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        return name
