"""Steps that overwrite the rule state, without a graph and with few temporaries.

They give the same numbers as `UpdateRule.update` to rounding; that stays the definition, and tests hold these to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from learned_opt.rules.base import UpdateRule
from learned_opt.rules.compiled import CompiledRule
from learned_opt.rules.context import Context
from learned_opt.rules.kernels import native, native_calls
from learned_opt.rules.lstm import LSTMRule
from learned_opt.rules.lstm_inplace import LSTMSteps
from learned_opt.rules.lstm_kept import KeptSteps
from learned_opt.task import Tensors

Scratch = dict[str, Any]
"""Buffers that one thread reuses from chunk to chunk; start with an empty dict for each theta."""

Kept = KeptSteps
"""Steps that are kept as they are taken, so that the way back need not take them again."""

Step = Callable[[torch.Tensor, torch.Tensor, Tensors, bool, Context | None], tuple[torch.Tensor, Tensors]]
"""(grads [n], params [n], state, whether the state's memory may be used for the new one, context) to (update [n], new
state)."""


def stepper(rule: UpdateRule, theta: Tensors, num_sets: int = 1) -> Step | None:
    """A function that takes many steps with one theta, fast; None where `rule.update` itself is the best there is.

    Args:
        rule: the update rule.
        theta: its meta-parameters; with several sets each has that leading dimension.
        num_sets: how many optimizers run side by side, each on n / num_sets coordinates of its own.
    """
    if not isinstance(rule, CompiledRule):
        return None
    kernel = rule.native_kernel(theta)
    if kernel is not None:
        packed = kernel.pack(native.flatten(theta, rule.names, num_sets))
        inputs, scale = rule.native_inputs, rule.native_scale
        known: tuple[Tensors | None, tuple[Tensors, int] | None] = (None, None)  # the state that it has looked at last

        def native_step(
            grads: torch.Tensor, params: torch.Tensor, state: Tensors, overwrite: bool, context: Context | None = None
        ) -> tuple[torch.Tensor, Tensors]:
            nonlocal known
            if overwrite:
                if known[0] is not state:
                    rows = native_calls.in_rows(state, grads.shape[0])
                    known = (state, rows if rows[0] is state else None)  # copies would not see the next step count
                after, checked = state, known[1]
            else:
                after, checked = {n: torch.empty_like(v) for n, v in state.items()}, None
            update = kernel.step(packed, inputs, scale, grads, state, after, context, checked)
            if "step" in state:
                after["step"] = after["step"].add_(1) if overwrite else state["step"] + 1
            return update, after

        return native_step
    return _torch_step(LSTMSteps(rule, theta, num_sets)) if isinstance(rule, LSTMRule) else None


def keeper(rule: UpdateRule, theta: Tensors, num_coordinates: int, num_steps: int) -> Kept | None:
    """Room for exactly so many steps; None where taking them again is faster, or where they take too much memory."""
    if not isinstance(rule, LSTMRule) or rule.native_kernel(theta) is not None:
        return None
    if num_coordinates > rule.network.most_coordinates(num_steps):
        return None
    return KeptSteps(rule, theta, num_coordinates, num_steps)


def _torch_step(steps: Callable[[torch.Tensor, Tensors], torch.Tensor]) -> Step:
    def torch_step(
        grads: torch.Tensor, params: torch.Tensor, state: Tensors, overwrite: bool, context: Context | None = None
    ) -> tuple[torch.Tensor, Tensors]:
        after = state if overwrite else {n: v.clone() for n, v in state.items()}
        update = steps(grads, after)
        if "step" in after:
            after["step"] += 1
        return update, after

    return torch_step


def prepare(rule: UpdateRule, theta: Tensors) -> Scratch:
    """What a scratch may begin with, for this theta on any thread: weights as the kernel reads them, if it is used."""
    if not isinstance(rule, CompiledRule):
        return {}
    kernel = rule.native_kernel(theta)
    return {} if kernel is None else {"packed": kernel.pack(native.flatten(theta, rule.names))}


def update_(
    rule: UpdateRule,
    theta: Tensors,
    grads: torch.Tensor,
    params: torch.Tensor,
    state: Tensors,
    scratch: Scratch,
    context: Context | None = None,
) -> torch.Tensor:
    """One step of the rule, as `rule.update`, with the new state written over the old.

    Args:
        rule: the update rule.
        theta: its meta-parameters, of the dtype of `grads`.
        grads: gradients [n].
        params: parameters [n].
        state: tensors [..., n], overwritten, "step" excepted: it may be shared by other coordinates and is only read.
        scratch: the calling thread's buffers, used with this rule and theta alone.
        context: of the coordinates' tensors, for a rule that takes one.

    Returns:
        The update [n]; valid until the next call with this scratch.
    """
    if isinstance(rule, CompiledRule):
        kernel = rule.native_kernel(theta)
        if kernel is not None:
            if "packed" not in scratch:
                scratch.update(prepare(rule, theta))
            return kernel.step(scratch["packed"], rule.native_inputs, rule.native_scale, grads, state, state, context)
    if isinstance(rule, LSTMRule):
        if "steps" not in scratch:
            scratch["steps"] = LSTMSteps(rule, theta)
        return scratch["steps"](grads, state)
    told = () if context is None else (context.rows(len(grads)),)
    update, new_state = rule.update(theta, grads, params, state, *told)
    for name, value in new_state.items():
        if name != "step":
            state[name].copy_(value)
    return update
