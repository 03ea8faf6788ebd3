"""Learned and hand-designed optimizers side by side, over task families.

A comparison is long, so nothing that happens in it is lost: every result is handed out as it comes, runs can be kept in
a cache, and an optimizer that fails on a family has an entry that says so, after which the comparison goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch

from learned_opt.artifact import Artifact, content_hash
from learned_opt.batched import BatchedFamily
from learned_opt.evaluation import cost
from learned_opt.evaluation.baselines import Baseline, Tuning, tune
from learned_opt.evaluation.cache import RunCache, learned_name
from learned_opt.evaluation.metrics import Array
from learned_opt.evaluation.results import Comparison, Cost, Result
from learned_opt.evaluation.runs import DEFAULT_PARTICLES_AT_ONCE, Runs, run_rule
from learned_opt.evaluation.scoring import score
from learned_opt.initial_params import flat_params
from learned_opt.rules.base import UpdateRule
from learned_opt.task import TaskFamily, Tensors

__all__ = ["Candidate", "EvaluationConfig", "Learned", "OnResult", "OnStart", "compare", "score"]


_LONGEST_MEASUREMENT = 60.0

TuningSplit = Literal["meta_validation", "meta_test"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
    """An update rule with its meta-parameters, as a candidate.

    Attributes:
        name: its label.
        rule: the update rule.
        theta: its meta-parameters.
        initial_params: label of a family -> learned initial parameters by name, which its tasks start from; those of
            other families start where the family starts them, as they do for baselines.
    """

    name: str
    rule: UpdateRule
    theta: Tensors
    initial_params: Mapping[str, Tensors] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name must not be empty")


Candidate = Learned | Baseline

OnStart = Callable[[str, str], None]
"""Called with the labels of family and optimizer before each is run."""

OnResult = Callable[[Result, Comparison], None]
"""Called with each result as it is found, and with the comparison so far."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How optimizers are compared.

    Attributes:
        horizon: inner steps, at least 1.
        num_tasks: meta-test tasks per seed, at least 1.
        seeds: of the meta-test draws, non-negative and distinct.
        num_validation_tasks: tasks on which baselines are tuned, at least 1.
        validation_seed: of those draws, non-negative.
        tuning_split: whose tasks they are, "meta_validation" or "meta_test". With the latter a baseline is tuned to the
            data that is reported, by draws of other initial parameters and batches: `validation_seed` must then not be
            among `seeds`. It is what one could reach who trains on the same data again and again.
        reference: name of the baseline that ratios are to.
        num_resamples: of the bootstrap, at least 1.
        confidence: of all intervals, in (0, 1).
        particles_at_once: bounds memory; at least 1.
        cost_seconds: for how long the time of a gradient, and of each optimizer's step, is measured on every family;
            0 for not at all.
    """

    horizon: int = 100
    num_tasks: int = 16
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    num_validation_tasks: int = 16
    validation_seed: int = 0
    tuning_split: TuningSplit = "meta_validation"
    reference: str = "adam"
    num_resamples: int = 2000
    confidence: float = 0.95
    particles_at_once: int = DEFAULT_PARTICLES_AT_ONCE
    cost_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("horizon", "num_tasks", "num_validation_tasks", "num_resamples", "particles_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be non-negative and distinct, and at least one; got {self.seeds}")
        if self.validation_seed < 0:
            raise ValueError(f"validation_seed must be non-negative; got {self.validation_seed}")
        if self.tuning_split not in (splits := get_args(TuningSplit)):
            raise ValueError(f"tuning_split must be one of {', '.join(splits)}; got {self.tuning_split!r}")
        if self.tuning_split == "meta_test" and self.validation_seed in self.seeds:
            raise ValueError(
                f"validation_seed {self.validation_seed} is among seeds {self.seeds}: with tuning_split meta_test "
                f"baselines would be tuned on the reported draws; give another, such as {max(self.seeds) + 1}"
            )
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie strictly between 0 and 1; got {self.confidence}")
        if not 0 <= self.cost_seconds <= _LONGEST_MEASUREMENT:
            raise ValueError(f"cost_seconds must lie in [0, {_LONGEST_MEASUREMENT:g}]; got {self.cost_seconds}")


def compare(
    candidates: Sequence[Candidate],
    families: Mapping[str, TaskFamily],
    config: EvaluationConfig | None = None,
    *,
    horizons: Mapping[str, int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    cache: RunCache | None = None,
    on_start: OnStart | None = None,
    on_result: OnResult | None = None,
) -> Comparison:
    """Run every candidate on the same meta-test tasks of every family.

    Baselines are tuned first, on tasks of `tuning_split`.

    Args:
        candidates: learned optimizers and baselines, of distinct names.
        families: label -> task family.
        config: how to compare.
        horizons: label -> inner steps, for families whose horizon is not the configuration's.
        device: where to run.
        dtype: of parameters and data.
        cache: where runs are looked up and kept; None for nowhere.
        on_start: called before an optimizer is run on a family.
        on_result: called with every result as soon as it is there, so that a long comparison can be saved as it goes.

    Returns:
        The comparison. A baseline that diverges at every rate, and an optimizer that raises an error, have an entry
        without scores and with a note.

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
    batched = _programs(families, device, dtype)
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
    for label, program in batched.items():
        horizon = (horizons or {}).get(label, config.horizon)
        reference: Array | None = None
        clock = _Clock(program, config.cost_seconds)
        # The reference goes first, since the others' ratios are to it.
        for candidate in sorted(candidates, key=lambda c: not (has_reference and c.name == config.reference)):
            if on_start is not None:
                on_start(label, candidate.name)
            result, losses = _result(label, candidate, program, config, horizon, reference, cache, clock)
            if has_reference and candidate.name == config.reference:
                reference = losses
            comparison = dataclasses.replace(comparison, results=(*comparison.results, result))
            if on_result is not None:
                on_result(result, comparison)
    return comparison


