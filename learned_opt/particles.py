"""Particles: the tasks in flight, how they start, restart and are copied.

A particle is one task being run. Which task it gets, and for how long, is a pure function of the run's seed, the
particle's number and its episode, so that particles are rebuilt from those anywhere.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from learned_opt.batched import BatchedFamily
from learned_opt.rules.base import UpdateRule
from learned_opt.rules.context import TensorLayout
from learned_opt.task import Tensors, task_seed
from learned_opt.truncation import HorizonSchedule

_DRAWS_BEFORE_GIVING_UP = 10
_LISTS = ("ids", "seeds", "episodes", "steps", "horizons")
_TENSORS = ("params", "grads", "losses", "initial")


INITIAL_PREFIX = "initial_params."
"""In theta, the names of learned initial parameters begin so; the label of their family follows."""


def rule_part(theta: Tensors) -> Tensors:
    """theta without learned initial parameters: what the update rule itself is given."""
    return {name: value for name, value in theta.items() if not name.startswith(INITIAL_PREFIX)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodePlan:
    """Which task and horizon a particle's next episode has: a pure function of run seed, particle and episode.

    Attributes:
        split: where tasks are drawn from.
        run_seed: the run's seed, non-negative.
        horizons: the schedule of horizons; None means that particles never reset.
    """

    split: str
    run_seed: int
    horizons: HorizonSchedule | None = None

    def draw(self, particle: int, episode: int) -> tuple[int, int]:
        """(task seed, horizon) of this episode; horizon −1 for never."""
        horizon = self.horizons.draw(self.run_seed, particle, episode) if self.horizons else -1
        return task_seed(self.split, self.run_seed, particle, episode), horizon


@dataclasses.dataclass
class Particles:
    """Tasks in flight, stacked.

    Attributes:
        ids: each particle's index in the whole run.
        seeds, episodes, steps, horizons: per particle, plain integers.
        tasks: constants, each [particles, …].
        params, grads: [particles, num_parameters]; the gradient is that of the current step's batch at `params`.
        losses: [particles], at `params`.
        initial: [particles], the loss that judges, at the parameters that the family drew for the episode: the scale
            of the task, also where the episode starts from learned initial parameters.
        rule_state: tensors [..., particles · num_parameters].
        shapes: of each parameter tensor of one task.
        basis: the bases of a rule that has one (`learned_opt.rules.basis`), tensors [particles, …]; empty otherwise.
        pending: where gradients are delayed, those of the next steps, [particles, delay, num_parameters], the oldest
            first, and `grads` is the one that the current step sees; None otherwise.
    """

    ids: list[int]
    seeds: list[int]
    episodes: list[int]
    steps: list[int]
    horizons: list[int]
    tasks: Tensors
    params: torch.Tensor
    grads: torch.Tensor
    losses: torch.Tensor
    initial: torch.Tensor
    rule_state: Tensors
    shapes: tuple[tuple[int, ...], ...]
    basis: Tensors = dataclasses.field(default_factory=dict)
    pending: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Coordinates of each parameter tensor of one task."""
        return tuple(map(math.prod, self.shapes))

    @property
    def layout(self) -> TensorLayout:
        """Where the particles' parameter tensors lie among their coordinates."""
        return TensorLayout(self.sizes, len(self.ids))

    def state_dict(self) -> dict[str, object]:
        """Plain tensors, lists and dicts; tasks are left out, since their seeds rebuild them."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("tasks", "shapes")}
        return {n: list(v) if isinstance(v, list) else dict(v) if isinstance(v, dict) else v for n, v in out.items()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], batched: BatchedFamily, split: str) -> Particles:
        """The particles that `state_dict` described, their tasks drawn again; `state` itself is left as it is."""
        tasks, _ = batched.start(split, state["seeds"])

        def own(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to(batched.device)
            if isinstance(value, dict):
                return {n: v.to(batched.device) for n, v in value.items()}
            return None if value is None else list(value)

        return cls(tasks=tasks, shapes=tuple(batched.shapes), **{n: own(v) for n, v in state.items()})


def start_particles(
    batched: BatchedFamily,
    rule: UpdateRule | None,
    plan: EpisodePlan,
    ids: Sequence[int],
    episodes: Sequence[int] | None = None,
) -> Particles:
    """Particles at the start of an episode, evaluated at their initial parameters.

    A task whose loss or gradient is not finite there is replaced by the particle's next episode.

    Args:
        batched: the family.
        rule: whose state to make; None for none.
        plan: names the tasks.
        ids: the particles' indices in the whole run.
        episodes: the episode each starts; zeros by default.

    Raises:
        ValueError: a particle drew only non-finite tasks.
    """
    ids = list(ids)
    episodes = list(episodes) if episodes is not None else [0] * len(ids)
    for _ in range(_DRAWS_BEFORE_GIVING_UP):
        drawn = [plan.draw(i, e) for i, e in zip(ids, episodes)]
        seeds, horizons = [d[0] for d in drawn], [d[1] for d in drawn]
        tasks, params = batched.start(plan.split, seeds)
        batch = first(batched.batches(tasks, seeds, [0] * len(ids), 1))
        losses, grads = batched.losses_and_grads(params, tasks, batch)
        initial = batched.judged_losses(params, tasks, batch) if batched.judged_apart else losses.clone()
        bad = ~torch.isfinite(magnitude(losses, grads) + initial)
        if not bad.any():
            break
        episodes = [e + int(b) for e, b in zip(episodes, bad.tolist())]
    else:
        raise ValueError(
            f"{batched.family.name}: the loss or its gradient is not finite at the initial parameters in "
            f"{_DRAWS_BEFORE_GIVING_UP} draws of a task in a row; check the family's loss, data and init_params"
        )
    state, basis = fresh_state(rule, batched, len(ids)) if rule else ({}, {})
    delay = batched.family.gradient_delay
    pending = grads[:, None].expand(-1, delay, -1).contiguous() if delay else None
    steps = [0] * len(ids)
    return Particles(
        ids,
        seeds,
        episodes,
        steps,
        horizons,
        tasks,
        params,
        grads,
        losses,
        initial,
        state,
        tuple(batched.shapes),
        basis,
        pending,
    )


def fresh_state(rule: UpdateRule, batched: BatchedFamily, num_particles: int) -> tuple[Tensors, Tensors]:
    """The rule state and the bases of so many particles that have taken no step."""
    where: dict[str, Any] = {"dtype": batched.dtype, "device": batched.device}
    state = rule.init_state(num_particles * batched.num_parameters, **where)
    return state, rule.basis.init(batched.shapes, num_particles, **where) if rule.basis else {}


@dataclasses.dataclass(frozen=True)
class Start:
    """Particles that were put at learned initial parameters.

    Attributes:
        columns: their indices, [k].
        params: [k, num_parameters].
        tasks, batch: the constants and the batch of the gradient there.
    """

    columns: torch.Tensor
    params: torch.Tensor
    tasks: Tensors
    batch: Tensors


def place(batched: BatchedFamily, particles: Particles, initial: torch.Tensor) -> Start | None:
    """Put the particles that have taken no step yet at learned initial parameters.

    Args:
        batched: the family.
        particles: changed in place; what was at its first step gets new parameters, loss and gradient.
        initial: [num_parameters], or [P, num_parameters] for one row per particle.

    Returns:
        Who was put where; None where every particle is under way.
    """
    columns = [c for c, step in enumerate(particles.steps) if step == 0]
    if not columns:
        return None
    index = torch.tensor(columns, device=batched.device)
    params = (initial[index] if initial.dim() == 2 else initial.expand(len(columns), -1)).detach().contiguous()
    tasks = {name: value[index] for name, value in particles.tasks.items()}
    batch = first(batched.batches(tasks, [particles.seeds[c] for c in columns], [0] * len(columns), 1))
    losses, grads = batched.losses_and_grads(params, tasks, batch)
    for name, value in (("params", params), ("losses", losses), ("grads", grads)):
        setattr(particles, name, getattr(particles, name).index_copy(0, index, value))
    _hold_first(particles, index)
    return Start(index, params, tasks, batch)


def magnitude(losses: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    """|loss| + |gradient|, [..., P], of gradients [..., P, D]; finite where the loss and the squared gradient are.

    Rules average squares, and an infinite one never decays.
    """
    return losses.abs() + torch.linalg.vector_norm(grads, dim=-1)


def restart(
    batched: BatchedFamily, rule: UpdateRule | None, plan: EpisodePlan, particles: Particles, columns: Sequence[int]
) -> None:
    """Put the particles in these columns at the start of their next episode; the others are left alone."""
    columns = list(columns)
    fresh = start_particles(
        batched, rule, plan, [particles.ids[c] for c in columns], [particles.episodes[c] + 1 for c in columns]
    )
    for name in ("ids", "seeds", "episodes", "steps", "horizons"):
        for column, value in zip(columns, getattr(fresh, name)):
            getattr(particles, name)[column] = value
    index = torch.tensor(columns, device=batched.device)
    for name in ("params", "grads", "losses", "initial"):
        setattr(particles, name, getattr(particles, name).index_copy(0, index, getattr(fresh, name)))
    _hold_first(particles, index)
    particles.tasks = {n: v.index_copy(0, index, fresh.tasks[n]) for n, v in particles.tasks.items()}
    particles.basis = {n: v.index_copy(0, index, fresh.basis[n]) for n, v in particles.basis.items()}
    particles.rule_state = {
        n: as_particles(v, len(particles))
        .index_copy(-2, index, as_particles(fresh.rule_state[n], len(columns)))
        .flatten(-2)
        for n, v in particles.rule_state.items()
    }


def delay_gradients(particles: Particles, grads: torch.Tensor, delay: int) -> None:
    """Take in the gradients [P, D] at the particles' parameters, and let their next step see those of `delay` ago.

    Steps that have no gradient so old see that of the episode's start.
    """
    pending = particles.pending
    if pending is None:
        pending = particles.grads[:, None].expand(-1, delay, -1)
    particles.grads = pending[:, 0]
    particles.pending = torch.cat([pending[:, 1:], grads[:, None]], dim=1)


def _hold_first(particles: Particles, index: torch.Tensor) -> None:
    """Particles that have just started have seen no gradient but the one that they hold."""
    if particles.pending is not None:
        first_ones = particles.grads[index][:, None].expand(-1, particles.pending.shape[1], -1)
        particles.pending = particles.pending.index_copy(0, index, first_ones)


def as_particles(tensor: torch.Tensor, num_particles: int) -> torch.Tensor:
    """[..., P · D] viewed as [..., P, D]."""
    return tensor.view(*tensor.shape[:-1], num_particles, -1)


def columns_of(state: Tensors, columns: torch.Tensor, num_particles: int) -> Tensors:
    """The rule state [..., P · D] of some particles, as [..., k · D]."""
    return {n: as_particles(v, num_particles).index_select(-2, columns).flatten(-2) for n, v in state.items()}


def first(batches: Tensors, index: int = 0) -> Tensors:
    """One step's batch out of stacked batches."""
    return {name: value[index] for name, value in batches.items()}


