"""What is read off loss curves, and how sure one can be of it.

Curves are [horizon + 1, num_tasks]: the initial loss, then the loss after every inner step, each on that step's batch.
A loss that is not finite counts as infinitely bad, and every mean it enters is infinite.

* The *final loss* of a task is the mean of its last losses, the last 5 % of the steps and at least one, which tames the
  noise of batches.
* The *mean loss* of a task is the mean over the losses after each step; the initial loss, which no optimizer can
  change, is left out.
* *Steps to reach* a target is the first step at which the running mean of the loss, over the same window as the final
  loss, is at or below the target. An optimizer reaches its own final loss at its last step or before.
* A task has *diverged* if any of its losses is not finite, and was *thrown back* if one is above the initial loss
  after another had been below a tenth of it.

Intervals are percentile bootstrap intervals over tasks (Efron and Tibshirani 1993, chapter 13). Quantities that compare
two optimizers resample the same tasks for both, since both ran on the same draws. A quantile is always one of the
resampled values, never between two, so that infinite values are allowed. The band of a curve is the interval of the
median by order statistics, which needs no resampling and holds for any distribution.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Statistic = Callable[..., Array]
"""From samples [..., num_tasks], one or several of the same shape, to [...]."""

FINAL_SHARE = 0.05
"""The share of a run's last steps over which the final loss is the mean."""

_NUMBERS_PER_RESAMPLING = 4_000_000


@dataclasses.dataclass(frozen=True)
class Interval:
    """A number with its confidence interval; infinite or NaN where a run diverged or a target was not reached."""

    value: float
    low: float
    high: float


def final_window(horizon: int) -> int:
    """How many of the last losses the final loss is the mean of."""
    return max(1, round(FINAL_SHARE * horizon))


def as_curves(losses: npt.ArrayLike) -> Array:
    """Losses [horizon + 1, num_tasks] as float64, with infinity for what is not finite.

    Raises:
        ValueError: not two dimensions, or fewer than two losses or one task.
    """
    curves = np.array(losses, dtype=np.float64)
    if curves.ndim != 2 or curves.shape[0] < 2 or curves.shape[1] < 1:
        raise ValueError(
            f"losses must be [horizon + 1, num_tasks] with at least one step and task; got shape {curves.shape}"
        )
    return np.where(np.isfinite(curves), curves, np.inf)


def final_losses(losses: npt.ArrayLike) -> Array:
    """The final loss of every task, [num_tasks]."""
    curves = as_curves(losses)
    return curves[-final_window(len(curves) - 1) :].mean(0)


def mean_losses(losses: npt.ArrayLike) -> Array:
    """The mean loss along the way of every task, [num_tasks]."""
    return as_curves(losses)[1:].mean(0)


