"""Where a run of a learned optimizer ends: at a constant lr, and where lr falls to zero over the last fifth.

    python -m benchmarks.last_steps [compact | FILE] [--num-steps 400] [--out benchmarks/results/last_steps.json]

A network 3-24-1 is fitted to a smooth function of 128 points, all of them in every step, from 24 initializations.
Without noise that would hide it, one sees how often the loss leaps: printed is the share of steps, from the 60th, whose
loss is more than four times the best so far, and the last loss over the first one, in the median and at its worst.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.documents import write
from learned_opt import Artifact, LearnedOptimizer
from learned_opt.artifact import load

FROM_STEP, LEAP = 60, 4.0

Schedule = Callable[[float], float]
"""From the share of the run that is over, in [0, 1), to lr."""

SCHEDULES: dict[str, Schedule] = {
    "constant": lambda over: 1.0,
    "half": lambda over: 0.5,
    "to zero over the last fifth": lambda over: min(1.0, 5 * (1 - over)),
}


def curve(weights: Artifact, seed: int, num_steps: int, schedule: Schedule, *, guard: bool = False) -> list[float]:
    """The losses of one run before each of its steps."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    inputs = torch.rand(128, 3, generator=generator) * 2 - 1
    targets = torch.sin(3 * inputs.sum(1, keepdim=True)) + inputs[:, :1] * inputs[:, 1:2]
    model = nn.Sequential(nn.Linear(3, 24), nn.Tanh(), nn.Linear(24, 1))
    optimizer = LearnedOptimizer(model.parameters(), weights, guard=guard)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step / num_steps))
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step(loss=loss)
        scheduler.step()
        losses.append(loss.item())
    return losses


def summary(losses: Sequence[Sequence[float]]) -> dict[str, float]:
    """Of runs [runs, steps]: the share of leaps, and the last loss over the first."""
    values = np.asarray(losses)
    leaps = values[:, FROM_STEP:] > LEAP * np.minimum.accumulate(values, 1)[:, FROM_STEP:]
    ratios = values[:, -1] / values[:, 0]
    return {"leaps": float(leaps.mean()), "median": float(np.median(ratios)), "worst": float(ratios.max())}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="?", default="compact", help="a name that ships, or an exported file")
    parser.add_argument("--num-runs", type=int, default=24)
    parser.add_argument("--num-steps", type=int, default=400)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    artifact = load(options.weights)
    rows: dict[str, Any] = {}
    for name, schedule, guard in [
        *((n, s, False) for n, s in SCHEDULES.items()),
        ("guard", SCHEDULES["constant"], True),
    ]:
        runs = [curve(artifact, seed, options.num_steps, schedule, guard=guard) for seed in range(options.num_runs)]
        row = rows[name] = summary(runs)
        print(
            f"{name}: leaps {row['leaps']:.3f}, last over first loss {row['median']:.3g}, at worst {row['worst']:.3g}"
        )
    document = {
        "command": f"python -m benchmarks.last_steps {options.weights} --num-steps {options.num_steps}",
        "optimizer": artifact.identity,
        "num_runs": options.num_runs,
        "results": rows,
    }
    write(options.out, document)


if __name__ == "__main__":
    main()
