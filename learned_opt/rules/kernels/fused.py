"""The LSTM rule's step on a GPU as one Triton kernel, or nothing, in which case plain torch takes the step.

Plain torch stays the definition. The first time that settings, dtypes and a device meet, the kernel steps a small
made-up sample, and the result is held to `LSTMRule.update` on the CPU. If the kernel raises or disagrees, a
`FusedStepWarning` says so once, and plain torch is used from then on; without Triton 3.3 or later from the start, and
nothing is said.

Set the environment variable LEARNED_OPT_FUSED to 0 to do without the kernel; it is read at every step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from learned_opt.rules.base import UpdateRule
from learned_opt.rules.kernels import native
from learned_opt.rules.lstm import LSTMRule, LSTMRuleConfig
from learned_opt.task import Tensors

MAX_UNITS = 64
"""Widest hidden or dense layer for the kernel, whose tiles of weights must fit a multiprocessor's shared memory. Matrix
products dominate the step of wider rules, and plain torch is good at those."""

OLDEST_TRITON = (3, 3)
"""The version that comes with torch 2.7."""

SAMPLE = 208
"""Coordinates of the sample that a kernel is tried on: several blocks, the last not full. A multiple of 16, as the rows
of most states are: Triton compiles for that case apart."""

_trusted: dict[tuple[object, ...], bool] = {}


class FusedStepWarning(UserWarning):
    """The fused kernel failed or gave other numbers than the rule, and plain torch takes its place."""


@dataclasses.dataclass(frozen=True)
class Factors:
    """What a step does with the update: p ← keep·p + lr·update, of gradients that are negated first to maximize."""

    lr: float = 1.0
    keep: float = 1.0
    maximize: bool = False


def wanted(rule: UpdateRule, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for this rule, device and dtype of computation, and nobody has turned it off."""
    if device.type != "cuda" or dtype != torch.float32 or os.environ.get("LEARNED_OPT_FUSED") == "0":
        return False
    if type(rule) is not LSTMRule or max(rule.config.hidden_size, rule.config.dense_units) > MAX_UNITS:
        return False
    return _has_triton()


@functools.cache
def _has_triton() -> bool:
    """Whether Triton is there and recent enough: the compiler of 3.2 ends the process over some of these kernels."""
    try:
        import triton
    except Exception:  # a broken installation raises what it likes
        return False
    return tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) >= OLDEST_TRITON


def flat_weights(rule: LSTMRule, theta: Tensors) -> torch.Tensor:
    """theta as the kernel reads it: one float32 tensor [num_meta_parameters]."""
    return native.flatten(theta, rule.names)[0].float()


def fused_step(
    rule: LSTMRule,
    theta: Tensors,
    weights: torch.Tensor,
    params: torch.Tensor,
    grads: torch.Tensor,
    rows: torch.Tensor,
    counts: Sequence[tuple[float, int]],
    factors: Factors,
) -> bool:
    """Step parameters and state in place with the kernel, if it can be trusted.

    Args:
        rule, theta: the rule and its meta-parameters on the device, for which `wanted` holds.
        weights: `flat_weights` of them.
        params: [n], written; of any floating dtype.
        grads: [n].
        rows: state [num_rows, n], written; the rule's state tensors without "step", row under row.
        counts: steps taken before this one, and the number of consecutive coordinates that it holds for.
        factors: what is done with the update.

    Returns:
        Whether the step was taken; if not, nothing has changed.
    """
    if not (params.is_contiguous() and grads.is_contiguous() and rows.stride(1) == 1 and rows.stride(0) > 1):
        return False
    device = params.device
    key = (rule.config, params.dtype, grads.dtype, rows.dtype, device)
    if not _trusted.get(key, True):
        return False
    try:
        if key not in _trusted:
            worst = disagreement(rule, theta, params.dtype, grads.dtype, rows.dtype, device)
            if not worst <= 1:
                raise ArithmeticError(f"its numbers differ from the rule's by {worst:.3g} times the tolerance")
            _trusted[key] = True
        launch(rule.config, weights, params, grads, rows, counts, factors)
    except Exception as error:
        _trusted[key] = False
        warnings.warn(
            f"the fused kernel of the LSTM rule cannot be used on {device} ({type(error).__name__}: {error}); plain "
            "torch takes its steps, more slowly. Set LEARNED_OPT_FUSED=0 to use plain torch without this warning",
            FusedStepWarning,
            stacklevel=2,
        )
        return False
    return True


def launch(
    config: LSTMRuleConfig,
    weights: torch.Tensor,
    params: torch.Tensor,
    grads: torch.Tensor,
    rows: torch.Tensor,
    counts: Sequence[tuple[float, int]],
    factors: Factors,
) -> None:
    """Run the kernel; arguments as for `fused_step`, nothing is checked."""
    from learned_opt.rules.kernels import fused_kernel

    device, n = params.device, params.numel()
    unbias = [1 - config.beta ** (steps + 1) for steps, _ in counts]
    shared = len(set(unbias)) == 1
    parts = unbias[:1] if shared else unbias
    sizes = [1] if shared else [size for _, size in counts]
    corrections = [weights.new_full((size,), value) for value, size in zip(parts, sizes)]
    constants = compiled_settings(config, _has_tensor_cores(device))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        fused_kernel.lstm_step[(math.ceil(n / constants["BLOCK"]),)](
            params,
            grads,
            rows,
            weights,
            corrections[0] if shared else torch.cat(corrections),
            0 if shared else 1,
            n,
            rows.stride(0),
            factors.lr,
            factors.keep,
            -1.0 if factors.maximize else 1.0,
            **constants,
        )


