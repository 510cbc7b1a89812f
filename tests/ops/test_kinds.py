"""What flat graphs of real models are made of: every operator is of a kind the planner knows."""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx import GraphModule

from iocompiler.graph.capture import capture
from iocompiler.graph.normalise import normalise
from iocompiler.ops import target
from iocompiler.ops.decompositions import table
from iocompiler.ops.partition import partition
from iocompiler.ops.random import SEEDS
from iocompiler.passes.dropout import dropout
from iocompiler.passes.foreach import foreach
from iocompiler.plan.rules import RULES
from iocompiler.plan.views import VIEWS

aten = torch.ops.aten
CONTRACTIONS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten.convolution_backward.default,
}
OPAQUE = {
    SEEDS,
    operator.getitem,
    operator.mul,  # of sizes
    aten.embedding_dense_backward.default,
    aten.native_dropout.default,  # of attention on the CPU, which stays whole before autograd
    aten._assert_async.msg,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}


class Kinds:
    """A backend that counts the operators of every flat graph and runs them on aten."""

    def __init__(self) -> None:
        self.found: Counter[Any] = Counter()

    def __call__(self, gm: GraphModule, inputs: list[Any]) -> Any:
        graph = capture(gm, inputs)
        normalise(graph)
        with target.planned_for((9, 0)):
            dropout(graph)
        graph.recompile()
        return aot_autograd(
            fw_compiler=self._count,
            bw_compiler=self._count,
            inference_compiler=self._count,
            decompositions=table(),
            partition_fn=partition,
            keep_inference_input_mutations=True,
        )(graph, inputs)

    def _count(self, flat: GraphModule, _: Any) -> Any:
        foreach(flat)
        flat.recompile()
        self.found.update(node.target for node in flat.graph.nodes if node.op == "call_function")
        return make_boxed_func(flat.forward)

    @property
    def unknown(self) -> dict[str, int]:
        known = {*RULES, *VIEWS} | CONTRACTIONS | OPAQUE
        names = {key for key in RULES if isinstance(key, str)}
        return {
            str(op): count
            for op, count in self.found.items()
            if op not in known and str(op) not in names
        }


def step(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Kinds:
    """Compile a step (forward, and backward where there is one) and count."""
    kinds = Kinds()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = torch.compile(function, backend=kinds)(*args, **kwargs)
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.sum().backward()
    return kinds


def _model(name: str, attention: str) -> tuple[nn.Module, dict[str, Tensor]]:
    t = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 99,
        "attn_implementation": attention,
    }
    ids = torch.randint(3, 99, (2, 9))
    tokens = {"input_ids": ids, "labels": ids}
    if name == "bert":
        return t.BertForMaskedLM(t.BertConfig(**sizes)), {
            **tokens,
            "attention_mask": torch.ones_like(ids),
        }
    if name == "gpt2":
        model = t.GPT2LMHeadModel(
            t.GPT2Config(
                n_embd=32, n_layer=1, n_head=2, vocab_size=99, n_positions=32, bos_token_id=0,
                eos_token_id=0, attn_implementation=attention,
            )
        )  # fmt: skip
        model.loss_type = "ForCausalLM"
        return model, tokens
    if name == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**sizes, num_key_value_heads=1)), tokens
    if name == "vit":
        config = t.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5)
        labels = torch.tensor([1, 2])
        pixels = torch.randn(2, 3, 16, 16).bfloat16()
        return t.ViTForImageClassification(config), {"pixel_values": pixels, "labels": labels}
    config = t.T5Config(
        d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=99,
        decoder_start_token_id=0, attn_implementation=attention,
    )  # fmt: skip
    return t.T5ForConditionalGeneration(config), tokens


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "t5"])
def test_transformers(name: str, attention: str) -> None:
    model, inputs = _model(name, attention)
    model = model.bfloat16().train()
    kinds = step(lambda **given: model(**given).loss, **inputs)
    assert kinds.unknown == {}
    assert kinds.found[aten.mm.default] > 5


class ResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.norm, self.last = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.last(self.second(torch.relu(self.norm(self.first(x))))))


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(3, 8)
        for part in x:
            h, c = self.cell(part, (h, c))
        return h


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "encoder": (lambda: nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), (2, 7, 32)),
    "encoder, norm first": (lambda: nn.TransformerEncoderLayer(32, 2, norm_first=True), (7, 2, 32)),
    "resnet": (ResidualBlock, (2, 4, 8, 8)),
    "lstm": (Loop, (4, 3, 8)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(MODULES))
def test_modules(name: str, dtype: torch.dtype) -> None:
    make, shape = MODULES[name]
    kinds = step(make().to(dtype), torch.randn(shape, dtype=dtype, requires_grad=True))
    assert kinds.unknown == {}
    assert kinds.found


def test_adamw() -> None:
    layer = nn.Linear(8, 8)
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(layer.parameters(), foreach=True)
    optimizer.step()
    kinds = step(optimizer.step)
    assert kinds.unknown == {}
    assert kinds.found[aten.copy_.default] == 4 * 2


def test_one_hot_and_cross_entropy_scatter_nothing() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        smooth = nn.functional.one_hot(y, 7) * 0.9
        return nn.functional.cross_entropy(x, y) + (x * smooth).sum()

    kinds = step(f, torch.randn(5, 7, requires_grad=True), torch.randint(0, 7, (5,)))
    assert kinds.unknown == {}
    assert not any("scatter" in str(op) for op in kinds.found)


def test_dynamic_sizes_leave_no_float_of_sizes() -> None:
    """A mean divides by a size as it is; a quotient of sizes would be no operand of a kernel."""

    def f(x: Tensor, y: Tensor) -> Tensor:
        normal = nn.functional.layer_norm(x, (7,))
        losses = (nn.functional.mse_loss, nn.functional.smooth_l1_loss, nn.functional.huber_loss)
        return sum(loss(normal, y) for loss in losses)

    x, y = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    for each in (x, y):
        torch._dynamo.mark_dynamic(each, 0)
    assert step(f, x, y).unknown == {}
