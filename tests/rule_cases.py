"""What tests of rules share that are told of whole parameter tensors: made-up context, and the real one by hand."""

from __future__ import annotations

import torch

from learned_opt.rules import UpdateRule, slice_coordinates
from learned_opt.rules.context import Context
from learned_opt.task import Tensors


def told(rule: UpdateRule, n: int, num_steps: int | None = None, seed: int = 7) -> Context | None:
    """Made-up context of three tensors; nothing for a rule that takes none."""
    if not rule.num_context:
        return None
    generator = torch.Generator().manual_seed(seed)
    steps = () if num_steps is None else (num_steps,)
    values = torch.randn(*steps, rule.num_context, 3, generator=generator)
    return Context(values, torch.randint(3, (n,), generator=generator, dtype=torch.int32).sort().values)


def in_dtype(context: Context | None, dtype: torch.dtype) -> Context | None:
    return None if context is None else Context(context.values.to(dtype), context.index)


def rows_of(context: Context | None, n: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """What `update` takes for it, behind its other arguments."""
    return () if context is None else (context.rows(n).to(dtype),)


def arguments(context: Context | None) -> tuple[Context, ...]:
    """What `backward` takes for it, behind its other arguments."""
    return () if context is None else (context,)


def agreement_by_hand(rule: UpdateRule, grads: torch.Tensor, state: Tensors) -> torch.Tensor:
    """The context [4] of a mixture's one tensor: cosines, written as they are defined."""
    beta = rule.settings()["square"]
    square = beta * state["v"][0] + (1 - beta) * grads**2
    seen = square > 0
    vectors = [vector[seen] / square[seen].sqrt() for vector in (grads, *state["m"])]
    cosines = []
    for i, k in ((0, 1), (0, 2), (0, 3), (1, 3)):
        norms = vectors[i].norm() * vectors[k].norm()
        cosines.append(vectors[i] @ vectors[k] / norms if norms > 0 else torch.zeros_like(norms))
    c = torch.stack(cosines)
    return 10 * c / (1 + 10 * c.abs())


def update_by_hand(
    rule: UpdateRule, theta: Tensors, grads: torch.Tensor, params: torch.Tensor, state: Tensors, sizes: list[int]
) -> tuple[torch.Tensor, Tensors]:
    """`rule.update` on tensors of these sizes, one after another, each alone and told of itself."""
    if not rule.num_context:
        return rule.update(theta, grads, params, state)
    updates, states, start = [], [], 0
    for size in sizes:
        stop = start + size
        mine, grad = slice_coordinates(state, start, stop), grads[start:stop]
        rows = agreement_by_hand(rule, grad, mine)[:, None].expand(-1, size)
        update, after = rule.update(theta, grad, params[start:stop], mine, rows)
        updates.append(update)
        states.append(after)
        start = stop
    assert start == len(grads)
    return torch.cat(updates), {name: torch.cat([s[name] for s in states], -1) for name in states[0]}


def loud(theta: Tensors, generator: torch.Generator) -> Tensors:
    """Theta whose growth, if it has any, hears all of its context and of the network."""
    if "output.skip" not in theta:
        return theta
    weight, skip = theta["output.weight"].clone(), theta["output.skip"]
    weight[-1] = torch.randn(weight[-1].shape, generator=generator, dtype=torch.float64).to(weight.dtype)
    return {
        **theta,
        "output.weight": weight,
        "output.skip": torch.randn(skip.shape, generator=generator, dtype=torch.float64).to(skip.dtype),
    }
