"""Noise-reuse evolution strategies (Li et al. 2023).

Like PES every arm keeps its perturbed state, but a pair draws one perturbation ε for a whole episode and applies it in
all of the episode's truncations:

    g = ε · (L(+) − L(−)) / (2σ²).

It is unbiased for the gradient of the whole unroll, and its variance does not grow with the number of truncations in an
episode.

An episode that ends inside a truncation ends its perturbation too: the truncation is cut there, and the next episode
runs on with its own. ε is drawn from the episode's number, so there is nothing to store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from learned_opt.estimators.antithetic import AntitheticEstimator, PairState, flatten
from learned_opt.estimators.base import Estimate, Workload
from learned_opt.task import Tensors


class NRES(AntitheticEstimator):
    """Noise-reuse ES; see `AntitheticEstimator` for its arguments."""

    kind: ClassVar[str] = "nres"

    def init(self, work: Workload, theta: Tensors, ids: Sequence[int]) -> PairState:
        pairs = self.pairs_of(work, ids)
        return PairState(pairs, self.start_arms(work, pairs))

    def estimate(self, work: Workload, theta: Tensors, state: PairState) -> Estimate:
        particles, num = state.particles, len(state.pairs)
        pieces: list[tuple[int, torch.Tensor]] = []
        losses, initial = [], []
        valid = torch.ones(num, dtype=torch.bool, device=work.batched.device)
        done = 0
        while done < work.truncation:
            left = [h - s for h, s in zip(particles.horizons, particles.steps) if h >= 0]
            stretch = min([work.truncation - done, *left])
            noise = self.perturb(work, theta, state.pairs, particles.episodes[:num])
            segment, piece_valid = self.advance(work, theta, particles, noise, stretch)
            losses.append(segment.losses)
            initial.append(segment.initial)
            # A pair that failed has been restarted, but the truncation it failed in is left out as a whole.
            valid = valid & piece_valid
            done += stretch
            pieces.append((done, noise))
        state.counter += 1
        all_losses, all_initial = torch.cat(losses), torch.cat(initial)
        shares = self.differences(work, all_losses, all_initial, valid)
        total = torch.zeros_like(flatten(theta))
        # The truncation is cut where any pair's episode ends; a pair's difference is of all it did under one ε, so that
        # it does not depend on which other pairs run beside it.
        difference, start = shares.new_zeros(num), 0
        for index, (stop, noise) in enumerate(pieces):
            difference = difference + shares[start:stop].sum(0)
            last = index + 1 == len(pieces)
            over = torch.ones_like(valid) if last else (pieces[index + 1][1] != noise).any(1)
            total = total + torch.where(over, self.shape_difference(difference), 0.0) @ noise
            difference, start = torch.where(over, 0.0, difference), stop
        return self.finish(work, theta, total, all_losses, all_initial, valid, work.truncation * len(particles))
