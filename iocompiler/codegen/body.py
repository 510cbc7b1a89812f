"""The ``call`` function of a generated module: allocate, launch, call aten, drop what is dead."""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from iocompiler.codegen.allocation import Allocation, empty, reinterpreted
from iocompiler.codegen.launchers import Launchers, Shared
from iocompiler.codegen.pytext import (
    Names,
    argument_text,
    elements_text,
    size_text,
    tuple_text,
    wrapped,
)
from iocompiler.codegen.replays import form_of, replayed
from iocompiler.codegen.signature import parameters
from iocompiler.codegen.statements import Statements
from iocompiler.codegen.values import Values
from iocompiler.ops import library
from iocompiler.ops.library_product import LibraryProduct
from iocompiler.plan.contents import made, references, regions
from iocompiler.plan.data import (
    Argument,
    AtenStep,
    BatchStep,
    ConstantStep,
    KernelStep,
    MatmulStep,
    Plan,
    Region,
    Step,
    TensorSpec,
    ViewStep,
)
from iocompiler.plan.memory import WITH_OUT, takes_out
from iocompiler.tile.flat import PARTS
from iocompiler.tile.index import Size
from iocompiler.tile.program import Buffer


def _callable(target: str, first: bool, measured: bool) -> str:
    """An operator as text: of ours the function behind it, or of its ``first`` result, of others
    its overload. ``measured``: whether products inside of it may have algorithms of their own.
    """
    namespace, name, *_ = target.split(".")
    if namespace != "iocompiler":
        return f"torch.ops.{target}"
    run = f'function("{name}"{", first=True" * first})'
    return f"module.multiplying({run})" if measured and library.multiplies(name) else run


def _first_alone(step: AtenStep) -> bool:
    """Whether an operator is called for the first of its results, which it makes alone for less."""
    namespace, name, *_ = step.target.split(".")
    paths = [path for path, _, _ in step.results()]
    return namespace == "iocompiler" and library.has_first(name) and paths == [(0,)]


def _needs_stream(step: Step) -> bool:
    if isinstance(step, AtenStep):
        return step.product is not None or bool(replayed(step))
    return isinstance(step, (KernelStep, MatmulStep, BatchStep))


