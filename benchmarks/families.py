"""Throughput of every task family: inner steps times particles per second, batched against one by one.

    python benchmarks/families.py [--family NAME …] [--particles 1 8 64] [--seconds 1]
        [--ratings-file PATH] [--omniglot-dir PATH]

A step is one gradient of every particle's loss and one plain gradient-descent update, with the family's default size;
drawing mini-batches is counted. "One by one" runs the same number of particles in a Python loop with ordinary autograd.
Families that read your files are measured where those are given.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

import tasks
from learned_opt.batched import BatchedFamily
from learned_opt.particles import EpisodePlan, start_particles
from learned_opt.task import TaskFamily, draw_batches, draw_task, task_seed
from learned_opt.unroll import inner_steps
from tasks.augment import Augmentation

_STEPS = 16


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


def default_family(name: str, files: dict[str, dict[str, str]]) -> TaskFamily:
    """The family with its default size; augmentations wrap the default digits network."""
    wraps = issubclass(tasks.FAMILIES[name], Augmentation)
    return tasks.get(name, **({"family": tasks.get("image_mlp")} if wraps else files.get(name, {})))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="*", choices=list(tasks.FAMILIES))
    parser.add_argument("--particles", nargs="*", type=int, default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--ratings-file", default="", help="for user_ratings: a file such as MovieLens' u.data")
    parser.add_argument("--omniglot-dir", default="", help="for omniglot: a folder with its zip files")
    options = parser.parse_args()
    files = {
        "user_ratings": {"ratings_file": options.ratings_file},
        "omniglot": {"data_dir": options.omniglot_dir},
    }
    without = [name for name, fields in files.items() if "" in fields.values()]
    torch.set_num_threads(1)
    print("| family | parameters | one by one | " + " | ".join(f"{n} batched" for n in options.particles) + " |")
    print("| --- |" + " ---: |" * (len(options.particles) + 2))
    for name in options.family or [name for name in tasks.FAMILIES if name not in without]:
        family = default_family(name, files)
        alone = one_by_one_rate(family, options.seconds)
        cells = []
        for num_particles in options.particles:
            rate = batched_rate(family, num_particles, options.seconds)
            cells.append(f"{rate:,.0f} ({rate / alone:.1f}x)")
        count = BatchedFamily(family).num_parameters
        print(f"| `{name}` | {count:,} | {alone:,.0f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
