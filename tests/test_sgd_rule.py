"""The gradient-descent rule against torch.optim.SGD."""

import pytest
import torch

from learned_opt import rules


def test_equals_torch_sgd():
    rule = rules.get("sgd", lr=0.3)
    theta = {n: v.double() for n, v in rule.init_theta(torch.Generator().manual_seed(0)).items()}
    x = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaf = x.clone().requires_grad_()
    optimizer = torch.optim.SGD([leaf], lr=float(theta["log_lr"].exp()))
    state = rule.init_state(5, dtype=torch.float64)
    for _ in range(4):
        optimizer.zero_grad()
        leaf.cos().sum().backward()
        update, state = rule.update(theta, -x.sin(), x, state)
        x = x + update
        optimizer.step()
    torch.testing.assert_close(x, leaf.detach(), rtol=1e-14, atol=0)
    assert state == {} and rule.rows_per_coordinate == 0
    assert float(theta["log_lr"].exp()) == pytest.approx(0.3, rel=1e-7)


def test_learning_rate_must_be_positive():
    with pytest.raises(ValueError, match="lr must be positive; got 0"):
        rules.get("sgd", lr=0)
