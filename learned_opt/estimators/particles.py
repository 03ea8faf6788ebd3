"""Copies of particles: what estimators need to run one start several times."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from learned_opt.unroll import Particles, columns_of


def snapshot(particles: Particles) -> Particles:
    """Particles that can be advanced without touching these; tensors are shared, since nothing writes into them."""
    names = ("ids", "seeds", "episodes", "steps", "horizons")
    lists: dict[str, Any] = {name: list(getattr(particles, name)) for name in names}
    return dataclasses.replace(particles, tasks=dict(particles.tasks), rule_state=dict(particles.rule_state), **lists)


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
    )
