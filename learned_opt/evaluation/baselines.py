"""Hand-designed optimizers to compare with, and the tuning of their learning rates.

A baseline is tuned for every task family and horizon: all rates of a half-decade grid run on the same meta-validation
tasks, and the rate with the least mean final loss is taken. A diverged task makes the mean infinite. Where the best
rate lies at the grid's edge, the grid is extended beyond it until it does not, or a limit is reached, and the result
says so.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from learned_opt.batched import BatchedFamily
from learned_opt.evaluation.metrics import diverged, final_losses
from learned_opt.evaluation.runs import (
    DEFAULT_PARTICLES_AT_ONCE,
    MakeOptimizer,
    MakeSchedule,
    Runs,
    check_rates,
    run_torch_optimizer,
)

_HALF_DECADES_PER_EXTENSION = 2
_MAX_EXTENSIONS = 3


def half_decades(first: int, last: int) -> tuple[float, ...]:
    """Learning rates from 10^first to 10^last, two a decade."""
    return tuple(10.0 ** (k / 2) for k in range(2 * first, 2 * last + 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """A torch.optim optimizer to compare with.

    Attributes:
        name: its label.
        make: makes it from parameter groups.
        rates: the learning rates to choose from, ascending; a single one is taken as it is, with no tuning.
        schedule: makes its learning-rate schedule for a horizon; None for a constant rate.
        elementwise: see `run_torch_optimizer`.
    """

    name: str
    make: MakeOptimizer
    rates: tuple[float, ...] = half_decades(-4, 1)
    schedule: MakeSchedule | None = None
    elementwise: bool = True

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name must not be empty")
        rates = check_rates(self.rates)
        if any(a >= b for a, b in zip(rates, rates[1:])):
            raise ValueError(f"rates must be ascending; got {rates}")
        object.__setattr__(self, "rates", rates)

    def run(
        self,
        batched: BatchedFamily,
        rates: tuple[float, ...],
        *,
        split: str,
        seeds: Sequence[int],
        num_tasks: int,
        horizon: int,
        with_metrics: bool = True,
        particles_at_once: int = DEFAULT_PARTICLES_AT_ONCE,
    ) -> Runs:
        """`run_torch_optimizer` with this optimizer: losses [horizon + 1, num_rates, num_tasks]."""
        return run_torch_optimizer(
            self.make,
            batched,
            rates,
            split=split,
            seeds=seeds,
            num_tasks=num_tasks,
            horizon=horizon,
            make_schedule=self.schedule,
            elementwise=self.elementwise,
            with_metrics=with_metrics,
            particles_at_once=particles_at_once,
        )


_NESTEROV = functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)

BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline(name="sgd", make=torch.optim.SGD),
        Baseline(name="nesterov", make=_NESTEROV),
        Baseline(name="rmsprop", make=torch.optim.RMSprop),
        Baseline(name="adam", make=torch.optim.Adam),
        Baseline(name="adamw_cosine", make=torch.optim.AdamW, schedule=CosineAnnealingLR),
        Baseline(name="adam_default", make=torch.optim.Adam, rates=(1e-3,)),
    )
}
"""Name -> baseline; a new one is one line here."""

DEFAULT_BASELINES: tuple[str, ...] = ("sgd", "nesterov", "rmsprop", "adam")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a learning rate was chosen.

    Attributes:
        rate: the chosen one; None if every task diverged at every rate.
        rates: all that were tried, ascending; only the given one if there was no choice.
        scores: the mean final loss at each on the meta-validation tasks, infinite where a task diverged; empty if there
            was no choice.
        num_diverged: how many tasks diverged at each; empty if there was no choice.
        num_tasks: meta-validation tasks; 0 if there was no choice.
        edge: "lowest" or "highest" if the chosen rate still lies at that edge of what was tried, else "".
    """

    rate: float | None
    rates: tuple[float, ...]
    scores: tuple[float, ...]
    num_diverged: tuple[int, ...]
    num_tasks: int
    edge: str

    @property
    def note(self) -> str:
        """What a reader of the results should know, or an empty string."""
        if self.rate is None:
            return f"every meta-validation task diverged at every rate from {self.rates[0]:.3g} to {self.rates[-1]:.3g}"
        if self.edge:
            return f"the best rate, {self.rate:.3g}, is the {self.edge} tried: a better one may lie beyond"
        chosen = self.rates.index(self.rate)
        if self.num_diverged and self.num_diverged[chosen]:
            share = f"{self.num_diverged[chosen]} of {self.num_tasks}"
            return f"{share} meta-validation tasks diverged even at the best rate"
        return ""


def tune(
    baseline: Baseline,
    batched: BatchedFamily,
    *,
    seed: int,
    num_tasks: int,
    horizon: int,
    particles_at_once: int = DEFAULT_PARTICLES_AT_ONCE,
) -> Tuning:
    """Choose a baseline's learning rate for a family and a horizon on meta-validation tasks.

    The least mean final loss wins; where every rate has a diverged task, fewest of those, then the least mean of the
    rest. Of equals the lowest rate.

    Args:
        baseline: the optimizer and its rates.
        batched: the family.
        seed: which meta-validation tasks, non-negative.
        num_tasks: how many, at least 1.
        horizon: inner steps, at least 1.
        particles_at_once: see `run_torch_optimizer`.
    """
    if len(baseline.rates) == 1:
        return Tuning(rate=baseline.rates[0], rates=baseline.rates, scores=(), num_diverged=(), num_tasks=0, edge="")
    found: dict[float, tuple[float, int, float]] = {}

    def try_rates(rates: tuple[float, ...]) -> None:
        losses = baseline.run(
            batched,
            rates,
            split="meta_validation",
            seeds=(seed,),
            num_tasks=num_tasks,
            horizon=horizon,
            with_metrics=False,
            particles_at_once=particles_at_once,
        ).losses.numpy()
        for column, rate in enumerate(rates):
            bad = diverged(losses[:, column])
            final = final_losses(losses[:, column])
            rest = float(final[~bad].mean()) if not bad.all() else math.inf
            found[rate] = (math.inf if bad.any() else rest, int(bad.sum()), rest)

    def best() -> float:
        return min(sorted(found), key=found.__getitem__)

    try_rates(baseline.rates)
    for _ in range(_MAX_EXTENSIONS):
        lowest, highest = min(found), max(found)
        if all(bad == num_tasks for _, bad, _ in found.values()) or best() == lowest:
            # Where everything diverges, lower rates are the ones that may not.
            try_rates(tuple(lowest / 10 ** (k / 2) for k in range(_HALF_DECADES_PER_EXTENSION, 0, -1)))
        elif best() == highest:
            try_rates(tuple(highest * 10 ** (k / 2) for k in range(1, _HALF_DECADES_PER_EXTENSION + 1)))
        else:
            break
    rates = tuple(sorted(found))
    rate: float | None = best()
    if all(found[r][1] == num_tasks for r in rates):
        rate = None
    return Tuning(
        rate=rate,
        rates=rates,
        scores=tuple(found[r][0] for r in rates),
        num_diverged=tuple(found[r][1] for r in rates),
        num_tasks=num_tasks,
        edge="" if rate is None else "lowest" if rate == rates[0] else "highest" if rate == rates[-1] else "",
    )
