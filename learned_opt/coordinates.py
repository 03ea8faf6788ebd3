"""Running an update rule over parameter tensors: from tensors to rows of coordinates and back, chunk by chunk.

A rule works on coordinates, and holds its state coordinates last. An optimizer's state must be one tensor of the
parameter's shape per row of the rule's state, so that every checkpoint and sharding tool can handle it. Here the two
meet: a chunk is a stretch of coordinates, from one large tensor or from many small ones; its rows are gathered into one
block, the rule runs on it, and what is new is written back. Temporaries are bounded by the chunk, whatever the size of
the tensors.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch

from learned_opt.rules.base import UpdateRule
from learned_opt.task import Tensors

STEP = "step"


class StateLayout:
    """The rows of a rule's state: how many, what each is called, and where they belong in the rule's own tensors.

    Attributes:
        keys: a name for each row, such as "hidden.0.3" for hidden[0, 3] or "m" for m.
        has_step: whether the rule counts its steps.
    """

    def __init__(self, rule: UpdateRule) -> None:
        example = rule.init_state(1)
        self.has_step = STEP in example
        self.keys: list[str] = []
        self._blocks: list[tuple[str, int, int, tuple[int, ...]]] = []
        for name, value in example.items():
            if name == STEP:
                continue
            lead = tuple(value.shape[:-1])
            start = len(self.keys)
            indices = itertools.product(*(range(size) for size in lead))
            self.keys += [".".join([name, *map(str, index)]) for index in indices]
            self._blocks.append((name, start, len(self.keys), lead))

    def to_rule(self, rows: torch.Tensor, step: torch.Tensor | None) -> Tensors:
        """The rule's state from its rows [num_rows, n] (views of them) and its step count [1] or [n]."""
        n = rows.shape[1]
        state = {name: rows[start:stop].view(*lead, n) for name, start, stop, lead in self._blocks}
        return state if step is None else {**state, STEP: step}

    def from_rule(self, state: Tensors) -> list[torch.Tensor]:
        """Blocks of rows [num_rows_of_block, n] that make up the new state, in order."""
        return [state[name].reshape(stop - start, -1) for name, start, stop, _ in self._blocks]


@dataclasses.dataclass
class Entry:
    """One parameter in a step, this process's part of it where it is sharded.

    Attributes:
        param: flat, [n]; written in place.
        grad: flat, [n].
        rows: the state, each flat [n]; written in place.
        step: how many steps the parameter has had before this one.
    """

    param: torch.Tensor
    grad: torch.Tensor
    rows: list[torch.Tensor]
    step: float


Piece = tuple[Entry, int, int]
"""Coordinates start … stop − 1 of an entry."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the optimizer does with the rule's update: p ← (1 − lr·weight_decay)·p + lr·update.

    Attributes:
        lr: multiplier of the update.
        weight_decay: share of the parameter that a step removes, before lr.
        maximize: climb instead of descend.
    """

    lr: float
    weight_decay: float
    maximize: bool


def chunks(entries: Sequence[Entry], chunk_size: int) -> Iterator[list[Piece]]:
    """All coordinates of the entries, in chunks of at most `chunk_size`; small tensors share one."""
    chunk: list[Piece] = []
    room = chunk_size
    for entry in entries:
        start, size = 0, entry.param.numel()
        while start < size:
            stop = min(start + room, size)
            chunk.append((entry, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield chunk
                chunk, room = [], chunk_size
    if chunk:
        yield chunk


def gather(tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """One flat tensor of this dtype with the contents of all; where there is one tensor of this dtype, that one."""
    joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return joined.to(dtype)


def step_chunk(
    chunk: Sequence[Piece], rule: UpdateRule, layout: StateLayout, theta: Tensors, dtype: torch.dtype, rates: Rates
) -> None:
    """One step of the rule on a chunk: reads gradients, parameters and state, and writes the latter two."""
    grads = gather([e.grad[a:b] for e, a, b in chunk], dtype)
    params = gather([e.param[a:b] for e, a, b in chunk], dtype)
    n = grads.shape[0]
    rows = gather([e.rows[r][a:b] for r in range(len(layout.keys)) for e, a, b in chunk], dtype).view(-1, n)
    update, new_state = rule.update(
        theta, -grads if rates.maximize else grads, params, layout.to_rule(rows, _steps(chunk, layout, grads))
    )
    moved = (
        torch.add(params, update, alpha=rates.lr)
        if not rates.weight_decay
        else (params * (1 - rates.lr * rates.weight_decay)).add_(update, alpha=rates.lr)
    )
    sizes = [b - a for _, a, b in chunk]
    targets, sources = [e.param[a:b] for e, a, b in chunk], list(moved.split(sizes))
    blocks = layout.from_rule(new_state)
    for k, (e, a, b) in enumerate(chunk):
        targets += [row[a:b] for row in e.rows]
        for block in blocks:
            sources += block.split(sizes, 1)[k].unbind(0) if len(sizes) > 1 else block.unbind(0)
    torch._foreach_copy_(targets, sources)


def _steps(chunk: Sequence[Piece], layout: StateLayout, like: torch.Tensor) -> torch.Tensor | None:
    """The step counts of the chunk's coordinates: [1] where they agree, else [n]; None if the rule does not count."""
    if not layout.has_step:
        return None
    first = chunk[0][0].step
    if all(e.step == first for e, _, _ in chunk):
        return like.new_full((1,), first)
    return torch.cat([like.new_full((b - a,), e.step) for e, a, b in chunk])
