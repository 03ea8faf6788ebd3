"""What it does to training when a learned optimizer keeps its state in bfloat16.

    python benchmarks/state_dtype.py WEIGHTS … [--steps 100] [--tasks 8] [--json benchmarks/results/state_dtype.json]

Trains digits networks (meta-test draws) with the drop-in optimizer, once with float32 and once with bfloat16 state, on
the same batches, and prints the mean loss over the last tenth of the steps, and the ratio task by task: its mean and
standard error. WEIGHTS are exported files or names of shipped optimizers.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import nn

from learned_opt import Artifact, LearnedOptimizer, load
from learned_opt.task import draw_batches, draw_task, task_seed
from tasks.image_mlp import ImageMLP

DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


def final_loss(
    family: ImageMLP, artifact: Artifact, seed: int, num_steps: int, state_dtype: torch.dtype | None
) -> float:
    """Mean loss over the last tenth of the steps on the task with this seed."""
    constants, start = draw_task(family, "meta_test", seed)
    task = {**constants, **family.shared_data()}
    params = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = LearnedOptimizer(params.values(), artifact, state_dtype=state_dtype)
    batches = draw_batches(family, constants, seed, 0, num_steps)
    losses = []
    for step in range(num_steps):
        optimizer.zero_grad()
        loss = family.loss(dict(params), task, {name: value[step] for name, value in batches.items()})
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return statistics.fmean(losses[-max(num_steps // 10, 1) :])


def main() -> None:
    """Print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="+")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    family = ImageMLP()
    print("| weights | float32 | bfloat16 | ratio by task |")
    print("| --- | --- | --- | --- |")
    rows = []
    for weights in arguments.weights:
        artifact = load(weights)
        seeds = [task_seed("meta_test", 0, index) for index in range(arguments.tasks)]
        losses = {
            name: [final_loss(family, artifact, seed, arguments.steps, dtype) for seed in seeds]
            for name, dtype in DTYPES.items()
        }
        ratios = [low / full for low, full in zip(losses["bfloat16"], losses["float32"])]
        error = statistics.stdev(ratios) / len(ratios) ** 0.5
        means = {name: statistics.fmean(values) for name, values in losses.items()}
        rows.append({"weights": artifact.identity, **means, "ratio": statistics.fmean(ratios), "error": error})
        print(
            f"| {artifact.name} | {means['float32']:.3g} | {means['bfloat16']:.3g} | "
            f"{statistics.fmean(ratios):.3f} ± {error:.3f} |",
            flush=True,
        )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"steps": arguments.steps, "tasks": arguments.tasks, "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
