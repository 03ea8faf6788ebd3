"""Truncated backpropagation through the unroll, first-order by replay or exact.

First order treats the inner gradients as constants (Andrychowicz et al. 2016). Then the derivative of the meta-loss
with respect to the parameters after step t, through the loss there, is w_t·g_t, and g_t has been computed anyway: the
unroll runs without a graph, and the rule alone runs once more, chunk of coordinates by chunk, with those vectors
as its cotangents (`UpdateRule.backward`). No second backward pass through the task is made, and memory is bounded by
the recorded gradients and one chunk, whatever the truncation's graph would have been. Where no particle restarts inside
the truncation and memory allows, the unroll keeps the rule's steps, and nothing is run again.

Second order is exact: it differentiates the inner gradients too. The unroll keeps what each step started from; going
backwards, one step at a time is rebuilt with its graph and differentiated, so that memory holds one step's graph only.
Here, too, the rule's steps are kept where they can be.

With `recompute`, of either order, memory grows with the square root of the truncation: the unroll keeps what every
√K-th step started from; going backwards, each such block of steps is run again, then differentiated one step at a time.
It costs a second unroll, and makes unrolls of any length differentiable. The numbers are those of the plain route.

A rule that has a basis (`learned_opt.rules.basis`) sees gradients, and makes updates, in coordinates that change within
a truncation. Its first-order gradient goes backwards step by step, the bases being constants like the gradients that
they are made of. There is no second order for such a rule on tasks with matrices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from learned_opt.batched import BatchedFamily
from learned_opt.distributed import Ranks
from learned_opt.estimators.base import Estimate, Estimator, Workload
from learned_opt.estimators.initial import replayed_start_gradient, start_gradient
from learned_opt.particles import Particles, join_states, rule_part, select_state, snapshot, start_particles
from learned_opt.rules.base import slice_coordinates
from learned_opt.rules.context import Context, TensorLayout
from learned_opt.segment import Segment, Stage
from learned_opt.task import Tensors
from learned_opt.unroll import unroll

KeptVJP = Callable[[torch.Tensor, Tensors, torch.Tensor, Tensors], tuple[torch.Tensor, Tensors]]
"""A kept step's `KeptSteps.vjp`: (grads, state, cotangents of update and state after) to those of grads and state."""

Cotangents = tuple[torch.Tensor, torch.Tensor, Tensors]
"""Derivatives of later meta-losses with respect to the (params, grads, rule state) that a step starts from."""


def in_order_of_ids(saved: dict[str, Any]) -> dict[str, Any]:
    """A `Particles.state_dict` with the particles in the order of their numbers in the run."""
    return select_state(saved, sorted(range(len(saved["ids"])), key=saved["ids"].__getitem__))


