"""What an update rule sees of the gradients: pure functions from gradients and state to input rows.

`log_and_sign` is the preprocessing of Andrychowicz et al. 2016 (appendix A); `normalized` that of RNNprop (Lv, Jiang
and Li 2017). Both return the inputs [features, n], the new state, and a mask of the coordinates that may move.
`momenta` and `agreement` are ours: averages at several time scales, with inputs that do not change when the gradient's
sign does, and how well they agree over a whole tensor.
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


def bias_correction(step: torch.Tensor, beta: float) -> torch.Tensor:
    """1 − beta^step, without the cancellation that early steps would suffer, for step ≥ 1 and beta in [0, 1)."""
    return -torch.expm1(step * (math.log(beta) if beta else -math.inf))


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
    correction = bias_correction(step.to(grads.dtype), beta)
    active = v != 0  # what is not a number is not hidden
    # The root's derivative at zero is infinite: untouched coordinates take it at one instead, and their inputs stay
    # zero.
    scale = 1 / (torch.where(active, v / correction, 1.0).sqrt() + eps)
    return torch.stack([grads * scale, m / correction * scale]), {"m": m, "v": v, "step": step}, active


NUM_MOMENTA = 3
"""Moving averages of the gradient in `momenta`."""
NUM_EVEN = 3 * NUM_MOMENTA + 1
NUM_DIRECTIONS = NUM_MOMENTA + 1


def momenta(
    grads: torch.Tensor, state: Tensors, betas: tuple[float, ...], eps: float
) -> tuple[torch.Tensor, torch.Tensor, Tensors, torch.Tensor]:
    """Directions d₀ = g/√v̂ and dᵢ = m̂ᵢ/√v̂ for three averages, and what tells how well they agree.

    The second result is the same for g and −g: |dᵢ| (how consistent the gradient has been), s(d₀·dᵢ) (whether it goes
    on as before), s(d₁·d₂) and s(d₁·d₃) (whether short and long memory agree), s(d₀²) (how large it is for its like),
    and (v̂ − ŵ)/(v̂ + ŵ) with a slower average ŵ of g² (whether gradients grow or shrink). s(x) is x/(1 + |x|).

    Args:
        grads: [n].
        state: "m" [3, n], "v" [2, n] (v, then w), "step" [n] or [1].
        betas: decays of the three averages of g, then of v and w.
        eps: added to √v̂, positive, in units of the gradient.

    Returns:
        (directions [4, n], inputs [10, n], new state, mask [n] of the coordinates that have had a non-zero gradient).
    """
    step = state["step"] + 1
    decay, rest = (grads.new_tensor(values)[:, None] for values in (betas, [1 - beta for beta in betas]))
    correction = torch.stack([bias_correction(step.to(grads.dtype), beta) for beta in betas])
    m = state["m"] * decay[:NUM_MOMENTA] + grads * rest[:NUM_MOMENTA]
    v = state["v"] * decay[NUM_MOMENTA:] + grads * grads * rest[NUM_MOMENTA:]
    active = v[1] != 0
    fast, slow = torch.where(active, v / correction[NUM_MOMENTA:], 1.0)
    scale = 1 / (fast.sqrt() + eps)
    directions = torch.cat([(grads * scale)[None], m / correction[:NUM_MOMENTA] * scale])
    now, first = directions[0], directions[1]
    products = torch.cat([now * directions[1:], first * directions[2:], (now * now)[None]])
    agreement = products / (1 + products.abs())
    trend = (fast - slow) / (fast + slow)
    inputs = torch.cat([directions[1:].abs(), agreement, trend[None]])
    return directions, inputs, {"m": m, "v": v, "step": step}, active


NUM_CONTEXT = 4
"""Rows of `agreement`."""
_SOUND = 1e15
_SHARPNESS = 10.0


def agreement_terms(grads: torch.Tensor, state: Tensors, beta: float) -> torch.Tensor:
    """The products that `agreement` needs summed over a tensor's coordinates, [8, n].

    With a = g/√v and bᵢ = mᵢ/√v, where m are the averages before the step and v is the average square after it: a²,
    b₁², b₂², b₃², a·b₁, a·b₂, a·b₃, b₁·b₃. Coordinates that have seen no gradient count zero, and so do those where
    something is not finite: one bad number must not spoil the others.

    Args:
        grads: [n].
        state: "m" [3, n], "v" [2, n].
        beta: decay of the first of v.
    """
    square = state["v"][0] * beta + grads * grads * (1 - beta)
    seen = square > 0
    scaled = torch.cat([grads[None], state["m"]]) * torch.where(seen, square, 1.0).rsqrt()
    sound = seen & (scaled.detach().abs().sum(0) < _SOUND)  # a comparison that NaN fails
    a, first, second, third = torch.where(sound, scaled, 0.0)
    return torch.stack(
        [a * a, first * first, second * second, third * third, a * first, a * second, a * third, first * third]
    )


def agreement(sums: torch.Tensor) -> torch.Tensor:
    """How well a tensor's gradient agrees with its three momenta, and the fastest with the slowest: [4, …] in (−1, 1).

    Cosines of the angles between them, coordinates measured in their own √v, each passed through 10c/(1 + 10|c|), since
    it is around zero that they tell steps that are too short from those that are too long. Zero before the second step.

    Args:
        sums: of `agreement_terms` over the tensor, [8, …].
    """
    squares = torch.cat([sums[:1] * sums[1:4], sums[1:2] * sums[3:4]])
    known = squares > 0
    cosines = torch.where(known, sums[4:] * torch.where(known, squares, 1.0).rsqrt(), 0.0)
    return _SHARPNESS * cosines / (1 + _SHARPNESS * cosines.abs())
