"""Measure meta-gradient estimators: their bias and noise against the full gradient, and their cost.

    python -m benchmarks.estimators compare --family quadratic --rule compact --horizon 100 --truncations 5 20 100
    python -m benchmarks.estimators cost

`compare` prints a table of `learned_opt.estimators.compare` and writes JSON and a picture beside it. `cost` prints
inner steps x particles per second of CPU time on one thread, which other programs on the machine disturb little, and
the peak memory of every estimator, beside plain evaluation of the unroll; each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import tasks
from learned_opt import artifact, estimators, rules
from learned_opt.batched import BatchedFamily
from learned_opt.meta_loss import MetaLoss
from learned_opt.particles import EpisodePlan, start_particles
from learned_opt.task import TaskFamily
from learned_opt.truncation import HorizonSchedule
from learned_opt.unroll import unroll

ESTIMATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "backprop, order 1": ("backprop", {"order": 1}),
    "backprop, order 2": ("backprop", {"order": 2}),
    "ES": ("es", {}),
    "PES": ("pes", {}),
    "NRES": ("nres", {}),
}
COST_ESTIMATORS: dict[str, tuple[str, dict[str, Any]]] = {
    **ESTIMATORS,
    "backprop, order 1, recompute": ("backprop", {"order": 1, "recompute": True}),
    "backprop, order 2, recompute": ("backprop", {"order": 2, "recompute": True}),
}
COST_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "quadratic, 10 parameters": ("quadratic", {}),
    "digits MLP, 1,510 parameters": ("image_mlp", {}),
}
COST_TRUNCATIONS = (20, 100)
PLAIN = "plain unroll"


def fields(pairs: list[str]) -> dict[str, Any]:
    """name=value arguments, values read as JSON where they are."""
    out: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign:
            raise SystemExit(f"expected name=value; got {pair!r}")
        try:
            out[name] = json.loads(value)
        except json.JSONDecodeError:
            out[name] = value
    return out


def run_compare(arguments: argparse.Namespace) -> None:
    family = tasks.get(arguments.family, **fields(arguments.family_field))
    if arguments.theta:
        saved = artifact.load(arguments.theta)
        rule, theta = saved.rule, saved.theta
    else:
        rule = rules.get(arguments.rule, **fields(arguments.rule_setting))
        theta = rule.init_theta(torch.Generator().manual_seed(arguments.seed))
    dtype = torch.float64 if arguments.float64 else torch.float32
    chosen = {label: ESTIMATORS[label] for label in arguments.estimators or ESTIMATORS}
    settings = {"sigma": arguments.sigma}
    comparison = estimators.compare(
        rule,
        family,
        {n: v.to(dtype) for n, v in theta.items()},
        {n: estimators.get(k, **(s if k == "backprop" else {**s, **settings})) for n, (k, s) in chosen.items()},
        horizon=arguments.horizon,
        truncations=arguments.truncations,
        num_particles=arguments.particles,
        num_samples=arguments.samples,
        meta_loss=MetaLoss(normalization=arguments.normalization),
        run_seed=arguments.seed,
        device=arguments.device,
    )
    print(comparison.table())
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".json").write_text(comparison.to_json() + "\n")
        comparison.plot(arguments.out.with_suffix(".png"))
        print(f"written: {arguments.out.with_suffix('.json')}, {arguments.out.with_suffix('.png')}", file=sys.stderr)


def warm_up() -> None:
    """Make torch load and compile all that any estimator uses, on a problem of no size."""
    rule = rules.get("compact")
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    work = estimators.Workload(
        rule=rule,
        batched=BatchedFamily(tasks.get("quadratic", dim=1)),
        plan=EpisodePlan(split="meta_train", run_seed=0),
        meta_loss=MetaLoss(),
        truncation=20,
    )
    for kind, settings in COST_ESTIMATORS.values():
        estimator = estimators.get(kind, **settings)
        estimator.estimate(work, theta, estimator.init(work, theta, range(2)))


def measure_cost(
    family: TaskFamily, label: str, truncation: int, num_particles: int, seconds: float
) -> dict[str, float]:
    """{"inner_steps_per_cpu_second", "megabytes"}: the peak beyond what was held before the particles started."""
    rule = rules.get("compact")
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    work = estimators.Workload(
        rule=rule,
        batched=BatchedFamily(family),
        plan=EpisodePlan(split="meta_train", run_seed=0, horizons=HorizonSchedule(longest=1000)),
        meta_loss=MetaLoss(),
        truncation=truncation,
    )
    warm_up()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if label == PLAIN:
        particles = start_particles(work.batched, rule, work.plan, range(num_particles))

        def once() -> int:
            unroll(rule, theta, work.batched, work.plan, particles, truncation)
            return truncation * num_particles
    else:
        kind, settings = COST_ESTIMATORS[label]
        estimator = estimators.get(kind, **settings)
        state = estimator.init(work, theta, range(num_particles))

        def once() -> int:
            # Steps of particles, not those of the unperturbed ones that ES runs beside its arms.
            estimator.estimate(work, theta, state)
            return truncation * num_particles

    once()
    once()
    steps, began = 0, time.process_time()
    while time.process_time() - began < seconds:
        steps += once()
    rate = steps / (time.process_time() - began)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"inner_steps_per_cpu_second": rate, "megabytes": (after - before) / 1024}


def run_cost(arguments: argparse.Namespace) -> None:
    if arguments.one:
        family_label, label, truncation = json.loads(arguments.one)
        name, config = COST_FAMILIES[family_label]
        family = tasks.get(name, **config)
        print(json.dumps(measure_cost(family, label, truncation, arguments.particles, arguments.seconds)))
        return
    print("| family | truncation | estimator | inner steps x particles / CPU s | of plain | peak memory (MB) |")
    print("| --- | --- | --- | --- | --- | --- |")
    found = []
    for family_label in COST_FAMILIES:
        for truncation in arguments.truncations:
            floor = None
            for label in (PLAIN, *COST_ESTIMATORS):
                command = [sys.executable, "-m", "benchmarks.estimators", "cost", "--one"]
                command += [json.dumps([family_label, label, truncation])]
                command += ["--particles", str(arguments.particles), "--seconds", str(arguments.seconds)]
                result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                rate = result["inner_steps_per_cpu_second"]
                floor = floor or rate
                cells = (
                    family_label,
                    truncation,
                    label,
                    f"{rate:,.0f}",
                    f"{rate / floor:.2f}",
                    f"{result['megabytes']:.0f}",
                )
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
                found.append({"family": family_label, "truncation": truncation, "estimator": label, **result})
    if arguments.out:
        arguments.out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimators", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("compare", help="bias, variance, signal-to-noise ratio and cost over truncations")
    one.add_argument("--family", default="quadratic", help="name in tasks.FAMILIES")
    one.add_argument("--family-field", nargs="*", default=[], metavar="NAME=VALUE")
    one.add_argument("--rule", default="compact", help="name in rules.RULES, at its initial theta")
    one.add_argument("--rule-setting", nargs="*", default=[], metavar="NAME=VALUE")
    one.add_argument("--theta", default="", help="an exported file or shipped name, in place of --rule")
    one.add_argument("--estimators", nargs="*", choices=list(ESTIMATORS), default=[], help="all by default")
    one.add_argument("--sigma", type=float, default=0.01, help="of the evolution strategies")
    one.add_argument("--horizon", type=int, default=100)
    one.add_argument("--truncations", type=int, nargs="+", default=[1, 5, 20, 100])
    one.add_argument("--particles", type=int, default=16)
    one.add_argument("--samples", type=int, default=16)
    one.add_argument("--normalization", default="log", help="of the meta-loss")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--device", default="cpu")
    one.add_argument("--float64", action="store_true")
    one.add_argument("--out", type=Path, default=None, help="path of the JSON and the picture, without suffix")
    one.set_defaults(run=run_compare)
    two = commands.add_parser("cost", help="speed and peak memory beside plain evaluation")
    two.add_argument("--truncations", type=int, nargs="+", default=list(COST_TRUNCATIONS))
    two.add_argument("--particles", type=int, default=16)
    two.add_argument("--seconds", type=float, default=3.0, help="of measuring, each")
    two.add_argument("--out", type=Path, default=None, help="path of the JSON")
    two.add_argument("--one", default="", help=argparse.SUPPRESS)
    two.set_defaults(run=run_cost)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
