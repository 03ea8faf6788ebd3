"""What a step of the learned optimizers costs beside one of `torch.optim.AdamW`, and the state they keep.

    python benchmarks/step.py [--rule compact …] [--threads 1 2] [--repeats 15] [--json benchmarks/results/step.json]
    python benchmarks/step.py --rule --weights compact [FILE …] --widths 64 128 128 10    exported ones, another MLP
    python benchmarks/step.py --device cuda [--rule compact …] [--model vit_b16 gpt2_small] [--json …]

The model is an MLP with 1.0 M parameters. Steps of all optimizers are interleaved, so that what else the machine does
hits all alike; the table shows medians. CPU time is that of all threads together: it is what tells when other programs
take part of the cores. "guarded" steps are given a loss that falls, so that the learned rule takes them. Costs do not
depend on what was learned: theta is fresh.

With --device, steps are timed on parameters of the shapes of ViT-B/16 and of the smallest GPT-2, one optimizer after
another, on a GPU by its own events: AdamW in few launches ("foreach") and in one ("fused"), and every learned rule in
plain torch and, where there is Triton, in its fused kernel. The model "tiny" has the layout of ViT-B/16 and 53,354
parameters, for a trial on any device.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from learned_opt import Artifact, LearnedOptimizer, load, rules
from learned_opt.rules.kernels import fused

_STEPS = 5  # are timed at once: a basis changes in one of so many

WIDTHS = (500, 1000, 500, 10)  # 1,006,510 parameters


def model(widths: Sequence[int] = WIDTHS) -> nn.Sequential:
    """The linear layers of an MLP of these widths, with made-up gradients."""
    net = nn.Sequential(*(nn.Linear(inputs, outputs) for inputs, outputs in zip(widths, widths[1:])))
    generator = torch.Generator().manual_seed(0)
    for param in net.parameters():
        param.grad = torch.randn(param.shape, generator=generator) * 1e-2
    return net


def untrained(name: str) -> Artifact:
    """A rule at its initial theta."""
    rule = rules.get(name)
    return Artifact.of(rule, rule.init_theta(torch.Generator().manual_seed(0)), name=name)


def optimizers(
    names: Sequence[str], weights: Sequence[str], widths: Sequence[int] = WIDTHS
) -> dict[str, torch.optim.Optimizer]:
    """AdamW, a learned optimizer of each rule, and those of exported files, every one on a model of its own."""
    out: dict[str, torch.optim.Optimizer] = {"AdamW": torch.optim.AdamW(model(widths).parameters(), lr=1e-5)}
    artifacts = {name: untrained(name) for name in names} | {f"weights {file}": load(file) for file in weights}
    for name, artifact in artifacts.items():
        out[name] = LearnedOptimizer(model(widths).parameters(), artifact)
        out[f"{name}, guarded"] = LearnedOptimizer(model(widths).parameters(), artifact, guard=True)
    return out


class FallingLoss:
    """One step of an optimizer, which is told a loss that is 1 % lower each time if it is guarded."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.loss = 1.0

    def __call__(self) -> None:
        if isinstance(self.optimizer, LearnedOptimizer) and self.optimizer.guard is not None:
            self.loss *= 0.99
            self.optimizer.step(loss=self.loss)
            assert self.optimizer.watch is not None and self.optimizer.watch.learned
        else:
            self.optimizer.step()


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of state a parameter, step counters left out."""
    rows = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    num_parameters = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return sum(v.numel() * v.element_size() for v in rows) / num_parameters


def measure(
    names: Sequence[str], weights: Sequence[str], num_threads: int, repeats: int, widths: Sequence[int] = WIDTHS
) -> list[dict[str, Any]]:
    """One row per optimizer: medians of wall and CPU milliseconds, and their ratios to AdamW's."""
    torch.set_num_threads(num_threads)
    subjects = optimizers(names, weights, widths)
    wall: dict[str, list[float]] = {name: [] for name in subjects}
    cpu: dict[str, list[float]] = {name: [] for name in subjects}
    steps = {name: FallingLoss(optimizer) for name, optimizer in subjects.items()}
    for step in steps.values():
        step()
        step()
    for _ in range(repeats):
        for name, step in steps.items():
            wall_before, cpu_before = time.perf_counter(), time.process_time()
            for _ in range(_STEPS):
                step()
            wall[name].append((time.perf_counter() - wall_before) * 1e3 / _STEPS)
            cpu[name].append((time.process_time() - cpu_before) * 1e3 / _STEPS)
    rows = []
    for name, optimizer in subjects.items():
        row = {"optimizer": name, "threads": num_threads, "state_bytes": state_bytes(optimizer)}
        for kind, times in (("wall", wall), ("cpu", cpu)):
            row[f"{kind}_ms"] = statistics.median(times[name])
            row[f"{kind}_ratio"] = statistics.median(times[name]) / statistics.median(times["AdamW"])
        rows.append(row)
    return rows


Shapes = list[tuple[int, ...]]
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def transformer(width: int, depth: int, *, words: int = 0, positions: int, patch: int = 0, classes: int = 0) -> Shapes:
    """The shapes of a transformer's parameters: pre-norm blocks with fused projections and a four times wider MLP."""
    block: Shapes = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    first: Shapes = [(words, width)] if words else [(width, 3, patch, patch), (width,), (1, 1, width)]
    last: Shapes = [(width,), (width,)] + ([(classes, width), (classes,)] if classes else [])
    return [*first, (positions, width), *block * depth, *last]


