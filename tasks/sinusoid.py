"""Few-shot regression of sinusoids (Finn, Abbeel and Levine, 2017)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch.nn import functional as F

from learned_opt.task import TaskFamily, Tensors
from tasks.supervised import apply_mlp, check_judge, check_network, init_mlp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sinusoid(TaskFamily):
    """Mean squared error of an MLP on a few points of y = amplitude · sin(x + phase).

    Amplitude is U(0.1, 5), phase U(0, π), points are U(−5, 5). The loss is that of the task's `num_shots` points (the
    support), all at every step; `eval_metrics` reports "test_loss", that of `num_queries` other points. Parameters are
    those of `tasks.supervised.init_mlp`. Reference: predicting 0 has expected loss 4.25; 0 is the infimum.

    Attributes:
        num_shots: points to learn from; at least 1.
        num_queries: held-out points; at least 1.
        hidden: widths of the hidden layers.
        activation: one of `tasks.activations.ACTIVATIONS`.
        init: "normal" or "fan_in"; see `tasks.supervised.init_mlp`.
        init_scale: see init.
        judge: which points the meta-loss is of: "support", or "query" for what few-shot learning is after.
    """

    name: ClassVar[str] = "sinusoid"
    num_shots: int = 10
    num_queries: int = 100
    hidden: tuple[int, ...] = (40, 40)
    activation: str = "relu"
    init: str = "fan_in"
    init_scale: float = 1.4142135
    judge: str = "support"

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        check_network(self.hidden, self.activation, self.init, self.init_scale)
        check_judge(self.judge)
        for name in ("num_shots", "num_queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        amplitude = 0.1 + 4.9 * torch.rand((), generator=generator)
        phase = math.pi * torch.rand((), generator=generator)
        x = 10 * torch.rand(self.num_shots + self.num_queries, 1, generator=generator) - 5
        y = amplitude * torch.sin(x + phase)
        k = self.num_shots
        return {"x": x[:k], "y": y[:k], "query_x": x[k:], "query_y": y[k:], "amplitude": amplitude, "phase": phase}

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        return init_mlp([1, *self.hidden, 1], self.init, self.init_scale, generator)

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        return F.mse_loss(apply_mlp(params, self.activation, task["x"]), task["y"])

    def query_loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor | None:
        return None if self.judge == "support" else self._on_queries(params, task)

    def _on_queries(self, params: Tensors, task: Tensors) -> torch.Tensor:
        return F.mse_loss(apply_mlp(params, self.activation, task["query_x"]), task["query_y"])

    def eval_metrics(self, params: Tensors, task: Tensors) -> Tensors:
        """The "test_loss" on the query points."""
        return {"test_loss": self._on_queries(params, task)}