class TruncatedBackprop(Estimator):
    """Truncated backpropagation.

    Args:
        order: 1 for gradients as constants, 2 for the exact meta-gradient of the truncation.
        chunk_size: coordinates replayed at a time (first order, without recompute); by default what suits the rule.
            With it the rule's steps are never kept.
        recompute: keep every √truncation-th state and run the steps between them twice: memory grows with the root.
    """

    kind: ClassVar[str] = "backprop"

    def __init__(self, order: int = 1, chunk_size: int | None = None, recompute: bool = False) -> None:
        if order not in (1, 2):
            raise ValueError(f"order must be 1 (inner gradients as constants) or 2 (exact); got {order}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1; got {chunk_size}")
        self.order = order
        self.chunk_size = chunk_size
        self.recompute = recompute

    def init(self, work: Workload, theta: Tensors, ids: Sequence[int]) -> Particles:
        """Particles at the start of their first episode.

        Raises:
            ValueError: order 2 with a rule that takes parameters in a basis, on a loss without second derivative, or on
                delayed gradients.
        """
        if self.order == 2 and work.rule.turns(work.batched.shapes):
            raise ValueError(
                f"order=2 cannot differentiate through the bases that rule {work.rule.kind!r} takes parameters in; "
                "use order=1, an evolution strategy (es, pes, nres), or a rule without (basis=0)"
            )
        if self.order == 2 and work.batched.family.gradient_delay:
            raise ValueError(
                f"order=2 cannot differentiate through the delayed gradients of {work.batched.family.name}; "
                "use order=1 or an evolution strategy (es, pes, nres)"
            )
        particles = start_particles(work.batched, work.rule, work.plan, ids)
        if self.order == 2:
            check_second_derivative(work.batched, particles)
        return particles

    def horizons(self, state: Particles) -> list[int]:
        return list(state.horizons)

    def state_dict(self, state: Particles) -> dict[str, Any]:
        return state.state_dict()

    def load_state_dict(self, work: Workload, saved: dict[str, Any]) -> Particles:
        return Particles.from_state_dict(saved, work.batched, work.plan.split)

    def estimate(self, work: Workload, theta: Tensors, state: Particles) -> Estimate:
        if self.recompute:
            value, grads, segment = self._in_blocks(work, theta, state)
        else:
            by_replay = self.order == 1 and not work.rule.turns(work.batched.shapes)
            segment = self._unroll(work, theta, state, work.truncation, "gradients" if by_replay else "stages")
            value, weights = work.meta_loss.weights(segment.losses, segment.initial, segment.valid, work.ranks.sum)
            grads = (self._replay if by_replay else self._step_by_step)(work, theta, segment, weights)
        return Estimate(
            grads={n: torch.zeros_like(g) if n in work.frozen else g for n, g in grads.items()},
            meta_loss=float(value),
            num_inner_steps=work.truncation * len(state),
            num_invalid=int((~segment.valid).sum()),
            num_clipped=work.meta_loss.num_clipped(segment.losses, segment.initial),
            weight=float(segment.valid.sum()),
        )

    def nothing(self, work: Workload, theta: Tensors) -> Estimate:
        if work.meta_loss.couples_particles:  # the other ranks wait for this one's part of the sum
            losses = next(iter(theta.values())).new_zeros(work.truncation, 0)
            work.meta_loss.weights(losses, losses, torch.ones_like(losses[0], dtype=torch.bool), work.ranks.sum)
        return super().nothing(work, theta)

    def merge(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return in_order_of_ids(join_states(parts))

    def part(self, saved: dict[str, Any], ranks: Ranks) -> dict[str, Any] | None:
        columns = ranks.share(range(len(saved["ids"])), first=saved["ids"][0])
        return select_state(saved, columns) if columns else None

    def _unroll(
        self, work: Workload, theta: Tensors, state: Particles, num_steps: int, record: str = "nothing"
    ) -> Segment:
        initial = work.initial_params(theta)
        return unroll(
            work.rule,
            theta,
            work.batched,
            work.plan,
            state,
            num_steps,
            record=record,
            keep_steps=record != "nothing" and self.chunk_size is None,
            initial_params=initial,
        )

    @torch.no_grad()
    def _replay(self, work: Workload, theta: Tensors, segment: Segment, weights: torch.Tensor) -> Tensors:
        assert segment.inputs is not None and segment.outputs is not None
        total = {name: torch.zeros_like(value) for name, value in theta.items()}
        theta, size = rule_part(theta), work.batched.num_parameters
        runs = segment.runs
        if segment.kept is not None:
            loss_grads = segment.outputs * weights[..., None]
            if not segment.valid.all():
                loss_grads = torch.where(segment.valid[:, None], loss_grads, 0.0)
                segment.kept.leave_out(~segment.valid)
            total |= segment.kept.backward(loss_grads.flatten(1))
            runs = []
        for run in runs:
            columns = slice(None) if run.columns is None else run.columns
            steps = slice(run.start, run.stop)
            valid = segment.valid[columns]
            inputs, outputs, weight = (
                segment.inputs[steps, columns],
                segment.outputs[steps, columns],
                weights[steps, columns],
            )
            if not valid.all():
                inputs, outputs = (torch.where(valid[:, None], x, 0.0) for x in (inputs, outputs))
            num_steps, num_columns = weight.shape
            inputs, outputs = inputs.reshape(num_steps, -1), outputs.reshape(num_steps, -1)
            params = run.params.reshape(-1)
            context = None
            if segment.contexts is not None:
                layout = TensorLayout(work.batched.sizes, num_columns)
                values = segment.contexts[steps][:, :, columns].flatten(-2)
                context = Context(values, layout.index(weight.device))
            chunk_size = self.chunk_size or work.rule.backward_chunk(theta, num_steps)
            for start in range(0, num_columns * size, chunk_size):
                stop = min(start + chunk_size, num_columns * size)
                owner = torch.arange(start, stop, device=weight.device) // size
                part = work.rule.backward(
                    theta,
                    inputs[:, start:stop],
                    params[start:stop],
                    slice_coordinates(run.rule_state, start, stop),
                    outputs[:, start:stop] * weight[:, owner],
                    *(() if context is None else (context.of(start, stop),)),
                )
                for name, value in part.items():
                    total[name] += value
        if work.initial:
            total[work.initial] += replayed_start_gradient(segment, weights)
        return total

    def _step_by_step(self, work: Workload, theta: Tensors, segment: Segment, weights: torch.Tensor) -> Tensors:
        total = {name: torch.zeros_like(value) for name, value in theta.items()}
        self._back_over(work, theta, total, segment, weights, segment.valid, None)
        return total

    def _in_blocks(self, work: Workload, theta: Tensors, state: Particles) -> tuple[torch.Tensor, Tensors, Segment]:
        """(meta-loss, meta-gradient, the segment without records), keeping one state per block of about √K steps."""
        size = math.isqrt(work.truncation - 1) + 1
        starts: list[tuple[Particles, int, int]] = []
        parts: list[Segment] = []
        for start in range(0, work.truncation, size):
            stop = min(start + size, work.truncation)
            starts.append((snapshot(state), start, stop))
            parts.append(self._unroll(work, theta, state, stop - start))
        losses, initial = torch.cat([p.losses for p in parts]), torch.cat([p.initial for p in parts])
        valid = torch.stack([p.valid for p in parts]).all(0)
        value, weights = work.meta_loss.weights(losses, initial, valid, work.ranks.sum)
        total = {name: torch.zeros_like(v) for name, v in theta.items()}
        later: Cotangents | None = None
        while starts:
            particles, start, stop = starts.pop()
            block = self._unroll(work, theta, particles, stop - start, "stages")
            later = self._back_over(work, theta, total, block, weights[start:stop], valid, later)
        return value, total, Segment(losses, initial, valid, None, None, [], [])

    def _back_over(
        self,
        work: Workload,
        theta: Tensors,
        total: Tensors,
        segment: Segment,
        weights: torch.Tensor,
        valid: torch.Tensor,
        later: Cotangents | None,
    ) -> Cotangents | None:
        """Differentiate the segment's steps, the last first; `later` is what comes from the steps behind them."""
        theta, kept = rule_part(theta), segment.kept
        if kept is not None and not valid.all():
            kept.leave_out(~valid)
        for step in reversed(range(len(segment.stages))):
            taken = None if kept is None else functools.partial(kept.vjp, step)
            later = self._one_step_back(work, theta, total, segment.stages[step], weights[step], later, valid, taken)
            if step in segment.starts:
                total[work.initial] += start_gradient(
                    work.batched, segment.starts[step], later[0], later[1] if self.order == 2 else None, valid
                )
        if kept is not None:
            for name, value in kept.finish().items():
                total[name] += value
        return later

    def _one_step_back(
        self,
        work: Workload,
        theta: Tensors,
        total: Tensors,
        stage: Stage,
        weight: torch.Tensor,
        later: Cotangents | None,
        valid: torch.Tensor,
        taken: KeptVJP | None,
    ) -> Cotangents:
        """Differentiate one inner step: adds to `total`, returns the cotangents of what was before it.

        These are (params, grads, rule state). With `taken`, the rule's step was kept, and adds up what theta gets.
        """
        batched = work.batched

        keep = valid if stage.ends is None else valid & ~stage.ends
        # Whether all count: asked once, since the answer waits for the device.
        whole = {id(mask): bool(mask.all()) for mask in (valid, keep)}

        def cleaned(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            """Zeros for the particles that do not count: theirs may be NaN, and NaN times zero is NaN."""
            return values if whole[id(mask)] else torch.where(mask[:, None], values, 0.0)

        d_params = cleaned(stage.judged_grads, valid) * weight[:, None]
        if later is None:
            d_state = {name: torch.zeros_like(value) for name, value in stage.rule_state.items()}
        else:
            d_params = d_params + cleaned(later[0], keep)
            if self.order == 2:
                vectors = cleaned(later[1], keep)
                points = cleaned(stage.new_params, valid)
                products = batched.hessian_products(points, stage.tasks, stage.batch, vectors)
                d_params = d_params + cleaned(products, keep)
            d_state = later[2]
            if not whole[id(keep)]:
                columns = keep.repeat_interleave(batched.num_parameters)
                d_state = {name: torch.where(columns, value, 0.0) for name, value in d_state.items()}
        state = stage.rule_state
        if not whole[id(valid)]:
            columns_valid = valid.repeat_interleave(batched.num_parameters)
            state = {name: torch.where(columns_valid, value, 0.0) for name, value in state.items()}
        grads, d_update = cleaned(stage.grads, valid), d_params
        if stage.turns is not None:
            # What is linear in the gradients is as constant as they are: no derivative follows it through the turn.
            d_state |= {name: torch.zeros_like(state[name]) for name in work.rule.linear_state}
            grads, d_update = stage.turns.gradients(grads), stage.turns.into(d_update)
        shape = stage.params.shape
        if taken is not None:
            d_taken, d_before = taken(grads.reshape(-1), state, d_update.reshape(-1), d_state)
            return d_params, d_taken.view(shape), d_before
        d_theta, d_grads, d_through_rule, d_before = work.rule.vjp(
            theta,
            grads.reshape(-1),
            cleaned(stage.params, valid).reshape(-1),
            state,
            d_update.reshape(-1),
            d_state,
            *((TensorLayout(batched.sizes, len(valid)),) if work.rule.num_context else ()),
        )
        for name, value in d_theta.items():
            total[name] += value
        return d_params + d_through_rule.view(shape), d_grads.view(shape), d_before


def check_second_derivative(batched: BatchedFamily, particles: Particles) -> None:
    """Raise ValueError if the loss cannot be differentiated twice; tried on the first of these particles.

    A loss whose gradient carries no graph passes only if its gradient is the same elsewhere, as a linear loss's is.
    """
    one = [0]
    params = particles.params[one].clone().requires_grad_()
    tasks = {name: value[one] for name, value in particles.tasks.items()}
    batches = batched.batches(tasks, particles.seeds[:1], particles.steps[:1], 1)
    batch = {name: value[0] for name, value in batches.items()}
    cause: RuntimeError | None = None
    try:
        with torch.enable_grad():
            _, grads = batched.losses_and_grads(params, tasks, batch, differentiable=True)
            if grads.requires_grad:
                torch.autograd.grad(grads.sum(), params)
                return
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        cause = error
    if cause is None:
        _, elsewhere = batched.losses_and_grads(params.detach() * 1.5 + 0.5, tasks, batch)
        if torch.allclose(grads, elsewhere, equal_nan=True):
            return
    reason = str(cause).splitlines()[0] if cause else "its gradient carries no graph, yet is not constant"
    raise ValueError(
        f"order=2 needs the second derivative of the loss of {batched.family.name}, which cannot be formed: {reason}. "
        "Use order=1, an evolution strategy (es, pes, nres), or write the loss with operations that can be "
        "differentiated twice"
    ) from cause
