"""All numbers of one optimizer on one family, from its loss curves and the reference's."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from learned_opt.evaluation import metrics
from learned_opt.evaluation.aggregate import interquartile_mean
from learned_opt.evaluation.metrics import Array, Interval
from learned_opt.evaluation.results import Curve, Scores
from learned_opt.evaluation.speedup import speedups
from learned_opt.task import Tensors

_POINTS_PER_CURVE = 201


class Intervals(Protocol):
    """How intervals are made; `EvaluationConfig` is one."""

    @property
    def num_resamples(self) -> int:
        """Of the bootstrap."""

    @property
    def confidence(self) -> float:
        """In (0, 1)."""


def score(losses: Array, task_metrics: Tensors, reference: Array | None, config: Intervals) -> Scores:
    """All numbers of one optimizer on one family.

    Args:
        losses: [horizon + 1, num_tasks].
        task_metrics: the family's metrics, each [num_tasks].
        reference: the reference's losses on the same tasks; None for none.
        config: how many resamples, and the confidence of intervals.
    """
    final, along = metrics.final_losses(losses), metrics.mean_losses(losses)

    def interval(statistic: metrics.Statistic, *samples: Array) -> Interval:
        return metrics.bootstrap(statistic, *samples, num_resamples=config.num_resamples, confidence=config.confidence)

    final_ratio = mean_ratio = task_final_ratio = steps_to_reference = share_reached = None
    speedup = horizon_speedup = task_speedups = task_horizon_speedups = None
    if reference is not None:
        final_ratio = interval(metrics.ratio_of_means, final, metrics.final_losses(reference))
        mean_ratio = interval(metrics.ratio_of_means, along, metrics.mean_losses(reference))
        task_final_ratio = interval(metrics.median_ratio, final, metrics.final_losses(reference))
        steps = metrics.steps_to_reach(losses, metrics.final_losses(reference))
        steps_to_reference = interval(metrics.median, steps)
        share_reached = float(np.isfinite(steps).mean())
        sooner, of_horizon = speedups(losses, reference), speedups(losses, reference, of_horizon=True)
        speedup, horizon_speedup = interval(interquartile_mean, sooner), interval(interquartile_mean, of_horizon)
        task_speedups, task_horizon_speedups = tuple(sooner.tolist()), tuple(of_horizon.tolist())
    return Scores(
        num_tasks=losses.shape[1],
        num_diverged=int(metrics.diverged(losses).sum()),
        num_above_start=int(metrics.ended_above_start(losses).sum()),
        num_thrown_back=int(metrics.thrown_back(losses).sum()),
        final_loss=interval(metrics.mean, final),
        mean_loss=interval(metrics.mean, along),
        final_ratio=final_ratio,
        mean_ratio=mean_ratio,
        task_final_ratio=task_final_ratio,
        steps_to_reference=steps_to_reference,
        share_reached=share_reached,
        speedup=speedup,
        horizon_speedup=horizon_speedup,
        metrics={name: interval(metrics.mean, value.double().numpy()) for name, value in task_metrics.items()},
        curve=_curve(losses, config.confidence),
        task_final_losses=tuple(final.tolist()),
        task_mean_losses=tuple(along.tolist()),
        task_speedups=task_speedups,
        task_horizon_speedups=task_horizon_speedups,
    )


def _curve(losses: Array, confidence: float) -> Curve:
    kept = np.unique(np.linspace(0, len(losses) - 1, min(_POINTS_PER_CURVE, len(losses))).round().astype(int))
    middle, low, high = (tuple(line[kept].tolist()) for line in metrics.median_band(losses, confidence))
    return Curve(steps=tuple(kept.tolist()), median=middle, low=low, high=high)
