"""The influence balancing problem: truncated estimators go the wrong way, persistent ones find the optimum."""

import math

import pytest
import torch

from benchmarks.influence_balancing import (
    ESTIMATORS,
    HORIZON,
    NUM_STATES,
    START,
    descend,
    optimum,
    picture,
    system,
    workload,
)
from learned_opt import estimators


def exact_slope(theta: float) -> float:
    """d/dθ of the mean loss over the horizon: x₁ is linear in θ, and its slope comes from the impulse response."""
    a, b = system(torch.float64)
    slope, power, total = torch.tensor(0.0, dtype=torch.float64), torch.eye(NUM_STATES, dtype=torch.float64), 0.0
    for _ in range(HORIZON):
        slope, power = slope + (power @ b)[0], power @ a
        total += float((theta * slope - 1) * slope)
    return total / HORIZON


def test_optimum_is_where_the_slope_vanishes():
    assert exact_slope(optimum()) == pytest.approx(0, abs=1e-9)
    assert optimum() < START and exact_slope(START) > 0


def episode_mean(label: str, truncation: int, num_particles: int, num_episodes: int, run_seed: int = 0) -> torch.Tensor:
    """Meta-gradients at θ = START averaged over each episode, [episodes]."""
    import dataclasses

    kind, settings = ESTIMATORS[label]
    work = workload(truncation, run_seed)
    horizons = dataclasses.replace(work.plan.horizons, random_offsets=False)
    work = dataclasses.replace(work, plan=dataclasses.replace(work.plan, horizons=horizons))
    estimator = estimators.get(kind, **settings)
    theta = {"theta": torch.tensor(START, dtype=torch.float64)}
    state = estimator.init(work, theta, range(num_particles))
    num = HORIZON // truncation
    grads = [float(estimator.estimate(work, theta, state).grads["theta"]) for _ in range(num * num_episodes)]
    return torch.tensor(grads, dtype=torch.float64).view(num_episodes, num).mean(1)


def test_truncation_one_turns_the_sign():
    assert float(episode_mean("backpropagation", HORIZON, 2, 1)) == pytest.approx(exact_slope(START), rel=1e-9)
    (truncated,) = episode_mean("backpropagation", 1, 2, 1).tolist()
    assert truncated < 0 < exact_slope(START)
    assert (episode_mean("ES", 1, 20, 3) < 0).all()


@pytest.mark.parametrize("label", ["PES", "NRES"])
def test_truncation_one_is_unbiased(label):
    samples = episode_mean(label, 1, 120, 8)
    error = float(samples.std() / math.sqrt(len(samples)))
    assert abs(float(samples.mean()) - exact_slope(START)) < 4 * error
    assert float(samples.mean()) > 4 * error


@pytest.mark.parametrize("label", list(ESTIMATORS))
def test_descent_with_truncation_one(label):
    final = descend(label, num_outer_steps=500)[-1]
    if label in ("PES", "NRES"):
        assert final == pytest.approx(optimum(), abs=0.06)
    else:
        assert final > START + 0.03


def test_picture_is_written(tmp_path):
    picture({"PES": descend("PES", num_outer_steps=3, num_particles=2)}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
