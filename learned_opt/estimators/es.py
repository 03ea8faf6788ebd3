"""Antithetic evolution strategies on truncations.

For every pair, with ε ~ N(0, σ²) and both arms starting from the state that theta itself has reached,

    g = ε · (L(theta + ε) − L(theta − ε)) / (2σ²),

an unbiased estimate of the gradient of E[L(theta + ε)], where L is the meta-loss of this truncation alone. Like
truncated backpropagation it ignores how theta shaped the state at the truncation's start (Metz et al. 2019 discuss both
biases); with a truncation as long as the horizon, and `random_offsets=False`, it is ES on full unrolls, which has no
such bias.

Between truncations the unperturbed particles advance, one per task: perturbed states are thrown away. They run in the
same batch as the arms, and not at all where their episode ends with the truncation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from learned_opt.estimators.antithetic import AntitheticEstimator, PairState
from learned_opt.estimators.base import Estimate, Workload
from learned_opt.particles import put, restart, start_particles, take
from learned_opt.task import Tensors


class TruncatedES(AntitheticEstimator):
    """Antithetic ES; see `AntitheticEstimator` for its arguments."""

    kind: ClassVar[str] = "es"

    def init(self, work: Workload, theta: Tensors, ids: Sequence[int]) -> PairState:
        pairs = self.pairs_of(work, ids)
        names = [particle for particle, _ in pairs[:: self.num_pairs]]
        return PairState(pairs, start_particles(work.batched, work.rule, work.plan, names))

    def estimate(self, work: Workload, theta: Tensors, state: PairState) -> Estimate:
        base, num = state.particles, len(state.pairs)
        noise = self.perturb(work, theta, state.pairs, [state.counter] * num)
        owners = [j // self.num_pairs for j in range(num)]
        ends = [h >= 0 and h - s == work.truncation for h, s in zip(base.horizons, base.steps)]
        going_on = [column for column, end in enumerate(ends) if not end]
        particles = take(base, owners + owners + going_on)
        segment, valid = self.advance(work, theta, particles, noise, work.truncation)
        put(base, going_on, particles, range(2 * num, len(particles)))
        if any(ends):
            restart(work.batched, work.rule, work.plan, base, [column for column, end in enumerate(ends) if end])
        state.counter += 1
        difference = self.shape_difference(self.differences(work, segment.losses, segment.initial, valid).sum(0))
        return self.finish(
            work, theta, difference @ noise, segment.losses, segment.initial, valid, work.truncation * len(particles)
        )
