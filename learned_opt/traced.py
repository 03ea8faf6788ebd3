"""The optimizer's step for `torch.compile`: no number leaves its tensor, and the rule is called once a parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from learned_opt import parameter_basis
from learned_opt.coordinates import StateLayout
from learned_opt.rules.base import UpdateRule
from learned_opt.rules.basis import Sides, Turn, observe, refresh, turn_of
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
        rows: its state, tensors of its shape: the rows of the rule's state, then those of its basis.
        step: steps before this one, a scalar.
        rule, layout, theta: the rule; theta's dtype is what it computes in.
        lr, weight_decay, maximize: as in `LearnedOptimizer`.
    """
    dtype = next(iter(theta.values())).dtype
    n, num_rows = param.numel(), len(layout.keys)
    old = _joined(rows, param, dtype)
    before, count = old[:num_rows], step.to(param.device, dtype).view(1)
    flat_grad, flat_param = grad.reshape(-1).to(dtype), param.reshape(-1).to(dtype)
    sides = rule.basis.sides(param.shape) if rule.basis is not None else None
    new_basis: list[torch.Tensor] = []
    with torch.autocast(param.device.type, enabled=False):
        if sides is not None:
            turn, before, basis = _turned(rule, sides, layout, before, old[num_rows:], flat_grad, count)
            flat_grad, new_basis = turn.gradients(sides.as_matrices(flat_grad)).reshape(-1), [basis]
        state = layout.to_rule(before, count if layout.has_step else None)
        seen = -flat_grad if maximize else flat_grad
        told: tuple[torch.Tensor, ...] = ()
        if rule.num_context:
            sums = TensorLayout((n,)).sums(rule.context_terms(seen, state))
            told = (rule.context_of(sums).to(dtype).expand(-1, n),)
        update, new_state = rule.update(theta, seen, flat_param, state, *told)
        if sides is not None:
            update = turn.back(sides.as_matrices(update)).reshape(-1)
    new = torch.cat([layout.from_rule(new_state, n), *new_basis])
    if isinstance(lr, torch.Tensor):
        new = torch.where(lr == 0, old, new)
    param.copy_((flat_param * (1 - lr * weight_decay) + lr * update).view(param.shape))
    for row, value in zip(rows, new.unbind(0)):
        row.copy_(value.view(param.shape))


def _joined(rows: Sequence[torch.Tensor], param: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rows as one matrix [rows, numel]."""
    parts = [row.reshape(-1).to(dtype) for row in rows]
    return torch.stack(parts) if parts else param.new_empty(0, param.numel(), dtype=dtype)


def _turned(
    rule: UpdateRule,
    sides: Sides,
    layout: StateLayout,
    rows: torch.Tensor,
    packed_basis: torch.Tensor,
    flat_grad: torch.Tensor,
    count: torch.Tensor,
) -> tuple[Turn, torch.Tensor, torch.Tensor]:
    """The basis of this step, the rule state's rows turned to it, and its own rows [rows, numel].

    Whether the basis is due to change is not known while tracing: what it would change to is computed in every step.
    """
    assert rule.basis is not None
    own = parameter_basis.unpacked(sides, packed_basis)
    new = {**own, **observe(rule.basis, sides, own, sides.as_matrices(flat_grad))}
    first, due = (count == 0).view(1, 1), (count % rule.basis.every == 0).view(1, 1)
    found = refresh(sides, new, first)
    change = turn_of(found).since(turn_of(own))
    new |= {name: torch.where(due, value, own[name]) for name, value in found.items()}
    turned = change.into(sides.as_matrices(rows)).flatten(-2)
    linear = torch.tensor(layout.linear, device=rows.device)
    rows = torch.where(linear[:, None] & (due & ~first).view(1, 1), turned, rows)
    return turn_of(new), rows, parameter_basis.packed(sides, new, len(packed_basis))
