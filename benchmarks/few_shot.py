"""Few-shot learning: the learned optimizer with learned initial parameters beside MAML and Meta-SGD.

    python benchmarks/few_shot.py --task sinusoid --folder runs/few_shot
    python benchmarks/few_shot.py --task omniglot --data-dir DIR --folder runs/few_shot

with DIR a folder of Omniglot's zip files. Every method learns initial parameters, by the exact meta-gradient of the
loss on query rows after the inner steps, with the same families, meta-optimizer, numbers of tasks and of outer steps:

- maml: gradient descent at one fixed rate (Finn, Abbeel and Levine 2017);
- meta_sgd: gradient descent at a learned rate for every parameter (Li, Zhou, Chen and Li 2017);
- learned: gradient descent whose rates a coordinatewise LSTM sets, the rule "gated", all of whose weights are learned;
- learned_rates: the same, its updates times a learned factor for every parameter;
- lstm: the coordinatewise LSTM that gives the update itself, on log-and-sign inputs (not among the default methods).

The checkpoint is chosen on meta-validation tasks and reported on meta-test tasks, with 95 % intervals of the mean over
tasks: the query loss of sinusoids (ten points, 2 x 40 ReLU), the query accuracy of characters that no other split
holds (5-way, 1-shot). Runs are checkpointed: the same command continues one that was stopped. The results go to
benchmarks/results/few_shot.json, method by method.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

import tasks
from learned_opt import estimators, rules
from learned_opt.batched import BatchedFamily
from learned_opt.checkpoints import CheckpointFolder
from learned_opt.curriculum import Stage
from learned_opt.files import write_atomically
from learned_opt.initial_params import InitialParamsConfig, name_of
from learned_opt.meta_config import MetaTrainerConfig
from learned_opt.meta_loss import MetaLoss
from learned_opt.meta_trainer import MetaTrainer
from learned_opt.particles import EpisodePlan, start_particles
from learned_opt.rules.base import RuleConfig, UpdateRule
from learned_opt.task import TaskFamily, Tensors
from learned_opt.truncation import HorizonSchedule
from learned_opt.unroll import unroll

RESULTS = Path(__file__).parent / "results" / "few_shot.json"
METHODS = ("maml", "meta_sgd", "learned", "learned_rates", "lstm")
TEST_STEPS = {"sinusoid": (1, 2, 5, 10), "omniglot": (1, 3, 5, 10)}
TASKS_AT_ONCE = 50
"""Rules with rates per parameter see whole particles only, and this many are one chunk of coordinates."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerParameterConfig(RuleConfig):
    """Where the rates start.

    Attributes:
        num_parameters: of the one family that the rule is for.
        factor: initial value of every rate.
    """

    num_parameters: int
    factor: float = 0.01


