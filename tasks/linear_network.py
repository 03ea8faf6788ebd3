"""Deep linear networks: matrices in a row that together are to be one given matrix."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch

from learned_opt.task import TaskFamily, Tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearNetwork(TaskFamily):
    """Mean squared error of a linear network against a random linear map: f = mean (Wₖ … W₁ X − M X)².

    X [dim, num_points] is N(0, 1) and M [dim, dim] N(0, 1/dim), so entries of M X have variance 1; all points are seen
    at every step. The k = `depth` matrices, "weight0" (W₁) and so on, each [dim, dim], start at N(0, init_scale²/dim).
    With a depth of 2 or more the origin is a saddle, degenerate from 3 on, beside which training rests on plateaus. The
    optimum is 0, wherever the product is M. Source: Saxe, McClelland and Ganguli, 2014.

    Attributes:
        depth: number of matrices; at least 1.
        dim: rows and columns of each; at least 1.
        num_points: columns of X; at least 1.
        init_scale: see above; positive and finite.
    """

    name: ClassVar[str] = "linear_network"
    depth: int = 3
    dim: int = 8
    num_points: int = 32
    init_scale: float = 0.5

    def __post_init__(self) -> None:
        for name in ("depth", "dim", "num_points"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 0 < self.init_scale < math.inf:
            raise ValueError(f"init_scale must be positive and finite; got {self.init_scale}")

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        points = torch.randn(self.dim, self.num_points, generator=generator)
        true_map = torch.randn(self.dim, self.dim, generator=generator) / math.sqrt(self.dim)
        return {"points": points, "map": true_map, "images": true_map @ points}

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        scale = self.init_scale / math.sqrt(self.dim)
        return {f"weight{i}": torch.randn(self.dim, self.dim, generator=generator) * scale for i in range(self.depth)}

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        x = task["points"]
        for i in range(self.depth):
            x = params[f"weight{i}"] @ x
        return (x - task["images"]).square().mean()

    def optimum(self, task: Tensors) -> Tensors:
        """Factors with loss 0: M itself, then identities."""
        identity = torch.eye(self.dim).to(task["map"])
        return {f"weight{i}": identity.clone() if i else task["map"].clone() for i in range(self.depth)}
