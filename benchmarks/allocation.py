"""What an inner step costs where freed memory is kept (`learned_opt.allocation`), and where it is given back.

    python -m benchmarks.allocation --out benchmarks/results/allocation.json

Losses and gradients of the families that `compact` is meta-trained on, as `benchmarks.suites` measures them: in the
processor's own time, page faults included, on one thread. Two processes take turns, round after round. Printed is the
ratio of their times for every family and for all of them together, each once: median, least and greatest of rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tasks
from benchmarks.conditions import conditions
from benchmarks.documents import write
from benchmarks.suites import seconds_per_step
from learned_opt.allocation import keep_freed_memory
from learned_opt.config import preset


def work(kept: bool, seconds: float) -> None:
    """What a process does: a line of JSON for every line that it reads."""
    torch.set_num_threads(1)
    if kept and not keep_freed_memory():
        raise SystemExit("error: this system's C library cannot be told to keep freed memory")
    families = tasks.build(preset("compact").families)
    for _ in sys.stdin:
        print(json.dumps({label: seconds_per_step(one, seconds) for label, one in families.items()}), flush=True)


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
