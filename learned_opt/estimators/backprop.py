"""Truncated backpropagation through the unroll, first-order by replay or exact.

First order treats the inner gradients as constants (Andrychowicz et al. 2016). Then the derivative of the meta-loss
with respect to the parameters after step t, through the loss there, is w_t·g_t, and g_t has been computed anyway: the
unroll runs without a graph, and the rule alone runs once more, chunk of coordinates by chunk, with those vectors
as its cotangents (`UpdateRule.backward`). No second backward pass through the task is made, and memory is bounded by
the recorded gradients and one chunk, whatever the truncation's graph would have been.

Second order is exact: it differentiates the inner gradients too. The unroll keeps what each step started from; going
backwards, one step at a time is rebuilt with its graph and differentiated, so that memory holds one step's graph only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from learned_opt.estimators.base import Estimate, Estimator, Workload
from learned_opt.rules.base import slice_coordinates
from learned_opt.task import Tensors
from learned_opt.unroll import Particles, Segment, Stage, columns_of, start_particles, unroll

REPLAY_CHUNK = 2048
"""Coordinates replayed at a time."""


class TruncatedBackprop(Estimator):
    """Truncated backpropagation.

    Args:
        order: 1 for gradients as constants, 2 for the exact meta-gradient of the truncation.
        chunk_size: coordinates replayed at a time (first order).
    """

    kind: ClassVar[str] = "backprop"

    def __init__(self, order: int = 1, chunk_size: int = REPLAY_CHUNK) -> None:
        if order not in (1, 2):
            raise ValueError(f"order must be 1 (inner gradients as constants) or 2 (exact); got {order}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1; got {chunk_size}")
        self.order = order
        self.chunk_size = chunk_size

    def init(self, work: Workload, theta: Tensors, ids: Sequence[int]) -> Particles:
        return start_particles(work.batched, work.rule, work.plan, ids)

    def horizons(self, state: Particles) -> list[int]:
        return list(state.horizons)

    def state_dict(self, state: Particles) -> dict[str, Any]:
        return state.state_dict()

    def load_state_dict(self, work: Workload, saved: dict[str, Any]) -> Particles:
        return Particles.from_state_dict(saved, work.batched, work.plan.split)

    def estimate(self, work: Workload, theta: Tensors, state: Particles) -> Estimate:
        segment = unroll(
            work.rule,
            theta,
            work.batched,
            work.plan,
            state,
            work.truncation,
            record="gradients" if self.order == 1 else "stages",
        )
        value, weights = work.meta_loss.weights(segment.losses, segment.initial, segment.valid)
        grads = (self._replay if self.order == 1 else self._exact)(work, theta, segment, weights)
        return Estimate(
            grads={n: torch.zeros_like(g) if n in work.frozen else g for n, g in grads.items()},
            meta_loss=float(value),
            num_inner_steps=work.truncation * len(state),
            num_invalid=int((~segment.valid).sum()),
            num_clipped=work.meta_loss.num_clipped(segment.losses, segment.initial),
        )

    @torch.no_grad()
    def _replay(self, work: Workload, theta: Tensors, segment: Segment, weights: torch.Tensor) -> Tensors:
        assert segment.inputs is not None and segment.outputs is not None
        total = {name: torch.zeros_like(value) for name, value in theta.items()}
        size = work.batched.num_parameters
        for run in segment.runs:
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
            for start in range(0, num_columns * size, self.chunk_size):
                stop = min(start + self.chunk_size, num_columns * size)
                owner = torch.arange(start, stop, device=weight.device) // size
                part = work.rule.backward(
                    theta,
                    inputs[:, start:stop],
                    params[start:stop],
                    slice_coordinates(run.rule_state, start, stop),
                    outputs[:, start:stop] * weight[:, owner],
                )
                for name, value in part.items():
                    total[name] += value
        return total

    def _exact(self, work: Workload, theta: Tensors, segment: Segment, weights: torch.Tensor) -> Tensors:
        leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
        total = {name: torch.zeros_like(value) for name, value in theta.items()}
        later: tuple[torch.Tensor, torch.Tensor, Tensors] | None = None
        for stage, weight in zip(reversed(segment.stages), weights.flip(0)):
            later = self._one_step_back(work, leaves, total, stage, weight, later, segment.valid)
        return total

    def _one_step_back(
        self,
        work: Workload,
        leaves: Tensors,
        total: Tensors,
        stage: Stage,
        weight: torch.Tensor,
        later: tuple[torch.Tensor, torch.Tensor, Tensors] | None,
        valid: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
        """Differentiate one inner step: adds to `total`, returns the cotangents of what was before it.

        These are (params, grads, rule state).
        """
        # Invalid particles' numbers may be NaN, and NaN times a zero cotangent is NaN: put zeros in their place.
        params, grads = (torch.where(valid[:, None], x, 0.0).requires_grad_() for x in (stage.params, stage.grads))
        columns_valid = valid.repeat_interleave(work.batched.num_parameters)
        state = {n: torch.where(columns_valid, v, 0.0).requires_grad_() for n, v in stage.rule_state.items()}
        with torch.enable_grad():
            update, new_state = work.rule.update(leaves, grads.reshape(-1), params.reshape(-1), state)
            new_params = params + update.view_as(params)
            losses, new_grads = work.batched.losses_and_grads(new_params, stage.tasks, stage.batch, differentiable=True)
            surrogate = (losses * weight)[valid].sum()
            if later is not None:
                d_params, d_grads, d_state = later
                keep = valid if stage.ends is None else valid & ~stage.ends
                for value, cotangent in ((new_params, d_params), (new_grads, d_grads)):
                    surrogate = surrogate + (value * cotangent)[keep].sum()
                for name, cotangent in d_state.items():
                    columns = keep.nonzero().flatten()
                    pair = columns_of({"value": new_state[name], "cotangent": cotangent}, columns, len(keep))
                    surrogate = surrogate + (pair["value"] * pair["cotangent"]).sum()
            wanted = [*leaves.values(), params, grads, *state.values()]
            if not surrogate.requires_grad:
                raise ValueError(f"{work.batched.family.name}: the loss does not depend on its parameters")
            out = torch.autograd.grad(surrogate, wanted, allow_unused=True, materialize_grads=True)
        for name, value in zip(leaves, out):
            total[name] += value
        rest = out[len(leaves) :]
        return rest[0], rest[1], dict(zip(state, rest[2:]))
