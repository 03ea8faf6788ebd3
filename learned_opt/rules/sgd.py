"""Gradient descent with a learnable learning rate: the rule with a closed form.

theta holds log(lr) alone, and there is no state. On a quadratic every meta-gradient is known exactly, which makes this
the reference that estimators are held to.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch

from learned_opt.rules.base import RuleConfig, UpdateRule
from learned_opt.task import Tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGDRuleConfig(RuleConfig):
    """Where meta-training starts.

    Attributes:
        lr: initial learning rate, positive.
    """

    lr: float = 1e-2

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be positive; got {self.lr}")


class SGDRule(UpdateRule):
    """update = −exp(log_lr)·g."""

    kind: ClassVar[str] = "sgd"
    config: SGDRuleConfig

    def __init__(self, config: SGDRuleConfig | None = None) -> None:
        self.config = config or SGDRuleConfig()

    def init_theta(self, generator: torch.Generator) -> Tensors:
        return {"log_lr": torch.tensor(math.log(self.config.lr))}

    def init_state(
        self, num_coordinates: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensors:
        return {}

    def update(
        self, theta: Tensors, grads: torch.Tensor, params: torch.Tensor, state: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        return -theta["log_lr"].exp() * grads, {}
