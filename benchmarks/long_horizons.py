"""An optimizer that was trained on short horizons, on runs a hundred times as long, beside Adam tuned for each of them.

    python -m benchmarks.long_horizons [rnnprop | FILE ...] [--data-dir FOLDER] --out long_horizons.json

MNIST networks as in Lv, Jiang and Li 2017: hidden layers of 20 units, batches of 128, weights from N(0, 0.1²); one
layer with sigmoid, ReLU, ELU and tanh units, and two to six layers with sigmoid units; 100, 2,000 and 10,000 steps. A
final loss is the mean of the last twentieth of a run. Printed for each: the mean over ten meta-test draws, its ratio to
Adam's with 95 % intervals of a paired bootstrap over draws, and how many runs diverged. Adam's learning rate is the
best of a half-decade grid on other draws of the same images, by the same final loss. Half of the images are for
meta-test. Results are saved as they come, Adam's final losses with them: a second call goes on with what is missing,
networks and optimizers, and runs Adam only on networks that it was not run on.
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


def adam_of(batched: BatchedFamily, horizons: Sequence[int], num_tasks: int, tuning: int) -> dict[str, dict[str, Any]]:
    """Tuned Adam on one network: {horizon: its rate and final losses}."""
    found = {}
    for horizon in horizons:
        rate, losses = tuned_adam(batched, horizon, tuning_tasks=tuning, num_tasks=num_tasks)
        found[str(horizon)] = {"rate": rate, "final losses": final_losses(losses).tolist()}
    return found


def measure(artifact: Artifact, batched: BatchedFamily, num_tasks: int, adam: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one optimizer on one network: {horizon: ...}, for the horizons of `adam`."""
    draws: dict[str, Any] = {"split": "meta_test", "seeds": (0,), "num_tasks": num_tasks}
    longest = max(map(int, adam))
    losses = run_rule(artifact.rule, artifact.theta, batched, horizon=longest, **draws).losses.double().numpy()
    return {horizon: beside_adam(losses[: int(horizon) + 1], its) for horizon, its in adam.items()}


def beside_adam(learned: np.ndarray, adam: dict[str, Any]) -> dict[str, Any]:
    """What is reported of losses [steps + 1, runs] beside Adam's rate and final losses; the runs' own, for later."""
    ours, theirs = final_losses(learned), np.array(adam["final losses"])
    return {
        "adam's rate": adam["rate"],
        "final loss": {"learned": float(ours.mean()), "adam": float(theirs.mean())},
        "median": {"learned": float(np.median(ours)), "adam": float(np.median(theirs))},
        "final loss over adam's": plain(bootstrap(ratio_of_means, ours, theirs)),
        "median of the ratios": float(np.median(ours / theirs)),
        "worst": {"learned": float(ours.max()), "adam": float(theirs.max())},
        "diverged": int(diverged(learned).sum()),
        "final losses": ours.tolist(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = command_line(str(__doc__), weights=["rnnprop"], networks=NETWORKS, horizons=HORIZONS, num_tasks=10)
    parser.add_argument("--tuning-tasks", type=int, default=4)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    artifacts = {artifact.identity: artifact for artifact in map(load, options.weights)}
    given = ["--data-dir FOLDER"] if options.data_dir else []
    command = " ".join(["python -m benchmarks.long_horizons", *options.weights, *given])
    setup = {
        "data": "the 10,000 test images" if options.data_dir else f"{options.dataset}, all images",
        "num_tasks": options.num_tasks,
        "tuning_tasks": options.tuning_tasks,
        "horizons": list(options.horizons),
    }
    document: dict[str, Any] = {"commands": [], **setup, "optimizers": [], "results": {}, "adam": {}}
    if options.out is not None and options.out.exists():
        former = json.loads(options.out.read_text())
        if former.keys() >= document.keys() and all(former[key] == value for key, value in setup.items()):
            document = former
    for key, values in (("commands", [command]), ("optimizers", artifacts)):
        document[key] += [value for value in values if value not in document[key]]
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
        batched = BatchedFamily(ImageMLP(**NETWORKS[name], **settings))
        if name not in document["adam"]:
            document["adam"][name] = adam_of(batched, options.horizons, options.num_tasks, options.tuning_tasks)
            write(options.out, document)
        for identity, artifact in artifacts.items():
            if identity not in results.setdefault(name, {}):
                results[name][identity] = measure(artifact, batched, options.num_tasks, document["adam"][name])
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