def _programs(
    families: Mapping[str, TaskFamily], device: torch.device | str, dtype: torch.dtype
) -> dict[str, BatchedFamily]:
    """The families' batched programs; labels of one and the same family, at several horizons say, share one."""
    made: dict[int, BatchedFamily] = {}
    for family in families.values():
        if id(family) not in made:
            made[id(family)] = BatchedFamily(family, device=device, dtype=dtype)
    return {label: made[id(family)] for label, family in families.items()}


class _Clock:
    """Costs on one family; the gradient, which all optimizers share, is timed once."""

    def __init__(self, program: BatchedFamily, seconds: float) -> None:
        self._program, self._seconds = program, seconds
        self._setting: cost.Setting | None = None

    def measure(self, candidate: Candidate) -> Cost | None:
        if not self._seconds:
            return None
        if self._setting is None:
            self._setting = cost.prepare(self._program.family, device=self._program.device, seconds=self._seconds)
        timed: Baseline | Artifact
        if isinstance(candidate, Learned):
            timed = Artifact.of(candidate.rule, candidate.theta, name="timed")
        else:
            timed = candidate
        return cost.measure(timed, self._setting, seconds=self._seconds)


def _result(
    label: str,
    candidate: Candidate,
    program: BatchedFamily,
    config: EvaluationConfig,
    horizon: int,
    reference: Array | None,
    cache: RunCache | None,
    clock: _Clock,
) -> tuple[Result, Array | None]:
    """One entry, and the losses behind it. An error becomes an entry that tells it: hours of work may lie behind."""
    result = Result(
        family=label,
        optimizer=candidate.name,
        learned=isinstance(candidate, Learned),
        horizon=horizon,
        tuning=None,
        scores=None,
        note="",
    )
    try:
        tuning, runs = _run(label, candidate, program, config, horizon, cache)
        result = dataclasses.replace(result, tuning=tuning, note=tuning.note if tuning else "")
        if runs is None:
            return result, None
        losses = runs.losses.double().numpy()
        # An optimizer is its own reference from the first.
        own = isinstance(candidate, Baseline) and candidate.name == config.reference
        scores = score(losses, runs.metrics, losses if own else reference, config)
        result = dataclasses.replace(result, scores=scores)
    except Exception as error:
        return dataclasses.replace(result, scores=None, note=f"could not run: {_first_line(error)}"), None
    try:
        return dataclasses.replace(result, cost=clock.measure(candidate)), losses
    except Exception as error:
        note = f"{result.note}; " if result.note else ""
        return dataclasses.replace(result, note=f"{note}its step could not be timed: {_first_line(error)}"), losses


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _run(
    label: str,
    candidate: Candidate,
    batched: BatchedFamily,
    config: EvaluationConfig,
    horizon: int,
    cache: RunCache | None,
) -> tuple[Tuning | None, Runs | None]:
    """A baseline's tuning, and losses [horizon + 1, tasks] and metrics [tasks] over all seeds' meta-test tasks."""
    if isinstance(candidate, Learned):
        initial = {n: params for n, params in candidate.initial_params.items() if n == label}

        def compute() -> Runs:
            return run_rule(
                candidate.rule,
                candidate.theta,
                batched,
                split="meta_test",
                seeds=config.seeds,
                num_tasks=config.num_tasks,
                horizon=horizon,
                particles_at_once=config.particles_at_once,
                initial_params=flat_params(label, initial[label], batched) if initial else None,
            )

        if cache is None:
            return None, compute()
        kind, settings = candidate.rule.kind, candidate.rule.settings()
        what = learned_name(candidate.rule, content_hash(kind, settings, candidate.theta, initial))
        return None, cache.run(batched, what, "meta_test", config.seeds, config.num_tasks, horizon, compute)
    tuning = tune(
        candidate,
        batched,
        seed=config.validation_seed,
        split=config.tuning_split,
        num_tasks=config.num_validation_tasks,
        horizon=horizon,
        particles_at_once=config.particles_at_once,
        cache=cache,
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
        cache=cache,
    )
    return tuning, Runs(runs.losses[:, 0], {name: value[0] for name, value in runs.metrics.items()})
