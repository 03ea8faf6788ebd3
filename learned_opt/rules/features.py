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


def bounded_square(average: torch.Tensor, recent: torch.Tensor, grads: torch.Tensor, ratio: float) -> torch.Tensor:
    """The average square that gradients are divided by the root of: at most so many times the recent one.

    Where there is little noise, gradients shrink faster than an average forgets. Divided by what they were, they would
    move nothing for hundreds of steps. A coordinate whose gradient is zero is let go on as it was: its average is not
    bounded.

    Args:
        average, recent: averages of g² over many steps, and over few.
        grads: g.
        ratio: the bound, at least 1.
    """
    most = ratio * recent
    return torch.where((average < most) | (grads == 0) | (recent == 0), average, most)


def momenta(
    grads: torch.Tensor,
    state: Tensors,
    betas: tuple[float, ...],
    ratio: float,
    eps: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, Tensors, torch.Tensor]:
    """Directions d₀ = g/√s and dᵢ = m̂ᵢ/√s for three averages, and what tells how well they agree.

    s is the average v̂ of g², bounded by what it has been of late (`bounded_square`, with the average ŵ over fewer
    steps). d₂ and d₃ fade where they are larger than r = √(ŵ/s): there they are r²/d instead of d. What was averaged
    over many steps and is larger than gradients are now is old, the more so the larger it is.

    The second result is the same for g and −g: |dᵢ| (how consistent the gradient has been), s(d₀·dᵢ) (whether it goes
    on as before), s(d₁·d₂) and s(d₁·d₃) (whether short and long memory agree), s(d₀²) (how large it is for its like),
    and (v̂ − ŵ)/(v̂ + ŵ) (whether gradients shrink or grow). Here s(x) is x/(1 + |x|).

    Args:
        grads: [n].
        state: "m" [3, n], "v" [2, n] (v, then w) or [3, n] (and the largest v̂ so far, kept), "step" [n] or [1].
        betas: decays of the three averages of g, then of v and w.
        ratio: of `bounded_square`.
        eps: added to √s, positive, in units of the gradient; one, or [n].

    Returns:
        (directions [4, n], inputs [10, n], new state, mask [n] of the coordinates that have had a non-zero gradient).
    """
    step = state["step"] + 1
    decay, rest = (grads.new_tensor(values)[:, None] for values in (betas, [1 - beta for beta in betas]))
    correction = torch.stack([bias_correction(step.to(grads.dtype), beta) for beta in betas])
    m = state["m"] * decay[:NUM_MOMENTA] + grads * rest[:NUM_MOMENTA]
    v = state["v"][:2] * decay[NUM_MOMENTA:] + grads * grads * rest[NUM_MOMENTA:]
    active = v[0] != 0
    average, recent = torch.where(active, v / correction[NUM_MOMENTA:], 1.0)
    if len(state["v"]) > len(v):
        largest = state["v"][2]
        v = torch.cat([v, torch.where(active & (average > largest), average, largest)[None]])
    scale = 1 / (bounded_square(average, recent, grads, ratio).sqrt() + eps)
    directions = _scaled(grads, m / correction[:NUM_MOMENTA], recent, scale)
    now, first = directions[:2]
    products = torch.cat([now * directions[1:], first * directions[2:], (now * now)[None]])
    agreement = products / (1 + products.abs())
    trend = (average - recent) / (average + recent)
    inputs = torch.cat([directions[1:].abs(), agreement, trend[None]])
    return directions, inputs, {"m": m, "v": v, "step": step}, active


