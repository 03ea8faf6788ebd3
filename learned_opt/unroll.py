"""The inner loop: the only place where inner steps are taken.

An inner step takes the gradient that each particle holds, lets the optimizer move the parameters, and
evaluates loss and gradient at the new place: the gradient at the end of one truncation is the first input of the next,
so every update is judged by a loss and no evaluation is made twice. A particle whose horizon is reached restarts
on a fresh task, in the middle of a truncation if need be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from learned_opt.batched import BatchedFamily
from learned_opt.particles import (
    EpisodePlan,
    Particles,
    Start,
    as_particles,
    delay_gradients,
    first,
    magnitude,
    place,
    restart,
    rule_part,
)
from learned_opt.rules.base import UpdateRule, chunked_update
from learned_opt.rules.context import Context
from learned_opt.rules.context import context as context_of
from learned_opt.rules.inplace import Step, keeper, stepper
from learned_opt.segment import Recorder, Segment, Stage
from learned_opt.task import Tensors
from learned_opt.turning import Turner, Turns

Move = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(params, grads), both [P, D], to the new params: a learned update, or a step of a torch.optim optimizer."""


def inner_steps(
    batched: BatchedFamily, particles: Particles, num_steps: int, move: Move
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Tensors]]:
    """Take inner steps without resets, advancing the particles in place; the only inner loop there is.

    Args:
        batched: the family.
        particles: what to advance.
        num_steps: how many steps.
        move: the optimizer.

    Yields:
        (losses [P], grads [P, D], batch) of the evaluation after each step.
    """
    batches = batched.batches(particles.tasks, particles.seeds, [s + 1 for s in particles.steps], num_steps)
    delay = batched.family.gradient_delay
    for k in range(num_steps):
        particles.params = move(particles.params, particles.grads)
        batch = first(batches, k)
        particles.losses, grads = batched.losses_and_grads(particles.params, particles.tasks, batch)
        if delay:
            delay_gradients(particles, grads, delay)
        else:
            particles.grads = grads
        particles.steps = [s + 1 for s in particles.steps]
        yield particles.losses, grads, batch


