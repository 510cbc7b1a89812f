"""Launches of one form are one kernel to Triton, and the worker's kernel is the one Triton's own
launch would compile.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from iocompiler.codegen.kernels.attention_decode import attention_combine
from iocompiler.ops.linear_cross_entropy_rows import Piece, Rows, Setting, launch_rows
from iocompiler.ops.packed_gradients import Packing
from iocompiler.runtime import attention, embedding_gradient
from iocompiler.runtime.attention_form import functions
from iocompiler.runtime.cache import key_of
from iocompiler.runtime.overlap import waiting_kernels
from iocompiler.runtime.template_form import Form, TemplateJob, form_of
from iocompiler.runtime.template_images import image
from iocompiler.runtime.template_launch import watched
from iocompiler.runtime.worker import OPTIONS
from tests.codegen.test_attention_compiling import problem

_MEMORY = torch.empty(64)
_ENTRY = re.compile(r"\.visible \.entry \w+\((.*?)\)", re.DOTALL)
_TARGET = GPUTarget("cuda", 90, 32)


def arguments(**changed: Any) -> dict[str, Any]:
    given: dict[str, Any] = dict.fromkeys(("Acc", "V", "Out", "Lse", "Rest"), _MEMORY)
    given |= dict.fromkeys(("heads", "rows", "columns", "parts", "lines"), 16)
    given |= {"v_strides": (1024, 64, 32, 1), "out_strides": (64, 32, 32, 1)}
    given |= {"GROUP": 2, "E": 32, "BLOCK_E": 64, "BLOCK_P": 16, "BLOCK_N": 64}
    return {**given, "KEPT": 1.0, "EMPTY": "nan", "PLANES": 1, **changed}


CHANGES: list[dict[str, Any]] = [
    {},
    *({"v_strides": (n, 64, 32, 1)} for n in (1, 2, 16, 1008, 2048, 2**31, 2**31 + 16, 2**31 - 1)),
    *({"v_strides": (1024, 64, 32, n)} for n in (0, 1, 2, 32, -16, -(2**31) - 3)),
    *({"columns": n} for n in (1, 17, 4096, 2**31 - 1, 2**31, 2**63)),
    *({"parts": n} for n in (1, 2, 48)),
    {"V": _MEMORY[1:]},
    {"V": _MEMORY.to(torch.bfloat16)},
    {"E": 16},
    {"PLANES": 2},
    {"PLANES": True},
    {"KEPT": 1},
]


def sourced(kernel: Any, given: dict[str, Any]) -> tuple[ASTSource, Any]:
    """What Triton makes a cubin of when it is launched with these arguments, and the options."""
    backend = make_backend(_TARGET)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    given = {"debug": False, **given, **OPTIONS}
    bound, specialization, options = bind(**given)
    packed = kernel._pack_args(backend, given, bound, specialization, options)
    return ASTSource(kernel, *packed[1:]), packed[0]


def compiled_for(given: dict[str, Any]) -> str:
    source, _ = sourced(attention_combine, given)
    return repr((source.signature, source.constants, source.attrs))


def test_one_form_is_one_kernel() -> None:
    made = [arguments(**changed) for changed in CHANGES]
    forms = [form_of(attention_combine, given, 90) for given in made]
    kernels = [compiled_for(given) for given in made]
    for a, b in itertools.combinations(range(len(made)), 2):
        assert (forms[a] == forms[b]) == (kernels[a] == kernels[b]), (CHANGES[a], CHANGES[b])
    assert 10 < len(set(kernels)) < len(CHANGES)


def test_a_length_that_grows_keeps_its_form() -> None:
    forms = {
        form_of(
            attention_combine,
            arguments(columns=n, parts=n // 64, lines=n, v_strides=(n * 128, n * 128, 128, 1)),
            90,
        )
        for n in (64, 65, 1000, 20001)
    }
    assert len(forms) == 1


def test_a_fake_tensor_lies_where_an_allocation_would() -> None:
    with FakeTensorMode():
        memory = torch.empty(64, device="cuda")
        odd = memory.narrow(0, 1, 63)
    real = form_of(attention_combine, arguments(), 90)
    assert form_of(attention_combine, arguments(V=memory), 90) == real
    assert form_of(attention_combine, arguments(V=odd), 90) != real
    assert form_of(attention_combine, arguments(V=odd), 90) == form_of(
        attention_combine, arguments(V=_MEMORY[1:]), 90
    )


@pytest.mark.parametrize("packing", ["bs|hd:qkv", "sb|hd:vqk", "bsh|d:qkv"])
def test_gradients_in_one_tensor_are_written_by_the_same_kernels(packing: str) -> None:
    given = problem("causal", 64, torch.bfloat16)
    inputs = given.query, given.key, given.value
    where = Packing.parsed(packing)
    layout = where.layout(tuple(x.shape for x in inputs))
    packed = given.query.new_empty(layout.shape)
    out, lse = torch.empty_like(given.query), torch.empty(1, *given.query.shape[:3])
    found: list[set[Form]] = []
    for results in ([torch.empty_like(x) for x in inputs], layout.slices(packed)):
        forms: set[Form] = set()
        with watched(lambda launch, tensors, forms=forms: forms.add(launch.form(tensors, 90))):  # type: ignore[misc]
            attention.backward(given, out, out, lse, None, results)
        found.append(forms)
    assert found[0] == found[1]


def launches() -> list[tuple[Any, dict[str, Any]]]:
    """Kernels and their arguments, of templates of every kind."""
    found: list[tuple[Any, dict[str, Any]]] = []
    given = problem("alibi", 64, torch.bfloat16)
    logits, losses = torch.empty(2, 50304, dtype=torch.bfloat16), torch.empty(2)
    target = torch.zeros(2, dtype=torch.int64)
    with watched(lambda launch, tensors: found.append((launch.kernel, launch.fixed | tensors))):
        attention.forward(given, given.query.new_empty(given.query.shape))
        embedding_gradient.accumulate(
            torch.empty(50, 37), torch.empty(20, 37), target, -1, added=True
        )
        launch_rows(Piece(logits[:, :50257], target, losses, logits), Rows(), Setting(outer=0.5))
    return found


def jobs() -> list[TemplateJob]:
    return [TemplateJob(form_of(kernel, given, 90)) for kernel, given in launches()]


KERNELS = (
    "attention_forward",
    "embedding_order",
    "embedding_sums",
    "embedding_fold",
    "cross_entropy_rows",
)


@pytest.mark.parametrize("which", range(len(KERNELS)))
def test_the_worker_compiles_what_a_launch_of_tritons_would(which: int) -> None:
    kernel, given = launches()[which]
    found = image(form_of(kernel, given, 90))
    source, options = sourced(kernel, given)
    knobs = triton.knobs
    with knobs.compilation.scope(), waiting_kernels(knobs, 90) as waits:
        knobs.compilation.always_compile = True
        expected = triton.compile(source, target=_TARGET, options=options.__dict__)
    assert waits == [found.metadata["waits"]] == [True]
    assert found.cubin == expected.asm["cubin"]
    entry = _ENTRY.search(expected.asm["ptx"])
    assert entry is not None
    widths = [re.search(r"\.[usbf](\d+)", row)[1] for row in entry[1].split(",")]  # type: ignore[index]
    own = {"i64": "64", "i32": "32", "fp32": "32"}
    kinds = [kind for _, kind in found.metadata["parameters"]]
    assert [own.get(kind, "64") for kind in kinds] + ["64", "64"] == widths


def test_every_kind_is_among_them() -> None:
    assert tuple(kernel.__name__ for kernel, _ in launches()) == KERNELS


def test_a_job_is_json() -> None:
    for job in jobs():
        said = json.loads(json.dumps(job.as_json()))
        assert said["kernel"] == {"function": job.name, "module": job.form.kernel.module}
        assert said["capability"] == 90
        for path in job.paths:
            assert Path(path).read_text() in said["texts"]
    attending = jobs()[0].as_json()
    assert attending["arguments"]["Q"] == {"tensor": "bfloat16", "aligned": True}
    assert attending["arguments"]["keep"] == {"function": "keep", "text": 0}
    assert attending["arguments"]["drop"] is None
    assert attending["arguments"]["operands"] == [{"tensor": "bfloat16", "aligned": True}]
    assert "num_warps" in attending["options"]


def test_a_key_changes_with_the_text_of_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    (job, *_) = jobs()
    before = key_of("template", job.as_json())
    assert key_of("template", jobs()[0].as_json()) == before
    monkeypatch.setattr("linecache.getlines", lambda path: ["another text"])
    assert key_of("template", job.as_json()) != before


def test_a_key_says_nothing_of_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (job, *_) = jobs()
    monkeypatch.setenv("IOCOMPILER_CACHE_DIR", str(tmp_path / "elsewhere"))
    functions.cache_clear()
    monkeypatch.setattr("iocompiler.runtime.attention_form._forms", {})
    (other, *_) = jobs()
    assert other.paths != job.paths
    assert other.as_json() == job.as_json()


def test_forms_of_other_capabilities_differ() -> None:
    forms: list[Form] = [form_of(attention_combine, arguments(), c) for c in (80, 90)]
    assert forms[0] != forms[1]
