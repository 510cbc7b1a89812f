"""`explain` on small models with no GPU: what it finds, and that nothing of the user changes."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from iocompiler.errors import CannotExplain, UnknownDevice
from iocompiler.report.explain import explain, loss_of
from iocompiler.report.fakes import double


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.rise = nn.Linear(64, 256)
        self.norm = nn.LayerNorm(256)
        self.fall = nn.Linear(256, 64)
        self.register_buffer("seen", torch.zeros(1))
        self.shift = torch.ones(256)  # neither a parameter nor a buffer

    def forward(self, x):
        self.seen.add_(1)
        return self.fall(self.norm(torch.nn.functional.gelu(self.rise(x)) + self.shift))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IOCOMPILER_CACHE_DIR", str(tmp_path / "cache"))


def graphs(report):
    return {k.graph for k in report.kernels}


def contractions(report):
    return [k for k in report.kernels if "mm" in k.name and not k.generated]


def test_inference_plans_one_graph_for_the_named_device():
    report = explain(Mlp(), torch.randn(512, 64), compile_kernels=False)
    assert graphs(report) == {"inference"}
    assert report.device == "h200"
    assert report.fallbacks == ()
    assert len(contractions(report)) == 2
    assert sum(k.flops for k in contractions(report)) == 2 * 2 * 512 * 64 * 256
    assert 0 < report.bytes_bound < report.bytes_moved
    assert 0 < report.time_bound_us < report.time_us
    assert any(line.startswith("test_explain.py:") for k in report.kernels for line in k.where)
    fused = [k for k in report.kernels if k.generated and k.bytes > 512 * 256]
    assert fused
    assert all("tl." in k.source for k in fused)


def test_training_adds_the_backward():
    report = explain(Mlp(), torch.randn(512, 64), training=True, compile_kernels=False)
    assert graphs(report) == {"forward", "backward"}
    # the input needs no gradient: one product fewer than two for each layer
    assert len([k for k in contractions(report) if k.graph == "backward"]) == 3
    assert list(report.graphs) == ["forward_0", "backward_0"]


def test_the_users_model_and_inputs_stay_as_they_are():
    model, x = Mlp(), torch.randn(8, 64, requires_grad=True)
    before, state = copy.deepcopy(model.state_dict()), dict(vars(model))
    explain(model, x, training=True, compile_kernels=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(type(p) is nn.Parameter and p.grad is None for p in model.parameters())
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert x.grad is None
    assert vars(model) == state


def test_a_faster_device_takes_less_time_for_the_same_bytes():
    x = torch.randn(4096, 64)
    slow = explain(Mlp(), x, device="L40S", compile_kernels=False)
    fast = explain(Mlp(), x, device="b200", compile_kernels=False)
    assert slow.bytes_bound == fast.bytes_bound
    assert fast.time_us < slow.time_us
    with pytest.raises(UnknownDevice):
        explain(Mlp(), x, device="abacus")


def test_functions_and_what_they_close_over():
    inner, scale = nn.Linear(16, 16), torch.full((16,), 2.0)

    def program(x, power=2):
        return torch.relu(inner(x) * scale) ** power

    report = explain(program, torch.randn(64, 16), compile_kernels=False)
    assert len(contractions(report)) == 1
    assert type(inner.weight) is nn.Parameter


def test_models_without_memory_behind_them():
    with torch.device("meta"):
        model = Mlp()
    report = explain(model, torch.empty(64, 64, device="meta"), compile_kernels=False)
    assert len(contractions(report)) == 2


def test_no_kernel_moves_less_than_its_bound():
    report = explain(Mlp(), torch.randn(100, 64), training=True, compile_kernels=False)
    assert all(k.bytes >= k.bound > 0 for k in report.kernels)
    assert all(k.time_us > 0 for k in report.kernels)


def test_programs_that_fail_say_why():
    with pytest.raises(CannotExplain, match=r"Linear cannot be explained"):
        explain(nn.Linear(4, 4), torch.randn(3, 5), compile_kernels=False)
    with pytest.raises(CannotExplain, match="nothing in the output needs a gradient"):
        explain(lambda x: x + 1, torch.randn(3), training=True, compile_kernels=False)


def test_a_branch_on_a_tensor_is_named_by_its_line() -> None:
    def given(x: torch.Tensor) -> torch.Tensor:
        return x.sin() if x[0] < 0.1 else x.cos()

    def one_of_many(x: torch.Tensor) -> torch.Tensor:
        return x.sin() if torch.rand(3)[0] < 0.1 else x.cos()

    for model in (given, one_of_many):
        with pytest.raises(CannotExplain, match=r"value of a tensor at test_explain.py:\d+"):
            explain(model, torch.randn(3))


@pytest.mark.parametrize(("rate", "contracted"), [(0.1, 1), (0.9, 0)])
def test_layers_that_a_random_number_drops_are_there_if_that_is_likelier(
    rate: float, contracted: int
) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            dropped = torch.rand([]) < rate
            return x.exp() if dropped else self.layer(x)

    model, x = Dropping(), torch.randn(64, 32)
    state = torch.get_rng_state()
    report = explain(model, x, compile_kernels=False)
    assert torch.equal(state, torch.get_rng_state())
    assert len(contractions(report)) == contracted


def test_graph_breaks_stand_in_the_report():
    def broken(x):
        y = x.relu() @ x
        torch._dynamo.graph_break()
        return y.exp()

    report = explain(broken, torch.randn(64, 64), compile_kernels=False)
    assert [f.region for f in report.fallbacks] == ["graph break"]
    assert len(report.kernels) == 3


def test_the_same_module_explained_often_does_not_run_into_the_recompile_limit():
    for rows in range(16, 32):
        report = explain(nn.Linear(8, 8), torch.randn(rows, 8), compile_kernels=False)
        assert report.kernels, rows


@pytest.mark.parametrize("device", ["cpu"])
def test_a_cpu_row_has_nothing_to_compile(device):
    report = explain(Mlp(), torch.randn(8, 64), device=device)
    assert all(k.resources is None for k in report.kernels)


@pytest.mark.slow
def test_kernels_are_compiled_with_no_gpu(cache):
    report = explain(Mlp(), torch.randn(512, 64))
    assert report.fallbacks == ()
    ours = [k for k in report.kernels if k.generated]
    assert all(k.resources is not None and k.resources.registers > 0 for k in ours)
    assert all(k.resources is None for k in report.kernels if not k.generated)


@pytest.mark.slow
def test_gpt2_with_its_loss():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_positions=64,
        vocab_size=96,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = "eager"
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.zeros(2, 64, dtype=torch.int64)
    report = explain(model, input_ids=ids, labels=ids, training=True, compile_kernels=False)
    assert graphs(report) == {"forward", "backward"}
    products = [k for k in report.kernels if k.name.startswith(("aten.mm", "aten.addmm"))]
    assert len([k for k in products if k.graph == "forward"]) == 4 * 2 + 1
    assert len([k for k in products if k.graph == "backward"]) == 2 * (4 * 2 + 1)
    assert report.bytes_moved > report.bytes_bound


# --- what is differentiated, and the double


def test_the_loss_is_named_or_the_first_scalar_or_the_sum():
    x = torch.ones(3, requires_grad=True)

    class Output:
        loss = x.sum()
        logits = x * 2

    assert loss_of(Output()) is Output.loss
    assert loss_of((x * 2, x.sum() * 5)).item() == 15
    assert loss_of({"a": x * 2, "b": x * 3, "ids": torch.ones(2)}).item() == 15
    with pytest.raises(ValueError, match="needs a gradient"):
        loss_of(torch.ones(3))


def test_the_double_shares_what_the_original_shares():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    twin = double(model, FakeTensorMode())
    assert twin[1].weight is twin[0].weight
    assert not twin[0].bias.requires_grad
    assert twin[0].weight.requires_grad
    assert twin is not model


def test_a_dropout_is_planned_as_on_the_device_asked_for() -> None:
    def dropped(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x.exp(), 0.1, True)

    report = explain(dropped, torch.randn(64, 256), compile_kernels=False)
    assert [rewrite.pattern for rewrite in report.rewrites] == ["dropout"]
    assert sum(kernel.generated for kernel in report.kernels) == 1
    assert "native_dropout" not in str(report)


def _kernels_of_attention(device: str, window: int) -> list[str]:
    def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        near = torch.ones(128, 128, dtype=torch.bool).tril()
        if window:
            near = near & ~torch.ones_like(near).tril(-window)
        scores = (q @ k.transpose(-1, -2) / 8).masked_fill(~near, float("-inf"))
        return scores.softmax(-1) @ v

    given = [torch.randn(2, 4, 128, 64, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"]
    report = explain(attended, *given, device=device, training=True, compile_kernels=False)
    (graph,) = (g for name, g in report.graphs.items() if name.startswith("forward"))
    calls = [n for n in graph.graph.nodes if "attention" in str(n.target)]
    return [a for call in calls for a in call.args if a in ("cudnn", "flash", "cpu", "template")]


@pytest.mark.parametrize(
    ("device", "window", "kernel"),
    [
        ("h200", 0, "cudnn"),
        ("a100", 0, "flash"),
        ("h200", 16, "template"),
        ("cpu", 0, "cpu"),
    ],
)
def test_attention_is_chosen_as_on_the_device_asked_for(
    device: str, window: int, kernel: str
) -> None:
    assert _kernels_of_attention(device, window) == [kernel]


class Masked(nn.Module):
    """Attention under a mask that it holds, and writes to first if asked to."""

    def __init__(self, mask: torch.Tensor, *, writes: bool = False) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.writes = writes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.writes:
            self.mask.add_(1.0)
            torch._dynamo.graph_break()
        return (x @ x.mT + self.mask).softmax(-1) @ x


@pytest.mark.parametrize(
    ("mask", "writes", "variant"),
    [
        (torch.full((64, 64), float("-inf")).triu(1), False, "causal"),
        (torch.full((64, 64), -1e9).triu(1), True, "program+score"),
        (torch.randn(64, 64), False, "program+score"),
    ],
)
def test_masks_that_modules_hold_are_seen(mask: torch.Tensor, writes: bool, variant: str) -> None:
    model, before = Masked(mask, writes=writes), mask.clone()
    report = explain(model, torch.randn(2, 4, 64, 16), compile_kernels=False)
    assert [found.variant for found in report.rewrites] == [variant]
    assert torch.equal(model.mask, before)


def test_a_program_that_keeps_the_rows_of_a_mask() -> None:
    def masked(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        kept = y != -100
        return torch.nn.functional.cross_entropy(x[kept] @ w, y[kept]) + x[(y > 0).nonzero()].sum()

    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(8, 50, requires_grad=True)
    report = explain(masked, x, w, torch.arange(6), device="h200", training=True)
    products = [k.graph for k in report.kernels if k.name == "aten.mm.default"]
    assert products == ["forward", "backward", "backward"]
