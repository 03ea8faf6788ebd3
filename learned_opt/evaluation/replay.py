"""An update rule fed gradients that were fixed beforehand: no task, no loss, only what the rule does with them.

Beside it stand `torch.optim.Adam` and `RMSprop` at learning rate 1 and otherwise their defaults, fed the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from learned_opt.evaluation.metrics import Array
from learned_opt.rules.base import UpdateRule
from learned_opt.rules.context import TensorLayout, told
from learned_opt.task import Tensors

REFERENCES: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
    "adam": lambda params: torch.optim.Adam(params, lr=1.0),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1.0),
}


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a rule did with a sequence of gradients.

    Attributes:
        updates: [steps, n].
        memory: label -> [steps, n], every number of the rule's state after each step; the cells alone for an LSTM.
    """

    updates: Array
    memory: dict[str, Array]


def as_double(theta: Tensors) -> Tensors:
    """Theta in float64 on the CPU."""
    return {name: value.detach().to("cpu", torch.float64) for name, value in theta.items()}


def run_steps(
    rule: UpdateRule, theta: Tensors, grads: torch.Tensor, state: Tensors, context: torch.Tensor | None = None
) -> tuple[list[torch.Tensor], list[Tensors]]:
    """The updates [n] to given gradients [steps, n] and the states after each, with parameters that start at zero.

    A rule that is told of whole tensors is told `context` [steps, num_context, n]; without it, every coordinate is
    taken for a tensor of its own.
    """
    params = torch.zeros_like(grads[0])
    updates, states = [], []
    single = TensorLayout((1,), grads.shape[1])
    for step, grad in enumerate(grads):
        more = told(rule, grad, state, single) if context is None else (context[step],)
        update, state = rule.update(theta, grad, params, state, *more)
        params = params + update
        updates.append(update)
        states.append(state)
    return updates, states


@torch.no_grad()
def replay(rule: UpdateRule, theta: Tensors, gradients: npt.ArrayLike, context: npt.ArrayLike | None = None) -> Replay:
    """Feed a rule a sequence of gradients, from a fresh state, in float64.

    Args:
        rule: the update rule.
        theta: its meta-parameters.
        gradients: [steps, n], at least one of each.
        context: [steps, num_context, n], what a rule that is told of whole tensors was told; see `run_steps`.
    """
    grads = torch.as_tensor(np.asarray(gradients, dtype=np.float64))
    if grads.dim() != 2 or not grads.numel():
        raise ValueError(f"gradients must be [steps, n] with at least one of each; got shape {tuple(grads.shape)}")
    state = rule.init_state(grads.shape[1], dtype=torch.float64)
    contexts = None if context is None else torch.as_tensor(np.asarray(context, dtype=np.float64))
    updates, states = run_steps(rule, as_double(theta), grads, state, contexts)
    kept = [name for name in state if name != "step"]
    rows: dict[str, Array] = {}
    for name in ["cell"] if "cell" in kept else kept:
        history = torch.stack([s[name].expand(*s[name].shape[:-1], grads.shape[1]) for s in states])
        lead = tuple(history.shape[1:-1])
        for place in np.ndindex(lead):
            label = f"{name} {'.'.join(str(i) for i in place)}".strip()
            index = (slice(None), *place)
            rows[label] = history[index].numpy()
    return Replay(torch.stack(updates).numpy(), rows)


def reference_updates(name: str, gradients: npt.ArrayLike) -> Array:
    """The updates [steps, n] of a reference, at learning rate 1, to the same gradients.

    Args:
        name: one of `REFERENCES`.
        gradients: [steps, n].
    """
    grads = torch.as_tensor(np.asarray(gradients, dtype=np.float64))
    param = torch.zeros(grads.shape[1:], dtype=torch.float64, requires_grad=True)
    optimizer = REFERENCES[name]([param])
    out = []
    for grad in grads:
        with torch.no_grad():
            param.zero_()  # so that an update is read off without rounding against a parameter
        param.grad = grad.clone()
        optimizer.step()
        out.append(param.detach().clone())
    found: Array = torch.stack(out).numpy()
    return found


def effective_rate(updates: npt.ArrayLike, gradients: npt.ArrayLike) -> Array:
    """The effective learning rate at every step, [steps]; NaN where Adam's direction is zero.

    Args:
        updates: [steps, n].
        gradients: [steps, n], those that led to them.
    """
    mine, direction = np.asarray(updates, dtype=np.float64), reference_updates("adam", gradients)
    if mine.shape != direction.shape:
        raise ValueError(f"updates and gradients must be of one shape; got {mine.shape} and {direction.shape}")
    sizes = [np.sqrt((values**2).mean(1)) for values in (mine, direction)]
    known = sizes[1] > 0
    return np.where(known, sizes[0] / np.where(known, sizes[1], 1.0), np.nan)
