"""One number for a whole suite, with its interval: interquartile means and performance profiles.

The method is that of Agarwal et al. 2021 (rliable): every meta-test task of every family gives one number; their
interquartile mean (the mean of the middle half) is hardly moved by a few extreme tasks, unlike the mean, and uses
more of the numbers than the median. Its interval is a *stratified* percentile bootstrap: within each family the tasks
are drawn again with replacement, and never a family more or less often than it is. A performance profile is the share
of all tasks whose number is at least (or at most) a threshold, as a function of the threshold.

A family on which an optimizer has no result, because it diverged at every rate or could not run, counts as the
worst that is possible on every task, so that nothing is gained by failing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from learned_opt.evaluation.metrics import Array, Interval
from learned_opt.evaluation.results import (
    Comparison,
    Cost,
    Result,
    format_cell,
    format_line,
    format_number,
    plain_values,
)

Strata = Sequence[npt.ArrayLike]
"""One vector per family: a number for each of its tasks."""

_TRIMMED = 0.25
_NUMBERS_PER_ROUND = 4_000_000


def interquartile_mean(sample: npt.ArrayLike) -> Array:
    """The mean of what is left of the last dimension without its lowest and highest quarter (each rounded down)."""
    values = np.sort(np.asarray(sample, dtype=np.float64), axis=-1)
    cut = int(_TRIMMED * values.shape[-1])
    out: Array = values[..., cut : values.shape[-1] - cut].mean(-1)
    return out


def _arrays(strata: Strata) -> list[Array]:
    arrays = [np.asarray(stratum, dtype=np.float64) for stratum in strata]
    if not arrays or any(a.ndim != 1 or not a.size for a in arrays):
        raise ValueError(f"strata must be non-empty vectors, at least one; got shapes {[a.shape for a in arrays]}")
    return arrays


def _resampled(strata: list[Array], num_resamples: int, seed: int) -> list[Array]:
    """Resamples [rounds, all tasks], each stratum from itself alone."""
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1; got {num_resamples}")
    random = np.random.default_rng(seed)
    per_round = max(1, _NUMBERS_PER_ROUND // sum(a.size for a in strata))
    out = []
    for start in range(0, num_resamples, per_round):
        size = min(per_round, num_resamples - start)
        out.append(np.concatenate([a[random.integers(a.size, size=(size, a.size))] for a in strata], axis=1))
    return out


def stratified_bootstrap(
    strata: Strata,
    statistic: Callable[[Array], Array] = interquartile_mean,
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """A statistic of all numbers together, with its stratified percentile bootstrap interval.

    Args:
        strata: one vector per family.
        statistic: reduces the last dimension.
        num_resamples: at least 1.
        confidence: in (0, 1).
        seed: of the resampling, non-negative.

    Raises:
        ValueError: an empty stratum, or an argument out of range.
    """
    arrays = _arrays(strata)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1; got {confidence}")
    found = np.concatenate([statistic(part) for part in _resampled(arrays, num_resamples, seed)])
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail], method="inverted_cdf")
    return Interval(float(statistic(np.concatenate(arrays))), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Profile:
    """The share of tasks at or beyond each threshold, with its interval.

    Attributes:
        thresholds: ascending.
        share, low, high: at each of them, in [0, 1].
    """

    thresholds: tuple[float, ...]
    share: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def performance_profile(
    strata: Strata,
    thresholds: Sequence[float],
    *,
    at_least: bool = True,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Profile:
    """The performance profile of one optimizer; see `stratified_bootstrap`.

    Args:
        strata: one vector per family.
        thresholds: where to take it.
        at_least: count numbers at or above the threshold, as for speed-ups; otherwise at or below, as for losses.
        num_resamples, confidence, seed: of the interval.
    """
    arrays = _arrays(strata)
    everything = np.concatenate(arrays)
    parts = _resampled(arrays, num_resamples, seed)
    tail = (1 - confidence) / 2
    share, low, high = [], [], []
    for threshold in thresholds:

        def count(sample: Array, limit: float = threshold) -> Array:
            out: Array = ((sample >= limit) if at_least else (sample <= limit)).mean(-1)
            return out

        share.append(float(count(everything)))
        bounds = np.quantile(np.concatenate([count(part) for part in parts]), [tail, 1 - tail], method="inverted_cdf")
        low.append(float(bounds[0]))
        high.append(float(bounds[1]))
    return Profile(tuple(float(t) for t in thresholds), tuple(share), tuple(low), tuple(high))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Total:
    """One optimizer over all families; ratios and speed-ups are to the reference on the same task.

    Attributes:
        optimizer: its label.
        learned: whether it is an update rule.
        final_ratio, mean_ratio: interquartile means of the loss ratio at the end and along the way, over the families
            whose losses are positive; None if there are none.
        speedup, horizon_speedup: interquartile means; see `learned_opt.evaluation.speedup`.
        wall_speedup: the speed-up in wall-clock time, the cost of a step included; None where that was not measured.
        worst_family, worst_speedup: the family with the least interquartile mean of the speed-up, and that.
        share_reached: the share of all tasks on which it reaches the reference's final loss.
        num_tasks, num_diverged: over all families; the tasks of families without a result count as diverged.
        num_thrown_back: tasks whose loss rose above the initial one after it had been below a tenth of that.
        missing: the families without a result.
    """

    optimizer: str
    learned: bool
    final_ratio: Interval | None
    mean_ratio: Interval | None
    speedup: Interval
    horizon_speedup: Interval
    wall_speedup: Interval | None
    worst_family: str
    worst_speedup: float
    share_reached: float
    num_tasks: int
    num_diverged: int
    num_thrown_back: int
    missing: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; a number that is not finite becomes None."""
        found = plain_values(dataclasses.asdict(self))
        assert isinstance(found, dict)
        return found


