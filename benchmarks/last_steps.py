"""Where a run of a learned optimizer ends: at a constant lr, and where lr falls to zero over the last fifth.

    python -m benchmarks.last_steps [compact | FILE] [--num-steps 400] [--out benchmarks/results/last_steps.json]

Two problems without noise that would hide it, from 24 initializations each. "regression": a network 3-24-1 is fitted to
a smooth function of 128 points, all of them in every step. "digits": a network 64-48-10 with leaky ReLU reads
handwritten digits in batches of 64, which it learns by heart within some hundred steps; the loss is that of all the
data. Printed are, over the steps from the 60th, the share whose loss is more than four times the best so far (leaps),
the share that is back above a tenth of the first loss after having been below a hundredth of it (lost), and the last
loss over the first one, in the median and at its worst. Beside it stands Adam at the rate of a half-decade grid with
the least last loss in the mean.
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
from learned_opt.evaluation import half_decades
from tasks.data.images import load_images

FROM_STEP, LEAP = 60, 4.0
FITTED, LOST = 0.01, 0.1
ADAM_RATES = half_decades(-3, -1)

Loss = Callable[[nn.Module], torch.Tensor]
Problem = tuple[nn.Module, Callable[[], Loss], Loss]
"""(A network, a function that draws the next batch and gives the loss on it, the loss on all of the data)."""

Schedule = Callable[[float], float]
"""From the share of the run that is over, in [0, 1), to lr."""

SCHEDULES: dict[str, Schedule] = {
    "constant": lambda over: 1.0,
    "half": lambda over: 0.5,
    "to zero over the last fifth": lambda over: min(1.0, 5 * (1 - over)),
}


def regression(seed: int) -> Problem:
    """A smooth function of 128 points, all in every step."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    inputs = torch.rand(128, 3, generator=generator) * 2 - 1
    targets = torch.sin(3 * inputs.sum(1, keepdim=True)) + inputs[:, :1] * inputs[:, 1:2]

    def loss(model: nn.Module) -> torch.Tensor:
        return nn.functional.mse_loss(model(inputs), targets)

    return nn.Sequential(nn.Linear(3, 24), nn.Tanh(), nn.Linear(24, 1)), lambda: loss, loss


def digits(seed: int) -> Problem:
    """Handwritten digits in batches of 64."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    inputs, targets = load_images("digits")

    def loss_on(rows: torch.Tensor | slice) -> Loss:
        return lambda model: nn.functional.cross_entropy(model(inputs[rows]), targets[rows])

    model = nn.Sequential(nn.Linear(64, 48), nn.LeakyReLU(), nn.Linear(48, 10))
    return model, lambda: loss_on(torch.randint(len(inputs), (64,), generator=generator)), loss_on(slice(None))


PROBLEMS: dict[str, Callable[[int], Problem]] = {"regression": regression, "digits": digits}


def curve(
    problem: Problem, make: Callable[[nn.Module], torch.optim.Optimizer], num_steps: int, schedule: Schedule
) -> list[float]:
    """The losses of one run, on all of the data, before each of its steps."""
    model, draw, all_data = problem
    optimizer = make(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step / num_steps))
    losses = []
    for _ in range(num_steps):
        with torch.no_grad():
            losses.append(all_data(model).item())
        optimizer.zero_grad()
        loss = draw()(model)
        loss.backward()
        if isinstance(optimizer, LearnedOptimizer):
            optimizer.step(loss=loss)
        else:
            optimizer.step()
        scheduler.step()
    return losses


def summary(losses: Sequence[Sequence[float]]) -> dict[str, float]:
    """Of runs [runs, steps]: the shares of leaps and of lost steps, and the last loss over the first."""
    values = np.asarray(losses)
    best = np.minimum.accumulate(values, 1)[:, FROM_STEP:]
    late, first = values[:, FROM_STEP:], values[:, :1]
    lost = (late > LOST * first) & (best < FITTED * first)
    ratios = values[:, -1] / values[:, 0]
    return {
        "leaps": float((late > LEAP * best).mean()),
        "lost": float(lost.mean()),
        "median": float(np.median(ratios)),
        "worst": float(ratios.max()),
    }


def rows_of(problem: Callable[[int], Problem], artifact: Artifact, num_runs: int, num_steps: int) -> dict[str, Any]:
    """What is printed of one problem, by schedule."""
    rows: dict[str, Any] = {}
    for name, schedule, guard in [
        *((n, s, False) for n, s in SCHEDULES.items()),
        ("guard", SCHEDULES["constant"], True),
    ]:

        def learned(model: nn.Module, guard: bool = guard) -> torch.optim.Optimizer:
            return LearnedOptimizer(model.parameters(), artifact, guard=guard)

        rows[name] = summary([curve(problem(seed), learned, num_steps, schedule) for seed in range(num_runs)])
    tried = {}
    for rate in ADAM_RATES:

        def adam(model: nn.Module, rate: float = rate) -> torch.optim.Optimizer:
            return torch.optim.Adam(model.parameters(), rate)

        tried[rate] = [curve(problem(seed), adam, num_steps, SCHEDULES["constant"]) for seed in range(num_runs)]
    best = min(tried, key=lambda rate: float(np.mean([losses[-1] for losses in tried[rate]])))
    rows["adam"] = {**summary(tried[best]), "rate": best}
    return rows


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
    results: dict[str, Any] = {}
    for problem, draw in PROBLEMS.items():
        results[problem] = rows_of(draw, artifact, options.num_runs, options.num_steps)
        for name, row in results[problem].items():
            print(
                f"{problem}, {name}: leaps {row['leaps']:.3f}, lost {row['lost']:.4f}, last over first loss "
                f"{row['median']:.3g}, at worst {row['worst']:.3g}"
            )
    document = {
        "command": f"python -m benchmarks.last_steps {options.weights} --num-steps {options.num_steps}",
        "optimizer": artifact.identity,
        "num_runs": options.num_runs,
        "results": results,
    }
    write(options.out, document)


if __name__ == "__main__":
    main()
