"""The optimizer's step for `torch.compile`: no number leaves its tensor, and the rule is called once a parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from learned_opt.coordinates import StateLayout
from learned_opt.rules.base import UpdateRule
from learned_opt.rules.context import TensorLayout
from learned_opt.task import Tensors


def step_param(
    param: torch.Tensor,
    grad: torch.Tensor,
    rows: Sequence[torch.Tensor],
    step: torch.Tensor,
    rule: UpdateRule,
    layout: StateLayout,
    theta: Tensors,
    *,
    lr: float | torch.Tensor,
    weight_decay: float,
    maximize: bool,
) -> None:
    """One step of the rule on one parameter, in place; it and its state stay where a tensor lr is zero.

    Args:
        param: the parameter, of any shape but empty.
        grad: its gradient.
        rows: its state, tensors of its shape.
        step: steps before this one, a scalar.
        rule, layout, theta: the rule; theta's dtype is what it computes in.
        lr, weight_decay, maximize: as in `LearnedOptimizer`.
    """
    dtype = next(iter(theta.values())).dtype
    n = param.numel()
    old = torch.cat([row.reshape(-1) for row in rows] or [param.new_empty(0)]).to(dtype).view(len(rows), n)
    count = step.to(param.device, dtype).view(1) if layout.has_step else None
    flat_grad, flat_param = grad.reshape(-1).to(dtype), param.reshape(-1).to(dtype)
    with torch.autocast(param.device.type, enabled=False):
        state = layout.to_rule(old, count)
        seen = -flat_grad if maximize else flat_grad
        told: tuple[torch.Tensor, ...] = ()
        if rule.num_context:
            sums = TensorLayout((n,)).sums(rule.context_terms(seen, state))
            told = (rule.context_of(sums).to(dtype).expand(-1, n),)
        update, new_state = rule.update(theta, seen, flat_param, state, *told)
    new = layout.from_rule(new_state, n)
    if isinstance(lr, torch.Tensor):
        new = torch.where(lr == 0, old, new)
    param.copy_((flat_param * (1 - lr * weight_decay) + lr * update).view(param.shape))
    for row, value in zip(rows, new.unbind(0)):
        row.copy_(value.view(param.shape))
