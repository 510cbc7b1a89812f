"""Two launches of one form are one kernel to Triton, too."""

from __future__ import annotations

import itertools
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
from iocompiler.runtime.template_launch import _form, _seen
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


def test_what_was_seen_says_the_form() -> None:
    made = [arguments(**changed) for changed in CHANGES]
    for a, b in itertools.combinations(made, 2):
        if _seen(attention_combine, a, DEVICE) == _seen(attention_combine, b, DEVICE):
            forms = [_form(attention_combine, each, DEVICE) for each in (a, b)]
            assert forms[0] == forms[1]


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
    monkeypatch.setattr(template_launch, "_triton", lambda: ("3.9.1", triton.knobs.runtime))
    assert not template_launch._direct()
