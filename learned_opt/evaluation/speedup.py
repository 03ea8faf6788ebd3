"""How much sooner an optimizer gets to the reference's final loss than the reference, on the same task.

Steps are read off running means (see `metrics.steps_to_reach`), and a count below one counts as one.

* Where the optimizer reaches the reference's final loss, the *speed-up* is the steps that the reference took to it over
  those that the optimizer took.
* Where it never does, nothing is extrapolated: the speed-up is the steps in which the reference passed the optimizer's
  final loss, over the whole horizon that the optimizer has spent. That is below 1 by as much as the reference is
  faster, and a plateau reached early earns nothing.
* A run whose final loss is not finite counts as `horizon` times slower than one whose is, and two such as equally fast.

VeLO (Metz et al. 2022) and Celo (Moudgil et al. 2025) put the horizon in place of the reference's steps: that is the
*horizon speed-up*. On a noisy plateau the reference passes its final loss long before the end, and then has a horizon
speed-up above 1 against itself; the speed-up is without that bonus, never the larger of the two, and exactly 1 for the
reference itself.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from learned_opt.evaluation.metrics import Array, final_losses, steps_to_reach


def speedups(losses: npt.ArrayLike, reference: npt.ArrayLike, *, of_horizon: bool = False) -> Array:
    """The speed-up on every task, [num_tasks], in [1/horizon, horizon].

    Args:
        losses: [horizon + 1, num_tasks].
        reference: the reference's losses on the same tasks, of the same shape.
        of_horizon: give horizon speed-ups.

    Raises:
        ValueError: shapes that differ, or are not curves.
    """
    if np.shape(losses) != np.shape(reference):
        shapes = f"{np.shape(losses)} and {np.shape(reference)}"
        raise ValueError(f"losses and reference must be of one shape, of the same tasks; got {shapes}")
    mine, theirs = final_losses(losses), final_losses(reference)
    horizon = np.shape(losses)[0] - 1
    lost, reference_lost = ~np.isfinite(mine), ~np.isfinite(theirs)

    def steps(curves: npt.ArrayLike, targets: Array) -> Array:
        """At least one and, for what is never reached, the horizon."""
        return np.clip(steps_to_reach(curves, targets), 1, horizon)

    reached = np.isfinite(steps_to_reach(losses, theirs))
    taken = float(horizon) if of_horizon else steps(reference, theirs)
    ratio = np.where(reached, taken / steps(losses, theirs), steps(reference, mine) / horizon)
    ratio = np.where(reference_lost, np.where(lost, 1.0, float(horizon)), ratio)
    return np.where(lost & ~reference_lost, 1 / horizon, ratio)
