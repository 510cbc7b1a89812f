"""An AdamW step over many tensors, compiled as ``torch.compile(optimizer.step)``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from benchmarks.peers import Peer
from tests.accuracy import Comparison, Results, compare

# at these widths the state is larger than five L2: a step finds nothing of the one before in the
# cache
WIDTHS = (4096, 16384)
_ROWS = 82  # about 8192 rows over 100 tensors
_SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "foreach": True}


@dataclass(frozen=True)
class AdamW:
    """``count`` parameters of ``_ROWS`` x ``width``, moments in the parameters' dtype."""

    width: int
    count: int

    @property
    def shape(self) -> tuple[int, int]:
        return (_ROWS, self.width)

    @property
    def compulsory_bytes(self) -> int:
        """Parameter, gradient and two moments read; parameter and moments written; bf16."""
        return 7 * 2 * self.count * _ROWS * self.width

    def layouts(self) -> dict[str, tuple[tuple[int, ...], None]]:
        """Shapes of the arguments of `update`: those of the counts of steps, "step0" and so on, are
        float32.
        """
        kinds = {"p": self.shape, "g": self.shape, "m": self.shape, "v": self.shape, "step": ()}
        return {f"{k}{i}": (shape, None) for k, shape in kinds.items() for i in range(self.count)}

    def update(self, **given: Tensor) -> None:
        """One step as a function of its tensors, to be planned with no GPU."""
        kinds = ([given[f"{k}{i}"] for i in range(self.count)] for k in ("p", "g", "m", "v"))
        steps = [given[f"step{i}"] for i in range(self.count)]
        betas = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}  # the optimizer's defaults
        more = {"amsgrad": False, "maximize": False, "capturable": True}
        adamw(*kinds, [], steps, **_SETTINGS, **betas, **more)

    def optimizer(self, device: str, dtype: torch.dtype, seed: int) -> torch.optim.AdamW:
        """Random parameters and gradients, rounded to bf16 whatever ``dtype``."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw() -> Tensor:
            return torch.randn(self.shape, generator=generator, device=device).bfloat16().to(dtype)

        parameters = [draw().requires_grad_() for _ in range(self.count)]
        for parameter in parameters:
            parameter.grad = draw()
        return torch.optim.AdamW(parameters, **_SETTINGS, capturable=device == "cuda")

    def check(self, peer: Peer, device: str) -> tuple[Comparison, ...]:
        """Parameters and moments after two steps, against float64."""

        def stepped(dtype: torch.dtype, compiled: bool) -> Results:
            optimizer = self.optimizer(device, dtype, seed=1)
            step = peer.compile(optimizer.step) if compiled else optimizer.step
            for _ in range(2):
                step()
            values: dict[str, Tensor] = {}
            for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
                state = optimizer.state[parameter]
                values[f"p{i}"] = parameter.detach()
                values |= {f"{k} {i}": v for k, v in state.items() if k != "step"}
            return Results(values, {})

        bf16 = torch.bfloat16
        return compare(
            stepped(bf16, True), stepped(bf16, False), stepped(torch.float64, False), bf16
        )
