"""One step under the guard: what the learned rule and Adam propose, and which of it is done.

The learned updates come from the same code, chunk by chunk, as without the guard, so that a run in which the guard
finds nothing to do has the same bits. Adam's moments follow every gradient, all tensors in a few launches, and one
transfer from the device a step tells the norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from learned_opt.coordinates import Entry, Program
from learned_opt.guard import GuardConfig, Watch

MOMENT1, MOMENT2, ACCEPTED, ADAM_STEP = "guard.m", "guard.v", "guard.param", "guard.step"
KEYS = (MOMENT1, MOMENT2, ACCEPTED)
"""What the guard keeps for a parameter, beside the scalar `ADAM_STEP`: Adam's moments, and the last accepted point."""

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8
_LARGE = 1e18  # the square of a larger gradient overflows float32
_LEAST_BOUND = 0.1  # Adam's steps shrink where gradients shrink or their signs vary; the trust region no further

Proposal = tuple[Sequence[Entry], Program]
"""The parameters of one group on one device, and the rule to ask."""


def init_state(state: dict[str, Any], param: torch.Tensor, dtype: torch.dtype) -> None:
    """Add what the guard keeps for a parameter to its state.

    Args:
        state: the optimizer's state of the parameter.
        param: the parameter.
        dtype: of Adam's moments, float32 or float64: in bfloat16 the second would stand still.
    """
    for key in (MOMENT1, MOMENT2):
        state[key] = torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)
    state[ACCEPTED] = param.detach().clone(memory_format=torch.contiguous_format)
    state[ADAM_STEP] = torch.zeros((), dtype=torch.float32)


def accept(param: torch.Tensor, state: dict[str, Any]) -> None:
    """Remember the parameter as it is."""
    state[ACCEPTED].copy_(param)


def restore(param: torch.Tensor, state: dict[str, Any]) -> None:
    """Return to the last accepted point, with a memory that has seen nothing."""
    param.copy_(state[ACCEPTED])
    for key, value in state.items():
        if key != ACCEPTED and isinstance(value, torch.Tensor):
            value.zero_()


def restart_adam(state: dict[str, Any]) -> None:
    """Have Adam forget what it has seen: the gradients of the learned steps are not those of its own."""
    for key in (MOMENT1, MOMENT2, ADAM_STEP):
        state[key].zero_()


def usable(grads: Sequence[torch.Tensor]) -> bool:
    """Whether every gradient is finite, and its square too."""
    return all(value <= _LARGE for value in _norms(grads, math.inf))


def _norms(tensors: Sequence[torch.Tensor], order: float) -> list[float]:
    """The norms of tensors of any dtypes and devices: a few launches, and one transfer a device."""
    kinds = dict.fromkeys((tensor.device, tensor.dtype) for tensor in tensors)
    norms: dict[int, torch.Tensor] = {}
    for kind in kinds:
        places = [k for k, tensor in enumerate(tensors) if (tensor.device, tensor.dtype) == kind]
        norms |= zip(places, torch._foreach_norm([tensors[k] for k in places], order))
    return _numbers([norms[k] for k in range(len(tensors))])


def _numbers(scalars: Sequence[torch.Tensor]) -> list[float]:
    """The values of scalars, one transfer a device."""
    devices = dict.fromkeys(scalar.device for scalar in scalars)
    found = {
        device: iter(torch.stack([s.double() for s in scalars if s.device == device]).tolist()) for device in devices
    }
    return [next(found[scalar.device]) for scalar in scalars]


def step(
    proposals: Sequence[Proposal],
    ask: Callable[[Sequence[Entry], Program], int],
    watch: Watch,
    config: GuardConfig,
    loss: float | None,
) -> bool:
    """Move the parameters by the learned updates, clipped, or by Adam's; or not at all if a gradient is not finite.

    Args:
        proposals: all that the optimizer moves in this step.
        ask: has the rule put its updates into the entries' `update`; returns how many coordinates it had none for.
        watch: whose turn it is; its counts are advanced.
        config: how tight the guard is.
        loss: the loss that the gradients belong to, where it is known.

    Returns:
        Whether a step was taken.
    """
    entries = [entry for some, _ in proposals for entry in some]
    if not usable([entry.grad for entry in entries]):
        watch.num_skipped += 1
        return False
    by_adam: list[torch.Tensor] = []
    for some, program in proposals:
        if watch.learned:
            for entry in some:
                entry.update = torch.empty_like(entry.param, dtype=program.dtype)
            watch.num_frozen += ask(some, program)
        by_adam += _adam_updates(some, program, config.adam_lr)
    if watch.learned:
        if loss is not None:
            watch.hear(*_promises(proposals, by_adam, config.adam_lr), loss, config)
        _clip(entries, by_adam, watch, config)
    else:
        for entry, update in zip(entries, by_adam):
            entry.update = update
    for some, program in proposals:
        _move(some, program)
    return True


