"""The baseline of the benchmarks of one family: Adam at the rate that is best for other draws of the same rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from learned_opt.batched import BatchedFamily
from learned_opt.evaluation import BASELINES
from learned_opt.evaluation.metrics import final_losses

_FIRST = (-6, -2)
_LEAST, _GREATEST = -14, 6
"""Of rates 10^(k / 2): the exponents k that are tried first, and those that the grid may grow to."""


def tuned_adam(
    batched: BatchedFamily,
    horizons: Sequence[int],
    *,
    tuning_tasks: int,
    num_tasks: int,
    split: str = "meta_test",
    seed: int = 0,
) -> dict[int, tuple[float, np.ndarray]]:
    """Adam's best rate of a half-decade grid for every horizon, and its losses, float64 [horizon + 1, num_tasks].

    Every rate is run once, for the longest horizon: a run at a constant rate is also one of every shorter horizon. The
    grid grows until the best rates lie inside it. Another split would often have fewer rows, which are learned by heart
    sooner, and at other rates.

    Args:
        batched: the family.
        horizons: inner steps.
        tuning_tasks: tasks to choose rates on: initializations and orders of batches that are not reported, draws of
            `seed + 1`, on the rows that are.
        num_tasks, split, seed: of the draws that are reported.
    """

    def run(rates: tuple[float, ...], seed: int, num_tasks: int) -> np.ndarray:
        runs = BASELINES["adam"].run(
            batched, rates, split=split, seeds=(seed,), num_tasks=num_tasks, horizon=max(horizons), with_metrics=False
        )
        return runs.losses.double().numpy()

    scores: dict[int, list[float]] = {}

    def try_out(*exponents: int) -> None:
        losses = run(tuple(10 ** (k / 2) for k in exponents), seed + 1, tuning_tasks)
        for column, k in enumerate(exponents):
            means = [float(final_losses(losses[: horizon + 1, column]).mean()) for horizon in horizons]
            scores[k] = [mean if np.isfinite(mean) else np.inf for mean in means]

    def best() -> list[int]:
        return [min(sorted(scores), key=lambda k: scores[k][column]) for column in range(len(horizons))]

    try_out(*range(_FIRST[0], _FIRST[1] + 1))
    while min(best()) == min(scores) > _LEAST:
        try_out(min(scores) - 1)
    while max(best()) == max(scores) < _GREATEST:
        try_out(max(scores) + 1)
    rates = [10 ** (k / 2) for k in best()]
    tried = tuple(sorted(set(rates)))
    losses = run(tried, seed, num_tasks)
    return {h: (rate, losses[: h + 1, tried.index(rate)]) for h, rate in zip(horizons, rates)}
