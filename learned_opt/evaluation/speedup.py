"""How much sooner one optimizer gets there than another, on the same task.

Two definitions, both of a task's two loss curves and both read off running means (see `metrics.steps_to_reach`).

* The *speed-up* is the reference's steps over the optimizer's, each to the worse of their two final losses: the best
  loss that both reach. An optimizer against itself has exactly 1, and exchanging the two inverts the number, so runs
  that never reach the reference's final loss count below 1 by as much as the reference is faster.
* The *horizon speed-up* is how VeLO (Metz et al. 2022) and Celo (Moudgil et al. 2025) report it: the horizon over the
  steps that the optimizer needs to the reference's final loss. Where it does not reach that, nothing is extrapolated:
  the reference's steps to the optimizer's final loss over the horizon, which is at most 1. On a noisy plateau
  the reference itself passes its final loss early, and has a horizon speed-up above 1 against itself; the first
  definition is without that bonus and never the larger of the two by more than that noise.

A step count below one counts as one. A run whose final loss is not finite counts as `horizon` times slower than one
whose is, and two such runs as equally fast.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from learned_opt.evaluation.metrics import Array, final_losses, steps_to_reach


def _check(losses: npt.ArrayLike, reference: npt.ArrayLike) -> int:
    """The horizon of two sets of curves, or ValueError."""
    one, other = np.shape(losses), np.shape(reference)
    if one != other:
        raise ValueError(f"losses and reference must be of one shape, of the same tasks; got {one} and {other}")
    return one[0] - 1


def _with_diverged(ratio: Array, lost: npt.NDArray[np.bool_], reference_lost: npt.NDArray[np.bool_], h: int) -> Array:
    either = np.where(lost & reference_lost, 1.0, np.where(lost, 1 / h, float(h)))
    return np.where(lost | reference_lost, either, ratio)


def speedups(losses: npt.ArrayLike, reference: npt.ArrayLike) -> Array:
    """The speed-up on every task, [num_tasks], in [1/horizon, horizon].

    Args:
        losses: [horizon + 1, num_tasks].
        reference: the reference's losses on the same tasks, of the same shape.

    Raises:
        ValueError: shapes that differ, or are not curves.
    """
    horizon = _check(losses, reference)
    mine, theirs = final_losses(losses), final_losses(reference)
    target = np.maximum(mine, theirs)
    steps = np.maximum(steps_to_reach(losses, target), 1)
    reference_steps = np.maximum(steps_to_reach(reference, target), 1)
    known = np.isfinite(target)
    ratio = np.where(known, reference_steps, 1.0) / np.where(known, steps, 1.0)
    return _with_diverged(ratio, ~np.isfinite(mine), ~np.isfinite(theirs), horizon)


def horizon_speedups(losses: npt.ArrayLike, reference: npt.ArrayLike) -> Array:
    """The horizon speed-up on every task, [num_tasks], in [1/horizon, horizon]; see `speedups`."""
    horizon = _check(losses, reference)
    mine, theirs = final_losses(losses), final_losses(reference)
    steps = np.maximum(steps_to_reach(losses, theirs), 1)
    back = np.maximum(steps_to_reach(reference, mine), 1)
    reached = np.isfinite(steps)
    # An optimizer that ends above the reference is passed by it; where rounding hides that, both took the horizon.
    back = np.where(np.isfinite(back), back, horizon)
    ratio = np.where(reached, horizon / np.where(reached, steps, 1.0), back / horizon)
    return _with_diverged(ratio, ~np.isfinite(mine), ~np.isfinite(theirs), horizon)
