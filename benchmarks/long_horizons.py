"""An optimizer that was trained on short horizons, on runs a hundred times as long, beside Adam tuned for each of them.

    python -m benchmarks.long_horizons [rnnprop | FILE ...] [--data-dir FOLDER] --out long_horizons.json

MNIST networks as in Lv, Jiang and Li 2017: hidden layers of 20 units, batches of 128, weights from N(0, 0.1²); one
layer with sigmoid, ReLU, ELU and tanh units, and two to six layers with sigmoid units; 100, 2,000 and 10,000 steps. A
final loss is the mean of the last twentieth of a run. Printed for each: the mean over ten meta-test draws, its ratio to
Adam's with 95 % intervals of a paired bootstrap over draws, and how many runs diverged. Adam's learning rate is the
best of a half-decade grid on meta-validation draws, by the same final loss. Half of the images are for
meta-test. Several optimizers share Adam's runs. Results are saved as they come, and a second call goes on with what
is missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.documents import plain, write
from benchmarks.mnist import command_line
from benchmarks.tuned_adam import tuned_adam
from learned_opt.artifact import Artifact, load
from learned_opt.batched import BatchedFamily
from learned_opt.evaluation import bootstrap, run_rule
from learned_opt.evaluation.metrics import diverged, final_losses, ratio_of_means
from tasks.image_mlp import ImageMLP

NETWORKS: dict[str, dict[str, Any]] = {
    **{name: {"hidden": (20,), "activation": name} for name in ("sigmoid", "relu", "elu", "tanh")},
    **{f"sigmoid, {depth} layers": {"hidden": (20,) * depth, "activation": "sigmoid"} for depth in range(2, 7)},
}
HORIZONS = (100, 2_000, 10_000)


def measure(
    artifacts: Sequence[Artifact], family: ImageMLP, horizons: Sequence[int], num_tasks: int, tuning: int
) -> dict[str, dict[str, Any]]:
    """The numbers of one network: {identity of the optimizer: {horizon: ...}}."""
    batched = BatchedFamily(family)
    adam = {horizon: tuned_adam(batched, horizon, tuning_tasks=tuning, num_tasks=num_tasks) for horizon in horizons}
    draws: dict[str, Any] = {"split": "meta_test", "seeds": (0,), "num_tasks": num_tasks, "horizon": max(horizons)}
    found: dict[str, dict[str, Any]] = {}
    for artifact in artifacts:
        losses = run_rule(artifact.rule, artifact.theta, batched, **draws).losses.double().numpy()
        rows = {str(h): beside_adam(losses[: h + 1], *adam[h]) for h in horizons}
        found[artifact.identity] = rows
    return found


def beside_adam(learned: np.ndarray, rate: float, adam: np.ndarray) -> dict[str, Any]:
    """What is reported of losses [steps + 1, runs] and those of Adam at `rate`."""
    ours, theirs = final_losses(learned), final_losses(adam)
    return {
        "adam's rate": rate,
        "final loss": {"learned": float(ours.mean()), "adam": float(theirs.mean())},
        "median": {"learned": float(np.median(ours)), "adam": float(np.median(theirs))},
        "final loss over adam's": plain(bootstrap(ratio_of_means, ours, theirs)),
        "median of the ratios": float(np.median(ours / theirs)),
        "worst": {"learned": float(ours.max()), "adam": float(theirs.max())},
        "diverged": int(diverged(learned).sum()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = command_line(str(__doc__), weights=["rnnprop"], networks=NETWORKS, horizons=HORIZONS, num_tasks=10)
    parser.add_argument("--tuning-tasks", type=int, default=4)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    artifacts = [load(name) for name in options.weights]
    given = ["--data-dir FOLDER"] if options.data_dir else []
    document = {
        "command": " ".join(["python -m benchmarks.long_horizons", *options.weights, *given]),
        "data": "the 10,000 test images" if options.data_dir else f"{options.dataset}, all images",
        "optimizers": [artifact.identity for artifact in artifacts],
        "num_tasks": options.num_tasks,
        "tuning_tasks": options.tuning_tasks,
        "horizons": list(options.horizons),
        "results": {},
    }
    if options.out is not None and options.out.exists():
        former = json.loads(options.out.read_text())
        if all(former.get(key) == value for key, value in document.items() if key != "results"):
            document = former
    settings: dict[str, Any] = {
        "batch_size": 128,
        "init_scale": 0.1,
        "dataset": options.dataset,
        "data_dir": options.data_dir,
    }
    if options.data_dir:
        settings["meta_test_from"] = 5_000
    results: dict[str, Any] = document["results"]
    for name in options.networks:
        if name not in results:
            family = ImageMLP(**NETWORKS[name], **settings)
            results[name] = measure(artifacts, family, options.horizons, options.num_tasks, options.tuning_tasks)
            write(options.out, document)
        for identity, rows in results[name].items():
            for horizon, found in rows.items():
                final, losses = found["final loss over adam's"], found["final loss"]
                print(
                    f"{identity}: {name}, {horizon} steps: {losses['learned']:.3g} against {losses['adam']:.3g}, ratio "
                    f"{final[0]:.2f} [{final[1]:.2f}, {final[2]:.2f}], median {found['median of the ratios']:.2f}; "
                    f"worst {found['worst']['learned']:.3g} against {found['worst']['adam']:.3g}; "
                    f"{found['diverged']} diverged",
                    flush=True,
                )


if __name__ == "__main__":
    main()