class Body:
    """The text of ``call`` for a plan, or of the function of a region: ``text``."""

    def __init__(
        self,
        plan: Plan,
        names: Names,
        launchers: Launchers,
        shared: Shared,
        region: tuple[str, Region] | None = None,
    ):
        self._shared, self._region = shared, region
        self._plan = plan
        self._launchers = launchers
        self._values = Values(plan)
        self._names = names
        self._allocation = Allocation(plan, names)
        self._statements = Statements()
        self._sizes: set[str] = set()  # that have a variable
        self._unpack()
        for step in plan.steps:
            match step:
                case KernelStep() | MatmulStep():
                    self._kernel(step)
                case BatchStep():
                    self._batch(step)
                case AtenStep(product=LibraryProduct() as product):
                    self._product(step, product)
                case AtenStep():
                    self._aten(step)
                case ViewStep():
                    self._view(step)
                case ConstantStep():
                    self._constant(step)
        self.text = self._written()

    def _unpack(self) -> None:
        plan = self._plan
        variables = []
        for name, spec in plan.inputs:
            if spec is None:
                self._names.of[name] = name
                self._statements.numbers.add(name)
                variables.append(name)
            else:
                variables.append(self._names.add(name))
        unpacked = f"{', '.join(variables)}{',' if len(variables) == 1 else ''}"
        lines = [f"({unpacked}) = args" if len(unpacked) > 80 else f"{unpacked} = args"]
        if not variables:
            lines = []
        self._sizes = {name for name, spec in plan.inputs if spec is None}
        for (_, spec), variable in zip(plan.inputs, variables, strict=True):
            lines += self._found_sizes(spec, variable)
            if spec is not None and self._region and self._region[1].exact:
                lines.append(self._laid_out(variable, spec))
        if self._region is None:
            lines.append("args.clear()")
        if any(map(_needs_stream, plan.steps)):
            lines.append("stream = current_stream()")
        self._statements.add(lines, set(variables))

    def _found_sizes(self, spec: TensorSpec | None, variable: str) -> list[str]:
        """Lines that name the sizes a tensor's shape is the first to tell."""
        lines = []
        for dim, size in enumerate(spec.shape if spec else ()):
            if isinstance(size, sympy.Symbol) and size.name not in self._sizes:
                self._sizes.add(size.name)
                lines.append(f"{size.name} = {variable}.shape[{dim}]")
        return lines

    def _kernel(self, step: KernelStep | MatmulStep) -> None:
        lines = [f"# {', '.join(step.where)}"] if step.where else []
        over = dict(step.over) if isinstance(step, KernelStep) else {}
        variables = self._results_in_memory(step, lines, over)
        launcher = self._launchers.launcher(step, self._signature(step))
        arguments = ["stream", *map(size_text, launcher.grid)]
        for buffer, name in zip(step.buffers, step.args, strict=True):
            text, variable = self._kernel_argument(buffer, name)
            arguments.append(text)
            variables.add(variable)
        arguments += step.size_symbols
        if 0 not in launcher.grid:
            lines.append(f"{launcher.name}({', '.join(arguments)})")
        self._statements.add(lines, variables)

    def _results_in_memory(self, step: Step, lines: list[str], over: Mapping[str, str]) -> set[str]:
        """Lines that make what a step writes by address; returns the variables made and read."""
        variables: set[str] = set()
        for name, spec in made(step).items():
            if name in over:
                given = self._names.of[over[name]]
                shown = f"{reinterpreted(given, spec)} if is_last_reader({given})"
                text, read = f"{shown} else {empty(spec)}", {given}
            elif self._allocation.has_variable(name):
                text, read = self._allocation.made(name, spec)
            else:
                continue
            variables |= {self._names.add(name), *read}
            lines.append(f"{self._names.of[name]} = {text}")
        return variables

    def _batch(self, step: BatchStep) -> None:
        lines = [f"# {', '.join(step.where)}"] if step.where else []
        variables = self._results_in_memory(step, lines, {})
        lines.append(f"{self._launchers.batch(step)}(stream, [")
        for (args, length), extents in zip(step.members, step.extents(), strict=True):
            cells = []
            for buffer, name in zip(step.program.buffers, args, strict=True):
                text, variable = self._kernel_argument(buffer, name)
                cells.append(text)
                variables.add(variable)
            parts = [size_text(extents[PARTS.name])] if step.parts else []
            lines.append(f"    ({', '.join([*cells, *parts, size_text(length)])}),")
        lines.append("])")
        self._statements.add(lines, variables)

    def _signature(self, step: KernelStep | MatmulStep) -> str:
        pairs = zip(step.buffers, step.args, strict=True)
        aligned = {b.name for b, name in pairs if b.role != "scalar" and self._values.aligned(name)}
        return parameters(step.buffers, step.size_symbols, aligned, self._values.extents)

    def _kernel_argument(self, buffer: Buffer, name: str) -> tuple[str, str]:
        """The text of a kernel's argument and the variable it reads."""
        if buffer.role == "scalar":
            variable = self._names.of[name]
            return (
                variable if self._values.specs[name] is None else f"{variable}.item()"
            ), variable
        return self._address(name, buffer.dtype.itemsize)

    def _address(self, name: str, itemsize: int) -> tuple[str, str]:
        """The text of a value's address and the variable it reads."""
        if name in self._names.of:
            return f"{self._names.of[name]}.data_ptr()", self._names.of[name]
        place = self._values.place(name)
        variable = self._names.of[place.root]
        offset = place.offset * itemsize
        return f"{variable}.data_ptr()" + (
            f" + {size_text(offset)}" if offset != 0 else ""
        ), variable

    def _product(self, step: AtenStep, product: LibraryProduct[Size]) -> None:
        """A library's launch: operands, result and what is added by their addresses."""
        self._shared.products += 1
        lines = [f"# {step.where}"] if step.where else []
        variables = self._results_in_memory(step, lines, {})
        # the operator's order: what is added stands first
        *added, a, b = (ref.name for ref in references(step.args))
        sizes = tuple_text(tuple(sympy.Symbol(name) for name in product.size_symbols))
        arguments = ["stream", sizes]
        out, *sums = made(step)
        for name in (a, b, out, *added, *sums):
            dtype = product.stored if product.stored and name == out else product.dtype
            text, variable = self._address(name, dtype.itemsize)
            arguments.append(f"sums={text}" if name in sums else text)
            variables.add(variable)
        launch = self._launchers.product(product, step.target.split(".")[1])
        lines.append(f"{launch}({', '.join(arguments)})")
        self._statements.add(lines, variables)

    def _view(self, step: ViewStep) -> None:
        place = self._values.place(step.name)
        if self._values.is_root(step.name):
            self._names.alias(step.name, place.root)
        elif self._values.needs_tensor(step.name):
            text, read = self._allocation.view(step.name, place, step.spec)
            name = self._names.add(step.name)
            self._statements.add([f"{name} = {text}"], read | {name})

    def _constant(self, step: ConstantStep) -> None:
        shape, stride = tuple_text(step.spec.shape), tuple_text(step.spec.stride)
        values = elements_text(step.values)
        constant = self._names.claim(f"constant_{step.name}")
        self._shared.globals.append(
            f"{constant} = module.constant({values}, {shape}, {stride}, {step.spec.dtype}, "
            f'"{step.spec.device}")'
        )
        if self._values.changes(step.name):
            name = self._names.add(step.name)
            self._statements.add([f"{name} = {constant}.clone()"], {name})
        else:
            self._names.of[step.name] = constant

    def _aten(self, step: AtenStep) -> None:
        self._shared.aten_calls += 1
        lines = [f"# {step.where}"] if step.where else []
        for region in regions((step.args, dict(step.kwargs))):
            self._function(region)
        arguments = [argument_text(a, self._names.of) for a in step.args]
        arguments += [f"{key}={argument_text(a, self._names.of)}" for key, a in step.kwargs]
        read = {
            self._names.of[r.name] for r in references((step.args, [a for _, a in step.kwargs]))
        }
        spec = step.outputs[0][1] if len(step.outputs) == 1 else None
        if spec is not None and takes_out(step, self._plan.device):
            result = step.outputs[0][0] or "_unread"
            text, given = self._allocation.made(result, spec)
            name = self._names.add(result)
            arguments.append(f"out={text}")
            lines.append(f"{name} = {WITH_OUT[step.target]}({', '.join(arguments)})")
            self._statements.add(lines, read | given | {name})
            return
        operator = self._operator(step)
        # functions that operators call may be passed tensors that are none
        if replayed(step) and self._region is None:
            operator, form = self._again(step, operator)
            arguments = ["stream", form, *arguments]
        made = self._results(step, f"{operator}({', '.join(arguments)})", lines)
        self._statements.add(lines, read | made)

    def _again(self, step: AtenStep, operator: str) -> tuple[str, str]:
        """What does the calls of an operator with arguments of one form, and the numbers that the
        form depends on, as text.
        """
        form, numbers = form_of(step, self._values.specs, self._names.of)
        known, key = self._shared.replayed, (operator, form)
        if key not in known:
            known[key] = self._names.claim(f"run_{replayed(step)}")
            self._shared.globals.append(f"{known[key]} = module.replayed({operator})")
        return known[key], numbers

    def _results(self, step: AtenStep, call: str, lines: list[str]) -> set[str]:
        """Lines that call and name the results; returns the variables made."""
        wanted = step.results()
        names = [self._names.add(name) for _, name, _ in wanted]
        places = ["".join(f"[{argument_text(key, {})}]" for key in path) for path, _, _ in wanted]
        places = [""] if _first_alone(step) else places
        if not wanted:
            lines.append(call)
        elif len(wanted) == 1:
            lines.append(f"{names[0]} = {call}{places[0]}")
        else:
            lines.append(f"results = {call}")
            lines += [f"{name} = results{at}" for name, at in zip(names, places, strict=True)]
            lines.append("del results")
        for name, (_, _, spec) in zip(names, wanted, strict=True):
            if spec is None:
                self._statements.numbers.add(name)
                self._sizes.add(name)
            else:
                lines += self._found_sizes(spec, name)
                lines.append(self._laid_out(name, spec))
        return set(names)

    def _laid_out(self, name: str, spec: TensorSpec) -> str:
        return f"{name} = laid_out({name}, {tuple_text(spec.shape)}, {tuple_text(spec.stride)})"

    def _operator(self, step: AtenStep) -> str:
        known, first = self._shared.operators, _first_alone(step)
        title = step.target.removesuffix(".default").replace(".", "_") + "_first" * first
        if title not in known:
            known[title] = self._names.claim(title)
            run = _callable(step.target, first, self._shared.measured)
            self._shared.globals.append(f"{known[title]} = {run}")
        return known[title]

    def _function(self, region: Region) -> None:
        """The function of a region, before the one that passes it on."""
        name = self._names.claim(region.name)
        names = self._names.inner()
        inner = Body(region.plan, names, self._launchers, self._shared, (name, region))
        self._shared.functions.append(inner.text)
        self._names.of[region.name] = name

    def _written(self) -> str:
        outputs = [self._output(output) for output in self._plan.outputs]
        kept = {self._names.of[r.name] for r in references(self._plan.outputs)}
        kept |= {line.split(" = ")[0] for line in self._shared.globals}
        lines = [f"def {self._region[0]}(*args):" if self._region else "def call(args):"]
        lines += self._statements.lines(kept)
        returned = f"[{', '.join(outputs)}]"
        if self._region and self._region[1].returns == "value":
            (returned,) = outputs
        elif self._region and self._region[1].returns == "tuple":
            returned = f"({', '.join(outputs)}{',' * (len(outputs) == 1)})"
        lines += wrapped(f"    return {returned}")
        return "\n".join(lines)

    def _output(self, output: Argument) -> str:
        return argument_text(output, self._names.of)
