"""Many draws of a task family optimized at once, by an update rule or by a torch.optim optimizer.

Both go through `learned_opt.unroll.inner_steps` from the same particles: a draw is named by (split, seed, index), so
two optimizers, or two learning rates of one, see the same constants, initial parameters and batches, and their losses
are paired. Where several seeds are given, their draws follow each other. A loss that is not finite is kept as it is:
what to make of it is for `metrics` to say.

Learning rates are one more batch dimension. All tasks at all rates are particles of one program, and every rate is a
parameter group of one torch.optim optimizer over the stacked parameters [tasks, parameters]. For an optimizer that
treats every coordinate alike and apart (SGD, Adam, RMSprop, …) that is exactly what one optimizer per task computes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from learned_opt.batched import BatchedFamily
from learned_opt.particles import EpisodePlan, Particles, fresh_state, place, start_particles
from learned_opt.rules.base import UpdateRule
from learned_opt.task import Tensors
from learned_opt.unroll import Move, inner_steps, learned_move

_STEPS_PER_STRETCH = 128
"""Batches are drawn for so many steps at a time, which bounds their memory whatever the horizon."""

_PARTICLES_PER_METRIC = 8
"""Held-out rows are usually many more than a batch's, so their metrics are computed for a few particles at a time."""

DEFAULT_PARTICLES_AT_ONCE = 256

ParamGroup = dict[str, Any]

MakeOptimizer = Callable[[list[ParamGroup]], torch.optim.Optimizer]
"""From parameter groups, each with "params" and "lr", to an optimizer: `torch.optim.Adam` itself is one."""

MakeSchedule = Callable[[torch.optim.Optimizer, int], LRScheduler]
"""From an optimizer and the horizon to a schedule, which is stepped once after every inner step."""


@dataclasses.dataclass(frozen=True)
class Runs:
    """What optimizing some tasks left behind, on the CPU.

    Attributes:
        losses: [horizon + 1, …, num_tasks], the initial loss and the loss after every inner step, each on its own
            step's batch.
        metrics: the family's `eval_metrics` at the last parameters, each [..., num_tasks]; empty where there are none.
    """

    losses: torch.Tensor
    metrics: Tensors


def run_rule(
    rule: UpdateRule,
    theta: Tensors,
    batched: BatchedFamily,
    *,
    split: str,
    seeds: Sequence[int],
    num_tasks: int,
    horizon: int,
    particles_at_once: int = DEFAULT_PARTICLES_AT_ONCE,
    initial_params: torch.Tensor | None = None,
) -> Runs:
    """Optimize `num_tasks` draws of every seed with an update rule.

    Args:
        rule: the update rule.
        theta: its meta-parameters; moved to the family's device and dtype.
        batched: the family.
        split: where tasks are drawn from, one of `learned_opt.task.SPLITS`.
        seeds: which draws, non-negative and at least one.
        num_tasks: how many for each seed, at least 1.
        horizon: inner steps, at least 1.
        particles_at_once: memory is bounded by so many particles.
        initial_params: learned initial parameters [num_parameters] that all tasks start from; None for their own.

    Returns:
        Losses [horizon + 1, num_seeds · num_tasks], and metrics [num_seeds · num_tasks].

    Raises:
        ValueError: an argument out of range, or a family that draws only tasks with a non-finite loss.
    """
    draws = _draws(seeds, num_tasks, horizon, particles_at_once)
    theta = {name: value.detach().to(batched.device, batched.dtype) for name, value in theta.items()}
    parts = []
    for start in range(0, len(draws), particles_at_once):
        particles = _start(batched, rule, split, draws[start : start + particles_at_once])
        if initial_params is not None:
            place(batched, particles, initial_params)
        with torch.no_grad():
            losses = _losses(batched, particles, horizon, learned_move(rule, theta, particles))
        parts.append(Runs(losses, _metrics(batched, particles)))
    return _join(parts)


