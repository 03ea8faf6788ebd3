"""The outer loop's body: one outer step, validation, and the whole state of a run.

An outer step lets every family's estimator advance its particles by one truncation, averages the meta-gradients, clips
their global norm and moves theta with a plain `torch.optim` optimizer. Everything that decides what comes next is
in `state_dict`: theta, the meta-optimizer, every particle in flight, the counters that name tasks and batches,
and the best theta so far. A run that is stopped anywhere and resumed from it ends with the same bits.

Several ranks (`learned_opt.distributed`) hold a share of the particles and of the validation tasks each, and everything
else alike: they meet once in an outer step for the meta-gradients, once for theta, and once in a validation.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from learned_opt.batched import BatchedFamily, check_device
from learned_opt.curriculum import Action, CurriculumState, frozen_names
from learned_opt.distributed import ALONE, Ranks, StoppedElsewhere, on_cpu
from learned_opt.estimators.base import Estimate, Estimator, Workload
from learned_opt.estimators.sharded import mean_over_ranks, sharded
from learned_opt.initial_params import check_size, is_initial, name_of, with_initial
from learned_opt.meta_config import MetaTrainerConfig, optimizer_class
from learned_opt.particles import EpisodePlan, start_particles
from learned_opt.rules.base import UpdateRule
from learned_opt.task import TaskFamily, Tensors
from learned_opt.unroll import unroll

_SKIPS_IN_A_ROW = 50
_NORM_DECAY = 0.9
"""Of the running average of a family's squared meta-gradient norm, where families are balanced."""


