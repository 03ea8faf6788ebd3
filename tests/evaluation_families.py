"""Families whose optimizers have closed forms, for the tests of evaluation."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from learned_opt.task import TaskFamily, Tensors, draw_task, task_seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parabola(TaskFamily):
    """f(θ) = a/2 · (θ − c)², where gradient descent is θ_t = c + (1 − rate·a)^t (θ₀ − c).

    One task in `every` has its curvature multiplied by `steep`.
    """

    name: ClassVar[str] = "parabola"
    curvature: float = 1.0
    steep: float = 1.0
    every: int = 1

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        a, c = torch.rand(2, generator=generator, dtype=torch.float64)
        hit = int(torch.randint(self.every, (), generator=generator)) == 0
        return {"a": self.curvature * (0.5 + a) * (self.steep if hit else 1.0), "c": c + 1}

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        return {"theta": -torch.rand((), generator=generator, dtype=torch.float64)}

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        return task["a"] / 2 * (params["theta"] - task["c"]).square()

    def eval_metrics(self, params: Tensors, task: Tensors) -> Tensors:
        return {"distance": (params["theta"] - task["c"]).abs()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression(TaskFamily):
    """Linear regression on mini-batches: two parameter tensors, shared data, and rows drawn anew at every step."""

    name: ClassVar[str] = "regression"

    def shared_data(self) -> Tensors:
        return {"x": torch.randn(40, 3, generator=torch.Generator().manual_seed(5))}

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        return {"w": torch.randn(3, generator=generator)}

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        return {"weight": torch.randn(3, generator=generator), "bias": torch.zeros(1)}

    def sample_batches(self, task: Tensors, num_steps: int, generator: torch.Generator) -> Tensors:
        return {"rows": torch.randint(40, (num_steps, 4), generator=generator)}

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        x = task["x"][batch["rows"]]
        return (x @ (params["weight"] - task["w"]) + params["bias"]).square().mean()


def gradient_descent(
    family: Parabola, split: str, seed: int, num_tasks: int, rate: float, horizon: int
) -> torch.Tensor:
    """The losses [horizon + 1, num_tasks] of gradient descent, by the closed form."""
    steps = torch.arange(horizon + 1, dtype=torch.float64)
    curves = []
    for index in range(num_tasks):
        task, params = draw_task(family, split, task_seed(split, seed, index, 0))
        distance = (1 - rate * task["a"]) ** steps * (params["theta"] - task["c"])
        curves.append(task["a"] / 2 * distance.square())
    return torch.stack(curves, dim=1)