def run_torch_optimizer(
    make_optimizer: MakeOptimizer,
    batched: BatchedFamily,
    rates: Sequence[float],
    *,
    split: str,
    seeds: Sequence[int],
    num_tasks: int,
    horizon: int,
    make_schedule: MakeSchedule | None = None,
    elementwise: bool = True,
    flat: bool = False,
    with_metrics: bool = True,
    particles_at_once: int = DEFAULT_PARTICLES_AT_ONCE,
) -> Runs:
    """Optimize the same draws at every learning rate with a torch.optim optimizer.

    Args:
        make_optimizer: makes the optimizer from parameter groups; its `step` must need no closure.
        batched: the family.
        rates: learning rates, positive; at least one.
        split, seeds, num_tasks, horizon: see `run_rule`.
        make_schedule: makes a learning-rate schedule; None for constant rates.
        elementwise: whether the optimizer treats coordinates apart from each other. If it does not (it has norms over a
            tensor, global statistics, …), say False: every particle then gets an optimizer of its own over
            parameters of their true shapes, which is exact and slower.
        flat: whether an optimizer that is not elementwise may get all of a task's parameters as one vector, which is
            faster: true if it knows tensors only by sums over all of them.
        with_metrics: whether to compute the family's metrics.
        particles_at_once: memory is bounded by so many particles, or by the particles of one task or rate.

    Returns:
        Losses [horizon + 1, num_rates, num_seeds · num_tasks], and metrics [num_rates, num_seeds · num_tasks].

    Raises:
        ValueError: an argument out of range, or a family that draws only tasks with a non-finite loss.
    """
    draws = _draws(seeds, num_tasks, horizon, particles_at_once)
    rates = check_rates(rates)
    num_draws_at_once = min(len(draws), particles_at_once)
    num_rates_at_once = max(1, particles_at_once // num_draws_at_once)
    columns = []
    for start in range(0, len(draws), num_draws_at_once):
        drawn = _start(batched, None, split, draws[start : start + num_draws_at_once])
        rows = []
        for first_rate in range(0, len(rates), num_rates_at_once):
            some = rates[first_rate : first_rate + num_rates_at_once]
            particles = _concatenate([drawn] * len(some))
            shapes = "stacked" if elementwise else "flat" if flat else "true"
            optimizers, move = _torch_move(make_optimizer, batched, particles, some, horizon, make_schedule, shapes)
            with torch.no_grad():
                losses = _losses(batched, particles, horizon, move)
            for optimizer in optimizers:
                # Schedule-free optimizers train at one point and are evaluated at another, which `eval` moves to.
                getattr(optimizer, "eval", lambda: None)()
            metrics = _metrics(batched, particles) if with_metrics else {}
            rows.append(
                Runs(
                    losses.view(horizon + 1, len(some), len(drawn)),
                    {name: value.view(len(some), len(drawn)) for name, value in metrics.items()},
                )
            )
        columns.append(_join(rows, dim=-2))
    return _join(columns)


def check_rates(rates: Sequence[float]) -> tuple[float, ...]:
    """The learning rates as floats, or ValueError: there must be one, and all must be positive and finite."""
    out = tuple(float(rate) for rate in rates)
    if not out:
        raise ValueError("rates must hold at least one learning rate; got none")
    for rate in out:
        if not (rate > 0 and math.isfinite(rate)):
            raise ValueError(f"rates must be positive and finite; got {rate}")
    return out


def _draws(seeds: Sequence[int], num_tasks: int, horizon: int, particles_at_once: int) -> list[tuple[int, int]]:
    """(seed, index) of every draw, seed by seed."""
    if not seeds or min(seeds) < 0:
        raise ValueError(f"seeds must be non-negative, and at least one; got {tuple(seeds)}")
    for name, value in (("num_tasks", num_tasks), ("horizon", horizon), ("particles_at_once", particles_at_once)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    return [(seed, index) for seed in seeds for index in range(num_tasks)]


def _start(batched: BatchedFamily, rule: UpdateRule | None, split: str, draws: Sequence[tuple[int, int]]) -> Particles:
    """Particles at the start of these draws."""
    parts = []
    for seed in dict.fromkeys(seed for seed, _ in draws):
        ids = [index for other, index in draws if other == seed]
        parts.append(start_particles(batched, None, EpisodePlan(split=split, run_seed=seed), ids))
    particles = _concatenate(parts)
    if rule is not None:
        particles.rule_state, particles.basis = fresh_state(rule, batched, len(particles))
    return particles


def _concatenate(parts: Sequence[Particles]) -> Particles:
    """All particles of some sets without rule state, one set after the other; the tensors are fresh memory."""

    def numbers(name: str) -> list[int]:
        return [value for part in parts for value in getattr(part, name)]

    def tensors(name: str) -> torch.Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    return Particles(
        ids=numbers("ids"),
        seeds=numbers("seeds"),
        episodes=numbers("episodes"),
        steps=numbers("steps"),
        horizons=numbers("horizons"),
        tasks={name: torch.cat([part.tasks[name] for part in parts]) for name in parts[0].tasks},
        params=tensors("params"),
        grads=tensors("grads"),
        losses=tensors("losses"),
        initial=tensors("initial"),
        rule_state={},
        shapes=parts[0].shapes,
        pending=None if parts[0].pending is None else tensors("pending"),
    )


def _torch_move(
    make_optimizer: MakeOptimizer,
    batched: BatchedFamily,
    particles: Particles,
    rates: Sequence[float],
    horizon: int,
    make_schedule: MakeSchedule | None,
    shapes: str,
) -> tuple[list[torch.optim.Optimizer], Move]:
    """Optimizers over views of the particles' parameters [rates · tasks, D], which they change in place, and a step.

    `shapes` says what an optimizer gets: all tasks "stacked", one task as a "flat" vector, or one in its "true" shapes.
    """
    blocks = particles.params.view(len(rates), -1, particles.params.shape[-1])
    leaves: list[list[torch.Tensor]] = []
    optimizers = []

    def views(row: torch.Tensor) -> list[torch.Tensor]:
        return list(batched.unflatten(row).values()) if shapes == "true" else [row]

    if shapes == "stacked":
        leaves = [[block.detach().requires_grad_()] for block in blocks]
        groups = [{"params": leaf, "lr": rate} for leaf, rate in zip(leaves, rates)]
        optimizers = [make_optimizer(groups)]
    else:
        for block, rate in zip(blocks, rates):
            for row in block:
                leaves.append([view.detach().requires_grad_() for view in views(row)])
                optimizers.append(make_optimizer([{"params": leaves[-1], "lr": rate}]))
    schedules = [make_schedule(optimizer, horizon) for optimizer in optimizers] if make_schedule else []

    def move(params: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
        for parts, row in zip(leaves, grads.view_as(blocks) if shapes == "stacked" else grads):
            for leaf, grad in zip(parts, views(row)):
                leaf.grad = grad
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        return params

    return optimizers, move


def _losses(batched: BatchedFamily, particles: Particles, horizon: int, move: Move) -> torch.Tensor:
    """Advance the particles to the horizon; losses [horizon + 1, particles]."""
    losses = [particles.losses]
    while len(losses) <= horizon:
        num_steps = min(_STEPS_PER_STRETCH, horizon + 1 - len(losses))
        losses.extend(loss for loss, _, _ in inner_steps(batched, particles, num_steps, move))
    return torch.stack(losses).cpu()


def _metrics(batched: BatchedFamily, particles: Particles) -> Tensors:
    parts = []
    for start in range(0, len(particles), _PARTICLES_PER_METRIC):
        rows = slice(start, start + _PARTICLES_PER_METRIC)
        tasks = {name: value[rows] for name, value in particles.tasks.items()}
        parts.append(batched.eval_metrics(particles.params[rows], tasks))
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def _join(parts: Sequence[Runs], dim: int = -1) -> Runs:
    names = parts[0].metrics
    return Runs(
        torch.cat([part.losses for part in parts], dim=dim),
        {name: torch.cat([part.metrics[name] for part in parts], dim=dim) for name in names},
    )
