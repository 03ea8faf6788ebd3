"""A learned optimizer on LASSO as in Open-L2O: 25 measurements, 50 unknowns, weight 0.005, 1,000 iterations.

    python -m benchmarks.lasso [compact | FILE] [--out benchmarks/results/lasso.json]
    python train_optimizer.py --preset lasso        # compact, adapted to the family

Printed: the relative distance to the optimum after 100, 300 and 1,000 steps over meta-test draws, E(f − f*) / E(f*),
the median of (f − f*) / f* over the draws whose optimum is not 0, and 95 % intervals, beside Adam at the learning
rate of a half-decade grid that is best at the end on other draws, and FISTA. f* is from 20,000 steps of FISTA
in float64. All of it runs in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.documents import plain, write
from benchmarks.tuned_adam import tuned_adam
from learned_opt.artifact import load
from learned_opt.batched import BatchedFamily
from learned_opt.evaluation import bootstrap, run_rule
from learned_opt.evaluation.metrics import Array, median, ratio_of_means
from learned_opt.particles import EpisodePlan
from learned_opt.task import draw_task
from tasks.linear import Lasso

STEPS = (100, 300, 1000)


def optima(family: Lasso, num_tasks: int) -> tuple[list[float], list[list[float]]]:
    """The least losses [tasks] of meta-test draws, and those that FISTA has after each of `STEPS` [steps][tasks]."""
    plan, best = EpisodePlan(split="meta_test", run_seed=0), []
    fista: list[list[float]] = [[] for _ in STEPS]
    for index in range(num_tasks):
        task, _ = draw_task(family, "meta_test", plan.draw(index, 0)[0])
        task = {name: value.double() for name, value in task.items()}
        best.append(float(family.loss(family.optimum(task), task, {})))
        for found, steps in zip(fista, STEPS):
            found.append(float(family.loss(family.optimum(task, steps), task, {})))
    return best, fista


def summary(losses: Array, best: Array) -> dict[str, list[float]]:
    """The relative distance of all draws together, and the median of each one's; [value, low, high]."""
    known = best > 1e-6
    together = bootstrap(ratio_of_means, losses - best, best)
    each = bootstrap(median, losses[known] / best[known] - 1)
    return {"together": plain(together), "median": plain(each)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="?", default="compact", help="a name that ships, or an exported file")
    parser.add_argument("--num-tasks", type=int, default=64)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    family, artifact = Lasso(), load(options.weights)
    batched = BatchedFamily(family, dtype=torch.float64)
    rate, adam = tuned_adam(batched, STEPS[-1], tuning_tasks=options.num_tasks, num_tasks=options.num_tasks)
    draws: dict[str, Any] = {"split": "meta_test", "seeds": (0,), "num_tasks": options.num_tasks, "horizon": STEPS[-1]}
    learned = run_rule(artifact.rule, artifact.theta, batched, **draws).losses
    least, fista = (torch.tensor(values, dtype=torch.float64).numpy() for values in optima(family, options.num_tasks))
    results = {
        f"{steps} steps": {
            "learned": summary(learned[steps].numpy(), least),
            "adam": summary(adam[steps], least),
            "fista": summary(fista[k], least),
        }
        for k, steps in enumerate(STEPS)
    }
    for label, row in results.items():
        cells = (f"{who} {v['together'][0]:.2g} (median {v['median'][0]:.2g})" for who, v in row.items())
        print(f"{label}: {', '.join(cells)}")
    document = {
        "command": f"python -m benchmarks.lasso {options.weights}",
        "optimizer": artifact.identity,
        "adam's rate": rate,
        "num_tasks": options.num_tasks,
        "results": results,
    }
    write(options.out, document)


if __name__ == "__main__":
    main()
