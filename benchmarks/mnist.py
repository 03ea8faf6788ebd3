"""A learned optimizer on MNIST networks as in Andrychowicz et al. 2016, beside Adam tuned for each of them.

    python -m benchmarks.mnist [compact | FILE] [--data-dir FOLDER] [--out benchmarks/results/mnist.json]

784-20-10 with sigmoid units, batches of 128, weights from N(0, 0.01²), to 100 and 200 steps; the same with two
hidden layers, with 40 units and with ReLU. Printed for each: the mean training loss at the end and its sum, over
fresh meta-test draws (rows of the data that nothing else uses), and the ratio to Adam at the learning rate of a
half-decade grid that is best on other draws of the same rows, with 95 % intervals of a paired bootstrap over draws. The
images are downloaded by scikit-learn, or read from IDX files in a folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.documents import plain, write
from benchmarks.tuned_adam import tuned_adam
from learned_opt.artifact import Artifact, load
from learned_opt.batched import BatchedFamily
from learned_opt.evaluation import bootstrap, run_rule
from learned_opt.evaluation.metrics import ratio_of_means
from tasks.image_mlp import ImageMLP

NETWORKS: dict[str, dict[str, Any]] = {
    "one layer of 20": {"hidden": (20,), "activation": "sigmoid"},
    "two layers of 20": {"hidden": (20, 20), "activation": "sigmoid"},
    "40 units": {"hidden": (40,), "activation": "sigmoid"},
    "ReLU": {"hidden": (20,), "activation": "relu"},
}
HORIZONS = (100, 200)


def measure(artifact: Artifact, family: ImageMLP, horizon: int, num_tasks: int) -> dict[str, Any]:
    """The numbers of one network and horizon."""
    batched = BatchedFamily(family)
    rate, adam = tuned_adam(batched, horizon, tuning_tasks=min(num_tasks, 16), num_tasks=num_tasks)
    draws: dict[str, Any] = {"split": "meta_test", "seeds": (0,), "num_tasks": num_tasks, "horizon": horizon}
    learned = run_rule(artifact.rule, artifact.theta, batched, **draws).losses.double().numpy()
    return {
        "adam's rate": rate,
        "final loss": {"learned": float(learned[-1].mean()), "adam": float(adam[-1].mean())},
        "final loss over adam's": plain(bootstrap(ratio_of_means, learned[-1], adam[-1])),
        "sum of losses": {"learned": float(learned[1:].sum(0).mean()), "adam": float(adam[1:].sum(0).mean())},
        "sum over adam's": plain(bootstrap(ratio_of_means, learned[1:].sum(0), adam[1:].sum(0))),
    }


def command_line(
    description: str,
    *,
    weights: str | list[str],
    networks: Mapping[str, Any],
    horizons: Sequence[int],
    num_tasks: int,
) -> argparse.ArgumentParser:
    """What benchmarks on MNIST networks are told, with these defaults: one optimizer, or several where a list is."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = "*" if isinstance(weights, list) else "?"
    parser.add_argument("weights", nargs=several, default=weights, help="a name that ships, or an exported file")
    parser.add_argument("--data-dir", default="", help="folder with IDX files; by default downloaded")
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--networks", nargs="+", choices=networks, default=list(networks))
    parser.add_argument("--horizons", nargs="+", type=int, default=horizons)
    parser.add_argument("--num-tasks", type=int, default=num_tasks)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = command_line(str(__doc__), weights="compact", networks=NETWORKS, horizons=HORIZONS, num_tasks=64)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    artifact = load(options.weights)
    settings = {"batch_size": 128, "init_scale": 0.01, "dataset": options.dataset, "data_dir": options.data_dir}
    results: dict[str, Any] = {}
    for name in options.networks:
        for horizon in options.horizons:
            found = measure(artifact, ImageMLP(**NETWORKS[name], **settings), horizon, options.num_tasks)
            results[f"{name}, {horizon} steps"] = found
            final, total = found["final loss over adam's"], found["sum over adam's"]
            print(
                f"{name}, {horizon} steps: final {found['final loss']['learned']:.3f} against "
                f"{found['final loss']['adam']:.3f}, ratio {final[0]:.2f} [{final[1]:.2f}, {final[2]:.2f}]; sum "
                f"{found['sum of losses']['learned']:.1f} against {found['sum of losses']['adam']:.1f}, ratio "
                f"{total[0]:.2f} [{total[1]:.2f}, {total[2]:.2f}]"
            )
    document = {
        "command": f"python -m benchmarks.mnist {options.weights}" + " --data-dir FOLDER" * bool(options.data_dir),
        "data": "the 10,000 test images" if options.data_dir else "the 70,000 images of openml.org",
        "optimizer": artifact.identity,
        "num_tasks": options.num_tasks,
        "results": results,
    }
    write(options.out, document)


if __name__ == "__main__":
    main()