def _has_tensor_cores(device: torch.device) -> bool:
    """Whether products of TF32 numbers are to be had: on NVIDIA's GPUs since Ampere."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def compiled_settings(config: LSTMRuleConfig, tensor_cores: bool) -> dict[str, Any]:
    """What is compiled into the kernel: the rule's settings, and tiles that fit the threads' registers.

    On tensor cores a product is three of TF32, which together are as exact as one in float32.
    """
    hidden, dense = _padded(config.hidden_size), _padded(config.dense_units)
    wide = max(hidden, dense)
    return {
        "NORMALIZED": config.inputs == "normalized",
        "BETA": config.beta,
        "EPS": config.eps,
        "LOG_RANGE": config.log_range,
        "SMALLEST": math.exp(-config.log_range),
        "LARGEST": math.exp(config.log_range),
        "DENSE": config.dense_units,
        "DENSE_PAD": dense,
        "LAYERS": config.num_layers,
        "HIDDEN": config.hidden_size,
        "HIDDEN_PAD": hidden,
        "SCALE": config.output_scale,
        "TANH": config.output_tanh,
        "PRECISION": "tf32x3" if tensor_cores else "ieee",
        "BLOCK": 64 if wide <= 32 else 32,
        "num_warps": 4 if wide == 16 else 8,
    }


def _padded(units: int) -> int:
    return max(16, 1 << max(units - 1, 0).bit_length())


def disagreement(
    rule: LSTMRule,
    theta: Tensors,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    row_dtype: torch.dtype,
    device: torch.device,
) -> float:
    """The worst difference between the kernel and the rule on a sample, in units of the tolerance.

    The tolerance is 1e-4, or two units in the last place of a dtype that is coarser, relative to the sum of old value,
    new value and a tenth. The sample has gradients from 1e-4 to 1e4 and zeros, and a state as after some steps. It is
    stepped with one step count for all coordinates, and again with several, uphill.

    Returns:
        At most 1 for a sound kernel; infinite where one of the two is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    cpu_theta = {name: value.cpu() for name, value in theta.items()}
    weights = flat_weights(rule, theta)
    worst = 0.0
    for counts, maximize in (([(3.0, SAMPLE)], False), ([(0.0, SAMPLE - 100), (7.0, 100)], True)):
        params, grads, rows = _sample(rule, generator)
        params, grads, rows = params.to(param_dtype), grads.to(grad_dtype), rows.to(row_dtype)
        new_params, new_rows = params.to(device, copy=True), rows.to(device, copy=True)
        # A rate that shows the update itself: parameters of low precision would swallow a small one.
        factors = Factors(lr=1 / rule.config.output_scale, keep=0.5, maximize=maximize)
        launch(rule.config, weights, new_params, grads.to(device), new_rows, counts, factors)
        expected_params, expected_rows = _by_the_rule(rule, cpu_theta, params, grads, rows, counts, factors)
        for new, expected, old in ((new_params, expected_params, params), (new_rows, expected_rows, rows)):
            tolerance = max(1e-4, 2 * torch.finfo(new.dtype).eps)
            scale = tolerance * (expected.abs() + old.float().abs() + 0.1)
            ratio = ((new.cpu().float() - expected).abs() / scale).max().item()
            worst = max(worst, ratio if math.isfinite(ratio) else math.inf)
    return worst


def _sample(rule: LSTMRule, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Parameters [n], gradients [n] and rows of state [num_rows, n]; every fifth coordinate has had no gradient."""
    grads = torch.randn(SAMPLE, generator=generator) * 10 ** (torch.rand(SAMPLE, generator=generator) * 8 - 4)
    grads[::5] = 0
    state = rule.init_state(SAMPLE)
    for name, value in state.items():
        if name in ("hidden", "cell"):
            value.copy_(torch.rand(value.shape, generator=generator) * 2 - 1)
    if "m" in state:
        state["m"].copy_(grads * torch.randn(SAMPLE, generator=generator))
        state["v"].copy_(grads.square() * torch.rand(SAMPLE, generator=generator))
    rows = torch.cat([value.reshape(-1, SAMPLE) for name, value in state.items() if name != "step"])
    return torch.randn(SAMPLE, generator=generator), grads, rows


def _by_the_rule(
    rule: LSTMRule,
    theta: Tensors,
    params: torch.Tensor,
    grads: torch.Tensor,
    rows: torch.Tensor,
    counts: Sequence[tuple[float, int]],
    factors: Factors,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `fused_step` must come to, in float32 on the CPU."""
    params, grads, rows = params.float(), grads.float() * (-1 if factors.maximize else 1), rows.float()
    state, start = rule.init_state(params.numel()), 0
    for name, value in state.items():
        if name == "step":
            state[name] = torch.cat([torch.full((size,), steps) for steps, size in counts])
            continue
        num_rows = value[..., 0].numel()
        state[name] = rows[start : start + num_rows].view_as(value)
        start += num_rows
    update, new_state = rule.update(theta, grads, params, state)
    new_rows = torch.cat([new_state[name].reshape(-1, params.numel()) for name in state if name != "step"])
    return params * factors.keep + update * factors.lr, new_rows
