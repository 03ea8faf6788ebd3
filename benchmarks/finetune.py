"""Does an unbiased estimator help past the training horizon? Meta-train with backpropagation, then go on three ways.

    python -m benchmarks.finetune --out finetune.json

The start is a rule meta-trained by truncated backpropagation. From there PES, NRES and
backpropagation itself spend the same number of inner steps. All four are run for ten times the training horizon on the
same meta-test tasks, and compared task by task: the mean over steps of the normalized loss log(f/f₀), lower is better.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

import tasks
from learned_opt import estimators, rules
from learned_opt.batched import BatchedFamily
from learned_opt.estimators.statistics import student_quantile
from learned_opt.meta_config import MetaTrainerConfig
from learned_opt.meta_trainer import MetaTrainer
from learned_opt.particles import EpisodePlan, start_particles
from learned_opt.rules.base import UpdateRule
from learned_opt.task import TaskFamily, Tensors
from learned_opt.truncation import HorizonSchedule
from learned_opt.unroll import unroll

CONTINUATIONS = ("backprop", "pes", "nres")


def meta_train(
    rule: UpdateRule,
    family: TaskFamily,
    kind: str,
    *,
    num_inner_steps: int,
    truncation: int,
    num_particles: int,
    horizon: int,
    learning_rate: float,
    seed: int,
    theta: Tensors | None = None,
) -> Tensors:
    """theta after as many outer steps as `num_inner_steps` inner steps x particles allow."""
    config = MetaTrainerConfig(
        outer_steps=num_inner_steps // (truncation * num_particles),
        num_particles=num_particles,
        truncation=truncation,
        horizons=HorizonSchedule(longest=horizon),
        learning_rate=learning_rate,
        validation_every=0,
        seed=seed,
    )
    trainer = MetaTrainer(rule, {family.name: family}, config, estimators.get(kind), theta=theta)
    for _ in range(config.outer_steps):
        trainer.step()
    return {n: v.detach().clone() for n, v in trainer.theta.items()}


def scores(rule: UpdateRule, batched: BatchedFamily, theta: Tensors, horizon: int, num_tasks: int) -> torch.Tensor:
    """Mean over steps of log(f/f₀) on the same meta-test tasks, [tasks]; f/f₀ that is not finite counts as 10³."""
    plan = EpisodePlan(split="meta_test", run_seed=12345)
    particles = start_particles(batched, rule, plan, range(num_tasks))
    segment = unroll(rule, theta, batched, plan, particles, horizon, restart_invalid=False)
    ratio = segment.losses / segment.initial
    return torch.where(torch.isfinite(ratio), ratio, 1e3).clamp(1e-12, 1e3).log().mean(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[4], help="widths of the digits network")
    parser.add_argument("--inner-steps", type=int, default=32000, help="of the start, and again of each continuation")
    parser.add_argument("--truncation", type=int, default=20)
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--horizon", type=int, default=100, help="of meta-training")
    parser.add_argument("--factor", type=int, default=10, help="meta-test horizon over that of meta-training")
    parser.add_argument("--tasks", type=int, default=16, help="meta-test tasks")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the meta-optimizer in the continuations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=None, help="JSON to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rule, family = rules.get("compact"), tasks.get("image_mlp", hidden=tuple(arguments.hidden))
    batched = BatchedFamily(family)
    common = {name: getattr(arguments, name) for name in ("truncation", "horizon")}
    common |= {"num_particles": arguments.particles, "num_inner_steps": arguments.inner_steps}
    horizon = arguments.horizon * arguments.factor
    found = []
    print(f"| seed | start | {' | '.join(f'{k}: change at {horizon} steps' for k in CONTINUATIONS)} |")
    print("| --- | --- |" + " --- |" * len(CONTINUATIONS))
    for seed in arguments.seeds:
        start = meta_train(rule, family, "backprop", learning_rate=3e-3, seed=seed, **common)
        before = scores(rule, batched, start, horizon, arguments.tasks)
        row: dict[str, object] = {"seed": seed, "start": float(before.mean())}
        cells = [f"{float(before.mean()):.3f}"]
        for kind in CONTINUATIONS:
            theta = meta_train(rule, family, kind, learning_rate=arguments.lr, seed=1000 + seed, theta=start, **common)
            change = scores(rule, batched, theta, horizon, arguments.tasks) - before
            half = student_quantile(len(change) - 1) * float(change.std()) / math.sqrt(len(change))
            row[kind] = {"change": float(change.mean()), "half_width": half}
            cells.append(f"{float(change.mean()):+.3f} ± {half:.3f}")
        found.append(row)
        print(f"| {seed} | " + " | ".join(cells) + " |", flush=True)
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"settings": {**vars(arguments), "out": ""}, "rows": found}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