def _adam_updates(entries: Sequence[Entry], program: Program, lr: float) -> list[torch.Tensor]:
    """Adam's update [n] of every parameter; advances its moments."""
    states = [entry.state for entry in entries]
    m, v = [s[MOMENT1].view(-1) for s in states], [s[MOMENT2].view(-1) for s in states]
    steps = [s[ADAM_STEP] for s in states]
    torch._foreach_add_(steps, 1)
    counts = [float(count) for count in steps]
    grads = [entry.grad.to(moment.dtype) for entry, moment in zip(entries, m)]
    torch._foreach_mul_(v, _BETA2)
    torch._foreach_addcmul_(v, grads, grads, value=1 - _BETA2)
    if program.rates.maximize:
        grads = list(torch._foreach_neg(grads))
    torch._foreach_lerp_(m, grads, 1 - _BETA1)
    updates = torch._foreach_div(m, _roots(v, counts))
    torch._foreach_mul_(updates, [-lr / (1 - _BETA1**count) for count in counts])
    return list(updates)


def _roots(v: Sequence[torch.Tensor], counts: Sequence[float]) -> list[torch.Tensor]:
    """What Adam divides by: √v̂ + ε."""
    roots = torch._foreach_div(list(v), [1 - _BETA2**count for count in counts])
    torch._foreach_sqrt_(roots)
    torch._foreach_add_(roots, _EPS)
    return list(roots)


def _clip(entries: Sequence[Entry], by_adam: Sequence[torch.Tensor], watch: Watch, config: GuardConfig) -> None:
    """Scale every update, in place, to at most `watch.trust` times the norm of Adam's."""
    trust = watch.trust(config)
    updates = [entry.update for entry in entries if entry.update is not None]
    norms = [*_norms(updates, 2), *_norms(by_adam, 2)]
    for entry, update, norm, bound in zip(entries, updates, norms, norms[len(entries) :]):
        limit = trust * max(bound, _LEAST_BOUND * config.adam_lr * math.sqrt(entry.param.numel()))
        if norm > limit:
            watch.num_clipped += 1
            update.mul_(limit / norm)


def _promises(proposals: Sequence[Proposal], by_adam: Sequence[torch.Tensor], lr: float) -> tuple[float, float]:
    """By how much the learned step and Adam's lower the loss to first order: −⟨gradient, update⟩.

    The mini-batch's own share of Adam's step is left out: its noise agrees with itself.
    """
    learned, adam, own = [], [], []
    updates = iter(by_adam)
    for entries, program in proposals:
        sign = 1 if program.rates.maximize else -1
        counts = [float(entry.state[ADAM_STEP]) for entry in entries]
        roots = _roots([entry.state[MOMENT2].view(-1) for entry in entries], counts)
        for entry, count, root in zip(entries, counts, roots):
            assert entry.update is not None
            grad = entry.grad.to(entry.update.dtype)
            learned.append(torch.dot(grad, entry.update) * (sign * program.rates.lr))
            adam.append(torch.dot(grad, next(updates)) * sign)
            own.append(torch.dot(grad, grad / root) * (lr * (1 - _BETA1) / (1 - _BETA1**count)))
    numbers = _numbers([*learned, *adam, *own])
    n = len(learned)
    return sum(numbers[:n]), sum(numbers[n : 2 * n]) - sum(numbers[2 * n :])


def _move(entries: Sequence[Entry], program: Program) -> None:
    """p ← (1 − lr·weight_decay)·p + lr·update, rounded once."""
    lr, keep = program.rates.lr, 1 - program.rates.lr * program.rates.weight_decay
    for entry in entries:
        assert entry.update is not None
        if entry.param.dtype == program.dtype:
            (entry.param if keep == 1 else entry.param.mul_(keep)).add_(entry.update, alpha=lr)
        else:
            entry.param.copy_(torch.add(entry.param.to(program.dtype) * keep, entry.update, alpha=lr))
