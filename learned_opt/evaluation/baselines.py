"""Hand-designed optimizers to compare with, and the tuning of their learning rates.

Any optimizer that follows torch.optim joins a comparison as a `Baseline`: a name, what makes it, and the rates to
choose from. Those in `BASELINES` are known by name; `find` also takes "module:attribute", where the attribute is a
`Baseline` or an optimizer's class.

A baseline is tuned for every task family and horizon: all rates of a half-decade grid run on the same tasks, of
meta-validation where nothing else is said, and the rate with the least mean final loss is taken. A diverged task makes
the mean infinite. Where the best rate lies at the grid's edge, the grid is extended beyond it until it does not, or a
limit is reached, and the result says so.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from learned_opt.batched import BatchedFamily
from learned_opt.evaluation.cache import RunCache
from learned_opt.evaluation.metrics import diverged, final_losses
from learned_opt.evaluation.runs import (
    DEFAULT_PARTICLES_AT_ONCE,
    MakeOptimizer,
    MakeSchedule,
    ParamGroup,
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
    """An optimizer of torch.optim, or one that follows it, to compare with.

    Attributes:
        name: its label.
        make: makes it from parameter groups; the class itself, or a `functools.partial` of it with other settings.
        rates: the learning rates to choose from, ascending; a single one is taken as it is, with no tuning.
        schedule: makes its learning-rate schedule for a horizon; None for a constant rate.
        elementwise, flat: see `run_torch_optimizer`.
        needs: the package to install for it; empty if none.
    """

    name: str
    make: MakeOptimizer
    rates: tuple[float, ...] = half_decades(-4, 1)
    schedule: MakeSchedule | None = None
    elementwise: bool = True
    flat: bool = False
    needs: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name must not be empty")
        rates = check_rates(self.rates)
        if any(a >= b for a, b in zip(rates, rates[1:])):
            raise ValueError(f"rates must be ascending; got {rates}")
        object.__setattr__(self, "rates", rates)

    @property
    def tuned(self) -> bool:
        """Whether there are rates to choose from."""
        return len(self.rates) > 1

    @property
    def installed(self) -> bool:
        """Whether the package it needs can be imported."""
        return not self.needs or importlib.util.find_spec(self.needs) is not None

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
        cache: RunCache | None = None,
    ) -> Runs:
        """`run_torch_optimizer` with it, or what `cache` has: losses [horizon + 1, num_rates, num_tasks]."""

        def compute() -> Runs:
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
                flat=self.flat,
                with_metrics=with_metrics,
                particles_at_once=particles_at_once,
            )

        if cache is None:
            return compute()
        what = {
            "make": self.make,
            "schedule": self.schedule,
            "rates": list(rates),
            "elementwise": self.elementwise,
            "flat": self.flat,
            "with_metrics": with_metrics,
        }
        return cache.run(batched, what, split, seeds, num_tasks, horizon, compute)


_NESTEROV = functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)


def make_prodigy(groups: list[ParamGroup]) -> torch.optim.Optimizer:
    """Prodigy (Mishchenko and Defazio 2023) from the package prodigyopt, which estimates its own learning rate."""
    optimizer: torch.optim.Optimizer = importlib.import_module("prodigyopt").Prodigy(groups)
    return optimizer


def make_schedule_free(groups: list[ParamGroup]) -> torch.optim.Optimizer:
    """Schedule-free AdamW (Defazio et al. 2024) from the package schedulefree, ready to train.

    Losses along the way are those where its gradients are taken; the family's metrics are taken at its averaged
    parameters, as its authors evaluate it.
    """
    optimizer: Any = importlib.import_module("schedulefree").AdamWScheduleFree(groups)
    optimizer.train()
    return cast(torch.optim.Optimizer, optimizer)


BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline(name="sgd", make=torch.optim.SGD),
        Baseline(name="nesterov", make=_NESTEROV),
        Baseline(name="rmsprop", make=torch.optim.RMSprop),
        Baseline(name="adam", make=torch.optim.Adam),
        Baseline(name="adamw_cosine", make=torch.optim.AdamW, schedule=CosineAnnealingLR),
        # What those pick who will not tune: the rates that the packages themselves set.
        Baseline(name="adam_default", make=torch.optim.Adam, rates=(1e-3,)),
        Baseline(name="prodigy", make=make_prodigy, rates=(1.0,), elementwise=False, flat=True, needs="prodigyopt"),
        Baseline(name="schedule_free_adamw", make=make_schedule_free, rates=(2.5e-3,), needs="schedulefree"),
    )
}
"""Name -> baseline; a new one is one line here."""

DEFAULT_BASELINES: tuple[str, ...] = ("sgd", "nesterov", "rmsprop", "adam")


def find(name: str) -> Baseline:
    """The baseline that a name stands for.

    Args:
        name: a name in `BASELINES`; or "module:attribute", imported with the working folder on the path, where the
            attribute is a `Baseline`, or the class of an optimizer, which is then tuned on the grid of the others and
            given every task in its true shapes, since it may couple coordinates.

    Raises:
        ValueError: an unknown name (near matches are suggested), a module or attribute that cannot be imported, or one
            that is neither.
        ModuleNotFoundError: the baseline needs a package that is not installed; the message says how to get it.
    """
    if ":" not in name:
        if name not in BASELINES:
            near = difflib.get_close_matches(name, list(BASELINES), n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(BASELINES)}"
            raise ValueError(f"unknown baseline {name!r}; {hint} (one of your own: module:attribute)")
        if not BASELINES[name].installed:
            raise ModuleNotFoundError(
                f"the baseline {name!r} needs {BASELINES[name].needs}: pip install 'learned-opt[baselines]'"
            )
        return BASELINES[name]
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"the baseline {name!r} cannot be imported: {error}") from error
    if isinstance(found, Baseline):
        return found
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
        return Baseline(name=attribute, make=found, elementwise=False)
    raise ValueError(
        f"the baseline {name!r} must be a learned_opt.evaluation.Baseline or the class of an optimizer; "
        f"got {type(found).__name__}"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a learning rate was chosen.

    Attributes:
        rate: the chosen one; None if every task diverged at every rate.
        rates: all that were tried, ascending; only the given one if there was no choice.
        scores: the mean final loss at each on the tasks of tuning, infinite where a task diverged; empty if there
            was no choice.
        num_diverged: how many tasks diverged at each; empty if there was no choice.
        num_tasks: tasks of tuning; 0 if there was no choice.
        split: whose tasks they are; empty if there was no choice.
        edge: "lowest" or "highest" if the chosen rate still lies at that edge of what was tried, else "".
    """

    rate: float | None
    rates: tuple[float, ...]
    scores: tuple[float, ...]
    num_diverged: tuple[int, ...]
    num_tasks: int
    split: str
    edge: str

    @property
    def note(self) -> str:
        """What a reader of the results should know, or an empty string."""
        kind = self.split.replace("_", "-")
        if self.rate is None:
            return f"every {kind} task diverged at every rate from {self.rates[0]:.3g} to {self.rates[-1]:.3g}"
        if self.edge:
            return f"the best rate, {self.rate:.3g}, is the {self.edge} tried: a better one may lie beyond"
        chosen = self.rates.index(self.rate)
        if self.num_diverged and self.num_diverged[chosen]:
            share = f"{self.num_diverged[chosen]} of {self.num_tasks}"
            return f"{share} {kind} tasks diverged even at the best rate"
        return ""


