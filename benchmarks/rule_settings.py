"""Settings of a learned optimizer's rule changed by hand, its weights as they are: how fast it is, and how often lost.

    python -m benchmarks.rule_settings [compact | FILE ...] --changes relative_eps=0.002 \
        square_ratio=1e4,recent_square=0.7 --out benchmarks/results/rule_settings.json

Eleven families that are not in the suite `test`: five networks, of which two ("silu" and "leaky") soon know their data
by heart, functions, and regressions. Every file is run as it is, and the first one with each of the changes, beside
Adam at the rate of a half-decade grid that is best on other draws. Printed are, for each: the interquartile mean of the
speed-up over all tasks (`learned_opt.evaluation.speedup`), that of every family, and how many steps were lost: above a
twentieth of the run's first loss, and above twenty times the least mean of ten steps so far. Last losses, ours and
Adam's, are in the file.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import trim_mean

import tasks
from benchmarks.documents import write
from benchmarks.tuned_adam import tuned_adam
from learned_opt import rules
from learned_opt.artifact import load
from learned_opt.batched import BatchedFamily
from learned_opt.evaluation import run_rule
from learned_opt.evaluation.speedup import speedups
from tasks.suites import SUITES

_SEED = 5
_DIGITS = {"name": "image_mlp", "dataset": "digits", "init": "fan_in"}
FAMILIES: dict[str, dict[str, Any]] = {
    "silu": SUITES["validation"]["digits silu 24-24"],
    "leaky": SUITES["validation"]["digits leaky relu 48"],
    "sigmoid": SUITES["train"]["digits sigmoid 20"],
    "label noise": {**_DIGITS, "hidden": [24], "activation": "tanh", "label_noise": 0.2, "batch_size": 32},
    "text": {"name": "char_mlp", "batch_size": 8, "hidden": 24},
    "rosenbrock": SUITES["validation"]["rosenbrock"],
    "powell": {"name": "powell"},
    "linear network": {"name": "linear_network"},
    "softmax regression": {"name": "softmax_regression"},
    "robust regression": {"name": "robust_regression"},
    "quadratic": SUITES["train"]["quadratic"],
}
NOISY: dict[str, dict[str, Any]] = {
    "small batches": {**_DIGITS, "hidden": [16], "activation": "relu", "batch_size": 8},
    "text relu": {"name": "char_mlp", "batch_size": 4, "hidden": 32, "activation": "relu", "context": 3},
    "text noise": {"name": "char_mlp", "batch_size": 8, "hidden": 16, "label_noise": 0.2},
}
"""On request: batches of four and eight."""


def last_loss(losses: np.ndarray) -> float:
    """The median over runs, of losses [steps, runs], of the mean over the last fiftieth of the steps."""
    return float(np.median(losses[-max(len(losses) // 50, 1) :].mean(0)))


def lost_steps(losses: np.ndarray) -> int:
    """Steps, of losses [steps, runs], above a twentieth of the first loss and twenty times the least mean of ten."""
    means = np.lib.stride_tricks.sliding_window_view(losses, 10, axis=0).mean(-1)
    late = losses[9:]
    return int(((late > losses[0] / 20) & (late > 20 * np.minimum.accumulate(means, 0))).sum())


def changed(text: str) -> dict[str, float]:
    """Settings from "name=value,name=value".

    Raises:
        ValueError: a part that is not of this form.
    """
    out = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            out[name] = int(value) if value.isdigit() else float(value)
        except ValueError:
            raise ValueError(f"changes must be name=number, separated by commas; got {part!r} in {text!r}") from None
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="*", default=["compact"], help="names that ship, or exported files")
    parser.add_argument("--changes", nargs="*", default=[], help="each name=value, or several with commas")
    parser.add_argument("--families", nargs="+", choices=[*FAMILIES, *NOISY], default=list(FAMILIES))
    parser.add_argument("--num-steps", type=int, default=500)
    parser.add_argument("--num-tasks", type=int, default=12)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    artifacts = [load(weights) for weights in options.weights]
    first = artifacts[0]
    variants = {artifact.identity: (artifact.rule, artifact.theta) for artifact in artifacts}
    for text in options.changes:
        settings = {**first.rule.settings(), **changed(text)}
        variants[text] = (rules.get(first.rule.kind, **settings), first.theta)
    command = ["python", "-m", "benchmarks.rule_settings", *options.weights]
    for name in ("changes", "families", "num_steps", "num_tasks"):
        value = getattr(options, name)
        if value != parser.get_default(name):
            command += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    document: dict[str, Any] = {
        "command": shlex.join(command),
        "num_steps": options.num_steps,
        "num_tasks": options.num_tasks,
        "steps_of_a_family": options.num_tasks * (options.num_steps - 8),
        "results": {name: {"families": {}} for name in variants},
    }
    found: dict[str, list[np.ndarray]] = {name: [] for name in variants}
    num_steps, num_tasks = options.num_steps, options.num_tasks
    for label, family in tasks.build({label: {**FAMILIES, **NOISY}[label] for label in options.families}).items():
        batched = BatchedFamily(family)
        draws: dict[str, Any] = {"split": "meta_validation", "num_tasks": num_tasks}
        _, theirs = tuned_adam(batched, num_steps, tuning_tasks=8, seed=_SEED, **draws)
        for name, (rule, theta) in variants.items():
            runs = run_rule(rule, theta, batched, horizon=num_steps, seeds=(_SEED,), **draws)
            ours = runs.losses.double().numpy()
            speeds = speedups(ours, theirs)
            found[name].append(speeds)
            row = {"speedup": float(trim_mean(speeds, 0.25)), "lost_steps": lost_steps(ours)}
            row |= {"last_loss": last_loss(ours), "last_loss_of_adam": last_loss(theirs)}
            document["results"][name]["families"][label] = row
    for name, row in document["results"].items():
        row["speedup"] = float(trim_mean(np.concatenate(found[name]), 0.25))
        row["lost_steps"] = sum(one["lost_steps"] for one in row["families"].values())
        each = ", ".join(f"{label} {one['speedup']:.2f}" for label, one in row["families"].items())
        print(f"{name}: speed-up {row['speedup']:.2f}, {row['lost_steps']} steps lost; {each}", flush=True)
    write(options.out, document)


if __name__ == "__main__":
    main()
