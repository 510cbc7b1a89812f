"""``python -m tests.fuzz.run --fuzz 1000 --seed 0``: many programs, failing ones shrunk and shown
as tests. With TRITON_INTERPRET=1 the kernels are the text that a GPU would get.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from typing import Any

import torch

from tests.fuzz.generate import generate
from tests.fuzz.judge import valid, verdict
from tests.fuzz.program import Program
from tests.fuzz.shrink import shrink
from tests.runtime.text_engine import TextEngine

UNJUDGED = "raises InterpreterError"
"""Triton's interpreter lacks functions, and confuses numbers with tensors of one element."""


def failure(seed: int, engine: Any = "reference", device: str = "cpu") -> str:
    """ "" where the seed's program is right; else its shrunk form, as a test, and what is wrong."""
    program = generate(seed)
    interpreted = isinstance(engine, TextEngine)  # which rounds bfloat16 towards zero
    if not valid(program) or (interpreted and "bfloat16" in repr(program)):
        return ""
    wrong = verdict(program, engine, device)
    if not wrong or wrong.startswith(UNJUDGED):
        return ""
    kind = wrong.split(":")[0] if wrong.startswith(("raises", "eager")) else ""

    def fails(candidate: Program) -> bool:
        if not valid(candidate):
            return False
        found = verdict(candidate, engine, device)
        return bool(found) and found.startswith(kind) and found.startswith("raises") == bool(kind)

    smaller = shrink(program, fails)
    return f"{smaller.as_test(f'seed {seed}')}\n# {verdict(smaller, engine, device) or wrong}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fuzz", type=int, default=1000, help="how many programs")
    parser.add_argument("--seed", type=int, default=0, help="the first one's seed")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    engine: Any = "reference" if given.device == "cpu" else "auto"
    if os.environ.get("TRITON_INTERPRET") == "1":
        engine = TextEngine(interpret=True)
    wrong = 0
    for seed in range(given.seed, given.seed + given.fuzz):
        text = failure(seed, engine, given.device)
        wrong += bool(text)
        if text:
            print(text, flush=True)
    print(f"{given.fuzz} programs from seed {given.seed}: {wrong} wrong", flush=True)


if __name__ == "__main__":
    main()
