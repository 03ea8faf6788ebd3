"""The memory that first-order meta-training needs: the formula, and the peak of a process that does it.

    python -m benchmarks.meta_training.memory                              1.0 M parameters, truncation 20, one particle
    python -m benchmarks.meta_training.memory --hidden 300 300 --truncation 50

The formula, derived in docs/speed.md, counts numbers held for each coordinate, a coordinate being one parameter of one
particle. Beside them there are the task's own temporaries, of a few times the parameters, and buffers whose size
depends on neither. Tests hold it to the tensors that are really alive.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from benchmarks.meta_training.worker import resident_mib
from learned_opt import estimators, rules
from learned_opt.meta_config import MetaTrainerConfig
from learned_opt.meta_trainer import MetaTrainer
from learned_opt.rules import UpdateRule
from learned_opt.truncation import HorizonSchedule
from tasks.image_mlp import ImageMLP

PARAMETER_ROWS = 10
"""Numbers per coordinate of parameters and gradients at the peak: those of particles, of the truncation's start, of
restarted tasks, and the copies made while one replaces another."""


def state_rows(rule: UpdateRule) -> int:
    """Numbers of rule state a coordinate, its step count included."""
    return sum(value[..., 0].numel() for value in rule.init_state(1).values())


def numbers_per_coordinate(rule: UpdateRule, truncation: int, *, restarts: int = 1, share: float = 1.0) -> float:
    """Numbers held for each coordinate at the peak of an outer step, at most.

    Args:
        rule: whose state is held.
        truncation: inner steps per meta-gradient, at least 1.
        restarts: at how many different steps of the truncation, its last included, particles reach their horizon.
        share: of the particles that restart together, in (0, 1].
    """
    states: float = 2  # at the truncation's start and now
    if restarts and share == 1:
        states = 3 + restarts  # as many starts of runs; then what is now, fresh, and put in its place
    elif restarts:
        states = (
            3 + restarts + restarts * share
        )  # starts, what is now, and for every run its particles' part of a start
    recorded = truncation + 1 + (truncation if restarts > 1 else 0)
    return states * state_rows(rule) + recorded + PARAMETER_ROWS


def predicted_bytes(
    rule: UpdateRule, num_coordinates: int, truncation: int, *, restarts: int = 1, share: float = 1.0, itemsize: int = 4
) -> float:
    """The same in bytes, for so many coordinates and so many bytes a number."""
    return itemsize * num_coordinates * numbers_per_coordinate(rule, truncation, restarts=restarts, share=share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """The peak memory of meta-training on one large network, in a process of its own."""

    hidden: tuple[int, ...] = (1000, 926)
    """Hidden layers of the MLP on digits; the default has 1,001,196 parameters."""
    truncation: int = 20
    """Inner steps per meta-gradient."""
    particles: int = 1
    """Tasks in flight."""
    outer_steps: int = 3
    """How many to take; every one ends an episode, so that all have the peak of a restart."""
    threads: int = 2
    """Of torch."""
    limit_gib: float = 4.0
    """What the answer is held against; the exit status says whether it was kept."""
    out: Path = Path("benchmarks/results/memory.json")
    """The JSON."""
    measuring: Annotated[bool, tyro.conf.arg(help="Measure in this process.")] = False


def measure(arguments: Arguments) -> dict[str, Any]:
    """The peak in this process, which must have done nothing before."""
    torch.set_num_threads(arguments.threads)
    rule = rules.get("rnnprop", dense_units=0)
    config = MetaTrainerConfig(
        num_particles=arguments.particles,
        truncation=arguments.truncation,
        horizons=HorizonSchedule(longest=arguments.truncation, random_offsets=False),
    )
    family = ImageMLP(hidden=arguments.hidden)
    family.shared_data()
    before = resident_mib(peak=False)
    trainer = MetaTrainer(rule, {"digits": family}, config, estimators.get("backprop"))
    start = time.perf_counter()
    for _ in range(arguments.outer_steps):
        trainer.step()
    num_parameters = trainer.work["digits"].batched.num_parameters
    num_coordinates = num_parameters * arguments.particles
    return {
        "num_parameters": num_parameters,
        "num_particles": arguments.particles,
        "truncation": arguments.truncation,
        "threads": arguments.threads,
        "seconds_per_outer_step": (time.perf_counter() - start) / arguments.outer_steps,
        "formula_gib": predicted_bytes(rule, num_coordinates, arguments.truncation) / 2**30,
        "peak_gib": (resident_mib(peak=True) - before) / 1024,
        "whole_process_gib": resident_mib(peak=True) / 1024,
        "limit_gib": arguments.limit_gib,
    }


def main() -> int:
    """The command line."""
    arguments = tyro.cli(Arguments)
    if arguments.measuring:
        print(json.dumps(measure(arguments)))
        return 0
    command = [sys.executable, "-m", "benchmarks.meta_training.memory", "--measuring", *sys.argv[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{found['num_parameters']:,} parameters, {found['num_particles']} particle(s), truncation "
        f"{found['truncation']}: formula {found['formula_gib']:.2f} GiB, peak {found['peak_gib']:.2f} GiB, whole "
        f"process {found['whole_process_gib']:.2f} of at most {found['limit_gib']:.2f} GiB; "
        f"{found['seconds_per_outer_step']:.1f} s an outer step"
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(found["whole_process_gib"] > arguments.limit_gib)


if __name__ == "__main__":
    sys.exit(main())
