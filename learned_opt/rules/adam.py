"""Adam with learnable learning rate and betas: the reference rule.

theta holds log(lr), log(1 − β₁) and log(1 − β₂), which keeps 1 − β exact to rounding where β is near one. At its
initial theta the rule is `torch.optim.Adam(lr, betas, eps)` (Kingma and Ba 2015) to rounding. The logarithm of ε is a
constant.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch

from learned_opt.rules.base import RuleConfig, UpdateRule
from learned_opt.task import Tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamRuleConfig(RuleConfig):
    """Where meta-training starts.

    Attributes:
        lr: initial learning rate, positive.
        beta1, beta2: initial decay rates, in (0, 1).
        eps: added to √v̂, non-negative.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be positive; got {self.lr}")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie strictly between 0 and 1; got {getattr(self, name)}")
        if not self.eps >= 0:
            raise ValueError(f"eps must be non-negative; got {self.eps}")


class AdamRule(UpdateRule):
    """Adam whose learning rate and betas are theta."""

    kind: ClassVar[str] = "adam"
    config: AdamRuleConfig

    def __init__(self, config: AdamRuleConfig | None = None) -> None:
        self.config = config or AdamRuleConfig()

    def init_theta(self, generator: torch.Generator) -> Tensors:
        c = self.config
        return {
            "log_lr": torch.tensor(math.log(c.lr)),
            "log_one_minus_beta1": torch.tensor(math.log1p(-c.beta1)),
            "log_one_minus_beta2": torch.tensor(math.log1p(-c.beta2)),
        }

    def init_state(
        self, num_coordinates: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensors:
        return {name: torch.zeros(num_coordinates, dtype=dtype, device=device) for name in ("m", "v", "step")}

    def update(
        self, theta: Tensors, grads: torch.Tensor, params: torch.Tensor, state: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        rate1, rate2 = theta["log_one_minus_beta1"].exp(), theta["log_one_minus_beta2"].exp()
        step = state["step"] + 1
        m = state["m"] + rate1 * (grads - state["m"])
        v = state["v"] + rate2 * (grads * grads - state["v"])
        correction1 = -torch.expm1(step * torch.log1p(-rate1))
        correction2 = -torch.expm1(step * torch.log1p(-rate2))
        seen = v != 0
        # Two roots, not one of the quotient: its derivative overflows float32 from gradients of 1e17 on.
        root = torch.where(seen, v, 1.0).sqrt() / correction2.sqrt()
        update = -theta["log_lr"].exp() * (m / correction1) / (root + self.config.eps)
        return torch.where(seen, update, 0.0), {"m": m, "v": v, "step": step}
