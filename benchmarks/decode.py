"""Decoding by Hugging Face models: tokens one by one, with a static or a growing cache.

A step is `TOKENS` calls of the forward with one token each, on a cache of which half is filled, in
bf16 under no_grad; times are those of one token. "GB/s" is what a token must read (the weights but
the table of tokens, which is picked from, and the cache: a static one whole) over the time. The
check feeds the same tokens to float64 and to eager bf16: the logits may be off by the rule of
`tests/accuracy.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.harness import Session, add_geometric_mean, add_ratio, columns, parser, wanted
from benchmarks.peers import Peer, chosen
from benchmarks.table import Row, Table
from tests.accuracy import FORWARD_FACTOR, SLACK

TOKENS = 16
PEERS = "eager,inductor,ours,inductor-graphs,ours-graphs"


@dataclass(frozen=True)
class Case:
    """``batch`` sequences of ``length`` positions of cache, half of which are filled."""

    model: str
    cache: str
    batch: int
    length: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.cache}, {self.batch} x {self.length}"


CASES = [
    *(Case("llama", "static", batch, length) for batch, length in ((1, 2048), (16, 4096))),
    *(Case("gpt2", "static", batch, 1024) for batch in (1, 16)),
    Case("gemma2", "static", 8, 4096),
    Case("llama", "dynamic", 16, 2048),
]


def main() -> None:
    args = parser(__doc__, PEERS).parse_args()
    peers = chosen(args.peers)
    shown = ["name", *columns(peers, "ms"), "ours/inductor", *columns(peers, "GB/s", "first s")]
    session = Session(args, Table("decoding, one token, bf16", [*shown, "check"]))
    for case in CASES:
        if wanted(case.name, args.only):
            _row(session, case)
    add_geometric_mean(session.table)
    session.table.finish(args.json)


def _row(session: Session, case: Case) -> None:
    row: Row = {"name": case.name}
    session.table.rows.append(row)
    for peer in session.peers:
        if case.cache == "dynamic" and peer.name.endswith("graphs"):
            continue  # each length would be recorded
        session.attempt(row, peer.name, partial(_measure, session.args, case, peer, row))
    ours = next((p for p in session.peers if p.name == "ours"), None)
    if session.args.check and ours is not None:
        session.attempt(row, "check", partial(_check, session.args, case, ours, row))
    add_ratio(row)


def _measure(args: argparse.Namespace, case: Case, peer: Peer, row: Row) -> None:
    model = build(case, args.quick)
    step = decoding(model, peer.compile(model.forward), case, args.quick)
    _, row[f"{peer.name} first s"] = timing.first_call(step)
    time = timing.steps(step, args.steps, args.budget)
    row[f"{peer.name} ms"] = time.ms / TOKENS
    row[f"{peer.name} spread ms"] = time.spread_ms / TOKENS
    row[f"{peer.name} GB/s"] = _needed(model, case, args.quick) / time.ms * TOKENS * 1e-6


def build(case: Case, quick: bool, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model in evaluation mode, weights random and the same each time."""
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    if case.model == "gpt2":
        sizes: dict[str, Any] = {"n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 4096}
        small: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}
        config: Any = transformers.GPT2Config(**(sizes | small if quick else sizes))
        kind: Any = transformers.GPT2LMHeadModel
    else:
        sizes = {
            "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256,
            "max_position_embeddings": 8192, "head_dim": 64,
        }  # fmt: skip
        small = {
            "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
            "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 128,
        }  # fmt: skip
        gemma = case.model == "gemma2"
        config = transformers.Gemma2Config if gemma else transformers.LlamaConfig
        config = config(**(sizes | small if quick else sizes))
        kind = transformers.Gemma2ForCausalLM if gemma else transformers.LlamaForCausalLM
    with torch.device(timing.device()):
        return kind(config).to(dtype).eval()


def decoding(
    model: Any, forward: Callable[..., Any], case: Case, quick: bool
) -> Callable[[], Tensor]:
    """Fills a cache, then decodes; each call of what is returned begins where the filling ended,
    and returns all logits [tokens, B, vocabulary].
    """
    from transformers import DynamicCache, StaticCache

    length = 64 if quick else case.length
    ids = _ids(model, case, length // 2 + TOKENS)
    filled, following = ids[:, : length // 2], ids[:, length // 2 :].split(1, 1)
    static = case.cache == "static"
    cache: Any = StaticCache(model.config, length) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=filled, past_key_values=cache, logits_to_keep=1)
    kept = [(layer.keys, layer.values) for layer in cache.layers]

    def rewind() -> None:
        for layer, (keys, values) in zip(cache.layers, kept, strict=True):
            layer.keys, layer.values = keys, values
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = length // 2
            if static:
                layer.cumulative_length.fill_(length // 2)
            elif hasattr(layer, "cumulative_length"):
                layer.cumulative_length = length // 2

    @torch.no_grad()
    def step() -> Tensor:
        rewind()
        made = []
        for token in following:
            torch.compiler.cudagraph_mark_step_begin()
            logits = forward(input_ids=token, past_key_values=cache, use_cache=True).logits
            made.append(logits[:, -1].clone())
        return torch.stack(made)

    return step


def _ids(model: nn.Module, case: Case, count: int) -> Tensor:
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(1)
    return torch.randint(3, 128, (case.batch, count), generator=generator, device=device)


def _needed(model: Any, case: Case, quick: bool) -> int:
    """Bytes a token must read."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = {p for p in model.parameters() if p is not table or p is head}
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    positions = 64 if quick else case.length
    if case.cache == "dynamic":
        positions //= 2
    cache = 2 * config.num_hidden_layers * case.batch * heads * width * positions
    return sum(p.nbytes for p in weights) + cache * table.itemsize


def _check(args: argparse.Namespace, case: Case, ours: Peer, row: Row) -> None:
    def logits(dtype: torch.dtype, peer: Peer | None = None) -> Tensor:
        model = build(case, args.quick, torch.bfloat16).to(dtype)
        forward = peer.compile(model.forward) if peer else model.forward
        return decoding(model, forward, case, args.quick)().double()

    expected = logits(torch.float64)
    eager, found = (
        float((logits(torch.bfloat16, peer) - expected).norm() / expected.norm())
        for peer in (None, ours)
    )
    allowed = FORWARD_FACTOR * eager + SLACK
    row["check"] = f"{'ok' if found <= allowed else 'FAIL'} {found / allowed:.2f}"


if __name__ == "__main__":
    main()
