"""One step under the guard: what the learned rule and Adam propose, and which of it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from learned_opt import guard
from learned_opt.coordinates import Entry, Program
from learned_opt.guard import GuardConfig, Watch

Proposal = tuple[Sequence[Entry], Program]
"""The parameters of one group on one device, and the rule to ask."""


def step(
    proposals: Sequence[Proposal], ask: Callable[[Sequence[Entry], Program], int], watch: Watch, config: GuardConfig
) -> bool:
    """Move the parameters by the learned updates, clipped, or by Adam's; or not at all if a gradient is not finite.

    Args:
        proposals: all that the optimizer moves in this step.
        ask: has the rule put its updates into the entries' `update`; returns how many coordinates it had none for.
        watch: whose turn it is; its counts are advanced.
        config: how tight the guard is.

    Returns:
        Whether a step was taken.
    """
    if not guard.usable([entry.grad for entries, _ in proposals for entry in entries]):
        watch.num_skipped += 1
        return False
    for entries, program in proposals:
        rates, dtype = program.rates, program.dtype
        if watch.learned:
            for entry in entries:
                entry.update = torch.empty_like(entry.param, dtype=dtype)
            watch.num_frozen += ask(entries, program)
        for entry in entries:
            grad = entry.grad.to(dtype)
            by_adam = guard.adam_update(entry.state, -grad if rates.maximize else grad, config.adam_lr)
            update = by_adam
            if entry.update is not None:
                update = entry.update
                watch.num_clipped += guard.clip_to(update, by_adam, config.trust)
            decayed = entry.param.to(dtype) * (1 - rates.lr * rates.weight_decay)
            entry.param.copy_(decayed.add_(update, alpha=rates.lr))
    return True
