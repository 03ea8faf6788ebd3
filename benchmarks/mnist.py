"""A learned optimizer on MNIST networks as in Andrychowicz et al. 2016, beside Adam tuned for each of them.

    python -m benchmarks.mnist [compact | FILE] [--data-dir FOLDER] [--out benchmarks/results/mnist.json]

784-20-10 with sigmoid units, batches of 128, weights from N(0, 0.01²), to 100 and 200 steps; the same with two
hidden layers, with 40 units and with ReLU. Printed for each: the mean training loss at the end and its sum, over
fresh meta-test draws (rows of the data that nothing else uses), and the ratio to Adam at the learning rate of a
half-decade grid that is best on meta-validation draws, with 95 % intervals of a paired bootstrap over draws. The images
are downloaded by scikit-learn, or read from IDX files in a folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from learned_opt.artifact import load
from learned_opt.batched import BatchedFamily
from learned_opt.evaluation import BASELINES, bootstrap, half_decades, run_rule
from learned_opt.evaluation.metrics import Array, ratio_of_means
from learned_opt.files import write_atomically
from tasks.image_mlp import ImageMLP

NETWORKS: dict[str, dict[str, Any]] = {
    "one layer of 20": {"hidden": (20,), "activation": "sigmoid"},
    "two layers of 20": {"hidden": (20, 20), "activation": "sigmoid"},
    "40 units": {"hidden": (40,), "activation": "sigmoid"},
    "ReLU": {"hidden": (20,), "activation": "relu"},
}
HORIZONS = (100, 200)


def ratio(learned: Array, adam: Array) -> list[float]:
    """Ratio of the means over draws [tasks], and the ends of its interval."""
    found = bootstrap(ratio_of_means, learned, adam)
    return [found.value, found.low, found.high]


def measure(weights: str, family: ImageMLP, horizon: int, num_tasks: int) -> dict[str, Any]:
    """The numbers of one network and horizon."""
    artifact, batched = load(weights), BatchedFamily(family)
    grid = half_decades(-4, 0)
    tuning = BASELINES["adam"].run(
        batched, grid, split="meta_validation", seeds=(0,), num_tasks=min(num_tasks, 16), horizon=horizon
    )
    final = tuning.losses[-10:].mean((0, 2)).nan_to_num(float("inf"))
    rate = grid[int(final.argmin())]
    draws: dict[str, Any] = {"split": "meta_test", "seeds": (0,), "num_tasks": num_tasks, "horizon": horizon}
    adam = BASELINES["adam"].run(batched, (rate,), **draws).losses[:, 0].double().numpy()
    learned = run_rule(artifact.rule, artifact.theta, batched, **draws).losses.double().numpy()
    return {
        "adam's rate": rate,
        "final loss": {"learned": float(learned[-1].mean()), "adam": float(adam[-1].mean())},
        "final loss over adam's": ratio(learned[-1], adam[-1]),
        "sum of losses": {"learned": float(learned[1:].sum(0).mean()), "adam": float(adam[1:].sum(0).mean())},
        "sum over adam's": ratio(learned[1:].sum(0), adam[1:].sum(0)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="?", default="compact", help="a name that ships, or an exported file")
    parser.add_argument("--data-dir", default="", help="folder with IDX files; by default downloaded")
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--horizons", nargs="+", type=int, default=HORIZONS)
    parser.add_argument("--num-tasks", type=int, default=64)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    settings = {"batch_size": 128, "init_scale": 0.01, "dataset": options.dataset, "data_dir": options.data_dir}
    results: dict[str, Any] = {}
    for name in options.networks:
        for horizon in options.horizons:
            found = measure(options.weights, ImageMLP(**NETWORKS[name], **settings), horizon, options.num_tasks)
            results[f"{name}, {horizon} steps"] = found
            final, total = found["final loss over adam's"], found["sum over adam's"]
            print(
                f"{name}, {horizon} steps: final {found['final loss']['learned']:.3f} against "
                f"{found['final loss']['adam']:.3f}, ratio {final[0]:.2f} [{final[1]:.2f}, {final[2]:.2f}]; sum "
                f"{found['sum of losses']['learned']:.1f} against {found['sum of losses']['adam']:.1f}, ratio "
                f"{total[0]:.2f} [{total[1]:.2f}, {total[2]:.2f}]"
            )
    if options.out:
        artifact = load(options.weights)
        document = {
            "command": f"python -m benchmarks.mnist {options.weights}" + " --data-dir FOLDER" * bool(options.data_dir),
            "data": "the 10,000 test images" if options.data_dir else "the 70,000 images of openml.org",
            "optimizer": artifact.identity,
            "num_tasks": options.num_tasks,
            "results": results,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, json.dumps(document, indent=1).encode())


if __name__ == "__main__":
    main()
