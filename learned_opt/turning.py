"""Particles' gradients in the basis that a rule wants them in (`learned_opt.rules.basis`), and updates back from there.

Every particle has bases of its own, one for each matrix among its parameters, kept in `Particles.basis`. They change
when the particle's own number of steps says so, whatever other particles there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from learned_opt.particles import Particles, as_particles
from learned_opt.rules.base import UpdateRule
from learned_opt.rules.basis import Sides, Turn, observe, refresh, turn_of
from learned_opt.task import Tensors


@dataclasses.dataclass(frozen=True)
class Turns:
    """The bases of all of the particles' tensors in one step.

    Attributes:
        sizes: coordinates of every tensor.
        turns: the tensors that are turned, by place, as matrices [P, rows, columns].
        linear_state: the particles' linear rule state as it has been turned to these bases.
    """

    sizes: tuple[int, ...]
    turns: dict[int, tuple[Sides, Turn]]
    linear_state: Tensors = dataclasses.field(default_factory=dict)

    def into(self, rows: torch.Tensor) -> torch.Tensor:
        """Coordinates [..., P, D] in these bases."""
        return self._each(rows, Turn.into)

    def back(self, rows: torch.Tensor) -> torch.Tensor:
        """What has these coordinates [..., P, D] in these bases."""
        return self._each(rows, Turn.back)

    def gradients(self, grads: torch.Tensor) -> torch.Tensor:
        """Gradients [P, D] in these bases, without what is rounding."""
        return self._each(grads, Turn.gradients)

    def of(self, columns: torch.Tensor) -> Turns:
        """Those of the particles in these columns."""
        return Turns(self.sizes, {place: (sides, turn.of(columns)) for place, (sides, turn) in self.turns.items()})

    def _each(self, rows: torch.Tensor, do: Callable[[Turn, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        parts = list(rows.split(self.sizes, -1))
        for place, (sides, turn) in self.turns.items():
            parts[place] = do(turn, sides.as_matrices(parts[place])).flatten(-2)
        return torch.cat(parts, -1)


class Turner:
    """Keeps the bases of some particles from step to step.

    Args:
        rule: one with a basis.
        particles: whose `basis` and linear rule state to read and replace.
    """

    def __init__(self, rule: UpdateRule, particles: Particles) -> None:
        assert rule.basis is not None
        self.rule, self.basis, self.particles = rule, rule.basis, particles
        found = {place: self.basis.sides(shape) for place, shape in enumerate(particles.shapes)}
        self.sides = {place: sides for place, sides in found.items() if sides is not None}

    def begin(self, grads: torch.Tensor, *, overwrite: bool) -> Turns:
        """Take in the gradients [P, D] of the step that comes.

        Args:
            grads: before they are turned.
            overwrite: whether the rule state's memory may be used for the new one.

        Returns:
            The bases for this step. The particles' linear rule state has been turned to them.
        """
        particles, every = self.particles, self.basis.every
        due = [c for c, step in enumerate(particles.steps) if step % every == 0]
        parts = grads.split(particles.sizes, -1)
        turns: dict[int, tuple[Sides, Turn]] = {}
        changes: dict[int, tuple[Sides, Turn]] = {}
        state = dict(particles.basis)
        for place, sides in self.sides.items():
            own = {name: state[f"{place}.{name}"] for name in sides.shapes}
            before = turn_of(own)
            own |= observe(self.basis, sides, own, sides.as_matrices(parts[place]))
            if due:
                own |= self._refreshed(sides, own, due)
                changes[place] = sides, turn_of(own).since(before)
            turns[place] = sides, turn_of(own)
            state |= {f"{place}.{name}": value for name, value in own.items()}
        particles.basis = state
        under_way = [c for c in due if particles.steps[c]]  # at an episode's start there is nothing yet to turn
        if under_way:
            self._turn_state(Turns(particles.sizes, changes), under_way, overwrite)
        return Turns(particles.sizes, turns, {name: particles.rule_state[name] for name in self.rule.linear_state})

    def _refreshed(self, sides: Sides, own: Tensors, due: Sequence[int]) -> Tensors:
        steps = [self.particles.steps[c] for c in due]
        device = self.particles.grads.device
        fresh = [step == 0 for step in steps]
        first = all(fresh) or (any(fresh) and torch.tensor(fresh, device=device)[:, None, None])
        if len(due) == len(self.particles):
            return refresh(sides, own, first)
        index = torch.tensor(due, device=device)
        found = refresh(sides, {name: value[index] for name, value in own.items()}, first)
        return {name: own[name].index_copy(0, index, value) for name, value in found.items()}

    def _turn_state(self, changes: Turns, columns: Sequence[int], overwrite: bool) -> None:
        """Turn the linear state of the particles in these columns, and leave that of the others as it is."""
        state, num = self.particles.rule_state, len(self.particles)
        index = None
        if len(columns) < num:
            index = torch.tensor(columns, device=self.particles.grads.device)
            changes = changes.of(index)
        for name in self.rule.linear_state:
            rows = as_particles(state[name], num)
            if index is None:
                turned = changes.into(rows)
            else:
                turned = rows.index_copy(-2, index, changes.into(rows.index_select(-2, index)))
            if overwrite:
                rows.copy_(turned)
            else:
                state = {**state, name: turned.flatten(-2)}
        self.particles.rule_state = state
