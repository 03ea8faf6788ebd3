"""Persistent evolution strategies (Vicol, Metz and Sohl-Dickstein 2021).

Every arm is a particle of its own that keeps its perturbed state from truncation to truncation, and a pair remembers
ξ, the sum of the perturbations that its current episode has seen. With L the meta-loss of this truncation,

    g = ξ · (L(+) − L(−)) / (2σ²),

which is unbiased for the whole unroll since the episode's start, at any truncation: the losses here depend on every one
of those perturbations, and each has its share in ξ.

An episode may end inside a truncation. Losses up to there belong to the old ξ; those after it have seen this
truncation's perturbation alone, and are multiplied by that. Where an episode ends with the truncation, ξ starts again
from zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from learned_opt.estimators.antithetic import AntitheticEstimator, PairState, flatten
from learned_opt.estimators.base import Estimate, Workload
from learned_opt.task import Tensors


class PES(AntitheticEstimator):
    """Persistent ES; see `AntitheticEstimator` for its arguments."""

    kind: ClassVar[str] = "pes"

    def init(self, work: Workload, theta: Tensors, ids: Sequence[int]) -> PairState:
        pairs = self.pairs_of(work, ids)
        return PairState(
            pairs,
            self.start_arms(work, pairs),
            accumulated=flatten(theta).new_zeros(len(pairs), flatten(theta).numel()),
        )

    def estimate(self, work: Workload, theta: Tensors, state: PairState) -> Estimate:
        assert state.accumulated is not None
        particles, num = state.particles, len(state.pairs)
        noise = self.perturb(work, theta, state.pairs, [state.counter] * num)
        seen = state.accumulated + noise
        # Steps until each pair's first restart; its arms restart together, so the plus arm speaks for both.
        left = [h - s if h >= 0 else work.truncation for h, s in zip(particles.horizons[:num], particles.steps[:num])]
        episodes = list(particles.episodes[:num])
        segment, valid = self.advance(work, theta, particles, noise, work.truncation)
        steps = torch.arange(work.truncation, device=noise.device)[:, None]
        before = steps < torch.tensor(left, device=noise.device)
        shares = self.differences(work, segment.losses, segment.initial, valid)
        total = self.shape_difference((shares * before).sum(0)) @ seen
        total = total + self.shape_difference((shares * ~before).sum(0)) @ noise

        at_start = torch.tensor([s == 0 for s in particles.steps[:num]], device=noise.device)[:, None]
        same = torch.tensor([e == old for e, old in zip(particles.episodes, episodes)], device=noise.device)[:, None]
        state.accumulated = torch.where(at_start, 0.0, torch.where(same, seen, noise))
        state.counter += 1
        return self.finish(work, theta, total, segment.losses, segment.initial, valid, work.truncation * len(particles))
