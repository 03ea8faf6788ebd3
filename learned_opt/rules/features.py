"""What an update rule sees of the gradients: pure functions from gradients and state to input rows.

`log_and_sign` is the preprocessing of Andrychowicz et al. 2016 (appendix A); `normalized` that of RNNprop (Lv, Jiang
and Li 2017). Both return the inputs [features, n], the new state, and a mask of the coordinates that may move.
"""

from __future__ import annotations

import math

import torch

from learned_opt.task import Tensors

NUM_FEATURES = 2


def log_and_sign(grads: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(log|g| / p, sign g) where |g| ≥ e^−p, else (−1, e^p·g).

    Args:
        grads: [n].
        p: the range of logarithms kept, positive; 10 in the paper.

    Returns:
        (inputs [2, n], mask [n] of the coordinates with a non-zero gradient).
    """
    magnitude = grads.abs()
    large = magnitude >= math.exp(-p)
    log = torch.where(large, magnitude.clamp_min(math.exp(-p)).log() / p, -1.0)
    sign = torch.where(large, grads.sign(), grads * math.exp(p))
    return torch.stack([log, sign]), grads != 0


def normalized(
    grads: torch.Tensor, state: Tensors, beta: float, eps: float
) -> tuple[torch.Tensor, Tensors, torch.Tensor]:
    """g/√v̂ and m̂/√v̂ with bias-corrected exponential averages m of g and v of g².

    Args:
        grads: [n].
        state: "m" [n], "v" [n], "step" [n] or [1].
        beta: decay of both averages, in [0, 1); 0.95 in the paper.
        eps: added to √v̂, positive, in units of the gradient.

    Returns:
        (inputs [2, n], new state, mask [n] of the coordinates that have had a non-zero gradient).
    """
    step = state["step"] + 1
    m = state["m"] * beta + grads * (1 - beta)
    v = state["v"] * beta + grads * grads * (1 - beta)
    correction = 1 - torch.pow(beta, step.to(grads.dtype))
    active = v > 0
    # The root's derivative at zero is infinite: untouched coordinates take it at one instead, and their inputs stay
    # zero.
    scale = 1 / (torch.where(active, v / correction, 1.0).sqrt() + eps)
    return torch.stack([grads * scale, m / correction * scale]), {"m": m, "v": v, "step": step}, active
