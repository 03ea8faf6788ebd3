"""Meta-training speed of this library beside a plain PyTorch loop and a strong JAX version, in interleaved rounds.

    python -m benchmarks.meta_training                                    all workloads, two threads
    python -m benchmarks.meta_training --threads 1 2 --workloads w1 w3    some, with one and with two
    python -m benchmarks.meta_training --contenders ours jax --rounds 9
    python -m benchmarks.meta_training --show benchmarks/results/meta_training.json    a file's table, as Markdown

Every contender is a process of its own that is started once; then they take turns, round after round, so that what else
the machine does hits all alike. Ratios are of measurements within one round. JAX is an extra:
pip install 'learned-opt[benchmarks]'.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import tyro

from benchmarks.conditions import conditions
from benchmarks.meta_training.report import markdown, summarize, table
from benchmarks.meta_training.worker import CONTENDERS, Contender, start_fastest
from benchmarks.meta_training.workloads import TITLES, SpeedWorkload, check_names

RESULTS = Path("benchmarks/results/meta_training.json")
_TOO_SLOW = {("w4", "plain")}
"""Left out unless named: one truncation of one task takes minutes and several gigabytes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare the speed of meta-training in interleaved rounds."""

    workloads: tuple[str, ...] = tuple(TITLES)
    """Presets: w1 to w5."""
    contenders: tuple[str, ...] = ()
    """Of ours, ours-torch, jax, plain; all that can run by default."""
    threads: tuple[int, ...] = (2,)
    """Numbers of threads, each measured apart."""
    rounds: int = 5
    """Turns of each contender."""
    seconds: float = 1.5
    """Least time of a turn."""
    truncation: int | None = None
    """Another truncation than the presets', for a quick look."""
    out: Path = RESULTS
    """The JSON."""
    show: Path | None = None
    """Print this JSON's table as Markdown, and measure nothing."""

    def __post_init__(self) -> None:
        check_names(self.workloads)
        for name in self.contenders:
            if name not in CONTENDERS:
                raise ValueError(f"unknown contender {name!r}; choose from {', '.join(CONTENDERS)}")
        for field in ("rounds", "seconds"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be positive; got {getattr(self, field)}")
        available = os.cpu_count() or 1
        if not self.threads or min(self.threads) < 1 or max(self.threads) > available:
            raise ValueError(f"threads must lie between 1 and the {available} processors here; got {self.threads}")


def chosen(arguments: Arguments, workload: str) -> list[str]:
    """The contenders for a workload, the measure of the machine last."""
    names = [name for name in arguments.contenders if name != "products"]
    if not names:
        names = [name for name in CONTENDERS if name != "products" and (workload, name) not in _TOO_SLOW]
        if importlib.util.find_spec("jax") is None:
            print("jax is not installed and left out: pip install 'learned-opt[benchmarks]'", file=sys.stderr)
            names.remove("jax")
    return [*names, "products"]


def measure(arguments: Arguments, name: str, num_threads: int) -> dict[str, Any]:
    """All rounds of one workload."""
    contenders: list[Contender] = []
    try:
        for contender in chosen(arguments, name):
            found = start_fastest(contender, name, num_threads, arguments.truncation, arguments.seconds)
            contenders.append(found)
        rounds: dict[str, list[dict[str, Any]]] = {c.name: [] for c in contenders}
        for _ in range(arguments.rounds):
            for contender in contenders:
                time.sleep(0.1)  # the threads of the one before come to rest
                rounds[contender.name].append(contender.run(arguments.seconds))
    finally:
        for contender in contenders:
            contender.close()
    workload = SpeedWorkload.of(name, truncation=arguments.truncation)
    return {"threads": num_threads, **summarize(workload, rounds, {c.name: c.notes for c in contenders})}


def main() -> None:
    """The command line."""
    arguments = tyro.cli(Arguments)
    if arguments.show is not None:
        print(markdown(json.loads(arguments.show.read_text())["rows"]))
        return
    before = os.getloadavg()[0]
    rows = []
    for num_threads in arguments.threads:
        for name in arguments.workloads:
            rows.append(measure(arguments, name, num_threads))
            print("\n".join(table(rows[-1:]).splitlines()[len(rows) > 1 :]), flush=True)
    versions = {"python": platform.python_version()}
    if importlib.util.find_spec("jax") is not None:
        from importlib.metadata import version

        versions["jax"] = version("jax")
    report = {
        **conditions("benchmarks.meta_training", before),
        **versions,
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
