"""How long a suite takes: what each of its families costs in a comparison, measured on a few steps and scaled up.

    python benchmarks/suites.py [--suite test_small test] [--seconds 1] [--results PATH]
    time python evaluate_optimizer.py compact --suite test_small --cache off --num-threads 2     the whole of it

One learned optimizer and every installed baseline run as `evaluate_optimizer.py` runs them by default: so many inner
steps times particles, of which the tuning of learning rates takes most. Each family's rate is measured on gradients of
64 particles at once with a plain update, on one thread, in the processor's own time, so that what else the machine does
counts little; updates, extensions of the grid of rates, metrics and the report come on top. The estimates go to
benchmarks/results/suites.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluate_optimizer import Arguments
from learned_opt.batched import BatchedFamily
from learned_opt.evaluation import BASELINES, EvaluationConfig
from learned_opt.files import write_atomically
from learned_opt.particles import EpisodePlan, start_particles
from learned_opt.task import TaskFamily
from learned_opt.unroll import inner_steps
from tasks.suites import SUITES, suite

RESULTS = Path(__file__).parent / "results" / "suites.json"
_PARTICLES = 64
_STEPS = 4


def inner_steps_of(config: EvaluationConfig) -> int:
    """Inner steps times particles that one family takes, for one learned optimizer and the installed baselines."""
    testing = config.num_tasks * len(config.seeds) * config.horizon
    installed = [baseline for baseline in BASELINES.values() if baseline.installed]
    tuning = sum(len(b.rates) for b in installed if b.tuned) * config.num_validation_tasks * config.horizon
    return testing * (len(installed) + 1) + tuning


def seconds_per_step(family: TaskFamily, seconds: float) -> float:
    """Processor time of one inner step of one particle."""
    batched = BatchedFamily(family)
    particles = start_particles(batched, None, EpisodePlan(split="meta_test", run_seed=0), range(_PARTICLES))

    def run() -> None:
        start = particles.params
        for _ in inner_steps(batched, particles, _STEPS, lambda params, grads: params - 1e-6 * grads):
            pass
        particles.params = start

    for _ in range(3):  # until the program is traced
        run()
    began, taken = time.process_time(), 0
    while taken == 0 or time.process_time() - began < seconds:
        run()
        taken += 1
    return (time.process_time() - began) / (taken * _STEPS * _PARTICLES)


def main() -> None:
    """Estimate the suites, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=list(SUITES), default=["test_small", "test"])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = Arguments().evaluation
    count = inner_steps_of(config)
    known: dict[str, float] = {}
    out: dict[str, Any] = {"settings": {"horizon": config.horizon, "inner_steps_per_family": count}, "minutes": {}}
    for name in options.suite:
        for label, family in suite(name).items():
            if label not in known:
                known[label] = count * seconds_per_step(family, options.seconds) / 60
                print(f"{label}: {known[label]:.2f} min", flush=True)
        rows = {label: round(known[label], 2) for label in suite(name)}
        out["minutes"][name] = {"total": round(sum(rows.values()), 1), "families": rows}
        print(f"{name}: {out['minutes'][name]['total']} min of one core", flush=True)
        write_atomically(options.results, (json.dumps(out, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