def tune(
    baseline: Baseline,
    batched: BatchedFamily,
    *,
    seed: int,
    num_tasks: int,
    horizon: int,
    split: str = "meta_validation",
    particles_at_once: int = DEFAULT_PARTICLES_AT_ONCE,
    cache: RunCache | None = None,
) -> Tuning:
    """Choose a baseline's learning rate for a family and a horizon on tasks that are not the reported ones.

    The least mean final loss wins; where every rate has a diverged task, fewest of those, then the least mean of the
    rest. Of equals the lowest rate.

    Args:
        baseline: the optimizer and its rates.
        batched: the family.
        seed: which tasks, non-negative.
        num_tasks: how many, at least 1.
        horizon: inner steps, at least 1.
        split: whose tasks. Where its rows are not as many as those of the reported split, the best rate is another.
        particles_at_once: see `run_torch_optimizer`.
        cache: where runs are looked up and kept; None for nowhere.
    """
    if not baseline.tuned:
        return Tuning(
            rate=baseline.rates[0], rates=baseline.rates, scores=(), num_diverged=(), num_tasks=0, split="", edge=""
        )
    found: dict[float, tuple[float, int, float]] = {}

    def try_rates(rates: tuple[float, ...]) -> None:
        losses = baseline.run(
            batched,
            rates,
            split=split,
            seeds=(seed,),
            num_tasks=num_tasks,
            horizon=horizon,
            with_metrics=False,
            particles_at_once=particles_at_once,
            cache=cache,
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
        split=split,
        edge="" if rate is None else "lowest" if rate == rates[0] else "highest" if rate == rates[-1] else "",
    )
