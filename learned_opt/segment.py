"""What an unroll leaves behind: losses, and what going backwards over it needs."""

from __future__ import annotations

import dataclasses

import torch

from learned_opt.particles import Particles, Start, columns_of
from learned_opt.rules.inplace import Kept
from learned_opt.task import Tensors
from learned_opt.turning import Turns


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive steps of some particles within a segment, with no reset between them.

    Attributes:
        columns: indices of the particles, [k]; None for all of them.
        start, stop: steps start … stop − 1 of the segment.
        params: [k, num_parameters] before the first of these steps.
        rule_state: before the first of these steps, tensors [..., k · num_parameters].
    """

    columns: torch.Tensor | None
    start: int
    stop: int
    params: torch.Tensor
    rule_state: Tensors


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one inner step started from, and what it was evaluated on.

    Attributes:
        params, grads: [P, num_parameters].
        rule_state: tensors [..., P · num_parameters].
        new_params: [P, num_parameters], after the step, before anything was restarted.
        judged_grads: [P, num_parameters], the gradient there of the loss that judges.
        tasks, batch: the constants and the batch of the evaluation after the step.
        ends: [P], which particles were restarted right after the step; None for none.
        turns: the bases that the rule was given the gradients in; None for the coordinates as they are.
    """

    params: torch.Tensor
    grads: torch.Tensor
    rule_state: Tensors
    new_params: torch.Tensor
    judged_grads: torch.Tensor
    tasks: Tensors
    batch: Tensors
    ends: torch.Tensor | None
    turns: Turns | None = None


@dataclasses.dataclass(frozen=True)
class Segment:
    """What an unroll of K steps over P particles left behind.

    Attributes:
        losses: [K, P] after each step, of the loss that judges (`TaskFamily.query_loss` where the family has one).
        initial: [K, P], that loss at the parameters drawn at the start of the episode each step belongs to.
        valid: [P], false where a loss or a gradient was not finite; such a particle's numbers are not to be used.
        inputs: [K, P, num_parameters], the gradient each step used; None unless gradients are recorded.
        outputs: [K, P, num_parameters], the gradient of the loss that judges, at the parameters after each step; None
            unless gradients are recorded.
        runs: the segment cut at resets; empty unless gradients are recorded.
        stages: one per step; empty unless stages are recorded.
        starts: by step of the segment, who was put at learned initial parameters before it.
        contexts: [K, num_context, P, tensors], what the rule was told of every tensor; None unless gradients are
            recorded and the rule takes context.
        kept: the rule's steps, which need not be taken again; None unless asked for, and where there is no such thing.
    """

    losses: torch.Tensor
    initial: torch.Tensor
    valid: torch.Tensor
    inputs: torch.Tensor | None
    outputs: torch.Tensor | None
    runs: list[Run]
    stages: list[Stage]
    starts: dict[int, Start] = dataclasses.field(default_factory=dict)
    contexts: torch.Tensor | None = None
    kept: Kept | None = None


class Recorder:
    """Keeps a segment's gradients, and cuts it into runs where particles restart.

    Gradients are written once: an evaluation's output is the next step's input. Only a restart within the segment
    makes the two differ, or `apart`: a loss of its own that judges, or delayed gradients. Then they get a buffer each.
    """

    def __init__(self, particles: Particles, num_steps: int, apart: bool) -> None:
        self.num_steps, self.num_particles = num_steps, len(particles)
        grads = particles.grads.new_empty(num_steps + 1, *particles.grads.shape)
        grads[0] = particles.grads
        self.inputs, self.outputs = grads[:-1], grads[1:]
        self._one_buffer = not apart
        if apart:
            self.inputs = self.inputs.clone()
        self._began = [0] * len(particles)
        self._snapshots = {0: (particles.params, particles.rule_state)}
        self._runs: list[Run] = []

    def write(self, step: int, grads: torch.Tensor, judged_grads: torch.Tensor) -> None:
        """The gradients that the next step sees, and those of the loss that judges after this one."""
        self.outputs[step] = judged_grads
        if not self._one_buffer and step + 1 < self.num_steps:
            self.inputs[step + 1] = grads

    def cut(self, particles: Particles, columns: list[int], step: int) -> None:
        """These particles were restarted before this step of the segment."""
        self._close(columns, step)
        for column in columns:
            self._began[column] = step
        if step == self.num_steps:
            return
        if self._one_buffer:
            self.inputs, self._one_buffer = self.inputs.clone(), False
        self.inputs[step] = particles.grads
        self._snapshots[step] = (particles.params, particles.rule_state)

    def finish(self) -> list[Run]:
        """All runs, once every step was taken."""
        self._close([c for c in range(self.num_particles) if self._began[c] < self.num_steps], self.num_steps)
        return self._runs

    def _close(self, columns: list[int], stop: int) -> None:
        for start in sorted({self._began[c] for c in columns}):
            chosen = [c for c in columns if self._began[c] == start]
            params, state = self._snapshots[start]
            if len(chosen) == self.num_particles:
                self._runs.append(Run(None, start, stop, params, state))
            else:
                index = torch.tensor(chosen, device=params.device)
                self._runs.append(Run(index, start, stop, params[index], columns_of(state, index, self.num_particles)))
