"""A program from a seed: steps proposed at random, kept where eager can run them."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from tests.fuzz.program import FLOATS, LAYOUTS, Given, Program, Step, in_place
from tests.fuzz.steps import KINDS, Proposal, Value

SIZES = (1, 2, 3, 4, 5, 6, 7, 17, 33)
_MOST = 1 << 13  # elements of one value: the interpreter is slow
_LARGE = 1e4


def generate(seed: int) -> Program:
    """The program of this seed: some 3 to 16 steps over 1 to 4 inputs."""
    return _Generator(random.Random(seed)).program(seed)


class _Generator:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.sizes = [rng.choice(SIZES) for _ in range(3)]
        if rng.random() < 0.04:
            self.sizes[0] = 0
        self.dtype = rng.choices(FLOATS, (6, 2, 2, 1))[0]
        self.values: list[Value] = []
        self.steps: list[Step] = []

    def program(self, seed: int) -> Program:
        rng = self.rng
        train = rng.random() < 0.6
        given = [(f"x{i}", self._given(i, train)) for i in range(rng.randint(1, 4))]
        generator = torch.Generator().manual_seed(seed)
        for name, one in given:
            tensor = one.draw(generator).requires_grad_(one.grad)
            self.values.append(Value(name, tensor, exact=True))
        for _ in range(rng.randint(3, 16)):
            self._step()
        names = [step.name for step in self.steps] or [given[0][0]]
        count = rng.randint(1, min(3, len(names)))
        outputs = tuple(dict.fromkeys([names[-1], *rng.sample(names, count)]))
        return Program(
            tuple(given), tuple(self.steps), outputs, train, rng.random() < 0.25
        ).pruned()

    def _given(self, position: int, train: bool) -> Given:
        rng = self.rng
        shape = tuple(
            rng.choice((*self.sizes, 1)) for _ in range(rng.choice((0, 1, 2, 2, 3, 3, 4)))
        )
        while _count(shape) > 2048:
            shape = shape[1:]
        kind = rng.random()
        if position and kind < 0.3:
            dtype = rng.choices(("int64", "int32", "uint8", "bool"), (5, 1, 1, 3))[0]
        else:
            dtype = self.dtype if kind < 0.9 else rng.choice(FLOATS)
        layout = rng.choices(LAYOUTS, (6, 2, 1, 1))[0]
        grad = train and dtype in FLOATS and rng.random() < 0.7
        return Given(shape, dtype, layout, grad, rng.choice((1, 2, 5)))

    def _step(self) -> None:
        """One step that eager can run, if one is found soon."""
        for _ in range(12):
            weights, kinds = zip(*KINDS, strict=True)
            proposal = self.rng.choices(kinds, weights)[0](self.rng, self.values)
            if proposal is not None and self._kept(proposal):
                return

    def _kept(self, proposal: Proposal) -> bool:
        step = Step(f"v{len(self.steps)}", proposal.text, tuple(v.name for v in proposal.reads))
        trial = Program((), (step,), (step.name,))
        read = tuple(dict.fromkeys(proposal.reads))
        trial = Program(tuple((v.name, Given(())) for v in read), trial.steps, (step.name,))
        # written into copies: what eager refuses half-way must not have changed anything
        copies = [v.tensor.clone() for v in read]
        try:
            (result,) = trial.function()(*copies)
        except Exception:
            return False
        if not isinstance(result, Tensor) or not _wanted(result):
            return False
        exact = proposal.exact and all(v.exact for v in read)
        if in_place(step):
            self._overwritten(proposal.reads[0], exact)
        self.steps.append(step)
        self.values.append(
            Value(
                step.name,
                result.detach().requires_grad_(result.requires_grad) if result.is_leaf else result,
                exact,
            )
        )
        return True

    def _overwritten(self, target: Value, exact: bool) -> None:
        """Whatever shares its memory may have changed: none of it is exact any more."""
        if not exact:
            self.values = [Value(v.name, v.tensor, False) for v in self.values]


def _wanted(result: Tensor) -> bool:
    if result.numel() > _MOST or result.layout != torch.strided or result.is_complex():
        return False
    if not result.numel() or not result.is_floating_point():
        return True
    return bool(result.detach().double().nan_to_num().abs().max() < _LARGE)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= max(1, size)
    return count