class MetaTrainer:
    """Meta-trains an update rule on task families.

    Args:
        rule: the update rule.
        families: label -> family to meta-train on, at least one.
        config: how.
        estimator: turns truncations into meta-gradients.
        validation_families: label -> family to choose the checkpoint on; the training families (on their
            meta-validation tasks) by default.
        theta: where to start; drawn from the seed by default.
        device: where everything runs.
        dtype: floating-point type of theta, parameters and state.
        ranks: the processes that share the particles; each makes a MetaTrainer with the same other arguments, and they
            call its methods in the same order.

    Attributes:
        theta: the meta-parameters, updated in place.
        outer_step: outer steps taken.
        best_theta, best_score, best_step: the theta with the lowest validation score so far; None, infinity, −1 before
            the first.
        totals: counts since the start: "inner_steps" (times particles), "skipped" outer steps, "invalid" particles
            restarted, "clipped" losses.
    """

    def __init__(
        self,
        rule: UpdateRule,
        families: Mapping[str, TaskFamily],
        config: MetaTrainerConfig,
        estimator: Estimator,
        *,
        validation_families: Mapping[str, TaskFamily] | None = None,
        theta: Tensors | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        ranks: Ranks = ALONE,
    ) -> None:
        if not families:
            raise ValueError("families is empty; name at least one family to meta-train on")
        if config.families_per_step > len(families):
            raise ValueError(
                f"families_per_step ({config.families_per_step}) exceeds the number of families ({len(families)})"
            )
        self.rule, self.config, self.estimator, self.ranks = rule, config, estimator, ranks
        self._sharded = sharded(estimator)
        device = check_device(device)
        cache: dict[TaskFamily | int, BatchedFamily] = {}

        def batched(family: TaskFamily) -> BatchedFamily:
            """Equal families share one; a family with a list among its fields, which has no hash, equals itself."""
            key: TaskFamily | int = family
            try:
                hash(family)
            except TypeError:
                key = id(family)
            if key not in cache:
                cache[key] = BatchedFamily(family, device=device, dtype=dtype)
            return cache[key]

        programs = {label: batched(family) for label, family in families.items()}
        theta = theta or rule.init_theta(torch.Generator().manual_seed(config.seed))
        theta = with_initial(theta, programs, config.initial_params)
        self.theta: Tensors = {n: v.detach().clone().to(device, dtype) for n, v in theta.items()}
        ranks.spread(list(self.theta.values()))
        self._initial = [name for name in self.theta if is_initial(name)]
        if self._initial and not estimator.trains_initial_params:
            raise ValueError(
                f"initial_params.families names {', '.join(config.initial_params.families)}, but estimator "
                f"{estimator.kind!r} as it is set never learns initial parameters; lower its share below 1"
            )
        groups = [{"params": [v for n, v in self.theta.items() if not is_initial(n)]}]
        if self._initial:
            groups.append({"params": [self.theta[n] for n in self._initial]})
        self.optimizer = optimizer_class(config.optimizer)(groups, lr=config.learning_rate)
        self.curriculum = CurriculumState()
        horizons = config.horizons_at(self.curriculum)
        plan = EpisodePlan(split="meta_train", run_seed=config.seed, horizons=horizons)
        frozen = frozen_names(config.stages, 0, self.theta)
        self.work = {
            label: Workload(
                rule=rule,
                batched=program,
                plan=plan,
                meta_loss=config.meta_loss,
                truncation=config.truncation,
                frozen=self._frozen_for(label, frozen),
                initial=name_of(label) if name_of(label) in self.theta else "",
                ranks=ranks,
            )
            for label, program in programs.items()
        }
        self.validation = {n: batched(f) for n, f in (validation_families or families).items()}
        for label, program in self.validation.items():
            if name_of(label) in self.theta:
                check_size(label, self.theta[name_of(label)], program)
        self.estimator_states = {
            label: self._sharded.init(work, self.theta, range(i * config.num_particles, (i + 1) * config.num_particles))
            for i, (label, work) in enumerate(self.work.items())
        }
        self.outer_step = 0
        self.best_theta: Tensors | None = None
        self.best_score, self.best_step = math.inf, -1
        self.totals = {"inner_steps": 0, "skipped": 0, "invalid": 0, "clipped": 0}
        self._skips_in_a_row = 0
        self._squared_norms: dict[str, float] = {}

    def _chosen(self) -> list[str]:
        labels, count = list(self.work), self.config.families_per_step
        if not count:
            return labels
        start = self.outer_step * count
        return [labels[(start + i) % len(labels)] for i in range(count)]

    def step(self) -> dict[str, float]:
        """Take one outer step.

        Returns:
            Metrics: "meta_loss" (and "meta_loss/<label>" per family), "grad_norm" before and "grad_norm_clipped" after
            clipping, "learning_rate", "horizon" (the mean over particles), and the totals.

        Raises:
            RuntimeError: 50 outer steps in a row had no finite meta-gradient.
        """
        config = self.config
        frozen = frozen_names(config.stages, self.outer_step, self.theta)
        self._plan_ahead(frozen)
        labels = self._chosen() * config.accumulation
        own = [self._sharded.estimate(self.work[n], self.theta, self.estimator_states[n]) for n in labels]
        flying = [h for state in self.estimator_states.values() for h in self._sharded.horizons(state)]
        means, horizons = mean_over_ranks(own, self.ranks, [sum(flying), len(flying)])
        estimates: list[tuple[str, Estimate]] = list(zip(labels, means))
        if config.balance_families:
            estimates = [(label, self._balanced(label, estimate)) for label, estimate in estimates]
        for name, value in self.theta.items():
            # No gradient, rather than zeros, for what is held fixed: Adam would move on with its momentum.
            # Initial parameters learn from their own family alone.
            grads = [e.grads[name] for label, e in estimates if not is_initial(name) or name == name_of(label)]
            value.grad = None if name in frozen or not grads else torch.stack(grads).mean(0)
        weights = [value for name, value in self.theta.items() if not is_initial(name)]
        norm = float(torch.nn.utils.clip_grad_norm_(weights, config.clip_norm))
        initial_norms = [
            float(torch.nn.utils.clip_grad_norm_(self.theta[name], config.initial_params.clip_norm))
            for name in self._initial
        ]
        finite = all(map(math.isfinite, [norm, *initial_norms]))
        for group, rate in zip(
            self.optimizer.param_groups, (config.learning_rate, config.initial_params.learning_rate)
        ):
            group["lr"] = config.learning_rate_at(self.outer_step, rate)
        if finite:
            self.optimizer.step()
            self.ranks.spread(list(self.theta.values()))  # machines of different kinds may round differently
        self.optimizer.zero_grad()
        self.outer_step += 1
        self.totals["inner_steps"] += sum(e.num_inner_steps for _, e in estimates)
        self.totals["invalid"] += sum(e.num_invalid for _, e in estimates)
        self.totals["clipped"] += sum(e.num_clipped for _, e in estimates)
        self.totals["skipped"] += not finite
        self._skips_in_a_row = 0 if finite else self._skips_in_a_row + 1
        if self._skips_in_a_row >= _SKIPS_IN_A_ROW:
            raise (RuntimeError if self.ranks.is_first else StoppedElsewhere)(
                f"the meta-gradient was not finite in {_SKIPS_IN_A_ROW} outer steps in a row; lower learning_rate "
                f"({config.learning_rate}) or the rule's output_scale, or check that the tasks' losses are finite"
            )
        metrics = {"meta_loss": sum(e.meta_loss for _, e in estimates) / len(estimates)}
        for label in dict(estimates):
            values = [e.meta_loss for n, e in estimates if n == label]
            metrics[f"meta_loss/{label}"] = sum(values) / len(values)
        metrics |= {
            "grad_norm": norm,
            "grad_norm_clipped": min(norm, config.clip_norm) if finite else math.nan,
            "learning_rate": config.learning_rate_at(self.outer_step - 1),
            "horizon": horizons[0] / horizons[1],
        }
        if initial_norms:
            metrics["grad_norm_initial"] = max(initial_norms)
        for name in {name: None for _, e in estimates for name in e.metrics}:
            values = [e.metrics[name] for _, e in estimates if name in e.metrics]
            metrics[f"estimator/{name}"] = sum(values) / len(values)
        return metrics | {name: float(value) for name, value in self.totals.items()}

    def _balanced(self, label: str, estimate: Estimate) -> Estimate:
        """The estimate with the rule's meta-gradient over the root of its family's average squared norm."""
        rule = {name: grad for name, grad in estimate.grads.items() if not is_initial(name)}
        squared = float(sum(grad.double().square().sum() for grad in rule.values()))
        if not math.isfinite(squared):
            return estimate  # the outer step will be skipped
        before = self._squared_norms.get(label)
        average = squared if before is None else _NORM_DECAY * before + (1 - _NORM_DECAY) * squared
        self._squared_norms[label] = average
        scale = 1 / math.sqrt(average) if average > 0 else 0.0
        return dataclasses.replace(estimate, grads=estimate.grads | {n: grad * scale for n, grad in rule.items()})

    def _plan_ahead(self, frozen: tuple[str, ...]) -> None:
        """Let the workloads follow the curriculum and the stages; episodes in flight keep their horizons."""
        horizons = self.config.horizons_at(self.curriculum)
        for label, work in self.work.items():
            frozen_here = self._frozen_for(label, frozen)
            if work.frozen != frozen_here or work.plan.horizons != horizons:
                plan = dataclasses.replace(work.plan, horizons=horizons)
                self.work[label] = dataclasses.replace(work, plan=plan, frozen=frozen_here)

    def _frozen_for(self, label: str, frozen: tuple[str, ...]) -> tuple[str, ...]:
        """The names that do not matter to this family's tasks join those that are held fixed for all."""
        return (*frozen, *(name for name in self._initial if name != name_of(label) and name not in frozen))

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do: all outer steps taken, or the curriculum at its end."""
        return self.curriculum.finished or self.outer_step >= self.config.outer_steps

    @property
    def validation_due(self) -> bool:
        """Whether this outer step is one to validate after; the last one always is."""
        every = self.config.validation_every
        return self.outer_step == self.config.outer_steps or (every > 0 and self.outer_step % every == 0)

    def validate(self) -> dict[str, float]:
        """Score theta on fixed meta-validation tasks, and remember it if it is the best so far.

        The score is the mean, over families, of the normalized loss: half its mean along the whole unroll, half its
        mean over the last twentieth. A loss that is not finite counts as the clip. With a curriculum the score also
        decides whether the horizon grows; if it does, theta goes back to the best at the horizon before.

        Returns:
            "validation" and "validation/<label>" per family; lower is better.
        """
        scores = self._score()
        score = sum(scores.values()) / len(scores)
        if score < self.best_score:
            self.best_theta = {n: v.clone() for n, v in self.theta.items()}
            self.best_score, self.best_step = score, self.outer_step
        if self.config.curriculum is not None and not self.curriculum.finished:
            self.curriculum, action = self.config.curriculum.observe(self.curriculum, score)
            if action in (Action.ADVANCE, Action.FINISH) and self.best_theta is not None:
                for name, value in self.best_theta.items():
                    self.theta[name].copy_(value)
            if action is Action.ADVANCE:
                self.best_score = (
                    math.inf
                )  # scores at another horizon are not comparable; theta stays the best until beaten
        return {"validation": score, **scores}

    def _score(self) -> dict[str, float]:
        """The validation score of every family."""
        config = self.config
        horizon = config.validation_horizon_at(self.curriculum)
        plan = EpisodePlan(split="meta_validation", run_seed=config.seed)
        scores: dict[str, float] = {}
        for label, batched in self.validation.items():
            losses = start = torch.zeros(horizon, 0, dtype=batched.dtype, device=batched.device)
            mine = self.ranks.share(range(config.validation_tasks))
            if mine:
                segment = unroll(
                    self.rule,
                    self.theta,
                    batched,
                    plan,
                    start_particles(batched, self.rule, plan, mine),
                    horizon,
                    restart_invalid=False,
                    initial_params=self.theta.get(name_of(label)),
                )
                losses = torch.where(torch.isfinite(segment.losses), segment.losses, math.inf)
                start = segment.initial
            values = config.meta_loss.along(losses, start, self.ranks.sum)
            last = max(1, horizon // 20)
            scores[f"validation/{label}"] = float((values.mean() + values[-last:].mean()) / 2)
        return scores

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as plain tensors, numbers, strings, lists and dicts.

        It holds all ranks' particles, and is of one form for any number of ranks. Every rank calls this; those that are
        not the first get an empty dict.
        """
        own = {n: self._sharded.state_dict(s) for n, s in self.estimator_states.items()}
        parts = self.ranks.gather(own if self.ranks.size == 1 else on_cpu(own))
        if parts is None:
            return {}
        return {
            "theta": {n: v.clone() for n, v in self.theta.items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),  # the optimizer changes its tensors in place
            "estimators": {n: self._sharded.merge([part[n] for part in parts]) for n in own},
            "outer_step": self.outer_step,
            "best_theta": self.best_theta,
            "best_score": self.best_score,
            "best_step": self.best_step,
            "curriculum": self.curriculum.state_dict(),
            "totals": dict(self.totals),
            "skips_in_a_row": self._skips_in_a_row,
            "squared_norms": dict(self._squared_norms),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, made by any number of ranks; every rank is given the whole.

        Raises:
            ValueError: the state is of another rule or other families.
        """
        shapes = {n: tuple(v.shape) for n, v in self.theta.items()}
        saved = {n: tuple(v.shape) for n, v in state["theta"].items()}
        if shapes != saved:
            raise ValueError(
                f"the checkpoint's theta has shapes {saved}, but the update rule needs {shapes}; "
                "resume with the same rule"
            )
        if list(state["estimators"]) != list(self.work):
            raise ValueError(
                f"the checkpoint was made with families {', '.join(state['estimators'])}, not {', '.join(self.work)}; "
                "resume with the same families"
            )
        for name, value in state["theta"].items():
            self.theta[name].copy_(value)
        self.curriculum = CurriculumState(**state["curriculum"])
        self._plan_ahead(frozen_names(self.config.stages, state["outer_step"], self.theta))
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.estimator_states = {
            n: self._sharded.load_state_dict(self.work[n], s) for n, s in state["estimators"].items()
        }
        self.outer_step = state["outer_step"]
        best = state["best_theta"]
        self.best_theta = best and {n: v.to(self.theta[n].device) for n, v in best.items()}
        self.best_score, self.best_step = state["best_score"], state["best_step"]
        self.totals = dict(state["totals"])
        self._skips_in_a_row = state["skips_in_a_row"]
        self._squared_norms = dict(state.get("squared_norms", {}))  # checkpoints of 0.1.0 have none
