"""What an inner step costs where freed memory is kept (`learned_opt.allocation`), and where it is given back.

    python -m benchmarks.allocation --out benchmarks/results/allocation.json

Losses and gradients of the families that `compact` is meta-trained on, 24 particles at once, as many as a family gets
in an outer step of it, on one thread; two processes take turns, round after round. Printed are the ratio of their
times for every family and for all of them together, each family once: medians, and the least and greatest of rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tasks
from benchmarks.conditions import conditions
from benchmarks.documents import write
from learned_opt.allocation import keep_freed_memory
from learned_opt.batched import BatchedFamily
from learned_opt.config import preset
from learned_opt.particles import EpisodePlan, start_particles
from learned_opt.unroll import inner_steps

_PARTICLES = 24
_STEPS = 10


def seconds_a_step(batched: BatchedFamily, seconds: float) -> float:
    """Wall-clock time of one inner step of all particles with a plain update."""
    particles = start_particles(batched, None, EpisodePlan(split="meta_train", run_seed=0), range(_PARTICLES))

    def run() -> float:
        start, began = particles.params, time.perf_counter()
        for _ in inner_steps(batched, particles, _STEPS, lambda params, grads: params - 1e-6 * grads):
            pass
        particles.params = start
        return time.perf_counter() - began

    run()  # until the program is traced
    times = [run()]
    while sum(times) < seconds:
        times.append(run())
    return float(np.median(times)) / _STEPS


def work(kept: bool, seconds: float) -> None:
    """What a process does: a line of JSON for every line that it reads."""
    torch.set_num_threads(1)
    if kept and not keep_freed_memory():
        raise SystemExit("error: this system's C library cannot be told to keep freed memory")
    families = {label: BatchedFamily(one) for label, one in tasks.build(preset("compact").families).items()}
    for _ in sys.stdin:
        print(json.dumps({label: seconds_a_step(one, seconds) for label, one in families.items()}), flush=True)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each family, in each round and process")
    parser.add_argument("--worker", choices=["kept", "given back"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.worker:
        work(options.worker == "kept", options.seconds)
        return
    load = os.getloadavg()[0]
    command = [sys.executable, "-m", "benchmarks.allocation", "--seconds", str(options.seconds), "--worker"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {name: subprocess.Popen([*command, name], **pipes) for name in ("kept", "given back")}
    rounds: list[dict[str, float]] = []
    for number in range(options.rounds + 1):
        answers = {}
        for name, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            answers[name] = json.loads(worker.stdout.readline())
        if number:  # the first one is for warming up
            found = {label: answers["given back"][label] / value for label, value in answers["kept"].items()}
            found["all"] = sum(answers["given back"].values()) / sum(answers["kept"].values())
            rounds.append(found)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    document: dict[str, Any] = {**conditions("benchmarks.allocation", load), "faster_by": {}}
    for label in rounds[0]:
        ratios = [found[label] for found in rounds]
        document["faster_by"][label] = [float(np.median(ratios)), min(ratios), max(ratios)]
        print(f"{label}: faster by {np.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
    write(options.out, document)


if __name__ == "__main__":
    main()
