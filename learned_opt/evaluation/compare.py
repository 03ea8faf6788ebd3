"""Learned and hand-designed optimizers side by side, over task families."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from learned_opt.batched import BatchedFamily
from learned_opt.evaluation import metrics
from learned_opt.evaluation.baselines import Baseline, Tuning, tune
from learned_opt.evaluation.metrics import Array, Interval
from learned_opt.evaluation.results import Comparison, Curve, Result, Scores
from learned_opt.evaluation.runs import DEFAULT_PARTICLES_AT_ONCE, Runs, run_rule
from learned_opt.rules.base import UpdateRule
from learned_opt.task import TaskFamily, Tensors

_POINTS_PER_CURVE = 201


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
    """An update rule with its meta-parameters, as a candidate.

    Attributes:
        name: its label.
        rule: the update rule.
        theta: its meta-parameters.
    """

    name: str
    rule: UpdateRule
    theta: Tensors

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name must not be empty")


Candidate = Learned | Baseline

OnResult = Callable[[Result, Comparison], None]
"""Called with each result as it is found, and with the comparison so far."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How optimizers are compared.

    Attributes:
        horizon: inner steps, at least 1.
        num_tasks: meta-test tasks per seed, at least 1.
        seeds: of the meta-test draws, non-negative and distinct.
        num_validation_tasks: meta-validation tasks on which baselines are tuned, at least 1.
        validation_seed: of those draws, non-negative.
        reference: name of the baseline that ratios are to.
        num_resamples: of the bootstrap, at least 1.
        confidence: of all intervals, in (0, 1).
        particles_at_once: bounds memory; at least 1.
    """

    horizon: int = 100
    num_tasks: int = 16
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    num_validation_tasks: int = 16
    validation_seed: int = 0
    reference: str = "adam"
    num_resamples: int = 2000
    confidence: float = 0.95
    particles_at_once: int = DEFAULT_PARTICLES_AT_ONCE

    def __post_init__(self) -> None:
        for name in ("horizon", "num_tasks", "num_validation_tasks", "num_resamples", "particles_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be non-negative and distinct, and at least one; got {self.seeds}")
        if self.validation_seed < 0:
            raise ValueError(f"validation_seed must be non-negative; got {self.validation_seed}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie strictly between 0 and 1; got {self.confidence}")


def compare(
    candidates: Sequence[Candidate],
    families: Mapping[str, TaskFamily],
    config: EvaluationConfig | None = None,
    *,
    horizons: Mapping[str, int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    on_result: OnResult | None = None,
) -> Comparison:
    """Run every candidate on the same meta-test tasks of every family.

    Baselines are tuned on meta-validation tasks first.

    Args:
        candidates: learned optimizers and baselines, of distinct names.
        families: label -> task family.
        config: how to compare.
        horizons: label -> inner steps, for families whose horizon is not the configuration's.
        device: where to run.
        dtype: of parameters and data.
        on_result: called with every result as soon as it is there, so that a long comparison can be saved as it goes.

    Returns:
        The comparison. A baseline that diverges at every rate has an entry without scores.

    Raises:
        ValueError: no candidates or families, a name twice, a horizon out of range or of an unknown family, a family
            that cannot run. All are raised before the first result.
    """
    config = config or EvaluationConfig()
    names = [candidate.name for candidate in candidates]
    if not names:
        raise ValueError("candidates must hold at least one optimizer; got none")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"candidates must have distinct names; got {name!r} more than once")
    if not families:
        raise ValueError("families must hold at least one task family; got none")
    for label, horizon in (horizons or {}).items():
        if label not in families:
            raise ValueError(f"horizons names {label!r}, which is not among the families {', '.join(families)}")
        if horizon < 1:
            raise ValueError(f"the horizon of {label!r} must be at least 1; got {horizon}")
    batched = {label: BatchedFamily(family, device=device, dtype=dtype) for label, family in families.items()}
    has_reference = any(isinstance(c, Baseline) and c.name == config.reference for c in candidates)
    comparison = Comparison(
        families={label: family.describe() for label, family in families.items()},
        optimizers=tuple(names),
        reference=config.reference if has_reference else "",
        num_tasks=config.num_tasks,
        seeds=tuple(config.seeds),
        confidence=config.confidence,
        results=(),
    )
    for label, family_program in batched.items():
        horizon = (horizons or {}).get(label, config.horizon)
        reference: Array | None = None
        # The reference goes first, since the others' ratios are to it.
        for candidate in sorted(candidates, key=lambda c: not (has_reference and c.name == config.reference)):
            tuning, runs = _run(candidate, family_program, config, horizon)
            losses = runs.losses.double().numpy() if runs else None
            if has_reference and candidate.name == config.reference:
                reference = losses
            result = Result(
                family=label,
                optimizer=candidate.name,
                learned=isinstance(candidate, Learned),
                horizon=horizon,
                tuning=tuning,
                scores=score(losses, runs.metrics, reference, config) if runs and losses is not None else None,
                note=tuning.note if tuning else "",
            )
            comparison = dataclasses.replace(comparison, results=(*comparison.results, result))
            if on_result is not None:
                on_result(result, comparison)
    return comparison


def _run(
    candidate: Candidate, batched: BatchedFamily, config: EvaluationConfig, horizon: int
) -> tuple[Tuning | None, Runs | None]:
    """A baseline's tuning, and losses [horizon + 1, tasks] and metrics [tasks] over all seeds' meta-test tasks."""
    if isinstance(candidate, Learned):
        return None, run_rule(
            candidate.rule,
            candidate.theta,
            batched,
            split="meta_test",
            seeds=config.seeds,
            num_tasks=config.num_tasks,
            horizon=horizon,
            particles_at_once=config.particles_at_once,
        )
    tuning = tune(
        candidate,
        batched,
        seed=config.validation_seed,
        num_tasks=config.num_validation_tasks,
        horizon=horizon,
        particles_at_once=config.particles_at_once,
    )
    if tuning.rate is None:
        return tuning, None
    runs = candidate.run(
        batched,
        (tuning.rate,),
        split="meta_test",
        seeds=config.seeds,
        num_tasks=config.num_tasks,
        horizon=horizon,
        particles_at_once=config.particles_at_once,
    )
    return tuning, Runs(runs.losses[:, 0], {name: value[0] for name, value in runs.metrics.items()})


def score(losses: Array, task_metrics: Tensors, reference: Array | None, config: EvaluationConfig) -> Scores:
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
    if reference is not None:
        final_ratio = interval(metrics.ratio_of_means, final, metrics.final_losses(reference))
        mean_ratio = interval(metrics.ratio_of_means, along, metrics.mean_losses(reference))
        task_final_ratio = interval(metrics.median_ratio, final, metrics.final_losses(reference))
        steps = metrics.steps_to_reach(losses, metrics.final_losses(reference))
        steps_to_reference = interval(metrics.median, steps)
        share_reached = float(np.isfinite(steps).mean())
    return Scores(
        num_tasks=losses.shape[1],
        num_diverged=int(metrics.diverged(losses).sum()),
        num_above_start=int(metrics.ended_above_start(losses).sum()),
        final_loss=interval(metrics.mean, final),
        mean_loss=interval(metrics.mean, along),
        final_ratio=final_ratio,
        mean_ratio=mean_ratio,
        task_final_ratio=task_final_ratio,
        steps_to_reference=steps_to_reference,
        share_reached=share_reached,
        metrics={name: interval(metrics.mean, value.double().numpy()) for name, value in task_metrics.items()},
        curve=_curve(losses, config.confidence),
        task_final_losses=tuple(final.tolist()),
        task_mean_losses=tuple(along.tolist()),
    )


def _curve(losses: Array, confidence: float) -> Curve:
    kept = np.unique(np.linspace(0, len(losses) - 1, min(_POINTS_PER_CURVE, len(losses))).round().astype(int))
    middle, low, high = (tuple(line[kept].tolist()) for line in metrics.median_band(losses, confidence))
    return Curve(steps=tuple(kept.tolist()), median=middle, low=low, high=high)
