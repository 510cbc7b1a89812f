"""Two launches of one form are one kernel to Triton, too."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from iocompiler.codegen.kernels.attention_decode import attention_combine
from iocompiler.runtime import template_launch
from iocompiler.runtime.template_launch import Launch
from iocompiler.runtime.worker import OPTIONS

_MEMORY = torch.empty(64)
DEVICE = torch.device("cpu")


def arguments(**changed: Any) -> dict[str, Any]:
    given: dict[str, Any] = dict.fromkeys(("Acc", "V", "Out", "Lse", "Rest"), _MEMORY)
    given |= dict.fromkeys(("heads", "rows", "columns", "parts", "lines"), 16)
    given |= {"v_strides": (1024, 64, 32, 1), "out_strides": (64, 32, 32, 1)}
    given |= {"GROUP": 2, "E": 32, "BLOCK_E": 64, "BLOCK_P": 16, "BLOCK_N": 64}
    return {**given, "KEPT": 1.0, "EMPTY": "nan", "SINKS": False, **changed}


CHANGES: list[dict[str, Any]] = [
    {},
    *({"v_strides": (n, 64, 32, 1)} for n in (1, 2, 16, 1008, 2048, 2**31, 2**31 + 16, 2**31 - 1)),
    *({"v_strides": (1024, 64, 32, n)} for n in (0, 1, 2, 32)),
    *({"columns": n} for n in (1, 17, 4096, 2**31 - 1)),
    *({"parts": n} for n in (1, 2, 48)),
    {"V": _MEMORY[1:]},
    {"V": _MEMORY.to(torch.bfloat16)},
    {"E": 16},
    {"SINKS": True},
]


def compiled_for(given: dict[str, Any]) -> str:
    """What Triton makes a cubin of."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    kernel = attention_combine
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    given = {"debug": False, **given, **OPTIONS}
    bound, specialization, options = bind(**given)
    packed = kernel._pack_args(backend, given, bound, specialization, options)
    return repr(packed[1:])


def test_one_form_is_one_kernel() -> None:
    made = [arguments(**changed) for changed in CHANGES]
    forms = [_form(attention_combine, given, DEVICE) for given in made]
    kernels = [compiled_for(given) for given in made]
    assert len(set(kernels)) > 5
    for a, b in itertools.combinations(range(len(made)), 2):
        assert forms[a] != forms[b] or kernels[a] == kernels[b], (CHANGES[a], CHANGES[b])


def test_a_length_that_grows_keeps_its_form() -> None:
    forms = {
        _form(
            attention_combine,
            arguments(columns=n, parts=n // 64, lines=n, v_strides=(n * 128, n * 128, 128, 1)),
            DEVICE,
        )
        for n in (64, 65, 1000, 20001)
    }
    assert len(forms) == 1


class Kernel:
    """Stands for a template: what it was launched with through Triton, and then without."""

    arg_names = ("X", "operands", "n", "BLOCK")
    do_not_specialize = ("n",)

    def __init__(self) -> None:
        self.compiled: list[dict[str, Any]] = []
        self.runs: list[tuple[int, tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        def compile_(**arguments: Any) -> Any:
            self.compiled.append(arguments)
            place = len(self.compiled)

            def run(*given: Any) -> None:
                self.runs.append((place, given))

            return SimpleNamespace(packed_metadata="metadata", function="function", run=run)

        return compile_


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(template_launch, "_direct", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 7, raising=False)
    return Kernel()


def memory(offset: int = 0) -> torch.Tensor:
    made = torch.empty(64)
    start = -made.data_ptr() // 4 % 4  # from a multiple of 16 bytes on
    return made[start + offset :]


def test_later_runs_give_a_compiled_kernel_the_new_memory(kernel: Kernel) -> None:
    launch = Launch(kernel, n=5, BLOCK=16, num_warps=4)
    x, y = memory(), memory()
    launch.run(3, X=x, operands=(y,))
    launch.run(4, X=y, operands=(x,))
    assert len(kernel.compiled) == 1
    assert kernel.compiled[0].keys() >= {"X", "operands", "n", "BLOCK", "num_warps"}
    ((place, given),) = kernel.runs
    assert place == 1
    assert given[:6] == (4, 1, 1, 7, "function", "metadata")
    assert given[9:] == (y.data_ptr(), (x.data_ptr(),), 5, 16)


def test_memory_at_an_odd_place_is_another_kernel(kernel: Kernel) -> None:
    launch = Launch(kernel, n=5, BLOCK=16)
    x, odd = memory(), memory(1)
    for operand in (x, odd, x, odd):
        launch.run(1, X=x, operands=(operand,))
    launch.run(1, X=odd, operands=(x,))
    assert len(kernel.compiled) == 3
    assert [place for place, _ in kernel.runs] == [1, 2]


def test_launches_of_one_form_share_what_is_compiled(kernel: Kernel) -> None:
    for n in (5, 6, 1):
        Launch(kernel, n=n, BLOCK=16).run(1, X=memory(), operands=())
    Launch(kernel, n=5, BLOCK=32).run(1, X=memory(), operands=())
    Launch(kernel, n=5, BLOCK=32, num_warps=8).run(1, X=memory(), operands=())
    assert len(kernel.compiled) == 3
    assert [given[11] for _, given in kernel.runs] == [6, 1]


def test_no_programs_are_no_launch(kernel: Kernel) -> None:
    Launch(kernel, n=5, BLOCK=16).run(0, X=memory(), operands=())
    assert not kernel.compiled


def test_a_compiled_kernel_is_called_without_triton() -> None:
    assert template_launch._direct() == triton.__version__.startswith("3.6.")


def test_through_triton_where_somebody_listens_to_launches() -> None:
    def listen(metadata: object) -> None:
        pass

    for hook in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
        hook.add(listen)
        try:
            assert not template_launch._direct()
        finally:
            hook.remove(listen)


def test_through_triton_in_a_version_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.9.1")
    template_launch._triton.cache_clear()
    try:
        assert not template_launch._direct()
    finally:
        template_launch._triton.cache_clear()
