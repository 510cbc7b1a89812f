"""Which calls of a module share what does them again, and what tells their forms apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch

import iocompiler.ops.registered  # noqa: F401  # the operators
from iocompiler.codegen.module import emit_module
from iocompiler.codegen.replays import form_of, replayed
from iocompiler.plan.data import AtenStep, Plan, Ref, TensorSpec

BF16 = torch.bfloat16
N = sympy.Symbol("n", integer=True, positive=True)
M = sympy.Symbol("m", integer=True, positive=True)


def spec(*shape: Any, dtype: torch.dtype = BF16) -> TensorSpec:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return TensorSpec(tuple(shape), tuple(strides), dtype, "cuda:0")


Q = spec(1, 2, 64, 64)


def attention(q: str, k: str, v: str, out: str, numbers: tuple[Any, ...] = ()) -> AtenStep:
    program = "score.float; const.float:0.5; map.float.mul 0 1"
    args = (Ref(q), Ref(k), Ref(v), (), numbers, program, "template", "ssss", None, 0.0, None, ())
    results = ((out, Q), (f"{out}_lse", spec(1, 1, 2, 64, dtype=torch.float32)))
    return AtenStep("iocompiler.scored_attention.default", args, (), results, True)


def test_equal_layers_share_one() -> None:
    steps = (attention("q", "k", "v", "a"), attention("a", "k", "v", "b"))
    inputs = tuple((name, Q) for name in "qkv")
    text = emit_module(Plan(inputs, steps, (Ref("b"),), "cuda:0"), "graph")
    assert text.count("module.replayed(iocompiler_scored_attention)") == 1
    assert text.count("results = run_scored_attention(stream, (), ") == 2
    wider = replace(steps[1], args=(*steps[1].args[:9], 0.1, None, ()))
    text = emit_module(Plan(inputs, (steps[0], wider), (Ref("b"),), "cuda:0"), "graph")
    assert text.count("module.replayed(iocompiler_scored_attention)") == 2


def test_forms_depend_on_specs_and_numbers() -> None:
    step = attention("q", "k", "v", "a", (Ref("count"), 3 * M))
    specs = {"q": Q, "k": spec(1, 2, N, 64), "v": spec(1, 2, N, 64), "count": None}
    names = {name: f"{name}_0" for name in specs}
    text, numbers = form_of(step, specs, names)
    assert numbers == "(count_0, m, n)"
    other = {**specs, "q": replace(Q, stride=(0, 64, 128, 1))}
    assert form_of(step, other, names)[0] != text
    assert form_of(step, {**specs, "q": replace(Q, dtype=torch.float16)}, names)[0] != text
    assert form_of(step, {**specs, "q2": Q}, {**names, "q": "q_1"})[0] == text


def test_other_calls_are_the_operators() -> None:
    step = attention("q", "k", "v", "a")
    assert replayed(step) == "scored_attention"
    for target in ("iocompiler.attention_classes.default", "aten.mm.default"):
        assert not replayed(replace(step, target=target))
    assert not replayed(replace(step, kwargs=(("dropout_p", 0.5),)))


def test_an_operator_whose_first_result_is_read_alone() -> None:
    out, lse = Q, spec(1, 2, 64, dtype=torch.float32)
    state = spec(0, dtype=torch.int64)
    args = (Ref("q"), Ref("k"), Ref("v"), None, 0.125, False, 0.0, "cudnn", "ssss")
    results: tuple[tuple[str | None, Any], ...] = (
        ("a", out), (None, lse), (None, state), (None, state),
    )  # fmt: skip
    step = AtenStep("iocompiler.attention_forward.default", args, (), results, True)
    inputs = tuple((name, Q) for name in "qkv")
    text = emit_module(Plan(inputs, (step,), (Ref("a"),), "cuda:0"), "graph")
    first = "iocompiler_attention_forward_first"
    assert f'{first} = function("attention_forward", first=True)' in text
    assert f"run_attention_forward = module.replayed({first})" in text
    assert "    a = run_attention_forward(stream, (), q, k, v, None, 0.125," in text
    both = replace(step, outputs=(("b", out), ("lse", lse), *results[2:]))
    outputs = Ref("lse"), Ref("b"), Ref("a")
    text = emit_module(Plan(inputs, (both, step), outputs, "cuda:0"), "graph")
    assert 'iocompiler_attention_forward = function("attention_forward")' in text
    assert "run_attention_forward = module.replayed(iocompiler_attention_forward)" in text
    assert f"run_attention_forward_2 = module.replayed({first})" in text
    assert "results = run_attention_forward(stream, (), q," in text
    assert "a = run_attention_forward_2(stream, (), q," in text
