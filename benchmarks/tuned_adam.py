"""The baseline of the benchmarks of one family: Adam at the rate that is best for it on other draws."""

from __future__ import annotations

import numpy as np

from learned_opt.batched import BatchedFamily
from learned_opt.evaluation import BASELINES, tune


def tuned_adam(
    batched: BatchedFamily, horizon: int, *, tuning_tasks: int, num_tasks: int, split: str = "meta_test", seed: int = 0
) -> tuple[float, np.ndarray]:
    """Adam's best rate of a half-decade grid, and its losses at it, float64 [horizon + 1, num_tasks].

    Args:
        batched: the family.
        horizon: inner steps, for which the rate is chosen, too.
        tuning_tasks: meta-validation tasks to choose it on, draws of seed 0.
        num_tasks, split, seed: of the draws that are reported.
    """
    adam = BASELINES["adam"]
    rate = tune(adam, batched, seed=0, num_tasks=tuning_tasks, horizon=horizon).rate
    assert rate is not None  # Adam does not diverge at every rate on these families
    runs = adam.run(batched, (rate,), split=split, seeds=(seed,), num_tasks=num_tasks, horizon=horizon)
    return rate, runs.losses[:, 0].double().numpy()
