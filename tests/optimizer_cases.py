"""What the tests of the drop-in optimizer share: weights that descend without any training, and a small model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from learned_opt import Artifact, rules

RULE_NAMES = list(rules.RULES)
LSTM_NAMES = [name for name, (kind, _) in rules.RULES.items() if kind == "lstm"]


def artifact_of(name: str, seed: int = 0, **settings: Any) -> Artifact:
    """Weights of this rule, with settings of its own, that descend.

    The LSTMs are wired by hand: unit 0 of every layer passes on, with saturated gates, the sign-like input (m/√v or
    the sign) of the layer below, and the read-out steps against it. The other units keep their random weights, so
    that no row of the state is idle.
    """
    rule = rules.get(name, **settings)
    theta = rule.init_theta(torch.Generator().manual_seed(seed))
    if rule.kind == "lstm":
        config = rule.settings()
        size = config["hidden_size"]
        if config["dense_units"]:
            theta["dense.weight"][0] = torch.tensor([0.0, 1.0])
        for layer in range(config["num_layers"]):
            weight, bias = theta[f"lstm.{layer}.weight"], theta[f"lstm.{layer}.bias"]
            source = 0 if layer or config["dense_units"] else 1
            for gate, value in enumerate((4.0, -4.0, 4.0, 0.0)):  # input open, forget shut, output open, candidate free
                weight[gate * size] = 0.0
                bias[gate * size] = value
            weight[3 * size, source] = 3.0
        theta["output.weight"] *= 0.1
        theta["output.weight"][0, 0] = -0.2
    return Artifact.of(rule, theta, {"made": "by hand"}, name=name)


def model_of(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two layers with 3 · 4 + 4 + 4 · 2 + 2 = 26 parameters."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.5)
    return model.to(dtype)


def loss_of(model: nn.Module, step: int = 0) -> torch.Tensor:
    """The loss on the batch of this step."""
    generator = torch.Generator().manual_seed(100 + step)
    dtype = next(model.parameters()).dtype
    inputs = torch.randn(8, 3, generator=generator).to(dtype)
    targets = torch.randn(8, 2, generator=generator).to(dtype)
    return F.mse_loss(model(inputs), targets)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int, start: int = 0) -> None:
    """Steps start … start + num_steps − 1."""
    for step in range(start, start + num_steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def copies(tensors) -> list[torch.Tensor]:
    """Detached copies."""
    return [tensor.detach().clone() for tensor in tensors]


def assert_same(left, right, *, exact: bool = True, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    """All pairs of tensors are equal: to the bit, or to the tolerances."""
    left, right = list(left), list(right)
    assert len(left) == len(right)
    for a, b in zip(left, right):
        a, b = a.detach(), b.detach()
        torch.testing.assert_close(a, b, rtol=0 if exact else rtol, atol=0 if exact else atol)


def assert_same_state(left: dict, right: dict) -> None:
    """Two state dictionaries are equal to the bit, dtypes included."""
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for index, state in left["state"].items():
        assert state.keys() == right["state"][index].keys()
        assert_same(state.values(), right["state"][index].values())
