"""What a generated module file needs to run: its kernels, compiled and bound, and the fastest ways
to make tensors.

A file is taken apart at its ``# %%`` cells. Only the call cell is run; a kernel's text goes, with
the prelude, to the compiler, or is found in the cache under that text. A file edited by hand
therefore runs as edited.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from iocompiler.codegen.pytext import helpers_for
from iocompiler.ops.library_product import Algorithm, Problem
from iocompiler.ops.multiply import using
from iocompiler.runtime.batch import BatchLaunch
from iocompiler.runtime.cache import default_cache, key_of
from iocompiler.runtime.compile import Job
from iocompiler.runtime.kernels import KernelSpec, cells, compiled_images
from iocompiler.runtime.launch import Image, Launch, Signature, make_launch
from iocompiler.runtime.products import Product
from iocompiler.runtime.replayed import Replayed
from iocompiler.runtime.values import laid_out, storage_elements


class Module:
    """A generated module: its cells of text, the kernels its call cell registers, bound launchers.

    Args:
        path: the file; it must exist.
        device: replaces the torch device the file names.
        binder: makes a kernel's launch function, in place of compiling and loading it on the GPU.
        allocate: False where no tensor can be made on the device: constants are then left out.
    """

    def __init__(
        self,
        path: str,
        device: str = "",
        binder: Callable[[KernelSpec], Launch] | None = None,
        allocate: bool = True,
    ):
        self.path = path
        self.source = Path(path).read_text()
        self.device = torch.device(device or "cpu")
        self.kernels: dict[str, KernelSpec] = {}
        self.images: dict[tuple[str, bool, bool], Image] = {}
        self.bound: dict[str, Launch] = {}
        self.batches: list[BatchLaunch] = []
        self.namespace: dict[str, Any] = {}
        self._algorithms: dict[Problem, Algorithm] = {}
        self._binder, self._allocate = binder, allocate
        self._compiling: tuple[int, Future[None]] = 0, Future()  # the process, and when it is done
        self._override = bool(device)
        self._prelude, self._texts, self.call_cell = cells(self.source)

    def adopt(self, namespace: dict[str, Any], device: str) -> None:
        """Take the globals of the file's call cell and, unless one was given, its device."""
        self.namespace = namespace
        if not self._override:
            self.device = torch.device(device)

    def execute(self) -> dict[str, Any]:
        """Run the call cell, at its true lines; returns its globals."""
        start = self.source.count("\n", 0, self.source.index(self.call_cell))
        code = compile("\n" * start + self.call_cell, self.path, "exec")
        namespace: dict[str, Any] = {"__name__": Path(self.path).stem, "__file__": self.path}
        namespace[_OPENED] = self  # in there, not by path: another thread may run the same file
        exec(code, namespace)
        return namespace

    def users_line(self, line: int) -> str:
        """The user's line of a call at this line of the file: the comment above it."""
        for text in reversed(self.source.splitlines()[:line]):
            if text.startswith("    # "):
                return text.strip()[2:]
            if text.startswith("def "):
                break
        return ""

    # what the call cell uses

    def tools(self) -> tuple[Callable[..., Any], ...]:
        """``empty(size, stride, dtype)``, ``reinterpret(base, size, stride, offset)``,
        ``laid_out``, ``current_stream()``.
        """
        guards: Any = torch._C._dynamo.guards
        stream: Callable[[], int]
        if self.device.type == "cuda":
            empty = guards._empty_strided_cuda
            stream = functools.partial(_raw_stream, self.device_index)
        else:
            empty = guards._empty_strided_cpu
            stream = int
        return empty, guards._reinterpret_tensor, laid_out, stream

    def kernel(
        self,
        name: str,
        signature: str,
        *,
        num_warps: int,
        num_stages: int,
        where: str = "",
        any_pointers: tuple[str, int, int] | None = None,
        registers: int = 0,
    ) -> Launch:
        """Register a kernel; the launch function returned compiles and binds the whole module when
        first called. ``any_pointers`` is that of `KernelSpec`, ``registers`` that of `Schedule`.
        """
        launcher = f"{name}({signature})"
        parsed = Signature.parse(signature)
        spec = KernelSpec(
            name, launcher, parsed, num_warps, num_stages, where, any_pointers, registers
        )
        self.kernels[launcher] = spec

        def first(*arguments: Any) -> None:
            self.bind()
            self.bound[launcher](*arguments)

        first.kernel = spec  # type: ignore[attr-defined]  # how `bind` finds the globals to replace
        return first

    def batch(
        self,
        name: str,
        signature: str,
        *,
        block: int,
        numbers: str,
        num_warps: int,
        num_stages: int,
        where: str = "",
        unit: int = 1,
        programs: int = 0,
        registers: int = 0,
    ) -> BatchLaunch:
        """Register a kernel over many sets of tensors; parameters as of `BatchLaunch`."""
        fixed: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
        self.kernel(name, signature, where=where, registers=registers, **fixed)
        launcher = f"{name}({signature})"

        def bound() -> Launch:
            if launcher not in self.bound:
                self.bind()
            return self.bound[launcher]

        self.batches.append(BatchLaunch(bound, block, numbers, self.device, unit, programs))
        return self.batches[-1]

    def product(self, problem: Callable[..., Problem]) -> Callable[..., None]:
        """Register a library's product; the function returned is `Product.run`."""
        on_gpu = self.device.type == "cuda"
        device = torch.device("cuda", self.device_index) if on_gpu else self.device
        return Product(problem, device, self._algorithms).run

    def algorithms(self, found: Mapping[Problem, Algorithm]) -> None:
        """Register which algorithms make which products, the module's own and operators'."""
        self._algorithms.update(found)

    def multiplying(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """An operator whose products inside are made by these algorithms."""
        return using(self._algorithms)(run)

    def replayed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """What does an operator's calls of one form again: `Replayed`; on a CPU, the operator."""
        if self.device.type != "cuda":
            return lambda stream, sizes, *args: run(*args)
        return Replayed(run, self.tools()[0])

    def recorded(self) -> None:
        """The calls go into CUDA graphs from here on."""
        for each in self.batches:
            each.recorded = True

    def constant(
        self,
        values: list[Any],
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        dtype: torch.dtype,
        device: str,
    ) -> torch.Tensor | None:
        """A tensor of known elements (row-major), made once."""
        if not self._allocate:
            return None
        where = self.device if torch.device(device).type == "cuda" else torch.device(device)
        tensor = torch.empty_strided(shape, stride, dtype=dtype, device=where)
        return tensor.copy_(torch.tensor(values, dtype=dtype).reshape(shape))

    def random(
        self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: str
    ) -> torch.Tensor:
        """A random input: normal floats, integers and bools of 0 and 1."""
        where = self.device if torch.device(device).type == "cuda" else torch.device(device)
        elements = storage_elements(shape, stride)
        if dtype.is_floating_point or dtype.is_complex:
            flat = torch.randn(elements, dtype=torch.float32).to(dtype)
        else:
            flat = torch.randint(0, 2, (elements,)).to(dtype)
        return flat.to(where).as_strided(shape, stride)

    def check(
        self, call: Callable[[list[Any]], list[Any]], example_inputs: Callable[[], list[Any]]
    ) -> None:
        """Run twice on the same random inputs, compare the two, and print the time of a call."""
        from iocompiler.runtime.standalone import check

        check(call, example_inputs, self.device)

    # compiling and binding

    @property
    def device_index(self) -> int:
        index: int | None = self.device.index
        if index is not None:
            return index
        # without a GPU to allocate on, none must be touched either
        return torch.cuda.current_device() if self._allocate and torch.cuda.is_available() else 0

    def compile(self, capability: int) -> None:
        """Cubins of every kernel's hinted versions, from the cache or from the worker processes.

        Raises:
            CompileError: a kernel does not compile.
        """
        wanted = [(spec, *variant) for spec in self.kernels.values() for variant in spec.variants()]
        self._compile(wanted, capability)

    def _compile(self, wanted: Iterable[tuple[KernelSpec, bool, bool]], capability: int) -> None:
        cache = default_cache()
        jobs: dict[str, Job] = {}
        keys: dict[tuple[str, bool, bool], str] = {}
        for spec, aligned, sizes in wanted:
            job = self._job(spec, aligned, sizes, capability)
            key = key_of("kernel", job.as_json())
            keys[spec.launcher, aligned, sizes] = key
            jobs.setdefault(key, job)
        images = compiled_images(jobs, cache)
        self.images.update({place: images[key] for place, key in keys.items()})

    def _job(self, spec: KernelSpec, aligned: bool, sizes: bool, capability: int) -> Job:
        text = self._texts[spec.name]
        source = f"{helpers_for(self._prelude, text)}\n\n{text}"
        return Job(
            source=source,
            name=spec.name,
            signature=spec.signature.types,
            divisible=spec.signature.divisible(aligned, sizes),
            num_warps=spec.num_warps,
            num_stages=spec.num_stages,
            capability=capability,
            where=spec.where,
            registers=spec.registers,
        )

    def begin(self) -> None:
        """Have the kernels compiled in the background; `bind` waits for them."""
        torch.cuda.init()  # type: ignore[no-untyped-call]
        done, capability = Future[None](), self._capability
        self._compiling = os.getpid(), done

        def run() -> None:
            try:
                self.compile(capability)
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        # no thread of a pool's: those are waited for when the program ends
        threading.Thread(target=run, daemon=True).start()

    def bind(self) -> None:
        """Load what is compiled on the device (compiling it first if need be) and put the launchers
        in place.
        """
        if self._binder is not None:
            self.bound = {name: self._binder(spec) for name, spec in self.kernels.items()}
        else:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            process, done = self._compiling
            if process == os.getpid():  # a forked child has no thread of its parent's
                done.result()
            if not self.images:
                self.compile(self._capability)
            self.bound = {name: self._launch(spec) for name, spec in self.kernels.items()}
        for name, value in list(self.namespace.items()):
            spec = getattr(value, "kernel", None)
            if isinstance(spec, KernelSpec):
                self.namespace[name] = self.bound[spec.launcher]

    @property
    def _capability(self) -> int:
        major, minor = torch.cuda.get_device_capability(self.device_index)
        return 10 * major + minor

    def _launch(self, spec: KernelSpec) -> Launch:
        from iocompiler.runtime.driver import driver

        load = functools.partial(
            make_launch, spec.signature, driver=driver(), device=self.device_index
        )
        unaligned = self._unaligned(spec)
        hinted, *rest = (self.images[(spec.launcher, *variant)] for variant in spec.variants())
        odd_sizes = load(image=rest[0]) if rest else None
        return load(image=hinted, unaligned=unaligned, odd_sizes=odd_sizes)

    def _unaligned(self, spec: KernelSpec) -> Launch:
        """The launch for pointers without the usual alignment, which few programs have: compiled at
        its first use.
        """
        made: list[Launch] = []

        def launch(*arguments: Any) -> None:
            if not made:
                from iocompiler.runtime.driver import driver

                other = spec.unhinted
                self._compile([(other, False, False)], self._capability)
                image = self.images[other.launcher, False, False]
                made.append(make_launch(other.signature, image, driver(), self.device_index))
            made[0](*arguments)

        return launch

    @property
    def resources(self) -> dict[str, dict[str, int]]:
        """Registers, spills and shared memory (bytes) of each kernel's hinted version."""
        fields = ("registers", "spills", "shared")
        found = {}
        for place, spec in self.kernels.items():
            image = self.images.get((place, *spec.variants()[0]))
            if image is not None:
                found[spec.name] = {f: int(image.metadata[f]) for f in fields}
        return found


# absent in a torch built without CUDA, where files are written and compiled but not run
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)

_OPENED = "__iocompiler_module__"


def open_module(path: str, namespace: dict[str, Any], device: str) -> Module:
    """The `Module` of a generated file, called by the file itself."""
    module: Module = namespace.pop(_OPENED, None) or Module(path)
    module.adopt(namespace, device)
    return module
