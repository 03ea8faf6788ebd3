"""What the evolution strategies share: pairs of opposite perturbations of theta, and their differences.

A *pair* is one task run twice, by theta + ε and by theta − ε: its two *arms*. Both arms have the particle's name, hence
the same task, batches and horizons, and they restart together. If only one arm's loss stops being finite, the pair is
left out of the meta-gradient of that truncation and both arms restart, so that they stay on the same task.

ε is a pure function of (run seed, particle, pair within the particle, counter): nothing random is stored, a run resumes
to the bit, and it does not matter which process runs which pair. The vector is drawn in float64 over theta's tensors in
the order of their names.

A rule with P particles in the configuration has P/2 pairs: what estimators cost is comparable at equal numbers of
particles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from learned_opt.distributed import Ranks
from learned_opt.estimators.base import Estimate, Estimator, Workload
from learned_opt.meta_loss import MetaLoss
from learned_opt.particles import Particles, join_states, restart, select_state, start_particles
from learned_opt.segment import Segment
from learned_opt.task import Tensors, generator_for
from learned_opt.unroll import unroll

DIFFERENCES = ("plain", "sign", "clip")

_STREAM = 2
"""Keeps perturbations apart from what other modules draw for the same run seed, particle and episode."""

Pair = tuple[int, int]
"""(particle's index in the whole run, pair within that particle)."""


def flatten(theta: Tensors) -> torch.Tensor:
    """theta as one vector [num_theta], tensors in the order of their names."""
    return torch.cat([theta[name].reshape(-1) for name in sorted(theta)])


def unflatten(flat: torch.Tensor, theta: Tensors) -> Tensors:
    """The inverse of `flatten` for [..., num_theta], with shapes and the order of names of `theta`."""
    names = sorted(theta)
    parts = dict(zip(names, flat.split([theta[name].numel() for name in names], dim=-1)))
    return {name: parts[name].reshape(flat.shape[:-1] + value.shape) for name, value in theta.items()}


def perturbations(
    theta: Tensors,
    sigma: float,
    run_seed: int,
    pairs: Sequence[Pair],
    counters: Sequence[int],
    frozen: Sequence[str] = (),
) -> torch.Tensor:
    """Draw ε ~ N(0, sigma²) for every pair.

    Args:
        theta: the meta-parameters.
        sigma: standard deviation, positive.
        run_seed: the run's seed.
        pairs: whose perturbations to draw.
        counters: per pair, which one of its perturbations.
        frozen: names in theta that are not perturbed.

    Returns:
        [pairs, num_theta], of theta's dtype and device, laid out as by `flatten`.
    """
    reference = next(iter(theta.values()))
    size = sum(value.numel() for value in theta.values())
    drawn = [
        torch.randn(size, generator=generator_for(run_seed, *pair, counter, _STREAM), dtype=torch.float64)
        for pair, counter in zip(pairs, counters)
    ]
    mask = flatten({name: torch.full(value.shape, float(name not in frozen)) for name, value in theta.items()})
    return (torch.stack(drawn) * sigma * mask).to(reference.device, reference.dtype)


def arms_of(theta: Tensors, noise: torch.Tensor, num_plain: int = 0) -> Tensors:
    """theta + ε of all pairs, then theta − ε of all pairs, then `num_plain` copies of theta, stacked."""
    flat = flatten(theta)
    rows = [flat + noise, flat - noise]
    if num_plain:
        rows.append(flat.expand(num_plain, -1))
    return unflatten(torch.cat(rows), theta)


def step_weights(meta_loss: MetaLoss, like: torch.Tensor) -> torch.Tensor:
    """How much each of the normalized losses [steps, …] counts in its particle's meta-loss: [steps]."""
    if meta_loss.average == "final":
        weights = torch.zeros_like(like[:, 0])
        weights[-1] = 1.0
        return weights
    return torch.full_like(like[:, 0], 1 / len(like))


@dataclasses.dataclass
class PairState:
    """Pairs in flight.

    Attributes:
        pairs: their names.
        particles: what is carried from truncation to truncation: one per task (ES), or the arms (PES, NRES).
        counter: truncations so far.
        accumulated: PES: [pairs, num_theta], the sum of the perturbations each pair's current episode has seen; else
            None.
    """

    pairs: list[Pair]
    particles: Particles
    counter: int = 0
    accumulated: torch.Tensor | None = None


class AntitheticEstimator(Estimator):
    """Base of ES, PES and NRES.

    Args:
        sigma: standard deviation of the perturbations of theta, positive.
        num_pairs: pairs that share one task, at least 1.
        difference: what becomes of a pair's difference of meta-losses L(theta + ε) − L(theta − ε): "plain" keeps it,
            "sign" replaces it by ±`difference_scale`, "clip" limits it to ±`difference_scale`. Only "plain" is
            unbiased.
        difference_scale: see difference, positive.
    """

    def __init__(
        self, sigma: float = 0.01, num_pairs: int = 1, difference: str = "plain", difference_scale: float = 1.0
    ) -> None:
        if not sigma > 0:
            raise ValueError(f"sigma must be positive; got {sigma}; 0.01 is a usual value")
        if num_pairs < 1:
            raise ValueError(f"num_pairs must be at least 1; got {num_pairs}")
        if difference not in DIFFERENCES:
            raise ValueError(f"difference must be one of {', '.join(DIFFERENCES)}; got {difference!r}")
        if not difference_scale > 0:
            raise ValueError(f"difference_scale must be positive; got {difference_scale}")
        self.sigma = sigma
        self.num_pairs = num_pairs
        self.difference = difference
        self.difference_scale = difference_scale

    def units(self, work: Workload, ids: Sequence[int]) -> list[list[int]]:
        """The particles in whose place each task's pairs run: 2·num_pairs each.

        Raises:
            ValueError: the number of particles is not a multiple of what one task takes, or the meta-loss has no value
                per particle.
        """
        if work.meta_loss.normalization == "log_mean":
            raise ValueError(
                f"normalization 'log_mean' is of all particles together, and {self.kind} needs a value of each pair; "
                "choose log, ratio or none, or an estimator that differentiates"
            )
        group = 2 * self.num_pairs
        if not ids or len(ids) % group:
            below, above = len(ids) // group * group, (len(ids) // group + 1) * group
            raise ValueError(
                f"num_particles must be a multiple of {group}: {self.kind} runs every task with "
                f"num_pairs={self.num_pairs} "
                f"pair(s) of two antithetic arms; got {len(ids)}; use {f'{below} or ' if below else ''}{above}"
            )
        return [list(ids)[start : start + group] for start in range(0, len(ids), group)]

    def pairs_of(self, work: Workload, ids: Sequence[int]) -> list[Pair]:
        """The pairs that take the place of particles with these indices.

        Raises:
            ValueError: as `units` does.
        """
        return [(unit[0], pair) for unit in self.units(work, ids) for pair in range(self.num_pairs)]

    def start_arms(self, work: Workload, pairs: Sequence[Pair]) -> Particles:
        """Both arms of every pair at the start of their first episode: all plus arms, then all minus arms."""
        return start_particles(work.batched, work.rule, work.plan, [particle for particle, _ in pairs] * 2)

    def perturb(self, work: Workload, theta: Tensors, pairs: Sequence[Pair], counters: Sequence[int]) -> torch.Tensor:
        """The perturbations of these pairs, [pairs, num_theta]."""
        return perturbations(theta, self.sigma, work.plan.run_seed, pairs, counters, work.frozen)

    def advance(
        self, work: Workload, theta: Tensors, particles: Particles, noise: torch.Tensor, num_steps: int
    ) -> tuple[Segment, torch.Tensor]:
        """Unroll both arms of every pair, and any further particles behind them under theta itself.

        Returns:
            (segment, [pairs] mask of those whose arms both stayed finite).
        """
        num = len(noise)
        thetas = arms_of(theta, noise, len(particles) - 2 * num)
        segment = unroll(
            work.rule,
            thetas,
            work.batched,
            work.plan,
            particles,
            num_steps,
            per_particle=True,
            initial_params=work.initial_params(thetas),
        )
        plus, minus = segment.valid[:num], segment.valid[num : 2 * num]
        # The unroll has restarted the arm that failed; its partner must follow it to the next task.
        partners = [c + num for c in (minus & ~plus).nonzero().flatten().tolist()]
        partners += (plus & ~minus).nonzero().flatten().tolist()
        if partners:
            restart(work.batched, work.rule, work.plan, particles, partners)
        return segment, plus & minus

    def differences(
        self, work: Workload, losses: torch.Tensor, initial: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """Each step's share of the pairs' differences of meta-losses, [steps, pairs]; zero for invalid pairs."""
        num = len(valid)
        both = valid.repeat(2)
        values = work.meta_loss.normalize(
            torch.where(both, losses[:, : 2 * num], 1.0), torch.where(both, initial[:, : 2 * num], 1.0)
        )
        return (values[:, :num] - values[:, num:]) * step_weights(work.meta_loss, values)[:, None] * valid

    def shape_difference(self, difference: torch.Tensor) -> torch.Tensor:
        """Apply the `difference` option to differences of meta-losses [pairs]."""
        if self.difference == "sign":
            return difference.sign() * self.difference_scale
        if self.difference == "clip":
            return difference.clamp(-self.difference_scale, self.difference_scale)
        return difference

    def finish(
        self,
        work: Workload,
        theta: Tensors,
        total: torch.Tensor,
        losses: torch.Tensor,
        initial: torch.Tensor,
        valid: torch.Tensor,
        num_inner_steps: int,
    ) -> Estimate:
        """The estimate from the sum over pairs of difference times direction.

        Args:
            total: [num_theta].
            losses, initial: [steps, 2 pairs] of the arms.
            valid: [pairs].
            num_inner_steps: what was spent.
        """
        grads = total / (2 * self.sigma**2 * max(int(valid.sum()), 1))
        arms = slice(0, 2 * len(valid))
        return Estimate(
            grads=unflatten(grads, theta),
            meta_loss=float(work.meta_loss(losses[:, arms], initial[:, arms], valid.repeat(2))),
            num_inner_steps=num_inner_steps,
            num_invalid=2 * int((~valid).sum()),
            num_clipped=work.meta_loss.num_clipped(losses[:, arms], initial[:, arms]),
            weight=float(valid.sum()),
        )

    def horizons(self, state: PairState) -> list[int]:
        return list(state.particles.horizons)

    def state_dict(self, state: PairState) -> dict[str, Any]:
        return {
            "pairs": [list(pair) for pair in state.pairs],
            "particles": state.particles.state_dict(),
            "counter": state.counter,
            "accumulated": state.accumulated,
        }

    def load_state_dict(self, work: Workload, saved: dict[str, Any]) -> PairState:
        return PairState(
            pairs=[(particle, pair) for particle, pair in saved["pairs"]],
            particles=Particles.from_state_dict(saved["particles"], work.batched, work.plan.split),
            counter=saved["counter"],
            accumulated=saved["accumulated"],
        )

    def merge(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        pairs = [pair for part in parts for pair in part["pairs"]]
        order = sorted(range(len(pairs)), key=pairs.__getitem__)
        joined = join_states([part["particles"] for part in parts])
        columns: list[list[int]] = [[], []]  # of the plus arms and the minus arms, pair by pair
        at = 0
        for part in parts:
            count = len(part["pairs"])
            columns[0] += range(at, at + count)
            columns[1] += range(at + count, at + 2 * count)
            at += len(part["particles"]["ids"])
        if at == 2 * len(pairs):
            chosen = [arm[k] for arm in columns for k in order]
        else:  # one particle for each task
            chosen = sorted(range(at), key=joined["ids"].__getitem__)
        accumulated = parts[0]["accumulated"]
        if accumulated is not None:
            accumulated = torch.cat([part["accumulated"] for part in parts])[order]
        return {
            "pairs": [pairs[k] for k in order],
            "particles": select_state(joined, chosen),
            "counter": parts[0]["counter"],
            "accumulated": accumulated,
        }

    def part(self, saved: dict[str, Any], ranks: Ranks) -> dict[str, Any] | None:
        pairs, particles, accumulated = saved["pairs"], saved["particles"], saved["accumulated"]
        tasks = range(len(pairs) // self.num_pairs)
        mine = ranks.share(tasks, first=pairs[0][0] // (2 * self.num_pairs))
        if not mine:
            return None
        chosen = [task * self.num_pairs + k for task in mine for k in range(self.num_pairs)]
        arms = len(particles["ids"]) == 2 * len(pairs)
        return {
            "pairs": [pairs[k] for k in chosen],
            "particles": select_state(particles, [*chosen, *(k + len(pairs) for k in chosen)] if arms else mine),
            "counter": saved["counter"],
            "accumulated": None if accumulated is None else accumulated[chosen],
        }