def diverged(losses: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Which tasks have a loss that is not finite, [num_tasks]."""
    return np.asarray(np.isinf(as_curves(losses)).any(0))


def ended_above_start(losses: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Which tasks ended with a final loss above their initial loss, diverged ones among them, [num_tasks]."""
    curves = as_curves(losses)
    return np.asarray(final_losses(curves) > curves[0])


def thrown_back(losses: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Which tasks had a loss below a tenth of their initial one, and above it again at some later step, [num_tasks].

    A run that diverges after it had come so far is among them. What became of it afterwards makes no difference. An
    initial loss that is not positive has no tenth, and its task is not among them.
    """
    curves = as_curves(losses)
    learned = np.logical_or.accumulate((curves[0] > 0) & (curves < 0.1 * curves[0]), axis=0)
    return np.asarray((learned & (curves > curves[0])).any(0))


def running_means(losses: npt.ArrayLike) -> Array:
    """At every step, the mean of that loss and those before it, at most `final_window`; [horizon + 1, num_tasks]."""
    curves = as_curves(losses)
    window = final_window(len(curves) - 1)
    # Differences of cumulative sums would be cheaper, and worthless where losses fall by many orders of magnitude.
    head = curves[: window - 1].cumsum(0) / np.arange(1, window)[:, None]
    tail = np.lib.stride_tricks.sliding_window_view(curves, window, axis=0).mean(-1)
    return np.concatenate([head, tail])


def steps_to_reach(losses: npt.ArrayLike, targets: npt.ArrayLike) -> Array:
    """The first step at which each task's running mean is at or below its target, [num_tasks]; infinity if never.

    Args:
        losses: [horizon + 1, num_tasks].
        targets: [num_tasks] or a scalar; a target that is not finite is never reached.
    """
    means = running_means(losses)
    goals = np.broadcast_to(np.asarray(targets, dtype=np.float64), means.shape[1:])
    # Running and plain means of the same losses differ by rounding, which must not cost a run its own final loss.
    slack = 1e-9 * np.abs(np.where(np.isfinite(goals), goals, 0.0))
    reached = (means <= goals + slack) & np.isfinite(goals)
    return np.where(reached.any(0), reached.argmax(0), np.inf)


def mean(sample: Array) -> Array:
    """The mean over tasks."""
    out: Array = sample.mean(-1)
    return out


def median(sample: Array) -> Array:
    """The median over tasks."""
    out: Array = np.median(sample, axis=-1)
    return out


def ratio_of_means(sample: Array, reference: Array) -> Array:
    """The mean over tasks divided by the reference's; NaN where the latter is not positive and finite."""
    below = reference.mean(-1)
    usable = np.isfinite(below) & (below > 0)
    return np.where(usable, sample.mean(-1) / np.where(usable, below, 1.0), np.nan)


def median_ratio(sample: Array, reference: Array) -> Array:
    """The median over tasks of the ratio of two numbers of one task; NaN where a reference is not positive and finite.

    A few tasks on which the reference does badly hardly move it, unlike the ratio of means.
    """
    usable = np.isfinite(reference) & (reference > 0)
    ratios = np.where(usable, sample / np.where(usable, reference, 1.0), np.nan)
    out: Array = np.median(ratios, axis=-1)
    return out


def bootstrap(
    statistic: Statistic, *samples: npt.ArrayLike, num_resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """A statistic over tasks with its percentile bootstrap interval.

    Args:
        statistic: such as `mean`, `median` or `ratio_of_means`; reduces the last dimension.
        *samples: one number per task each, [num_tasks]; several are paired: tasks are resampled for all at once.
        num_resamples: how many resamples, at least 1.
        confidence: in (0, 1).
        seed: of the resampling, non-negative.

    Raises:
        ValueError: samples that are empty or not of one length, or an argument out of range.
    """
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    if not arrays or any(a.ndim != 1 or a.shape != arrays[0].shape or not a.size for a in arrays):
        raise ValueError(f"samples must be non-empty vectors of one length; got shapes {[a.shape for a in arrays]}")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1; got {num_resamples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1; got {confidence}")
    random = np.random.default_rng(seed)
    size = arrays[0].size
    per_round = max(1, _NUMBERS_PER_RESAMPLING // size)
    parts = []
    for start in range(0, num_resamples, per_round):
        rows = random.integers(size, size=(min(per_round, num_resamples - start), size))
        parts.append(statistic(*(a[rows] for a in arrays)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(parts), [tail, 1 - tail], method="inverted_cdf")
    return Interval(float(statistic(*arrays)), float(low), float(high))


def median_band(losses: npt.ArrayLike, confidence: float = 0.95) -> tuple[Array, Array, Array]:
    """The median over tasks at every step, and its interval by order statistics.

    With r the largest rank for which a binomial (num_tasks, ½) variable is below r with probability at most
    (1 − confidence)/2, the interval runs from the r-th smallest to the r-th largest loss. With fewer than six tasks no
    rank gives 95 %: the band is then from the smallest to the largest.

    Returns:
        (median, low, high), each [horizon + 1].
    """
    curves = np.sort(as_curves(losses), axis=1)
    num_tasks = curves.shape[1]
    rank, below = 0, 0.0
    for k in range(num_tasks // 2):
        below += _binomial(num_tasks, k)
        if below > (1 - confidence) / 2:
            break
        rank = k + 1
    rank = max(rank, 1)
    return np.median(curves, axis=1), curves[:, rank - 1], curves[:, num_tasks - rank]


def _binomial(n: int, k: int) -> float:
    """The probability of k out of n at ½, by logarithms, since the plain formula overflows for large n."""
    return math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
