"""The baseline of the benchmarks of one family: Adam at the rate that is best for other draws of the same rows."""

from __future__ import annotations

import numpy as np

from learned_opt.batched import BatchedFamily
from learned_opt.evaluation import BASELINES, tune


def tuned_adam(
    batched: BatchedFamily, horizon: int, *, tuning_tasks: int, num_tasks: int, split: str = "meta_test", seed: int = 0
) -> tuple[float, np.ndarray]:
    """Adam's best rate of a half-decade grid, and its losses at it, float64 [horizon + 1, num_tasks].

    Another split would often have fewer rows, which are learned by heart sooner, and at other rates.

    Args:
        batched: the family.
        horizon: inner steps, for which the rate is chosen, too.
        tuning_tasks: tasks to choose it on: initializations and orders of batches that are not reported, draws of
            `seed + 1`, on the rows that are.
        num_tasks, split, seed: of the draws that are reported.
    """
    adam = BASELINES["adam"]
    rate = tune(adam, batched, seed=seed + 1, split=split, num_tasks=tuning_tasks, horizon=horizon).rate
    assert rate is not None  # Adam does not diverge at every rate on these families
    runs = adam.run(batched, (rate,), split=split, seeds=(seed,), num_tasks=num_tasks, horizon=horizon)
    return rate, runs.losses[:, 0].double().numpy()
