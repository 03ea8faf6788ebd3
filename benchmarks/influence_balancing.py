"""Influence balancing: where truncation gives the gradient the wrong sign.

A linear system of 23 states, x ← Ax + θb, whose first state should be 1 (Tallec and Ollivier 2017; Vicol, Metz and
Sohl-Dickstein 2021). A holds ½ on the diagonal and next to it; b is +1 for the first 10 states and −1 for the other 13.
θ raises the first state at once, but lowers it in the long run, as the influence of the other 23 − 10 states arrives.
Estimators that see one step raise θ for ever; unbiased ones find the optimum.

    python -m benchmarks.influence_balancing --out influence_balancing.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import torch

from learned_opt import estimators
from learned_opt.batched import BatchedFamily
from learned_opt.meta_loss import MetaLoss
from learned_opt.particles import EpisodePlan
from learned_opt.rules.base import RuleConfig, UpdateRule
from learned_opt.task import TaskFamily, Tensors
from learned_opt.truncation import HorizonSchedule

NUM_STATES = 23
NUM_POSITIVE = 10
HORIZON = 100
START = 0.5


def system(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """(A [23, 23], b [23])."""
    a = 0.5 * torch.eye(NUM_STATES, dtype=dtype) + 0.5 * torch.diag(torch.ones(NUM_STATES - 1, dtype=dtype), 1)
    b = torch.ones(NUM_STATES, dtype=dtype)
    b[NUM_POSITIVE:] = -1
    return a, b


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfluenceBalancing(TaskFamily):
    """½(x₁ − 1)² of a system that starts at zero; all tasks are the same."""

    name: ClassVar[str] = "influence_balancing"

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        return {"target": torch.ones(())}

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        return {"x": torch.zeros(NUM_STATES)}

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        return 0.5 * (params["x"][0] - task["target"]).square()


class LinearSystem(UpdateRule):
    """The system's step as an update: Ax + θb − x. It reads no gradient, and takes coordinates 23 at a time."""

    kind: ClassVar[str] = "linear_system"
    config: RuleConfig = RuleConfig()

    def init_theta(self, generator: torch.Generator) -> Tensors:
        return {"theta": torch.tensor(START)}

    def init_state(
        self, num_coordinates: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensors:
        return {}

    def update(
        self, theta: Tensors, grads: torch.Tensor, params: torch.Tensor, state: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        a, b = system(params.dtype)
        x = params.reshape(-1, NUM_STATES)
        return (x @ a.T + theta["theta"] * b - x).reshape(params.shape), {}


def optimum() -> float:
    """The θ that minimizes the mean loss over the horizon: x₁ after t steps is θ·a_t, so θ = Σa_t / Σa_t²."""
    a, b = system(torch.float64)
    x, slopes = torch.zeros(NUM_STATES, dtype=torch.float64), []
    for _ in range(HORIZON):
        x = a @ x + b
        slopes.append(float(x[0]))
    return sum(slopes) / sum(s * s for s in slopes)


def workload(truncation: int, run_seed: int, dtype: torch.dtype = torch.float64) -> estimators.Workload:
    """The problem with episodes of `HORIZON` steps."""
    return estimators.Workload(
        rule=LinearSystem(),
        batched=BatchedFamily(InfluenceBalancing(), dtype=dtype),
        plan=EpisodePlan(split="meta_train", run_seed=run_seed, horizons=HorizonSchedule(longest=HORIZON)),
        meta_loss=MetaLoss(normalization="none"),
        truncation=truncation,
    )


ESTIMATORS: dict[str, tuple[str, dict[str, float]]] = {
    "backpropagation": ("backprop", {"order": 2}),
    "ES": ("es", {"sigma": 0.1}),
    "PES": ("pes", {"sigma": 0.1}),
    "NRES": ("nres", {"sigma": 0.1}),
}


def descend(
    label: str,
    *,
    truncation: int = 1,
    num_outer_steps: int = 1000,
    num_particles: int = 100,
    lr: float = 0.01,
    run_seed: int = 0,
) -> list[float]:
    """θ after every outer step of Adam on one estimator's meta-gradients; the learning rate falls by a half cosine."""
    kind, settings = ESTIMATORS[label]
    estimator = estimators.get(kind, **settings)
    work = workload(truncation, run_seed)
    theta = {"theta": torch.tensor(START, dtype=torch.float64)}
    optimizer = torch.optim.Adam(theta.values(), lr=lr)
    state = estimator.init(work, theta, range(num_particles))
    path = [START]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_outer_steps)
    for _ in range(num_outer_steps):
        theta["theta"].grad = estimator.estimate(work, theta, state).grads["theta"]
        optimizer.step()
        schedule.step()
        path.append(float(theta["theta"]))
    return path


def picture(paths: dict[str, list[float]], path: str | Path) -> None:
    """θ over the outer steps, one line an estimator, beside the optimum."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for label, values in paths.items():
        axes.plot(values, label=f"{label}, truncation 1")
    axes.axhline(optimum(), color="black", linestyle="--", linewidth=1, label="optimum")
    axes.set(xlabel="outer steps", ylabel="θ", title="Influence balancing: 23 states, 10 positive influences")
    low, high = optimum(), START
    axes.set_ylim(low - 0.5, high + 1.0)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("influence_balancing.png"), help="picture to write")
    parser.add_argument("--outer-steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    paths = {
        label: descend(label, num_outer_steps=arguments.outer_steps, run_seed=arguments.seed) for label in ESTIMATORS
    }
    picture(paths, arguments.out)
    print(
        json.dumps(
            {"optimum": optimum(), "start": START, **{label: values[-1] for label, values in paths.items()}}, indent=2
        )
    )


if __name__ == "__main__":
    main()
