"""What a step of the learned optimizers costs beside one of `torch.optim.AdamW`, and the state they keep.

    python benchmarks/step.py [--rule compact …] [--threads 1 2] [--repeats 15] [--json benchmarks/results/step.json]

The model is an MLP with 1.0 M parameters. Steps of all optimizers are interleaved, so that what else the machine does
hits all alike; the table shows medians. CPU time is that of all threads together: it is what tells when other programs
take part of the cores. Costs do not depend on what was learned: theta is fresh.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from learned_opt import Artifact, LearnedOptimizer, rules


def model() -> nn.Sequential:
    """An MLP with 1,006,510 parameters and made-up gradients."""
    net = nn.Sequential(nn.Linear(500, 1000), nn.ReLU(), nn.Linear(1000, 500), nn.ReLU(), nn.Linear(500, 10))
    generator = torch.Generator().manual_seed(0)
    for param in net.parameters():
        param.grad = torch.randn(param.shape, generator=generator) * 1e-2
    return net


def optimizers(names: list[str]) -> dict[str, torch.optim.Optimizer]:
    """AdamW and one learned optimizer of each rule, every one on a model of its own."""
    out: dict[str, torch.optim.Optimizer] = {"AdamW": torch.optim.AdamW(model().parameters(), lr=1e-5)}
    for name in names:
        rule = rules.get(name)
        artifact = Artifact.of(rule, rule.init_theta(torch.Generator().manual_seed(0)), name=name)
        out[name] = LearnedOptimizer(model().parameters(), artifact)
    return out


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of state a parameter, step counters left out."""
    rows = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    num_parameters = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return sum(v.numel() * v.element_size() for v in rows) / num_parameters


def measure(names: list[str], num_threads: int, repeats: int) -> list[dict[str, Any]]:
    """One row per optimizer: medians of wall and CPU milliseconds, and their ratios to AdamW's."""
    torch.set_num_threads(num_threads)
    subjects = optimizers(names)
    wall: dict[str, list[float]] = {name: [] for name in subjects}
    cpu: dict[str, list[float]] = {name: [] for name in subjects}
    for optimizer in subjects.values():
        optimizer.step()
        optimizer.step()
    for _ in range(repeats):
        for name, optimizer in subjects.items():
            wall_before, cpu_before = time.perf_counter(), time.process_time()
            optimizer.step()
            wall[name].append((time.perf_counter() - wall_before) * 1e3)
            cpu[name].append((time.process_time() - cpu_before) * 1e3)
    rows = []
    for name, optimizer in subjects.items():
        row = {"optimizer": name, "threads": num_threads, "state_bytes": state_bytes(optimizer)}
        for kind, times in (("wall", wall), ("cpu", cpu)):
            row[f"{kind}_ms"] = statistics.median(times[name])
            row[f"{kind}_ratio"] = statistics.median(times[name]) / statistics.median(times["AdamW"])
        rows.append(row)
    return rows


def main() -> None:
    """Print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", nargs="+", default=["compact", "rnnprop", "l2l"], choices=sorted(rules.RULES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print("| optimizer | threads | ms a step | x AdamW | CPU ms | x AdamW | state, bytes a parameter |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    load = os.getloadavg()[0]
    for num_threads in arguments.threads:
        for row in measure(arguments.rule, num_threads, arguments.repeats):
            rows.append(row)
            print(
                f"| {row['optimizer']} | {row['threads']} | {row['wall_ms']:.1f} | {row['wall_ratio']:.0f} | "
                f"{row['cpu_ms']:.1f} | {row['cpu_ratio']:.0f} | {row['state_bytes']:.0f} |",
                flush=True,
            )
    print(f"\nload average before: {load:.1f} on {os.cpu_count()} cores; torch {torch.__version__}")
    if arguments.json:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": load}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"rows": rows, "machine": machine, "torch": torch.__version__}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
