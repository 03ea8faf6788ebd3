"""What an update rule is told of the whole parameter tensor that a coordinate belongs to.

Sums over a tensor's coordinates say what no coordinate can tell from its own noisy gradient: whether the last steps
were too short or too long. A rule that wants them states `num_context`, the terms of the sums (`context_terms`), and
what becomes of the sums (`context_of`). Terms are summed over coordinates, so that a tensor may be cut into pieces, on
one machine or on several, and its context is still that of the whole.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from learned_opt.rules.base import UpdateRule
from learned_opt.task import Tensors


@functools.lru_cache(maxsize=64)
def _index(sizes: tuple[int, ...], repeats: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # it is kept, and autograd takes no tensor that was made in that mode
        counts = torch.tensor(sizes * repeats, device=device)
        return torch.arange(len(counts), device=device, dtype=torch.int32).repeat_interleave(counts)


@dataclasses.dataclass(frozen=True)
class TensorLayout:
    """Where parameter tensors lie among coordinates: one after another, and all of them so many times.

    Attributes:
        sizes: coordinates of each tensor, at least 1.
        repeats: how often the sequence of tensors is repeated, once for each particle.
    """

    sizes: tuple[int, ...]
    repeats: int = 1

    def index(self, device: torch.device) -> torch.Tensor:
        """The number of every coordinate's tensor, int32 [n]."""
        return _index(self.sizes, self.repeats, device)

    def sums(self, terms: torch.Tensor) -> torch.Tensor:
        """Terms [..., n] summed over every tensor: [..., repeats · tensors], in float64 where the device has it.

        Products of sums are taken afterwards, which a float32 holds neither for many coordinates nor for tiny ones.
        """
        dtype = terms.dtype if terms.device.type == "mps" else torch.float64
        parts = terms.unflatten(-1, (self.repeats, -1)).split(self.sizes, dim=-1)
        return torch.stack([part.sum(-1, dtype=dtype) for part in parts], -1).flatten(-2)


@dataclasses.dataclass(frozen=True)
class Context:
    """The context of some coordinates' tensors.

    Attributes:
        values: [num_context, tensors], or [steps, num_context, tensors] for a run of steps.
        index: int32 [n], the tensor of every coordinate; None where there is one tensor.
    """

    values: torch.Tensor
    index: torch.Tensor | None

    def rows(self, num_coordinates: int) -> torch.Tensor:
        """[..., num_context, n]: every coordinate's own copy."""
        if self.index is None:
            return self.values.expand(*self.values.shape[:-1], num_coordinates)
        return self.values.index_select(-1, self.index)

    def of(self, start: int, stop: int) -> Context:
        """That of coordinates start … stop − 1."""
        return self if self.index is None else Context(self.values, self.index[start:stop])


def context(rule: UpdateRule, grads: torch.Tensor, state: Tensors, layout: TensorLayout) -> Context:
    """What the rule is told before a step.

    Args:
        rule: one with `num_context` of at least 1.
        grads: [n].
        state: rule state before the step, tensors [..., n].
        layout: of the n coordinates.
    """
    values = rule.context_of(rule.context_sums(grads, state, layout)).to(grads.dtype)
    return Context(values, layout.index(grads.device))


def told(rule: UpdateRule, grads: torch.Tensor, state: Tensors, layout: TensorLayout) -> tuple[torch.Tensor, ...]:
    """What `UpdateRule.update` takes beside the rest: the context's rows, or nothing for a rule that takes none."""
    return (context(rule, grads, state, layout).rows(len(grads)),) if rule.num_context else ()


def joined(values: torch.Tensor, sizes: Sequence[int]) -> Context:
    """The context of tensors of so many coordinates each, one after another, from its values [num_context, tensors]."""
    return Context(values, None if len(sizes) == 1 else _index(tuple(sizes), 1, values.device))