def totals(comparison: Comparison, *, num_resamples: int = 2000) -> list[Total]:
    """The totals of every optimizer, over the families that have a result of the reference.

    Args:
        comparison: may still be incomplete: families that an optimizer has not yet come to are left out of its totals.
        num_resamples: of the intervals.

    Returns:
        One entry for every optimizer with at least one such family; empty where the comparison has no reference.
    """
    out = []
    for name in comparison.optimizers:
        rows = _against_reference(comparison, name)
        if rows:
            out.append(_total(name, rows, num_resamples, comparison.confidence))
    return out


def speedup_strata(comparison: Comparison, optimizer: str) -> dict[str, Array]:
    """family -> speed-ups [num_tasks] of an optimizer, as `totals` counts them."""
    return {mine.family: _speedups(mine, reference) for mine, reference in _against_reference(comparison, optimizer)}


def _against_reference(comparison: Comparison, optimizer: str) -> list[tuple[Result, Result]]:
    """The optimizer's results, each with the reference's on the same family."""
    out = []
    for family in comparison.families if comparison.reference else ():
        mine, reference = comparison.result(family, optimizer), comparison.result(family, comparison.reference)
        if mine is not None and reference is not None and reference.scores is not None:
            out.append((mine, reference))
    return out


def _num_tasks(reference: Result) -> int:
    assert reference.scores is not None
    return reference.scores.num_tasks


def _speedups(mine: Result, reference: Result, *, of_horizon: bool = False) -> Array:
    scores = mine.scores
    found = None if scores is None else scores.task_horizon_speedups if of_horizon else scores.task_speedups
    if found is None:
        return np.full(_num_tasks(reference), 1 / mine.horizon)
    return np.array(found, dtype=np.float64)


def _ratios(mine: Result, reference: Result, which: str) -> Array | None:
    """Loss ratios [num_tasks], or None for a family whose reference losses are not all positive and finite."""
    below = np.array(getattr(reference.scores, which), dtype=np.float64)
    if not (np.isfinite(below) & (below > 0)).all():
        return None
    if mine.scores is None:
        return np.full(below.shape, np.inf)
    out: Array = np.array(getattr(mine.scores, which), dtype=np.float64) / below
    return out


def _total(name: str, rows: list[tuple[Result, Result]], num_resamples: int, confidence: float) -> Total:
    def iqm(strata: list[Array]) -> Interval | None:
        if not strata:
            return None
        return stratified_bootstrap(strata, num_resamples=num_resamples, confidence=confidence)

    def ratio(which: str) -> Interval | None:
        found = [_ratios(mine, reference, which) for mine, reference in rows]
        return iqm([ratios for ratios in found if ratios is not None])

    speed = [_speedups(mine, reference) for mine, reference in rows]
    of_horizon = [_speedups(mine, reference, of_horizon=True) for mine, reference in rows]
    wall = []
    for (mine, reference), values in zip(rows, speed):
        factor = wall_factor(mine.cost, reference.cost)
        if factor is not None:
            wall.append(values * factor)
        elif mine.scores is None:
            wall.append(values)
    by_family = [float(interquartile_mean(values)) for values in speed]
    worst = min(range(len(rows)), key=by_family.__getitem__)
    counts = [(_num_tasks(reference), mine.scores) for mine, reference in rows]
    every, every_horizon = iqm(speed), iqm(of_horizon)
    assert every is not None and every_horizon is not None
    num_tasks = sum(number for number, _ in counts)
    return Total(
        optimizer=name,
        learned=rows[0][0].learned,
        final_ratio=ratio("task_final_losses"),
        mean_ratio=ratio("task_mean_losses"),
        speedup=every,
        horizon_speedup=every_horizon,
        wall_speedup=iqm(wall) if len(wall) == len(rows) and any(mine.cost for mine, _ in rows) else None,
        worst_family=rows[worst][0].family,
        worst_speedup=by_family[worst],
        share_reached=sum(number * (s.share_reached or 0.0) for number, s in counts if s is not None) / num_tasks,
        num_tasks=num_tasks,
        num_diverged=sum(number if s is None else s.num_diverged for number, s in counts),
        num_thrown_back=sum(0 if s is None else s.num_thrown_back for _, s in counts),
        missing=tuple(mine.family for mine, _ in rows if mine.scores is None),
    )


def wall_factor(mine: Cost | None, reference: Cost | None) -> float | None:
    """By what a speed-up in steps is multiplied to be one in time; None where a cost was not measured."""
    if mine is None or reference is None or not math.isfinite(mine.total):
        return None
    return reference.total / mine.total


def totals_table(sums: Sequence[Total], reference: str) -> str:
    """The totals as aligned plain text, the fastest first; empty where there are none."""
    if not sums:
        return ""
    timed = any(total.wall_speedup for total in sums)
    header = ["over all families", "speed-up", *(["in time"] if timed else []), "final / " + reference]
    header += ["slowest family", "thrown back", "diverged"]
    rows = []
    for total in sorted(sums, key=lambda one: -one.speedup.value):
        intervals = [total.speedup, *([total.wall_speedup] if timed else []), total.final_ratio]
        rows.append([total.optimizer, *(format_cell(one, 3, True) for one in intervals)])
        rows[-1] += [f"{format_number(total.worst_speedup, 2)} {total.worst_family}"]
        rows[-1] += [f"{number}/{total.num_tasks}" for number in (total.num_thrown_back, total.num_diverged)]
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    lines = [format_line(row, widths) for row in [header, *rows]]
    return "\n".join([*lines, f"Interquartile means over {sums[0].num_tasks} tasks, relative to tuned {reference}."])
