"""How much faster two ranks are than one, with one thread each: `python -m benchmarks.scaling`.

The workload is W1 x 8: digits, an MLP 64-20-10 with sigmoids (1,510 parameters), batches of 64, 64 particles, horizon
100, truncation 20, first-order backpropagation, and the rnnprop rule (an LSTM of 2 x 20). Both arms run the same outer
steps from the same start. Two ranks compute all the time while they run, so that on a machine that drifts the arms
must take turns: rounds alternate, and the efficiency is the median over rounds of one rank's time over two ranks' time,
divided by two. Ranks are timed from barrier to barrier; starting processes and compiling are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import tasks
from benchmarks.conditions import conditions
from learned_opt import distributed, estimators, rules
from learned_opt.meta_config import MetaTrainerConfig
from learned_opt.meta_trainer import MetaTrainer
from learned_opt.truncation import HorizonSchedule

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
TARGET = 0.9


def trainer_of(ranks: distributed.Ranks, num_particles: int) -> MetaTrainer:
    """W1 with so many particles."""
    family = {"name": "image_mlp", "dataset": "digits", "hidden": [20], "activation": "sigmoid", "batch_size": 64}
    config = MetaTrainerConfig(
        outer_steps=10**6,
        num_particles=num_particles,
        truncation=20,
        horizons=HorizonSchedule(longest=100),
        learning_rate=1e-3,
        validation_every=0,
    )
    return MetaTrainer(
        rules.get("rnnprop"), tasks.build({"digits": family}), config, estimators.get("backprop"), ranks=ranks
    )


def rank(arguments: argparse.Namespace) -> None:
    """One rank: a round whenever a line arrives at the first one, whose seconds and theta it prints."""
    torch.set_num_threads(1)
    with distributed.start() as ranks:
        trainer = trainer_of(ranks, arguments.particles)
        for _ in range(arguments.warm_up):
            trainer.step()
        while True:
            line = ranks.first(lambda: sys.stdin.readline())
            if not line.strip():
                return
            ranks.highest(0)
            began = time.perf_counter()
            for _ in range(int(line)):
                trainer.step()
            ranks.highest(0)
            seconds = time.perf_counter() - began
            if ranks.is_first:
                total = float(torch.cat([v.reshape(-1) for v in trainer.theta.values()]).double().square().sum().sqrt())
                print(json.dumps({"seconds": seconds, "theta_norm": total}), flush=True)


class Arm:
    """Ranks that wait for rounds.

    Args:
        size: how many.
        arguments: of the command line.
        port: on which they find each other.
    """

    def __init__(self, size: int, arguments: argparse.Namespace, port: int) -> None:
        command = [sys.executable, "-m", "benchmarks.scaling", "--as-rank", "--particles", str(arguments.particles)]
        command += ["--warm-up", str(arguments.warm_up)]
        self.processes = []
        for index in range(size):
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "RANK": str(index),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(index),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            stdin = subprocess.PIPE if index == 0 else subprocess.DEVNULL
            stdout = subprocess.PIPE if index == 0 else subprocess.DEVNULL
            self.processes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdin=stdin, stdout=stdout, text=True)
            )

    def round(self, num_steps: int) -> dict[str, float]:
        """Run so many outer steps."""
        first = self.processes[0]
        assert first.stdin is not None and first.stdout is not None
        first.stdin.write(f"{num_steps}\n")
        first.stdin.flush()
        line = first.stdout.readline()
        if not line:
            raise RuntimeError("a rank has stopped; its message is above")
        found: dict[str, float] = json.loads(line)
        return found

    def stop(self) -> None:
        """End the ranks."""
        first = self.processes[0]
        assert first.stdin is not None
        first.stdin.close()
        for process in self.processes:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def free_port() -> int:
    """A port that nobody listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Alternate rounds of both arms."""
    before = os.getloadavg()[0]
    arms = {1: Arm(1, arguments, free_port()), 2: Arm(2, arguments, free_port())}
    rounds = []
    try:
        for arm in arms.values():
            arm.round(1)  # both are ready, and neither computes while it waits
        for index in range(arguments.rounds):
            order = (1, 2) if index % 2 == 0 else (2, 1)
            found = {size: arms[size].round(arguments.steps) for size in order}
            one, two = found[1], found[2]
            drift = abs(one["theta_norm"] / two["theta_norm"] - 1)
            rounds.append({"one": one["seconds"], "two": two["seconds"], "theta_difference": drift})
            print(f"round {index + 1}: one rank {one['seconds']:.2f} s, two ranks {two['seconds']:.2f} s", flush=True)
    finally:
        for arm in arms.values():
            arm.stop()
    efficiencies = [r["one"] / r["two"] / 2 for r in rounds]
    inner = arguments.particles * 20 * arguments.steps
    return {
        **conditions("benchmarks.scaling", before),
        "num_particles": arguments.particles,
        "outer_steps_per_round": arguments.steps,
        "rounds": rounds,
        "efficiency": statistics.median(efficiencies),
        "efficiency_range": [min(efficiencies), max(efficiencies)],
        "target": TARGET,
        "inner_steps_per_second": {
            "one rank": inner / statistics.median(r["one"] for r in rounds),
            "two ranks": inner / statistics.median(r["two"] for r in rounds),
        },
        "outer_step_seconds_of_one_rank": statistics.median(r["one"] for r in rounds) / arguments.steps,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5, help="outer steps a round")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=6, help="outer steps before the first round")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_rank:
        rank(arguments)
        return
    report = measure(arguments)
    low, high = report["efficiency_range"]
    print(f"efficiency on two ranks: {report['efficiency']:.2f} of ideal (rounds {low:.2f} to {high:.2f})")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
