"""Backpropagation and an evolution strategy, weighted by inverse variance (Metz et al. 2019).

Where the meta-loss is smooth, backpropagation's meta-gradient varies little; where long or chaotic unrolls make it
explode, that of evolution strategies does. Each coordinate of theta takes

    g = (g_bp / v_bp + g_es / v_es) / (1 / v_bp + 1 / v_es),

the combination with the smallest variance if the two are independent. Half of the particles run one estimator and half
the other, each half in `num_groups` groups whose meta-gradients are independent: their spread gives v.

Deviations from the paper: the spread of a few groups is a poor estimate of a variance, so v is an exponential average
over outer steps (`decay=0` for the current one alone); and backpropagation runs at theta itself, not at perturbed
thetas.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from learned_opt.estimators.antithetic import AntitheticEstimator, flatten, unflatten
from learned_opt.estimators.base import Estimate, Estimator, Workload
from learned_opt.estimators.sharded import mean_over_ranks, sharded
from learned_opt.estimators.table import SINGLE, make
from learned_opt.task import Tensors


@dataclasses.dataclass
class MixState:
    """States of the groups, and the averaged variances.

    Attributes:
        groups: one list per estimator, of its groups' states.
        variances: [2, num_theta], exponential averages of the variances of the two mean meta-gradients.
        counter: outer steps so far.
    """

    groups: list[list[Any]]
    variances: torch.Tensor
    counter: int = 0


class InverseVarianceMix(Estimator):
    """Backpropagation and an evolution strategy, weighted by inverse variance.

    Args:
        evolution: "es", "pes" or "nres".
        backprop_settings, evolution_settings: settings of the two estimators.
        num_groups: independent groups per estimator, at least 2.
        decay: of the exponential average of variances, in [0, 1).
    """

    kind: ClassVar[str] = "mix"
    spans_ranks: ClassVar[bool] = True

    def __init__(
        self,
        evolution: str = "es",
        backprop_settings: Mapping[str, Any] | None = None,
        evolution_settings: Mapping[str, Any] | None = None,
        num_groups: int = 2,
        decay: float = 0.9,
    ) -> None:
        if num_groups < 2:
            raise ValueError(f"num_groups must be at least 2, since their spread gives the variance; got {num_groups}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1); got {decay}")
        second = make(SINGLE, evolution, evolution_settings or {})
        if not isinstance(second, AntitheticEstimator):
            raise ValueError(f"evolution must be an evolution strategy, es, pes or nres; got {evolution!r}")
        first = make(SINGLE, "backprop", backprop_settings or {})
        self.estimators: tuple[Estimator, Estimator] = (sharded(first), sharded(second))
        self.num_groups = num_groups
        self.decay = decay
        self._unit = 2 * num_groups * 2 * second.num_pairs

    def init(self, work: Workload, theta: Tensors, ids: Sequence[int]) -> MixState:
        """Particles of both estimators, at the start of their first episode.

        Raises:
            ValueError: the number of particles cannot be divided among the groups.
        """
        if not ids or len(ids) % self._unit:
            above = (len(ids) // self._unit + 1) * self._unit
            raise ValueError(
                f"num_particles must be a multiple of {self._unit}: mix runs two estimators in num_groups="
                f"{self.num_groups} groups of antithetic pairs each; got {len(ids)}; use {above}"
            )
        size = len(ids) // (2 * self.num_groups)
        parts = [list(ids)[i : i + size] for i in range(0, len(ids), size)]
        halves = (parts[: self.num_groups], parts[self.num_groups :])
        flat = flatten(theta)
        return MixState(
            groups=[[e.init(work, theta, part) for part in half] for e, half in zip(self.estimators, halves)],
            variances=flat.new_zeros(2, len(flat)),
        )

    def estimate(self, work: Workload, theta: Tensors, state: MixState) -> Estimate:
        own = [
            estimator.estimate(work, theta, group)
            for estimator, groups in zip(self.estimators, state.groups)
            for group in groups
        ]
        means_over_ranks, _ = mean_over_ranks(own, work.ranks)
        estimates = [means_over_ranks[: self.num_groups], means_over_ranks[self.num_groups :]]
        grads = torch.stack([torch.stack([flatten(e.grads) for e in row]) for row in estimates])
        means, now = grads.mean(1), grads.var(1) / self.num_groups
        # A coordinate whose variance overflows has no weight this time, and leaves its average as it was.
        usable = torch.isfinite(means) & torch.isfinite(now)
        averaged = state.variances * self.decay + now * (1 - self.decay)
        state.variances = torch.where(usable, averaged, state.variances)
        state.counter += 1
        # The averages' common bias at the start cancels in the weights.
        total = state.variances.sum(0)
        es_weight = torch.where(total > 0, state.variances[0] / total, 0.5)
        es_weight = torch.where(usable[0], torch.where(usable[1], es_weight, 0.0), 1.0)
        means = torch.where(usable | ~usable.any(0), means, 0.0)
        return Estimate(
            grads=unflatten(torch.lerp(means[0], means[1], es_weight), theta),
            meta_loss=sum(e.meta_loss for e in means_over_ranks) / len(means_over_ranks),
            num_inner_steps=sum(e.num_inner_steps for e in own),
            num_invalid=sum(e.num_invalid for e in own),
            num_clipped=sum(e.num_clipped for e in own),
            metrics={"es_weight": float(es_weight.mean())},
        )

    def horizons(self, state: MixState) -> list[int]:
        return [h for e, groups in zip(self.estimators, state.groups) for group in groups for h in e.horizons(group)]

    def state_dict(self, state: MixState) -> dict[str, Any]:
        return {
            "groups": [[e.state_dict(g) for g in groups] for e, groups in zip(self.estimators, state.groups)],
            "variances": state.variances,
            "counter": state.counter,
        }

    def load_state_dict(self, work: Workload, saved: dict[str, Any]) -> MixState:
        groups = [[e.load_state_dict(work, g) for g in groups] for e, groups in zip(self.estimators, saved["groups"])]
        return MixState(groups, saved["variances"].to(work.batched.device), saved["counter"])

    def merge(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        groups = [
            [e.merge([part["groups"][half][group] for part in parts]) for group in range(self.num_groups)]
            for half, e in enumerate(self.estimators)
        ]
        return {"groups": groups, "variances": parts[0]["variances"], "counter": parts[0]["counter"]}
