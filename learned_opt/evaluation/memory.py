"""What a rule's memory goes with: rank correlations (Spearman) of every number it keeps with what it might track."""

from __future__ import annotations

import dataclasses

import numpy as np

from learned_opt.evaluation.metrics import Array
from learned_opt.evaluation.replay import Replay

FEATURES = ("log |gradient|", "gradient", "momentum", "consistency", "time", "update")
"""What memory is held against: log |g|, g/√v̂, m̂/√v̂, its magnitude, log t, and the update itself."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """What each number of a rule's memory goes with.

    Attributes:
        cells: labels of the numbers; empty for a rule without memory.
        correlations: [cells, features], rank correlations with `FEATURES`; NaN where one of the two never changes.
    """

    cells: tuple[str, ...]
    correlations: Array


def memory(gradients: list[Array], replays: list[Replay], *, num_samples: int = 20_000, seed: int = 0) -> Memory:
    """Rank correlations of a rule's memory with `FEATURES`, over all steps and coordinates of some streams.

    Args:
        gradients: [steps, n] each.
        replays: what the rule did with them.
        num_samples: at most so many pairs of step and coordinate of every stream enter.
        seed: of their choice.
    """
    cells = tuple(replays[0].memory)
    columns: list[Array] = []
    for grads, found in zip(gradients, replays):
        sample = np.random.default_rng(seed).permutation(grads.size)[:num_samples]
        features = _features(grads, found.updates)
        rows = [*(found.memory[cell] for cell in cells), *features]
        columns.append(np.stack([row.reshape(-1)[sample] for row in rows]))
    table = np.concatenate(columns, axis=1)
    table = table[:, np.isfinite(table).all(0)]
    return Memory(cells, rank_correlations(table[: len(cells)], table[len(cells) :]))


def _features(grads: Array, updates: Array) -> list[Array]:
    beta1, beta2 = 0.9, 0.999
    steps = np.arange(1, len(grads) + 1)[:, None]
    m, v, means, squares = np.zeros_like(grads[0]), np.zeros_like(grads[0]), [], []
    for grad in grads:
        m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
        means.append(m)
        squares.append(v)
    root = np.sqrt(np.stack(squares) / (1 - beta2**steps))
    seen = root > 0
    root = np.where(seen, root, 1.0)
    momentum = np.stack(means) / (1 - beta1**steps) / root
    size = np.abs(grads)
    log = np.where(size > 0, np.log10(np.where(size > 0, size, 1.0)), np.nan)
    return [log, grads / root, momentum, np.abs(momentum), np.broadcast_to(np.log(steps), grads.shape), updates]


def rank_correlations(rows: Array, columns: Array) -> Array:
    """Spearman's correlation of every row of one table [r, samples] with every row of another [c, samples], [r, c]."""

    def standard(table: Array) -> Array:
        ranks = np.empty_like(table)
        for k, values in enumerate(table):
            _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
            ranks[k] = (counts.cumsum() - (counts - 1) / 2)[place]
        ranks = ranks - ranks.mean(1, keepdims=True)
        norm = np.sqrt((ranks**2).sum(1, keepdims=True))
        return np.where(norm > 0, ranks / np.where(norm > 0, norm, 1.0), np.nan)

    if not len(rows):
        return np.empty((0, len(columns)))
    out: Array = standard(rows) @ standard(columns).T
    return out
