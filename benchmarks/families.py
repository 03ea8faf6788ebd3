"""Throughput of every task family: inner steps times particles per second, batched against one by one.

    python benchmarks/families.py [--family NAME …] [--particles 1 8 64] [--seconds 1] [--results PATH]

A step is one gradient of every particle's loss and one plain gradient-descent update, with the family's default size;
drawing mini-batches is counted. "One by one" runs one particle after another in a Python loop with ordinary autograd.
Families that read your files get generated ones of the public files' sizes, since speed does not depend on what is in
them; "module" is a small network on generated groups. The results go to benchmarks/results/families.json, family by
family; families that are not measured this time keep their rows.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import tasks
from learned_opt.batched import BatchedFamily
from learned_opt.files import write_atomically
from learned_opt.particles import EpisodePlan, start_particles
from learned_opt.task import TaskFamily, draw_batches, draw_task, task_seed
from learned_opt.unroll import inner_steps
from tasks.augment import Augmentation

_STEPS = 16
RESULTS = Path(__file__).parent / "results" / "families.json"
NAMES = (*tasks.FAMILIES, tasks.ModuleFamily.name)


def per_second(run: Callable[[], int], seconds: float) -> float:
    """Inner steps per second of a function that returns how many it took; one call warms it up."""
    run()
    began, taken = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        taken += run()
    return taken / (time.perf_counter() - began)


def batched_rate(family: TaskFamily, num_particles: int, seconds: float) -> float:
    """Inner steps x particles per second, all particles in one program."""
    batched = BatchedFamily(family)
    plan = EpisodePlan(split="meta_train", run_seed=0)
    particles = start_particles(batched, None, plan, range(num_particles))

    def run() -> int:
        start = particles.params
        for _ in inner_steps(batched, particles, _STEPS, lambda params, grads: params - 1e-6 * grads):
            pass
        particles.params = start
        return _STEPS * num_particles

    return per_second(run, seconds)


def one_by_one_rate(family: TaskFamily, seconds: float) -> float:
    """Inner steps per second of one task at a time."""
    seed = task_seed("meta_train", 0)
    task, start = draw_task(family, "meta_train", seed)
    task = {**task, **family.shared_data()}

    def run() -> int:
        params = {name: value.clone().requires_grad_() for name, value in start.items()}
        batches = draw_batches(family, task, seed, 0, _STEPS)
        for step in range(_STEPS):
            loss = family.loss(params, task, {name: value[step] for name, value in batches.items()})
            grads = torch.autograd.grad(loss, list(params.values()))
            with torch.no_grad():
                for value, grad in zip(params.values(), grads):
                    value -= 1e-6 * grad
        return _STEPS

    return per_second(run, seconds)


def generated_ratings(folder: Path) -> Path:
    """A file as large as MovieLens' smallest: 943 users, 1,682 items, some 100,000 ratings."""
    generator = torch.Generator().manual_seed(0)
    lines = []
    for user in range(943):
        items = torch.randperm(1682, generator=generator)[:106].tolist()
        stars = torch.randint(1, 6, (106,), generator=generator).tolist()
        lines += [f"{user}\t{item}\t{rating}\n" for item, rating in zip(items, stars)]
    path = folder / "ratings.dat"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def generated_omniglot(folder: Path, num_characters: int = 100) -> Path:
    """A zip file of characters with 20 drawings each, noise in place of ink."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    with zipfile.ZipFile(folder / "images_background_generated.zip", "w") as archive:
        for c in range(num_characters):
            for d in range(20):
                ink = (torch.rand(105, 105, generator=generator) < 0.9).numpy()
                buffer = io.BytesIO()
                Image.fromarray(ink).save(buffer, "PNG")
                name = f"images_background_generated/Alphabet/character{c:03}/{c:04}_{d + 1:02}.png"
                archive.writestr(name, buffer.getvalue())
    return folder


def own_module() -> TaskFamily:
    """A small network on 40 groups of 50 rows."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 8, generator=generator)
    data = tasks.GroupedData(inputs, inputs.sum(1, keepdim=True).sin(), torch.arange(2000) % 40)
    network = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    return tasks.ModuleFamily(network, F.mse_loss, data, batch_size=16)


def default_family(name: str, folder: Path) -> TaskFamily:
    """The family with its default size; augmentations wrap the default digits network."""
    if name == tasks.ModuleFamily.name:
        return own_module()
    if issubclass(tasks.FAMILIES[name], Augmentation):
        return tasks.get(name, family=tasks.get("image_mlp"))
    if name == "user_ratings":
        return tasks.get(name, ratings_file=str(generated_ratings(folder)))
    if name == "omniglot":
        return tasks.get(name, data_dir=str(generated_omniglot(folder)))
    return tasks.get(name)


def measure(name: str, particles: list[int], seconds: float, folder: Path) -> dict[str, Any]:
    """One family's row: rates in inner steps x particles per second, and their ratios to one by one."""
    family = default_family(name, folder)
    alone = one_by_one_rate(family, seconds)
    rates = {str(n): batched_rate(family, n, seconds) for n in particles}
    return {
        "num_parameters": BatchedFamily(family).num_parameters,
        "one_by_one": round(alone, 1),
        "batched": {n: round(rate, 1) for n, rate in rates.items()},
        "ratio": {n: round(rate / alone, 2) for n, rate in rates.items()},
    }


def table(rows: dict[str, dict[str, Any]], particles: list[int]) -> str:
    """The rows in Markdown."""
    lines = ["| family | parameters | one by one | " + " | ".join(f"{n} batched" for n in particles) + " |"]
    lines.append("| --- |" + " ---: |" * (len(particles) + 2))
    for name, row in rows.items():
        if all(str(n) in row["batched"] for n in particles):
            cells = [f"{row['batched'][str(n)]:,.0f} ({row['ratio'][str(n)]:.1f}x)" for n in particles]
            lines.append(f"| `{name}` | {row['num_parameters']:,} | {row['one_by_one']:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the families, save every row as it comes, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--particles", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"seconds": options.seconds, "torch": torch.__version__, "num_threads": 1, "cpus": os.cpu_count()}
    before = json.loads(options.results.read_text())["rows"] if options.results.exists() else {}
    rows = {name: row for name, row in before.items() if name in NAMES}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.family:
            rows[name] = measure(name, options.particles, options.seconds, Path(folder))
            rows = {n: rows[n] for n in NAMES if n in rows}
            text = json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n"
            write_atomically(options.results, text.encode())
    print(table(rows, options.particles))


if __name__ == "__main__":
    main()
