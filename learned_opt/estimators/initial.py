"""Meta-gradients of learned initial parameters: what flows back to where an episode starts.

An episode that starts within the truncation starts from p₀, which theta holds. With inner gradients as constants every
later parameter vector moves one to one with p₀ (rules read gradients, not parameters), so its derivative is the sum of
the later loss gradients, each times its weight in the meta-loss: first-order MAML (Finn, Abbeel and Levine 2017). The
exact derivative adds what reaches p₀ through the gradient there.
"""

from __future__ import annotations

import torch

from learned_opt.batched import BatchedFamily
from learned_opt.particles import Start
from learned_opt.segment import Segment


def replayed_start_gradient(segment: Segment, weights: torch.Tensor) -> torch.Tensor:
    """First order: Σ w_t·g_t, [num_parameters], over the steps of episodes that start within the segment.

    Args:
        segment: with gradients recorded.
        weights: [K, P], derivative of the meta-loss with respect to the losses after each step; zero for particles
            that are not valid.
    """
    assert segment.outputs is not None
    began = torch.full_like(weights[0], len(weights))
    for step in sorted(segment.starts, reverse=True):
        began[segment.starts[step].columns] = step
    steps = torch.arange(len(weights), device=weights.device)[:, None]
    outputs = segment.outputs
    if not segment.valid.all():
        outputs = torch.where(segment.valid[:, None], outputs, 0.0)
    return torch.einsum("kp,kpd->d", weights * (steps >= began), outputs)


def start_gradient(
    batched: BatchedFamily,
    start: Start,
    d_params: torch.Tensor,
    d_grads: torch.Tensor | None,
    valid: torch.Tensor,
) -> torch.Tensor:
    """The derivative with respect to p₀, [num_parameters], from those with respect to what the first step started from.

    Args:
        batched: the family.
        start: who started.
        d_params: [P, num_parameters], with respect to the parameters there.
        d_grads: [P, num_parameters], with respect to the gradient there; None for gradients as constants.
        valid: [P], which particles count.
    """
    kept = valid[start.columns]
    total = torch.where(kept[:, None], d_params[start.columns], 0.0).sum(0)
    if d_grads is None:
        return total
    vectors = torch.where(kept[:, None], d_grads[start.columns], 0.0)
    through = batched.hessian_products(start.params, start.tasks, start.batch, vectors)
    return total + torch.where(kept[:, None], through, 0.0).sum(0)