class PerParameterRates(UpdateRule):
    """Another rule's update, or the negative gradient, times a learned number for each parameter of one network.

    It belongs to that network alone, unlike the rules of the library, and sees all coordinates of all particles at
    once: they are few here.
    """

    kind: ClassVar[str] = "per_parameter_rates"
    config: PerParameterConfig

    def __init__(self, config: PerParameterConfig, inner: UpdateRule | None = None) -> None:
        self.config, self.inner = config, inner

    @property
    def rows_per_coordinate(self) -> int:  # type: ignore[override]  # small: a step is never cut into chunks
        return 0

    def init_theta(self, generator: torch.Generator) -> Tensors:
        theta = self.inner.init_theta(generator) if self.inner else {}
        return {**theta, "rates": torch.full((self.config.num_parameters,), self.config.factor)}

    def init_state(
        self, num_coordinates: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensors:
        return self.inner.init_state(num_coordinates, dtype=dtype, device=device) if self.inner else {}

    def update(
        self, theta: Tensors, grads: torch.Tensor, params: torch.Tensor, state: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        count, rest = divmod(len(grads), self.config.num_parameters)
        assert not rest, "a chunk of the coordinates, not whole particles"
        update = -grads
        if self.inner:
            update, state = self.inner.update(theta, grads, params, state)
        return update * theta["rates"].repeat(count), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What the methods are compared on.

    Attributes:
        family, test_family: to meta-train on, and to report on (with more query rows).
        metric: of the family's reported metrics, the one to report.
        num_tasks: per outer step.
        horizon: inner steps in meta-training.
        learning_rate: of gradient descent.
        outer_steps: of meta-training.
    """

    family: TaskFamily
    test_family: TaskFamily
    metric: str
    num_tasks: int
    horizon: int
    learning_rate: float
    outer_steps: int


def problem_of(options: argparse.Namespace) -> Problem:
    """The task's settings, those of the MAML paper where our network and data are its own."""
    if options.task == "sinusoid":
        found = Problem(
            family=tasks.get("sinusoid", judge="query", num_queries=10),
            test_family=tasks.get("sinusoid", judge="query", num_queries=100),
            metric="test_loss",
            num_tasks=25,
            horizon=1,
            learning_rate=0.01,
            outer_steps=25_000,
        )
    else:
        if not options.data_dir:
            raise SystemExit("error: --task omniglot needs --data-dir, a folder with Omniglot's zip files")
        fields: dict[str, Any] = {"data_dir": options.data_dir, "rotated": True, "judge": "query"}
        fields |= {"num_ways": 5, "num_shots": 1, "channels": options.channels, "side": options.side}
        found = Problem(
            family=tasks.get("omniglot", num_queries=5, **fields),
            test_family=tasks.get("omniglot", num_queries=15, **fields),
            metric="test_accuracy",
            num_tasks=8,
            horizon=1,
            learning_rate=0.4,
            outer_steps=4_000,
        )
    changed = {n: v for n in ("outer_steps", "num_tasks", "horizon") if (v := getattr(options, n))}
    return dataclasses.replace(found, **changed)


def rule_of(method: str, problem: Problem) -> UpdateRule:
    """The method's update rule."""
    num_parameters = BatchedFamily(problem.family).num_parameters
    rate = problem.learning_rate
    if method == "maml":
        return rules.get("sgd", lr=rate)
    if method == "meta_sgd":
        return PerParameterRates(PerParameterConfig(num_parameters=num_parameters, factor=rate))
    if method == "lstm":
        return rules.get("lstm", inputs="log_and_sign", output_tanh=False, output_scale=0.1)
    gated = rules.get("gated", lr=rate)
    if method == "learned":
        return gated
    return PerParameterRates(PerParameterConfig(num_parameters=num_parameters, factor=1.0), gated)


def trainer_of(method: str, problem: Problem, seed: int) -> MetaTrainer:
    """The meta-trainer of a method."""
    only_initial = (Stage(num_outer_steps=problem.outer_steps, trainable=("initial_params.*",)),)
    config = MetaTrainerConfig(
        outer_steps=problem.outer_steps,
        num_particles=problem.num_tasks,
        truncation=problem.horizon,
        horizons=HorizonSchedule(longest=problem.horizon, random_offsets=False),
        stages=only_initial if method == "maml" else (),
        initial_params=InitialParamsConfig(families=("task",), learning_rate=1e-3),
        meta_loss=MetaLoss(normalization="none", average="final"),
        learning_rate=1e-3,
        clip_norm=10.0,
        validation_every=max(problem.outer_steps // 50, 1),
        validation_tasks=TASKS_AT_ONCE,
        seed=seed,
    )
    return MetaTrainer(rule_of(method, problem), {"task": problem.family}, config, estimators.get("backprop", order=2))


def meta_train(trainer: MetaTrainer, folder: Path, say: Callable[[str], None]) -> float:
    """Train to the end, from the last checkpoint if there is one. Returns the seconds spent here."""
    checkpoints = CheckpointFolder(folder, keep=2)
    if checkpoints.latest() is not None:
        trainer.load_state_dict(checkpoints.load_latest())
        say(f"continuing at outer step {trainer.outer_step}")
    began = time.perf_counter()
    while not trainer.finished:
        trainer.step()
        if trainer.validation_due:
            score = trainer.validate()["validation"]
            checkpoints.save(trainer.state_dict(), trainer.outer_step, best=trainer.best_step == trainer.outer_step)
            per_step = (time.perf_counter() - began) / max(trainer.outer_step, 1)
            say(f"outer step {trainer.outer_step}: validation {score:.4f} ({per_step * 1e3:.1f} ms per outer step)")
    return time.perf_counter() - began


def measure(trainer: MetaTrainer, problem: Problem, num_tasks: int, steps: tuple[int, ...]) -> list[dict[str, float]]:
    """Mean and 95 % interval of the metric over meta-test tasks, after each of these numbers of inner steps."""
    theta = trainer.best_theta or trainer.theta
    batched = BatchedFamily(problem.test_family)
    plan = EpisodePlan(split="meta_test", run_seed=0)
    values: dict[int, list[torch.Tensor]] = {k: [] for k in steps}
    for start in range(0, num_tasks, TASKS_AT_ONCE):
        ids = range(start, min(start + TASKS_AT_ONCE, num_tasks))
        particles = start_particles(batched, trainer.rule, plan, ids)
        done = 0
        for k in sorted(steps):
            unroll(
                trainer.rule,
                theta,
                batched,
                plan,
                particles,
                k - done,
                restart_invalid=False,
                initial_params=theta[name_of("task")],
            )
            done = k
            values[k].append(batched.eval_metrics(particles.params, particles.tasks)[problem.metric])
    out = []
    for k, parts in values.items():
        value = torch.cat(parts).double()
        half = 1.96 * float(value.std()) / math.sqrt(len(value))
        mean = float(value.mean())
        found = {"mean": mean, "low": mean - half, "high": mean + half, "std": float(value.std())}
        # JSON knows no NaN: null stands for a mean over tasks of which one has diverged.
        out.append({"inner_steps": k, **{name: v if math.isfinite(v) else None for name, v in found.items()}})
    return out


def save(path: Path, task: str, problem: Problem, row: dict[str, Any]) -> None:
    """Put the method's row into the file, beside what is there of the same settings."""
    found = json.loads(path.read_text()) if path.exists() else {}
    settings = {
        "family": problem.test_family.name,
        "metric": problem.metric,
        "outer_steps": problem.outer_steps,
        "num_tasks": problem.num_tasks,
        "horizon": problem.horizon,
    }
    before = found.get(task, {})
    methods = before.get("methods", {}) if before.get("settings") == settings else {}
    found[task] = {"settings": settings, "methods": {**methods, row.pop("method"): row}}
    write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())


def main() -> None:
    """Meta-train and measure the methods, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("sinusoid", "omniglot"), default="sinusoid")
    parser.add_argument("--method", nargs="*", choices=METHODS, default=METHODS[:-1])
    parser.add_argument("--data-dir", default="", help="folder with Omniglot's zip files")
    parser.add_argument("--folder", type=Path, default=Path("runs/few_shot"), help="for checkpoints")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--outer-steps", type=int, default=0, help="0 for the task's own")
    parser.add_argument("--num-tasks", type=int, default=0, help="per outer step; 0 for the task's own")
    parser.add_argument("--horizon", type=int, default=0, help="inner steps in meta-training; 0 for the task's own")
    parser.add_argument("--test-tasks", type=int, default=1000)
    parser.add_argument("--channels", type=int, nargs="+", default=(16, 16, 16))
    parser.add_argument("--side", type=int, default=14, help="of Omniglot's images, in pixels")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    problem = problem_of(options)
    for method in options.method:
        trainer = trainer_of(method, problem, options.seed)
        folder = options.folder / f"{options.task}-{method}-{problem.outer_steps}"
        meta_train(trainer, folder, lambda text, method=method: print(f"{method}: {text}", flush=True))
        rows = measure(trainer, problem, options.test_tasks, TEST_STEPS[options.task])
        row = {"method": method, "test_tasks": options.test_tasks, "best_step": trainer.best_step, "after": rows}
        save(options.results, options.task, problem, row)
        for found in rows:
            mean, low, high = ("diverged" if found[n] is None else f"{found[n]:.4f}" for n in ("mean", "low", "high"))
            steps = f"{options.task} {method} after {found['inner_steps']} inner steps"
            print(f"{steps}: {problem.metric} {mean} [{low}, {high}]", flush=True)


if __name__ == "__main__":
    main()
