"""Gradient descent whose rate an LSTM sets anew at every step, for every coordinate.

    u = −exp(log_lr + s·tanh(out)) · g

with `out` the read-out of the coordinatewise LSTM of `learned_opt.rules.lstm` and s a bound on how far a rate can be
from the learned rate of all. This is the input gate of the LSTM meta-learner (Ravi and Larochelle 2017), whose cell is
the parameter and whose candidate is the negative gradient. Deviations: no forget gate, since none of our problems ask
for decay; rates on a logarithmic scale; and neither the loss nor the parameter among the inputs.

Untrained it is close to gradient descent. It is for few steps from learned initial parameters: there the size of a
gradient matters, which rules on normalized gradients do not see, and the exact meta-gradient stays bounded, since the
derivative of log|g| meets a factor g.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch

from learned_opt.rules.base import RuleConfig, UpdateRule
from learned_opt.rules.context import TensorLayout
from learned_opt.rules.lstm import LSTMRule, LSTMRuleConfig
from learned_opt.task import Tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedRuleConfig(RuleConfig):
    """Where the rate starts, and the LSTM that changes it.

    Attributes:
        lr: initial rate, positive; learned.
        log_factor: s, the largest logarithm of a rate over the learned one; positive.
        inputs: "log_and_sign" of the gradient, or "normalized", which tells no sizes apart at the first step.
        hidden_size: units of the LSTM, at least 1.
    """

    lr: float = 1e-2
    log_factor: float = 3.0
    inputs: str = "log_and_sign"
    hidden_size: int = 4

    def __post_init__(self) -> None:
        for name in ("lr", "log_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        self.lstm()

    def lstm(self) -> LSTMRuleConfig:
        """The configuration of the LSTM, whose read-out is the logarithm of a factor on the rate."""
        return LSTMRuleConfig(
            inputs=self.inputs, hidden_size=self.hidden_size, output_scale=self.log_factor, output_tanh=True
        )


class GatedRule(UpdateRule):
    """Gradient descent with gated rates; theta and state are those of the LSTM, and "log_lr"."""

    kind: ClassVar[str] = "gated"
    config: GatedRuleConfig

    def __init__(self, config: GatedRuleConfig | None = None) -> None:
        self.config = config or GatedRuleConfig()
        self._lstm = LSTMRule(self.config.lstm())

    def init_theta(self, generator: torch.Generator) -> Tensors:
        return {**self._lstm.init_theta(generator), "log_lr": torch.tensor(math.log(self.config.lr))}

    def init_state(
        self, num_coordinates: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensors:
        return self._lstm.init_state(num_coordinates, dtype=dtype, device=device)

    def update(
        self, theta: Tensors, grads: torch.Tensor, params: torch.Tensor, state: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        factor, state = self._lstm.update(_own(theta), grads, params, state)
        return -(theta["log_lr"] + factor).exp() * grads, state

    def vjp(
        self,
        theta: Tensors,
        grads: torch.Tensor,
        params: torch.Tensor,
        state: Tensors,
        d_update: torch.Tensor,
        d_state: Tensors,
        layout: TensorLayout | None = None,
    ) -> tuple[Tensors, torch.Tensor, torch.Tensor, Tensors]:
        """See `UpdateRule.vjp`; through the LSTM by its own route."""
        factor, _ = self._lstm.update(_own(theta), grads, params, state)
        slope = -(theta["log_lr"] + factor).exp() * d_update
        d_factor = slope * grads
        d_theta, d_grads, d_params, d_before = self._lstm.vjp(_own(theta), grads, params, state, d_factor, d_state)
        return {**d_theta, "log_lr": d_factor.sum()}, d_grads + slope, d_params, d_before


def _own(theta: Tensors) -> Tensors:
    return {name: value for name, value in theta.items() if name != "log_lr"}