def snapshot(particles: Particles) -> Particles:
    """Particles that can be advanced without touching these; tensors are shared, since nothing writes into them."""
    names = ("ids", "seeds", "episodes", "steps", "horizons")
    lists: dict[str, Any] = {name: list(getattr(particles, name)) for name in names}
    dicts: dict[str, Any] = {name: dict(getattr(particles, name)) for name in ("tasks", "rule_state", "basis")}
    return dataclasses.replace(particles, **dicts, **lists)


def take(particles: Particles, columns: Sequence[int]) -> Particles:
    """Copies of the particles in these columns, in this order; a column may be taken any number of times."""
    columns = list(columns)
    index = torch.tensor(columns, device=particles.params.device)
    lists: dict[str, Any] = {
        name: [getattr(particles, name)[c] for c in columns]
        for name in ("ids", "seeds", "episodes", "steps", "horizons")
    }
    tensors = {name: getattr(particles, name)[index] for name in ("params", "grads", "losses", "initial")}
    return Particles(
        **lists,
        **tensors,
        tasks={name: value[index] for name, value in particles.tasks.items()},
        rule_state=columns_of(particles.rule_state, index, len(particles)),
        shapes=particles.shapes,
        basis={name: value[index] for name, value in particles.basis.items()},
        pending=None if particles.pending is None else particles.pending[index],
    )


