"""Quadratics |Wθ − y|² in the three conventions of the literature.

| convention | W | y | θ₀ | used by |
| --- | --- | --- | --- | --- |
| "normal" | N(0, 1) | N(0, 1) | N(0, 1) | Andrychowicz et al. 2016, figure 4 |
| "zero_start" | N(0, 1) | N(0, 1) | 0 | public PyTorch reproductions |
| "uniform" | U(0, 1) | U(0, 1) | N(0, 0.01²) | the paper's published code |
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from learned_opt.task import TaskFamily, Tensors

CONVENTIONS = ("normal", "zero_start", "uniform")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quadratic(TaskFamily):
    """f(θ) = |Wθ − y|², the sum of squares; its optimum is 0 almost surely, since W is square.

    Attributes:
        dim: W is [dim, dim], y and θ, "theta", are [dim]; at least 1.
        convention: one of `CONVENTIONS`.
    """

    name: ClassVar[str] = "quadratic"
    dim: int = 10
    convention: str = "normal"

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim must be at least 1; got {self.dim}")
        if self.convention not in CONVENTIONS:
            raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}; got {self.convention!r}")

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        draw = torch.rand if self.convention == "uniform" else torch.randn
        return {
            "w": draw(self.dim, self.dim, generator=generator),
            "y": draw(self.dim, generator=generator),
        }

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        scale = {"normal": 1.0, "zero_start": 0.0, "uniform": 0.01}[self.convention]
        return {"theta": torch.randn(self.dim, generator=generator) * scale}

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        return (task["w"] @ params["theta"] - task["y"]).square().sum()