MODELS: dict[str, Shapes] = {
    "vit_b16": transformer(768, 12, positions=197, patch=16, classes=1000),
    "gpt2_small": transformer(768, 12, words=50257, positions=1024),
    "tiny": transformer(32, 4, positions=17, patch=4, classes=10),
}
"""Parameter shapes of models; the read-out of GPT-2 is its embedding."""


def device_subjects(names: list[str], device: torch.device) -> list[tuple[str, str, Make]]:
    """(optimizer, how it steps, what makes it) for everything that is timed on a device."""
    out: list[tuple[str, str, Make]] = [
        ("AdamW", "foreach", lambda p: torch.optim.AdamW(p, lr=1e-5, foreach=True)),
        ("AdamW", "fused", lambda p: torch.optim.AdamW(p, lr=1e-5, fused=True)),
    ]
    for name in names:
        artifact = untrained(name)
        out.append((name, "plain", lambda p, a=artifact: LearnedOptimizer(p, a)))  # type: ignore[misc]
        if fused.wanted(artifact.rule, device, torch.float32):
            out.append((name, "fused", lambda p, a=artifact: LearnedOptimizer(p, a)))  # type: ignore[misc]
        out.append((name, "plain, guarded", lambda p, a=artifact: LearnedOptimizer(p, a, guard=True)))  # type: ignore[misc]
    return out


def timed(step: Callable[[], None], device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of each of some calls, after three that are not counted."""
    for _ in range(3):
        step()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            step()
            after.record()
            torch.cuda.synchronize(device)
            times.append(before.elapsed_time(after))
        else:
            start = time.perf_counter()
            step()
            times.append((time.perf_counter() - start) * 1e3)
    return times


def measure_on_device(
    shapes: Shapes, subject: tuple[str, str, Make], device: torch.device, repeats: int
) -> dict[str, Any]:
    """One optimizer on parameters of these shapes: times, state and peak memory; an error's text if it cannot run."""
    name, how, make = subject
    generator = torch.Generator(device).manual_seed(0)
    row: dict[str, Any] = {"optimizer": name, "step": how}
    before = os.environ.get("LEARNED_OPT_FUSED")
    os.environ["LEARNED_OPT_FUSED"] = "0" if how.startswith("plain") else "1"
    try:
        params = [nn.Parameter(torch.randn(shape, generator=generator, device=device) * 0.02) for shape in shapes]
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, device=device) * 1e-2
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        optimizer = make(params)
        times = timed(FallingLoss(optimizer), device, repeats)
        millions = sum(param.numel() for param in params) / 1e6
        row |= {"ms": statistics.median(times), "least_ms": min(times), "state_bytes": state_bytes(optimizer)}
        row["ms_per_million"] = row["ms"] / millions
        if device.type == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated(device) / (millions * 1e6)
    except torch.cuda.OutOfMemoryError:
        row["error"] = "out of memory"
    finally:
        if before is None:
            del os.environ["LEARNED_OPT_FUSED"]
        else:
            os.environ["LEARNED_OPT_FUSED"] = before
    return row


def device_report(names: list[str], models: list[str], device: torch.device, repeats: int) -> dict[str, Any]:
    """Print and return the table for a device."""
    print("| model | optimizer | step | ms | ms a million | state, bytes a parameter | peak, bytes a parameter |")
    print("| --- " * 7 + "|")
    rows = []
    for model_name in models:
        for subject in device_subjects(names, device):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                row = {"model": model_name, **measure_on_device(MODELS[model_name], subject, device, repeats)}
            # A kernel that is refused says so in a warning, and plain torch takes its place.
            row["warnings"] = sorted({str(warning.message) for warning in caught})
            rows.append(row)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            cells = ["error"] * 4
            if "error" not in row:
                peak = f"{row['peak_bytes']:.0f}" if "peak_bytes" in row else ""
                cells = [f"{row['ms']:.2f}", f"{row['ms_per_million']:.3f}", f"{row['state_bytes']:.0f}", peak]
            print(f"| {model_name} | {row['optimizer']} | {row['step']} | " + " | ".join(cells) + " |", flush=True)
            for text in row["warnings"]:
                print(f"warning: {text}")
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"rows": rows, "device": machine, "torch": torch.__version__}


def main() -> None:
    """Print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rule", nargs="*", default=["turned", "compact", "mixture", "rnnprop", "l2l"], choices=sorted(rules.RULES)
    )
    parser.add_argument("--weights", nargs="+", default=[], help="names that ship, or exported files; not on a device")
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, help="of the MLP's layers")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", help="such as cuda; time whole models' parameters there")
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=["vit_b16", "gpt2_small"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.device and arguments.weights:
        parser.error("--weights are timed on the CPU: leave --device out")
    if arguments.device:
        write(
            device_report(arguments.rule, arguments.model, torch.device(arguments.device), arguments.repeats),
            arguments.json,
        )
        return
    print("| optimizer | threads | ms a step | x AdamW | CPU ms | x AdamW | state, bytes a parameter |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    busy = os.getloadavg()[0]
    for num_threads in arguments.threads:
        for row in measure(arguments.rule, arguments.weights, num_threads, arguments.repeats, arguments.widths):
            rows.append(row)
            print(
                f"| {row['optimizer']} | {row['threads']} | {row['wall_ms']:.1f} | {row['wall_ratio']:.0f} | "
                f"{row['cpu_ms']:.1f} | {row['cpu_ratio']:.0f} | {row['state_bytes']:.0f} |",
                flush=True,
            )
    print(f"\nload average before: {busy:.1f} on {os.cpu_count()} cores; torch {torch.__version__}")
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": busy}
    write({"rows": rows, "machine": machine, "torch": torch.__version__}, arguments.json)


def write(content: dict[str, Any], path: Path | None) -> None:
    """Write the content as JSON, if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
