"""How the time of an outer step grows with particles, parameters and truncation.

    python -m benchmarks.cost_growth                              all three, two threads
    python -m benchmarks.cost_growth --over particles --threads 1
    python -m benchmarks.cost_growth --show benchmarks/results/cost_growth.json    a file's tables, as Markdown

The points of a range are visited in turn, round after round, and the least time of each counts, which is the one least
disturbed. The exponent is the slope of a least-squares line through logarithms: 1 is linear growth. Fixed costs flatten
it at the small end, so that over the upper half of the range is given beside it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import tyro

import tasks
from benchmarks.conditions import conditions
from learned_opt import config as configuration
from learned_opt import estimators, rules
from learned_opt.meta_trainer import MetaTrainer

RANGES: dict[str, tuple[int, ...]] = {
    "particles": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    "parameters": (10, 31, 98, 250, 440, 1000),
    "truncation": (5, 10, 20, 50, 100),
}
"""What is varied -> its values; for parameters, the width of both hidden layers of an MLP on digits."""

_BASE = "w1"


def trainer_at(over: str, value: int) -> MetaTrainer:
    """The workload w1 with one thing changed; parameters are varied with one particle.

    Horizons are five truncations, so that the share of restarts is the same everywhere.
    """
    settings = configuration.preset(_BASE)
    (family,) = tasks.build(settings.families).values()
    config = settings.trainer
    if over == "particles":
        config = dataclasses.replace(config, num_particles=value)
    elif over == "truncation":
        config = dataclasses.replace(config, truncation=value)
    elif over == "parameters":
        config = dataclasses.replace(config, num_particles=1)
        family = dataclasses.replace(family, hidden=(value, value))
    else:
        raise ValueError(f"over must be one of {', '.join(RANGES)}; got {over!r}")
    horizons = dataclasses.replace(config.horizons, longest=5 * config.truncation)
    rule = rules.get(settings.rule, **settings.rule_settings)
    estimator = estimators.get(settings.estimator, **settings.estimator_settings)
    return MetaTrainer(rule, {"digits": family}, dataclasses.replace(config, horizons=horizons), estimator)


def outer_steps(trainer: MetaTrainer, seconds: float) -> float:
    """Seconds of an outer step, over whole episodes of five that last at least so long together."""
    start, count = time.perf_counter(), 0
    while True:
        for _ in range(5):
            trainer.step()
        count += 5
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return elapsed / count


def measure(over: str, values: Sequence[int], rounds: int, seconds: float) -> dict[str, Any]:
    """The table of one range: sizes, seconds an outer step (the least of the rounds), and the exponents."""
    trainers = [trainer_at(over, value) for value in values]
    sizes = [t.work["digits"].batched.num_parameters if over == "parameters" else v for t, v in zip(trainers, values)]
    times: list[list[float]] = [[] for _ in trainers]
    for _ in range(rounds + 1):  # the first warms up
        for trainer, found in zip(trainers, times):
            found.append(outer_steps(trainer, seconds))
    least = [min(found[1:]) for found in times]
    half = len(sizes) // 2
    return {
        "over": over,
        "sizes": sizes,
        "seconds": least,
        "rounds": [found[1:] for found in times],
        "exponent": exponent(sizes, least),
        "exponent_of_upper_half": exponent(sizes[half - 1 :], least[half - 1 :]),
    }


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """The slope of the least-squares line through (log size, log time).

    Raises:
        ValueError: fewer than two points, or one that is not positive.
    """
    if len(sizes) < 2 or len(sizes) != len(times) or min(*sizes, *times) <= 0:
        raise ValueError(f"an exponent needs at least two sizes and as many times, all positive; got {sizes}, {times}")
    x, y = [math.log(s) for s in sizes], [math.log(t) for t in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def markdown(tables: Sequence[dict[str, Any]]) -> str:
    """The tables, with a line for each size and the exponents below."""
    parts = []
    for found in tables:
        lines = [
            f"| {found['over']} | milliseconds an outer step | times that of the one before |",
            "| --- | --- | --- |",
        ]
        before: tuple[float, float] | None = None
        for size, seconds in zip(found["sizes"], found["seconds"]):
            grown = f"{seconds / before[1]:.2f} at {size / before[0]:.2f} x the size" if before else ""
            lines.append(f"| {size:,} | {seconds * 1e3:,.1f} | {grown} |")
            before = size, seconds
        exponents = f"Exponent {found['exponent']:.2f}; over the upper half {found['exponent_of_upper_half']:.2f}."
        parts.append("\n".join([*lines, "", exponents]))
    return "\n\n".join(parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """How the time of an outer step grows with particles, parameters and truncation."""

    over: tuple[str, ...] = tuple(RANGES)
    """What to vary."""
    rounds: int = 3
    """How often each point is timed, after one round that warms up."""
    seconds: float = 0.3
    """Least time of a turn; a turn is at least five outer steps, an episode."""
    at_most: int = 1000
    """Leave out particles, widths and truncations above this, for a quick look."""
    threads: int = 2
    """Of torch."""
    out: Path = Path("benchmarks/results/cost_growth.json")
    """The JSON."""
    show: Path | None = None
    """Print this JSON's tables as Markdown, and measure nothing."""

    def __post_init__(self) -> None:
        for name in self.over:
            if name not in RANGES:
                raise ValueError(f"over must be among {', '.join(RANGES)}; got {name!r}")
            if sum(value <= self.at_most for value in RANGES[name]) < 2:
                raise ValueError(f"at_most = {self.at_most} leaves fewer than two points of {name}; raise it")
        for name in ("rounds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")


def main() -> None:
    """The command line."""
    arguments = tyro.cli(Arguments)
    if arguments.show is not None:
        print(markdown(json.loads(arguments.show.read_text())["tables"]))
        return
    torch.set_num_threads(arguments.threads)
    before = os.getloadavg()[0]
    tables = []
    for over in arguments.over:
        values = [value for value in RANGES[over] if value <= arguments.at_most]
        tables.append(measure(over, values, arguments.rounds, arguments.seconds))
        print(markdown(tables[-1:]) + "\n", flush=True)
    report = {
        **conditions("benchmarks.cost_growth", before),
        "threads": arguments.threads,
        "tables": tables,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
