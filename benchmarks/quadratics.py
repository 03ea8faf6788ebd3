r"""Learned optimizers on ten-dimensional quadratics, in the three conventions of the literature.

    python train_optimizer.py --preset quadratic_basis --run-dir runs/quadratic_normal
    python train_optimizer.py --preset quadratic_basis --run-dir runs/quadratic_zero_start --trainer.outer-steps 2000 \
        --trainer.meta-loss.normalization none \
        --families '{quadratic: {name: quadratic, dim: 10, convention: zero_start}}'
    python train_optimizer.py --preset quadratic_basis --run-dir runs/quadratic_uniform \
        --families '{quadratic: {name: quadratic, dim: 10, convention: uniform}}'
    python -m benchmarks.quadratics --runs runs --out benchmarks/results/quadratics.json

and, coordinate by coordinate with the original's inputs, as in quadratics_l2l.json,

    python train_optimizer.py --preset quadratic --run-dir runs/quadratic_normal
    python train_optimizer.py --preset quadratic_zero_start --run-dir runs/first
    python train_optimizer.py --preset quadratic_zero_start --run-dir runs/quadratic_zero_start \
        --start-from runs/first/optimizer.safetensors --trainer.num-particles 512 --trainer.outer-steps 800 \
        --trainer.learning-rate 1e-3 --trainer.validation-every 50
    python train_optimizer.py --preset quadratic_uniform --run-dir runs/quadratic_uniform

For each convention: mean and median over fresh meta-test draws of the loss at steps 100 and 200, and the sum of the
mean loss over the first 100 steps, with 95 % bootstrap intervals, beside SGD, Nesterov momentum, RMSprop and Adam at
the learning rate that is best for the mean loss at step 100 on meta-validation draws.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import tasks
from benchmarks.documents import plain, write
from learned_opt import load_artifact
from learned_opt.batched import BatchedFamily
from learned_opt.evaluation import BASELINES, DEFAULT_BASELINES, bootstrap, half_decades, run_rule
from learned_opt.evaluation.metrics import Array, mean, median

CONVENTIONS = ("normal", "zero_start", "uniform")
HORIZON = 200


def numbers(losses: Array) -> dict[str, Any]:
    """What is reported of losses [HORIZON + 1, tasks]; each entry is [value, low, high]."""
    return {
        "mean at 0": plain(bootstrap(mean, losses[0])),
        "mean at 100": plain(bootstrap(mean, losses[100])),
        "median at 100": plain(bootstrap(median, losses[100])),
        "mean at 200": plain(bootstrap(mean, losses[200])),
        "sum of means 1 to 100": plain(bootstrap(mean, losses[1:101].sum(0))),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate the exported optimizer of each convention's run, print the numbers and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder with the run folders quadratic_<convention>")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--num-tasks", type=int, default=4096)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for convention in CONVENTIONS:
        path = options.runs / f"quadratic_{convention}" / "optimizer.safetensors"
        if not path.exists():
            print(f"{convention}: no {path}, left out")
            continue
        batched = BatchedFamily(tasks.get("quadratic", convention=convention))
        artifact = load_artifact(path)
        draws: dict[str, Any] = {"num_tasks": options.num_tasks, "horizon": HORIZON, "particles_at_once": 4096}
        learned = run_rule(artifact.rule, artifact.theta, batched, split="meta_test", seeds=(0,), **draws).losses
        results[convention] = {
            "optimizer": {"hash": artifact.hash, "provenance": artifact.provenance},
            "learned": numbers(learned.double().numpy()),
        }
        for name in DEFAULT_BASELINES:
            grid = half_decades(-4, 0)
            tuning = BASELINES[name].run(
                batched, grid, split="meta_validation", seeds=(0,), **{**draws, "num_tasks": 512, "horizon": 100}
            )
            final = tuning.losses[100].mean(1).nan_to_num(float("inf"))
            rate = grid[int(final.argmin())]
            losses = BASELINES[name].run(batched, (rate,), split="meta_test", seeds=(0,), **draws).losses[:, 0]
            results[convention][name] = {"rate": rate, **numbers(losses.double().numpy())}
        for name, row in results[convention].items():
            if name != "optimizer":
                cells = "  ".join(
                    f"{k} {v[0]:.4g} [{v[1]:.4g}, {v[2]:.4g}]" for k, v in row.items() if isinstance(v, list)
                )
                print(f"{convention:10} {name:9} {cells}")
    command = "python -m benchmarks.quadratics --runs runs"
    write(options.out, {"command": command, "num_tasks": options.num_tasks, "results": results})


if __name__ == "__main__":
    main()
