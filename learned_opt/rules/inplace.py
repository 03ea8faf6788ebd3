"""Steps that overwrite the rule state, without a graph and with few temporaries.

They give the same numbers as `UpdateRule.update` to rounding; that stays the definition, and tests hold these to it.

For the LSTM, each layer is one matrix product into a reused block of gates (the bias is a column of the weights,
against a row of ones), and everything elementwise happens where the numbers already are; tanh(x) is 2σ(2x) − 1, as in
`lstm_torch`. Chunks of some 3,000
coordinates of a 2x20 LSTM stay in a core's cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from learned_opt.rules import native, native_calls
from learned_opt.rules.base import UpdateRule, fitting_chunk, slice_coordinates
from learned_opt.rules.compiled import CompiledRule
from learned_opt.rules.context import Context
from learned_opt.rules.features import NUM_FEATURES, bias_correction, log_and_sign
from learned_opt.rules.lstm import LSTMRule
from learned_opt.rules.lstm_torch import doubled_candidates
from learned_opt.task import Tensors

Scratch = dict[str, torch.Tensor]
"""Buffers that one thread reuses from chunk to chunk; start with an empty dict for each theta."""


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
    if not isinstance(rule, LSTMRule):
        return None
    # One set after another: a batched product over sets would put them between the rows and the coordinates.
    thetas = [theta] if num_sets == 1 else [{n: v[k] for n, v in theta.items()} for k in range(num_sets)]
    size = fitting_chunk(rule)
    scratches: dict[tuple[int, int], Scratch] = {}

    def torch_step(
        grads: torch.Tensor, params: torch.Tensor, state: Tensors, overwrite: bool, context: Context | None = None
    ) -> tuple[torch.Tensor, Tensors]:
        after = state if overwrite else {n: v.clone() for n, v in state.items()}
        update = torch.empty_like(grads)
        per_set = len(grads) // num_sets
        for k, own in enumerate(thetas):
            for start in range(k * per_set, (k + 1) * per_set, size):
                stop = min(start + size, (k + 1) * per_set)
                update[start:stop] = update_(
                    rule,
                    own,
                    grads[start:stop],
                    params[start:stop],
                    slice_coordinates(after, start, stop),
                    scratches.setdefault((k, stop - start), {}),
                )
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
        return _lstm_update_(rule, theta, grads, state, scratch)
    told = () if context is None else (context.rows(len(grads)),)
    update, new_state = rule.update(theta, grads, params, state, *told)
    for name, value in new_state.items():
        if name != "step":
            state[name].copy_(value)
    return update


def _lstm_update_(
    rule: LSTMRule, theta: Tensors, grads: torch.Tensor, state: Tensors, scratch: Scratch
) -> torch.Tensor:
    c, n = rule.config, grads.shape[0]
    size = c.hidden_size
    if "gates" not in scratch or scratch["gates"].shape[1] != n:
        _allocate(rule, theta, n, scratch)
    inputs = scratch["inputs" if c.dense_units else "joined.0"][:NUM_FEATURES]
    if c.inputs == "normalized":
        active = _normalized_(grads, state, c.beta, c.eps, inputs)
    else:
        features, active = log_and_sign(grads, c.log_range)
        inputs.copy_(features)
    if c.dense_units:
        below = scratch["joined.0"][: c.dense_units]
        torch.mm(scratch["dense"], scratch["inputs"], out=below)
        # ELU as max(x, exp(min(x, 0)) − 1): torch's own takes twice as long.
        negative = torch.clamp_max(below, 0, out=scratch["elu"]).exp_().sub_(1)
        torch.maximum(below, negative, out=below)
    gates, minus_one = scratch["gates"], scratch["minus one"]
    i, f, o, candidate = gates.view(4, size, n).unbind(0)
    for layer in range(c.num_layers):
        joined, hidden, cell = scratch[f"joined.{layer}"], state["hidden"][layer], state["cell"][layer]
        joined[-size - 1 : -1] = hidden
        torch.mm(scratch[f"lstm.{layer}"], joined, out=gates).sigmoid_()
        torch.add(minus_one, candidate, alpha=2, out=candidate)  # tanh
        cell.mul_(f).addcmul_(i, candidate)
        last = layer + 1 == c.num_layers
        above = scratch["top"][:-1] if last else scratch[f"joined.{layer + 1}"][:size]
        torch.add(cell, cell, out=above).sigmoid_()
        torch.add(minus_one, above, alpha=2, out=above).mul_(o)
        hidden.copy_(above)
    update = torch.mm(scratch["output"], scratch["top"], out=scratch["update"])[0]
    if c.output_tanh:
        update.tanh_()
    return update.mul_(c.output_scale).masked_fill_(~active, 0)


def _normalized_(grads: torch.Tensor, state: Tensors, beta: float, eps: float, inputs: torch.Tensor) -> torch.Tensor:
    """`features.normalized` with averages and inputs written in place; returns the mask."""
    m = state["m"].mul_(beta).add_(grads, alpha=1 - beta)
    v = state["v"].mul_(beta).addcmul_(grads, grads, value=1 - beta)
    correction = bias_correction(state["step"] + 1, beta)
    # Where v is zero the inputs are as good as zero, whatever they are divided by, and the update is masked.
    scale = (v / correction).sqrt_().add_(eps).reciprocal_()
    torch.mul(grads, scale, out=inputs[0])
    torch.mul(m, scale.div_(correction), out=inputs[1])
    return v != 0


def _allocate(rule: LSTMRule, theta: Tensors, n: int, scratch: Scratch) -> None:
    """Fill the scratch for chunks of n coordinates: weights beside their biases, and buffers whose last row is ones."""
    c = rule.config
    size = c.hidden_size
    like = theta["output.bias"]

    def with_bias(name: str) -> torch.Tensor:
        return torch.cat([theta[f"{name}.weight"], theta[f"{name}.bias"][:, None]], 1)

    def ending_in_ones(rows: int) -> torch.Tensor:
        buffer = like.new_empty(rows + 1, n)
        buffer[-1] = 1.0
        return buffer

    width = NUM_FEATURES
    if c.dense_units:
        scratch["dense"] = with_bias("dense")
        scratch["inputs"] = ending_in_ones(NUM_FEATURES)
        scratch["elu"] = like.new_empty(c.dense_units, n)
        width = c.dense_units
    for layer in range(c.num_layers):
        scratch[f"lstm.{layer}"] = doubled_candidates(theta, layer)
        scratch[f"joined.{layer}"] = ending_in_ones(width + size)
        width = size
    scratch["output"] = with_bias("output")
    scratch["top"] = ending_in_ones(size)
    scratch["minus one"] = like.new_full((), -1.0)
    scratch["gates"] = like.new_empty(4 * size, n)
    scratch["update"] = like.new_empty(1, n)