def put(particles: Particles, columns: Sequence[int], source: Particles, source_columns: Sequence[int]) -> None:
    """Overwrite the particles in these columns with those in the columns of `source`, one by one."""
    if not columns:
        return
    device = particles.params.device
    to, of = torch.tensor(list(columns), device=device), torch.tensor(list(source_columns), device=device)
    for name in _LISTS:
        for column, source_column in zip(columns, source_columns):
            getattr(particles, name)[column] = getattr(source, name)[source_column]
    for name in _TENSORS:
        setattr(particles, name, getattr(particles, name).index_copy(0, to, getattr(source, name)[of]))
    if source.pending is not None:
        before = particles.pending
        if before is None:  # these have taken no step yet: gradients of the episode's start
            before = particles.grads[:, None].expand(-1, source.pending.shape[1], -1)
        particles.pending = before.index_copy(0, to, source.pending[of])
    particles.tasks = {n: v.index_copy(0, to, source.tasks[n][of]) for n, v in particles.tasks.items()}
    particles.basis = {n: v.index_copy(0, to, source.basis[n][of]) for n, v in particles.basis.items()}
    picked = columns_of(source.rule_state, of, len(source))
    particles.rule_state = {
        n: as_particles(v, len(particles)).index_copy(-2, to, as_particles(picked[n], len(to))).flatten(-2)
        for n, v in particles.rule_state.items()
    }


def select_state(saved: Mapping[str, Any], columns: Sequence[int]) -> dict[str, Any]:
    """The `Particles.state_dict` of the particles in these columns, in this order."""
    index = torch.tensor(list(columns), device=saved["params"].device)
    out: dict[str, Any] = {name: [saved[name][c] for c in columns] for name in _LISTS}
    out |= {name: saved[name][index] for name in _TENSORS}
    out["pending"] = None if saved["pending"] is None else saved["pending"][index]
    out["basis"] = {name: value[index] for name, value in saved["basis"].items()}
    return out | {"rule_state": columns_of(saved["rule_state"], index, len(saved["ids"]))}


def join_states(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One `Particles.state_dict` of the particles of several, one after another."""
    out: dict[str, Any] = {name: [value for part in parts for value in part[name]] for name in _LISTS}
    out |= {name: torch.cat([part[name] for part in parts]) for name in _TENSORS}
    out["pending"] = None if parts[0]["pending"] is None else torch.cat([part["pending"] for part in parts])
    out["basis"] = {name: torch.cat([part["basis"][name] for part in parts]) for name in parts[0]["basis"]}
    states = [part["rule_state"] for part in parts]
    return out | {"rule_state": {name: torch.cat([state[name] for state in states], -1) for name in states[0]}}
