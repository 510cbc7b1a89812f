"""A Hugging Face GPT-2 with random weights: compiled, checked against eager, its report printed.

Runs anywhere; with a CUDA device it also times a training step against eager and Inductor.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import iocompiler as ioc

Step = Callable[[], torch.Tensor]


def build(device: str) -> tuple[GPT2LMHeadModel, torch.Tensor]:
    """A model and one batch of token ids: small on a CPU, GPT-2's own size on a GPU."""
    torch.manual_seed(0)
    big = device == "cuda"
    config = GPT2Config(
        n_layer=12 if big else 2,
        n_embd=768 if big else 128,
        n_head=12 if big else 4,
        n_positions=1024 if big else 64,
        vocab_size=50257 if big else 1000,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config).to(device, torch.bfloat16 if big else torch.float32).train()
    model.loss_type = "ForCausalLM"  # left out, the library logs a guess and so breaks the graph
    ids = torch.randint(config.vocab_size, (8 if big else 2, config.n_positions), device=device)
    return model, ids


def step(call: Callable[..., Any], model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Loss of one training step; the gradients are left in the parameters."""
    model.zero_grad(set_to_none=True)
    loss: torch.Tensor = call(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach()


def check(model: GPT2LMHeadModel, ids: torch.Tensor, compiled: Callable[..., Any]) -> None:
    """Compare ours and eager's loss and gradients with float64, and print the errors."""
    exact = copy.deepcopy(model).double()
    wanted = step(exact, exact, ids), [p.grad for p in exact.parameters()]
    errors = {}
    for name, call in (("eager", model), ("iocompiler", compiled)):
        loss = step(call, model, ids)
        grads = [p.grad for p in model.parameters()]
        errors[name] = (_error([loss], [wanted[0]]), _error(grads, wanted[1]))
        print(
            f"{name:<12} loss {loss.item():.5f}  error against float64: "
            f"loss {errors[name][0]:.1e}, gradients {errors[name][1]:.1e}"
        )
    assert errors["iocompiler"][0] <= 2 * errors["eager"][0] + 1e-5, "the loss is off"
    assert errors["iocompiler"][1] <= 3 * errors["eager"][1] + 1e-5, "a gradient is off"


def _error(found: list[Any], wanted: list[Any]) -> float:
    """The largest relative error, in norm, of any tensor."""
    pairs = zip(found, wanted, strict=True)
    return max(((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs)


def milliseconds(run: Step, repeats: int = 20) -> float:
    """Median time of a step, by CUDA events, after warm-up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, ids = build(device)
    compiled = torch.compile(model, backend="iocompiler")

    check(model, ids, compiled)
    print(ioc.explain(model, ids, labels=ids, training=True))

    if device == "cuda":
        inductor = torch.compile(model, backend="inductor")
        for name, call in (("eager", model), ("inductor", inductor), ("iocompiler", compiled)):
            print(f"{name:<12} {milliseconds(lambda c=call: step(c, model, ids)):8.2f} ms a step")


if __name__ == "__main__":
    main()
