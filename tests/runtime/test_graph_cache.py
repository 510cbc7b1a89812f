"""Graphs found again: equal results and gradients, and nothing kept that cannot be told apart."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import iocompiler as ioc
from iocompiler import engines, walk
from iocompiler.compilation import Compilation
from iocompiler.errors import CacheWarning
from iocompiler.graph.findings import Miss, Rewrite, record
from iocompiler.runtime import cache as disk
from tests.compiling import copy, grad
from tests.runtime.text_engine import TextEngine


def compiled(
    f: Callable[..., Any], **settings: Any
) -> tuple[Callable[..., Any], list[Compilation]]:
    records: list[Compilation] = []
    dynamic = settings.pop("dynamic", None)
    settings = {"engine": TextEngine(), "strict": True, **settings}
    made = ioc.Compiler(on_compiled=records.append, **settings)
    torch._dynamo.reset()
    return torch.compile(f, backend=made, dynamic=dynamic), records


def outcome(run: Callable[..., Any], inputs: tuple[Any, ...]) -> list[Any]:
    """Results, gradients and the inputs afterwards, of a call with fresh copies."""
    torch.manual_seed(3)
    given = [copy(x) if isinstance(x, Tensor) else x for x in inputs]
    results = run(*given)
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    wanted = [r for r in results if isinstance(r, Tensor) and r.requires_grad]
    if wanted:
        # weights with strides of their own: not those the backward was traced for
        weights = [torch.linspace(0.5, 2, w.numel()).reshape(w.shape[::-1]).permute(
            *reversed(range(w.dim()))).to(w.device) for w in wanted]  # fmt: skip
        torch.autograd.backward(wanted, weights)  # type: ignore[no-untyped-call]
    gradients = [x.grad for x in given if isinstance(x, Tensor)]
    return [*results, *gradients, *(x.detach() if isinstance(x, Tensor) else x for x in given)]


def found_again(f: Callable[..., Any], *inputs: Any, **settings: Any) -> list[Compilation]:
    """Compile ``f`` twice: the second time it is found, and both compute what eager does."""
    expected = outcome(f, inputs)
    seen: list[Compilation] = []
    for what in ("stored", "found"):
        run, records = compiled(f, **settings)
        result = outcome(run, inputs)
        assert [r.cache for r in records] == [what]
        seen += records
        assert_alike(result, expected)
    return seen


def assert_alike(result: Iterable[Any], expected: Iterable[Any]) -> None:
    """Outcomes have the same types, values, strides and needs of a gradient."""
    for ours, theirs in zip(result, expected, strict=True):
        assert type(ours) is type(theirs)
        if isinstance(ours, Tensor):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            assert ours.requires_grad == theirs.requires_grad
            assert ours.stride() == theirs.stride()
        else:
            assert ours == theirs


def reason(f: Callable[..., Any], *inputs: Any, **settings: Any) -> str:
    """Why a graph is not kept; it runs all the same, twice."""
    for _ in range(2):
        run, records = compiled(f, **settings)
        outcome(run, inputs)
        (first, *_) = records
        assert first.cache.startswith("not cached: "), first.cache
    return first.cache.removeprefix("not cached: ")


def mlp(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(F.layer_norm(x @ w, (w.shape[1],), b)).softmax(-1)


# equal results


def capped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh(q @ k.transpose(-1, -2) / 20) * 20).softmax(-1) @ v


def head_and_loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), y).reshape(1)


@pytest.mark.parametrize(
    ("function", "shapes", "pattern"),
    [
        (capped_attention, ((2, 3, 24, 16),) * 3, "attention"),
        (head_and_loss, ((520, 16), (17000, 16)), "linear_cross_entropy"),
    ],
)
def test_operators_of_ours_are_found_again(
    function: Callable[..., Any], shapes: tuple[tuple[int, ...], ...], pattern: str
) -> None:
    inputs = [grad(*shape) for shape in shapes]
    if function is head_and_loss:
        inputs.append(torch.randint(17000, (520,)))
    seen = found_again(function, *inputs)
    assert [rewrite.pattern for record in seen for rewrite in record.rewrites] == [pattern] * 2


def test_nothing_is_traced_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = (grad(4, 8), grad(8, 6), grad(6))
    first, _ = compiled(mlp)
    expected = outcome(first, inputs)

    def forbidden(*_: Any) -> None:
        raise AssertionError("it was traced")

    monkeypatch.setattr(walk, "capture", forbidden)
    monkeypatch.setattr(walk, "differentiated", forbidden)
    again, records = compiled(mlp)
    torch.testing.assert_close(outcome(again, inputs), expected)
    assert records[0].cache == "found"


def test_gradients() -> None:
    found_again(mlp, grad(4, 8), grad(8, 6), grad(6))


def test_some_outputs_and_inputs_have_gradients() -> None:
    def f(x: Tensor, y: Tensor, unused: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        hidden = x * y
        return hidden.sin(), y.cos(), hidden.argmax(-1), n + 1, hidden.detach() * 2

    found_again(f, grad(3, 5), torch.randn(3, 5), grad(2), torch.arange(4))


def test_outputs_that_are_inputs() -> None:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return x, x.sin() * y, y

    found_again(f, grad(3), torch.randn(3))
    run, _ = compiled(f)
    x, y = grad(3), torch.randn(3)
    assert run(x, y)[0] is x


def test_inference() -> None:
    with torch.no_grad():
        found_again(mlp, grad(4, 8), grad(8, 6), grad(6))
    with torch.inference_mode():
        found_again(mlp, torch.randn(4, 8), torch.randn(8, 6), torch.randn(6))


def test_a_part_with_gradients_under_no_grad() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        with torch.enable_grad():
            return (x * w).sin()

    with torch.no_grad():
        found_again(f, grad(3), torch.randn(3))


def test_an_input_is_overwritten() -> None:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        z = x.mul_(2)
        return z, z + y

    found_again(f, torch.randn(3, 5), torch.randn(3, 5))
    run, _ = compiled(f)
    x = torch.randn(3, 5)
    version = x._version
    assert run(x, x.clone())[0] is x
    assert x._version > version


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(training: bool) -> None:
    def f(x: Tensor, w: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, w, training=training).relu()

    found_again(f, grad(4, 3, 5), grad(3), torch.zeros(3), torch.ones(3))


def test_a_module_with_buffers() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv1d(3, 4, 1, bias=False), nn.BatchNorm1d(4), nn.ReLU())
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def step(compile_it: bool) -> dict[str, Any]:
        model.load_state_dict(state)
        model.zero_grad()
        run, records = compiled(model) if compile_it else (model, [])
        x = torch.linspace(-1, 1, 30).reshape(2, 3, 5)
        run(x).square().sum().backward()
        if compile_it:
            seen.append(records[0].cache)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]
        return gradients | {f"{name} after": v.clone() for name, v in model.state_dict().items()}

    seen: list[str] = []
    expected = step(False)
    for _ in range(2):
        torch.testing.assert_close(step(True), expected, rtol=1e-4, atol=1e-5)
    assert seen == ["stored", "found"]


def test_autocast() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).float().sin()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found_again(f, grad(4, 8), grad(8, 6))


def test_inputs_with_a_history() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        return x.sin() * y.detach()

    def through(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, y: run(x * 2, y * 3)

    inputs = (grad(3), grad(3))
    expected = outcome(through(f), inputs)
    for what in ("stored", "found"):
        run, records = compiled(f)
        for ours, theirs in zip(outcome(through(run), inputs), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert records[0].cache == what


def test_dropout_follows_the_seed() -> None:
    run, _ = compiled(lambda x: F.dropout(x, 0.5))
    again, records = compiled(lambda x: F.dropout(x, 0.5))
    x = torch.ones(64)
    results = []
    for f in (run, again, again):
        torch.manual_seed(5)
        results.append(f(x))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])
    assert not torch.equal(again(x), results[0])
    assert records[0].cache == "found"


def test_constants_made_by_tracing() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, torch.tensor(-7.5)) * torch.tensor([1.0, 2.0, 3.0])

    found_again(f, grad(4, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("train", [True, False])
def test_on_a_gpu(train: bool) -> None:
    def f(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        y = mlp(x, w, b)
        return y, y.argmax(-1), y * torch.tensor(0.5, device=y.device)

    given = (torch.randn(*shape, device="cuda") for shape in ((4, 8), (8, 6), (6,)))
    found_again(f, *(x.requires_grad_(train) for x in given), engine="auto")


# sizes


def test_dynamic_sizes() -> None:
    inputs = [(grad(n, 8), grad(8, 6), grad(6)) for n in (5, 9, 4)]
    for what in ("stored", "found"):
        run, records = compiled(mlp, dynamic=True)
        for given in inputs:
            for ours, theirs in zip(outcome(run, given), outcome(mlp, given), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert [r.cache for r in records] == [what]


def test_sizes_are_outputs() -> None:
    def f(x: Tensor) -> tuple[Tensor, int]:
        y = x.sin()
        torch._dynamo.graph_break()
        return y * y.shape[0], y.shape[0]

    for what in ("stored", "found"):
        run, records = compiled(f, dynamic=True)
        for n in (3, 5, 8):
            x = torch.randn(n, 2)
            torch.testing.assert_close(run(x), f(x))
        assert {r.cache for r in records} == {what}


@ioc.graph_pass
def wants_an_even_size(gm: GraphModule) -> int:
    sizes = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    even = next(size for size in sizes if isinstance(size, torch.SymInt)) % 2 == 0
    record(gm, Rewrite("even" if even else "odd", ""))
    return 0


def test_guards_of_a_pass_hold_for_what_is_found() -> None:
    pipeline = ioc.DEFAULT.after("normalise", wants_an_even_size)

    def patterns(*sizes: int) -> list[tuple[str, str]]:
        run, records = compiled(lambda x: x.sin() + 1, dynamic=True, pipeline=pipeline)
        for size in sizes:
            x = torch.randn(size)
            torch.testing.assert_close(run(x), x.sin() + 1)
        return [(r.rewrites[0].pattern, r.cache) for r in records]

    assert patterns(6, 8) == [("even", "stored")]
    assert patterns(4, 7, 9) == [("even", "found"), ("odd", "stored")]
    assert patterns(3, 10, 5) == [("odd", "found"), ("even", "found")]


# the function around it


def test_twice_through_the_backward() -> None:
    for _ in range(2):
        run, _ = compiled(lambda x: x.sin().exp())
        x = grad(3)
        y = run(x)
        first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], first)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(y.sum(), x)


def test_no_second_derivative() -> None:
    for _ in range(2):
        run, _ = compiled(lambda x: x.sin().exp())
        x = grad(3)
        (first,) = torch.autograd.grad(run(x).sum(), x, create_graph=True)
        torch.testing.assert_close(first, x.cos() * x.sin().exp())
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        first.sum().backward()


def test_a_saved_tensor_that_was_changed_is_noticed() -> None:
    for _ in range(2):
        run, records = compiled(lambda x, w: x * w)
        x, w = torch.randn(3), grad(3)
        y = run(x, w)
        x.add_(1)
        if records[0].cache == "found":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
        else:
            run(torch.randn(3), w).sum().backward()  # the entry is written with the backward
    assert records[0].cache == "found"


def test_inputs_are_not_held() -> None:
    for _ in range(2):
        run, _ = compiled(lambda x, w: (x @ w).relu())
        x = torch.randn(4, 3)
        run(x, grad(3, 2))
        held = weakref.ref(x)
        del x
        gc.collect()
        assert held() is None


# what was found travels


@ioc.graph_pass
def finds(gm: GraphModule) -> int:
    record(gm, Rewrite("pattern", "model.py:3", "a variant"))
    record(gm, Miss("other", "model.py:4", "3 > 2"))
    return 1


def test_findings() -> None:
    pipeline = ioc.DEFAULT.after("normalise", finds)
    first, second = found_again(lambda x: x.sin(), grad(3), pipeline=pipeline)
    assert second.rewrites == first.rewrites == [Rewrite("pattern", "model.py:3", "a variant")]
    assert second.misses == first.misses == [Miss("other", "model.py:4", "3 > 2")]
    assert second.changed == first.changed == 1


# what is not kept


def test_the_trade_under_a_memory_budget() -> None:
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((20, 16), (16, 24), (24,)))
    first, second = found_again(mlp, x, w, b, memory_budget=1.0)
    assert first.trade is not None
    assert first.trade == second.trade


def test_options_that_keep_it_out(tmp_path: Path) -> None:
    x = torch.randn(3)
    assert reason(torch.sin, x, cache=False) == "the option cache is off"
    assert "dump" in reason(torch.sin, x, dump=str(tmp_path))
    assert "verify" in reason(torch.sin, x, verify=True)
    assert "recorded anew" in reason(torch.sin, x, mode="reduce-overhead")
    for engine in ("aten", "reference"):
        assert reason(torch.sin, x, engine=engine) == "the engine keeps no text"


def test_a_cpu_graph_is_left_to_inductor() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "inductor", lambda gm, *_: gm.forward)
        assert (
            reason(lambda x: x.sin(), torch.randn(3), engine="auto") == "the engine keeps no text"
        )


def test_outputs_that_alias() -> None:
    x = grad(4, 3)
    assert reason(lambda x: x.view(12), x) == "an output is an alias of input"
    assert "alias" in reason(lambda x: [y := x.sin(), y.view(12)], x)


def test_outputs_that_only_look_like_aliases() -> None:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        y = x.sin()
        return y, y, x.cos().view(12), x.exp().t(), *x.neg().split(2)

    found_again(f, grad(4, 3))


def test_inputs_changed_outside_of_the_graph() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        z = x * 2  # a gradient flows through the overwritten input
        y.copy_(z)
        return z + y

    assert "changed outside" in reason(f, grad(3), torch.zeros(3))


def test_regions_and_foreign_functions() -> None:
    def f(x: Tensor) -> Tensor:
        return checkpoint(torch.sin, x, use_reentrant=False)

    assert "higher-order" in reason(f, grad(3))
    assert "tests.doubled" in reason(lambda x: torch.ops.tests.doubled(x) + 1, torch.randn(3))


@torch.library.custom_op("tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_a_part_on_aten() -> None:
    class Lame(TextEngine):
        def __call__(self, plan: Any, gm: GraphModule) -> Any:
            raise RuntimeError("no")

    with pytest.warns(ioc.FallbackWarning):
        assert "runs on aten" in reason(torch.sin, torch.randn(3), engine=Lame(), strict=False)


def test_a_pass_without_source() -> None:
    space: dict[str, Any] = {}
    exec("def made(gm):\n    return 0\n", space)
    pipeline = ioc.DEFAULT.after("normalise", ioc.graph_pass(space["made"]))
    assert "the source of made cannot be had" in reason(
        torch.sin, torch.randn(3), pipeline=pipeline
    )


# the key


def one(**settings: Any) -> str:
    run, records = compiled(lambda x: x.sin() + 1, **settings)
    run(torch.ones(3))
    return records[0].cache


def test_everything_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def by(number: int) -> Any:
        @ioc.graph_pass
        def counts(gm: GraphModule) -> int:
            return number * 0

        return ioc.DEFAULT.after("normalise", counts)

    assert [one(), one()] == ["stored", "found"]
    assert [one(device="a100"), one(device="a100")] == ["stored", "found"]
    assert [one(pipeline=by(1)), one(pipeline=by(1))] == ["stored", "found"]
    assert one(pipeline=by(2)) == "stored"
    assert one(pipeline=ioc.DEFAULT.without("dropout")) == "stored"
    with torch.no_grad():
        assert one() == "stored"
    monkeypatch.setattr(disk, "versions", lambda: {"torch": "another"})
    assert one() == "stored"


# damage


def entry(root: Path) -> Path:
    (folder,) = (root / "graphs").iterdir()
    return folder


def test_a_damaged_file_is_made_again(cache_root: Path) -> None:
    assert one() == "stored"
    (entry(cache_root) / "inference.py").write_text("raise SystemExit\n")
    with pytest.warns(CacheWarning, match="does not match its hash") as caught:
        assert one() == "stored"
    assert len(caught) == 1
    assert one() == "found"


@pytest.mark.parametrize("damage", ["convention", "constants", "foreign", "guards", "text"])
def test_contents_that_make_no_sense(cache_root: Path, damage: str) -> None:
    assert one() == "stored"
    cache = disk.default_cache()
    assert cache is not None
    key = entry(cache_root).name
    found = cache.get("graphs", key)
    assert found is not None
    files, meta = dict(found.files), json.loads(json.dumps(found.meta))
    if damage == "foreign":
        files["key.txt"] += b"%9 = something else\n"
    elif damage == "text":
        files["inference.py"] = b"# %% call\ncall = None\n"
    else:
        changes = {
            "convention": {"inputs": 1},
            "constants": [{"attribute": "gone"}],
            "guards": "0 +",
        }
        meta[damage] = changes[damage]
    cache.clear()
    cache.put("graphs", key, files, meta)
    with pytest.warns(CacheWarning, match="built again") as caught:
        assert one() == "stored"
    assert len(caught) == 1
    assert one() == "found"


# another process

_SCRIPT = """
import torch
import iocompiler as ioc
from tests.runtime.text_engine import TextEngine

records = []
x = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
w = torch.linspace(-2, 1, 20).reshape(4, 5).requires_grad_()
# the last has a gradient too, which nobody asks for
f = lambda x, w: ((x @ w).softmax(-1).sum(0), (x * 2).argmax(-1), (x @ w).sin())
backend = ioc.Compiler(engine=TextEngine(), strict=True, on_compiled=records.append)
y, n, _ = torch.compile(f, backend=backend)(x, w)
y.square().sum().backward()
found = [y, x.grad.clone(), w.grad.clone()]
x.grad = w.grad = None
expected, positions, _ = f(x, w)
expected.square().sum().backward()
torch.testing.assert_close(found, [expected, x.grad, w.grad], rtol=1e-4, atol=1e-5)
assert torch.equal(n, positions)
print(records[0].cache)
"""


def test_another_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(_SCRIPT))
    root = str(Path(__file__).parents[2])
    variables = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": root}
    seen = [
        subprocess.run(
            [sys.executable, str(script)],
            check=True, timeout=120, capture_output=True, text=True, env=variables,
        ).stdout.strip()
        for _ in range(2)
    ]  # fmt: skip
    assert seen == ["stored", "found"]