def _scaled(grads: torch.Tensor, averages: torch.Tensor, recent: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Gradients [n] and averages [3, n] times scale [n], the two slower ones faded beside √recent·scale: [4, n]."""
    most = _root(recent) * scale
    first, *slower = averages * scale
    return torch.stack([grads * scale, first, *(_faded(one, most) for one in slower)])


def _faded(values: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """x within ±most, and beyond it most²/x."""
    beyond = values.abs() > most  # what is not a number stays
    return torch.where(beyond, most * (most / torch.where(beyond, values, 1.0)), values)


def _root(square: torch.Tensor) -> torch.Tensor:
    """√x with a derivative of zero at zero."""
    some = square != 0  # what is not a number is not hidden
    return torch.where(some, torch.where(some, square, 1.0).sqrt(), 0.0)


NUM_CONTEXT = 4
"""Rows of `agreement` without the strength of the signal and the loudness."""
_NUM_SUMS = 10
_SOUND = 1e15
_SHARPNESS = 10.0


def agreement_terms(
    grads: torch.Tensor, state: Tensors, betas: tuple[float, ...], ratio: float, signal: bool = False
) -> torch.Tensor:
    """The products that `agreement` needs summed over a tensor's coordinates, [10, n], or [12, n] with `signal`.

    With a = g/√s and bᵢ = mᵢ/√s, where m are the averages before the step, s is the average square after it, bounded by
    the recent one w, and b₂ and b₃ fade beyond ±√(w/s), as in `momenta`: a², b₁², b₂², b₃², a·b₁, a·b₂, a·b₃, b₁·b₂,
    b₁·b₃, b₂·b₃; and with `signal` b₃² without the bias of a young average, and one for each a that is not zero.
    Coordinates that have seen no gradient count zero, and so do those where something is not finite: one bad number
    must not spoil the others.

    Args:
        grads: [n].
        state: "m" [3, n], "v" [2 or 3, n], and with `signal` "step" [n] or [1].
        betas, ratio: as in `momenta`.
        signal: whether `agreement` is to tell how strong the signal is.
    """
    now = grads * grads
    average, recent = (v * beta + now * (1 - beta) for v, beta in zip(state["v"][:2], betas[NUM_MOMENTA:]))
    square = bounded_square(average, recent, grads, ratio)
    seen = square > 0
    scale = torch.where(seen, square, 1.0).rsqrt()
    scaled = _scaled(grads, state["m"], recent, scale)
    sound = seen & (scaled.detach().abs().sum(0) < _SOUND)  # a comparison that NaN fails
    a, first, second, third = torch.where(sound, scaled, 0.0)
    squares = [a * a, first * first, second * second, third * third]
    terms = [*squares, a * first, a * second, a * third, first * second, first * third, second * third]
    if signal:
        age = state["step"].to(grads.dtype).clamp_min(1)  # before the first step the average is zero
        terms += [squares[-1] / bias_correction(age, betas[NUM_MOMENTA - 1]).square(), (a != 0).to(a.dtype)]
    return torch.stack(terms)


def agreement(sums: torch.Tensor, loudness: float = 0.0) -> torch.Tensor:
    """How well a tensor's gradient agrees with its momenta: [4, …] in (−1, 1); with twelve sums [5, …], or [6, …].

    With a and bᵢ of `agreement_terms`: cosines of the angles between a and b₁, a and b₁ + b₂, a and b₁ + b₂ + b₃, and
    between b₁ and b₁ + b₂ + b₃. Each is passed through 10c/(1 + 10|c|), since it is around zero that they tell steps
    that are too short from those that are too long. The slower averages are asked together with the faster ones: noise
    is averaged out as well, and when the gradient has changed, one that remembers the old one is outvoted sooner. Zero
    before the second step.

    The fifth is ρ = |b̂₃| / |a| passed through the same: how long the average over many steps is beside the gradient,
    which says how much of a gradient is signal. It is some 0.02 for nothing but noise and one for a gradient that stays
    what it is. The weaker the signal, the smaller a cosine still means that steps are too short.

    The sixth, if there is `loudness`, is how loud the gradient is: the mean of a² over coordinates whose gradient is
    not zero, times `loudness`, and one at most. With the ratio of `bounded_square` it is one for noise, some half where
    gradients shrink so that the average square stays at its bound, and small where the gradient is far below those just
    before.

    Args:
        sums: of `agreement_terms` over the tensor, [10 or 12, …].
        loudness: what the mean is multiplied by; 0 to leave it out.
    """
    a, one, second, third, a_first, a_second, a_third, first_second, first_third, second_third = sums[:_NUM_SUMS]
    two = one + second + 2 * first_second
    three = two + third + 2 * (first_third + second_third)
    squares = torch.stack([a * one, a * two, a * three, one * three])
    products = [a_first, a_first + a_second, a_first + a_second + a_third, one + first_second + first_third]
    known = squares > 0
    cosines = torch.where(known, torch.stack(products) * torch.where(known, squares, 1.0).rsqrt(), 0.0)
    if len(sums) > _NUM_SUMS:
        length = _root(torch.where(a > 0, sums[_NUM_SUMS] / torch.where(a > 0, a, 1.0), 0.0))
        cosines = torch.cat([cosines, length[None]])
    told = _SHARPNESS * cosines / (1 + _SHARPNESS * cosines.abs())
    if len(sums) > _NUM_SUMS and loudness:
        told = torch.cat([told, (loudness * a / sums[_NUM_SUMS + 1].clamp_min(1)).clamp_max(1)[None]])
    return told


def clip_terms(grads: torch.Tensor, state: Tensors, beta: float) -> torch.Tensor:
    """The squares that `clip_factor` needs summed over a tensor's coordinates, [2, n].

    They are those of the gradient, and what they have been of late, without the bias of a young average. Where one is
    not finite both count zero.

    Args:
        grads: [n].
        state: before the step: "v" [2 or 3, n], with the recent average square second, and "step" [n] or [1].
        beta: decay of that average.
    """
    now, recent = grads * grads, state["v"][1]
    sound = now.detach().isfinite() & recent.detach().isfinite()
    age = state["step"].to(grads.dtype).clamp_min(1)  # before the first step the average is zero
    return torch.where(sound, torch.stack([now, recent / bias_correction(age, beta)]), 0.0)


def clip_factor(now: torch.Tensor, recent: torch.Tensor, most: float) -> torch.Tensor:
    """What a tensor's gradient is multiplied by, so that it is no longer than `most` times what it was of late.

    Args:
        now, recent: of `clip_terms`, summed over the tensor; a tensor without a past keeps its gradient.
        most: over 1.
    """
    bound = most * most * recent
    loud = (now > bound) & (bound > 0)
    return torch.where(loud, (torch.where(loud, bound, 1.0) / torch.where(loud, now, 1.0)).sqrt(), 1.0)


def largest_terms(state: Tensors) -> torch.Tensor:
    """What `largest_root` needs summed over a tensor's coordinates, [2, n].

    They are the largest average square that a coordinate has had, and one where there is any. Where it is not finite
    both count zero.

    Args:
        state: before the step: "v" [3, n], with those squares third.
    """
    largest = state["v"][2]
    some = (largest.detach() > 0) & largest.detach().isfinite()
    return torch.stack([torch.where(some, largest, 0.0), some.to(largest.dtype)])


def largest_root(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """How large a tensor's gradients have been: the root of the mean of those squares; zero before the first step.

    Args:
        total, count: of `largest_terms`, summed over the tensor.
    """
    return _root(total / count.clamp_min(1))