def learned_move(
    rule: UpdateRule,
    theta: Tensors,
    particles: Particles,
    *,
    per_particle: bool = False,
    chunk_size: int | None = None,
    keep_states: bool = False,
    contexts: list[torch.Tensor] | None = None,
    turns: list[Turns] | None = None,
    step: Step | None = None,
) -> Move:
    """The move that applies an update rule and keeps its state in the particles.

    Args:
        rule: the update rule.
        theta: its meta-parameters; with `per_particle`, one set per particle stacked along a leading dimension.
        particles: whose rule state to read and replace.
        per_particle: see theta; used by estimators that perturb theta.
        chunk_size: coordinates at a time; None for what suits the rule.
        keep_states: whether every step's rule state stays as it was. Otherwise that of the first step does, and later
            ones may be overwritten.
        contexts: where to put the values of every step's context, for a rule that takes one.
        turns: where to put every step's bases, for a rule that has one on tasks with matrices.
        step: takes the rule's steps; by default what is fastest.
    """
    if step is None and chunk_size is None:
        step = stepper(rule, theta, len(particles) if per_particle else 1)
    turner = Turner(rule, particles) if rule.turns(particles.shapes) else None
    overwrite = False

    def told(grads: torch.Tensor) -> Context | None:
        if not rule.num_context:
            return None
        found = context_of(rule, grads.reshape(-1), particles.rule_state, particles.layout)
        if contexts is not None:
            contexts.append(found.values)
        return found

    def fast_update(params: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
        nonlocal overwrite
        assert step is not None
        update, particles.rule_state = step(
            grads.reshape(-1), params.reshape(-1), particles.rule_state, overwrite, told(grads)
        )
        overwrite = not keep_states
        return update.view_as(params)

    def update(params: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
        context = told(grads)
        if not per_particle:
            found, particles.rule_state = chunked_update(
                rule,
                theta,
                grads.reshape(-1),
                params.reshape(-1),
                particles.rule_state,
                chunk_size=chunk_size,
                context=context,
            )
            return found.view_as(params)
        state = {n: as_particles(v, len(params)) for n, v in particles.rule_state.items()}
        rows = () if context is None else (as_particles(context.rows(grads.numel()), len(params)),)
        found, state = torch.func.vmap(rule.update, in_dims=(0, 0, 0, -2, *[-2] * len(rows)), out_dims=(0, -2))(
            theta, grads, params, state, *rows
        )
        particles.rule_state = {n: v.flatten(-2) for n, v in state.items()}
        return found

    proposed = update if step is None else fast_update

    def move(params: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
        if turner is None:
            return params + proposed(params, grads)
        now = turner.begin(grads, overwrite=overwrite)
        if turns is not None:
            turns.append(now)
        return params + now.back(proposed(params, now.gradients(grads)))

    return move


@torch.no_grad()
def unroll(
    rule: UpdateRule,
    theta: Tensors,
    batched: BatchedFamily,
    plan: EpisodePlan,
    particles: Particles,
    num_steps: int,
    *,
    record: str = "nothing",
    keep_steps: bool = False,
    per_particle: bool = False,
    restart_invalid: bool = True,
    chunk_size: int | None = None,
    initial_params: torch.Tensor | None = None,
) -> Segment:
    """Advance the particles by one truncation, without a graph, restarting those that reach their horizon.

    Particles whose loss or gradient stops being finite are marked invalid and, by default, restarted at the end.

    Args:
        rule, theta: the optimizer; see `learned_move` for `per_particle`.
        batched: the family.
        plan: names the tasks that restarted particles get.
        particles: advanced in place.
        num_steps: inner steps, at least 1.
        record: "nothing"; "gradients", which a first-order replay needs, and which leaves bases out; or "stages", which
            going backwards step by step needs.
        keep_steps: whether to keep the rule's steps, where that is faster than taking them again. Stages but the first
            then lack the network's own state.
        per_particle: theta has a leading dimension of particles.
        restart_invalid: whether particles marked invalid start their next episode at the end.
        chunk_size: coordinates per chunk of the update rule; None for what suits it.
        initial_params: learned initial parameters that every episode starts from, [num_parameters] or, with
            `per_particle`, [P, num_parameters]; None for those that the family draws. They are put in place when an
            episode takes its first step, so that theta is the one it is unrolled with.

    Returns:
        The segment's losses and what was recorded.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1; got {num_steps}")
    theta = rule_part(theta)
    starts: dict[int, Start] = {}

    def begin(step: int) -> None:
        start = place(batched, particles, initial_params) if initial_params is not None else None
        if start is not None:
            starts[step] = start

    begin(0)
    recorder = None
    if record == "gradients":
        # A loss of its own that judges, and delayed gradients, make what the next step sees another gradient.
        recorder = Recorder(particles, num_steps, batched.judged_apart or bool(batched.family.gradient_delay))
    kept = None
    if keep_steps and all(h < 0 or h - s >= num_steps for h, s in zip(particles.horizons, particles.steps)):
        kept = keeper(rule, theta, particles.params.numel(), num_steps)
    shape = (num_steps, len(particles))
    losses, initial = particles.losses.new_empty(shape), particles.losses.new_empty(shape)
    check = torch.zeros_like(particles.losses)  # not finite as soon as anything was not, but for what is recorded
    stages: list[Stage] = []
    contexts: list[torch.Tensor] = []
    turns: list[Turns] = []
    done = 0
    while done < num_steps:
        # A move of its own for every stretch: what the stretch starts from is left as it is, for whoever recorded it.
        move = learned_move(
            rule,
            theta,
            particles,
            per_particle=per_particle,
            chunk_size=chunk_size,
            keep_states=record == "stages",
            contexts=contexts if recorder is not None else None,
            turns=turns if record == "stages" else None,
            step=kept.step if kept is not None else None,
        )
        stretch = min([num_steps - done, *(h - s for h, s in zip(particles.horizons, particles.steps) if h >= 0)])
        before = (particles.params, particles.grads, particles.rule_state)
        initial[done : done + stretch] = particles.initial
        for k, (loss, grad, batch) in enumerate(inner_steps(batched, particles, stretch, move), start=done):
            judged_grad = grad
            if batched.judged_apart:
                check += magnitude(loss, grad)
                loss, judged_grad = batched.judge(particles.params, particles.tasks, batch)
            losses[k] = loss
            if recorder is None:
                check += magnitude(loss, judged_grad)
            else:
                recorder.write(k, particles.grads, judged_grad)
            if record == "stages":
                turned = turns[k] if turns else None
                if turned is not None:
                    before = (*before[:2], {**before[2], **turned.linear_state})
                stages.append(Stage(*before, particles.params, judged_grad, particles.tasks, batch, None, turned))
                before = (particles.params, particles.grads, particles.rule_state)
        done += stretch
        over = [c for c in range(len(particles)) if particles.steps[c] == particles.horizons[c]]
        if over:
            restart(batched, rule, plan, particles, over)
            if done < num_steps:
                begin(done)
            if recorder is not None:
                recorder.cut(particles, over, done)
            if stages:
                ends = torch.zeros(len(particles), dtype=torch.bool, device=batched.device)
                ends[over] = True
                stages[-1] = dataclasses.replace(stages[-1], ends=ends)
    if recorder is not None:
        check += magnitude(losses, recorder.outputs).sum(0)
    valid = torch.isfinite(check)
    invalid = (~valid).nonzero().flatten().tolist()
    if invalid and restart_invalid:
        restart(batched, rule, plan, particles, invalid)
    if recorder is None:
        return Segment(losses, initial, valid, None, None, [], stages, starts, kept=kept)
    told = as_particles(torch.stack(contexts), len(particles)) if contexts else None
    recorded = (recorder.inputs, recorder.outputs, recorder.finish())
    return Segment(losses, initial, valid, *recorded, stages, starts, told, kept)
