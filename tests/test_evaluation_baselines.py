"""Tuning, against brute force by closed forms."""

import math

import numpy as np
import pytest
import torch
from evaluation_families import Parabola, gradient_descent

from learned_opt.batched import BatchedFamily
from learned_opt.evaluation import BASELINES, DEFAULT_BASELINES, Baseline, half_decades, tune
from learned_opt.evaluation.metrics import final_losses

SGD = BASELINES["sgd"]


def tuned(family, baseline=SGD, horizon=20, num_tasks=6):
    batched = BatchedFamily(family, dtype=torch.float64)
    return tune(baseline, batched, seed=1, num_tasks=num_tasks, horizon=horizon)


def brute_force(family, rates, horizon=20, num_tasks=6):
    curves = [gradient_descent(family, "meta_validation", 1, num_tasks, rate, horizon).numpy() for rate in rates]
    return [final_losses(curve).mean() for curve in curves]


def test_the_grid_has_two_rates_a_decade():
    assert half_decades(-4, 1) == pytest.approx(
        [1e-4, 3.16228e-4, 1e-3, 3.16228e-3, 0.01, 0.0316228, 0.1, 0.316228, 1, 3.16228, 10]
    )
    assert all(BASELINES[name].rates == half_decades(-4, 1) for name in DEFAULT_BASELINES)


@pytest.mark.parametrize("curvature", [0.3, 1.0, 40.0])
def test_the_best_rate_is_that_of_brute_force(curvature):
    family = Parabola(curvature=curvature)
    got = tuned(family)
    scores = brute_force(family, got.rates)
    assert got.rates == SGD.rates
    assert got.rate == got.rates[int(np.argmin(scores))]
    np.testing.assert_allclose(got.scores, scores, rtol=1e-8)
    assert (got.edge, got.note, got.num_tasks) == ("", "", 6)


@pytest.mark.parametrize(("curvature", "steps"), [(3e-2, 2), (3e4, -2)])
def test_a_best_rate_at_the_edge_extends_the_grid(curvature, steps):
    family = Parabola(curvature=curvature)
    got = tuned(family)
    assert len(got.rates) == len(SGD.rates) + abs(steps)
    assert got.rate is not None and ((got.rate > 10) if steps > 0 else (got.rate < 1e-4))
    np.testing.assert_allclose(np.diff(np.log10(got.rates)), 0.5, rtol=1e-9)
    assert got.rate == got.rates[int(np.nanargmin(brute_force(family, got.rates)))]
    assert got.edge == "" and got.note == ""


def test_a_best_rate_that_stays_at_the_edge_is_told():
    got = tuned(Parabola(curvature=1e-9))
    assert got.edge == "highest" and got.rate == pytest.approx(1e4)
    assert got.note == "the best rate, 1e+04, is the highest tried: a better one may lie beyond"


def test_a_baseline_that_diverges_at_every_rate_has_none():
    got = tuned(Parabola(curvature=1e40))
    assert got.rate is None and got.edge == ""
    assert set(got.scores) == {math.inf} and set(got.num_diverged) == {6}
    # Lower rates were tried before giving up.
    assert got.note == "every meta-validation task diverged at every rate from 1e-07 to 10"


def test_where_some_task_always_diverges_the_fewest_and_then_the_best_of_the_rest_win():
    family = Parabola(steep=1e40, every=3)
    got = tuned(family)
    count = min(got.num_diverged)
    assert 0 < count < 6 and set(got.scores) == {math.inf}
    finals = [final_losses(gradient_descent(family, "meta_validation", 1, 6, rate, 20).numpy()) for rate in got.rates]
    rest = [f[np.isfinite(f)].mean() if np.isfinite(f).sum() == 6 - count else math.inf for f in finals]
    assert got.rate == got.rates[int(np.argmin(rest))]
    assert got.note == f"{count} of 6 meta-validation tasks diverged even at the best rate"


def test_a_single_rate_is_not_tuned():
    got = tuned(Parabola(), BASELINES["adam_default"])
    assert (got.rate, got.rates, got.scores, got.num_tasks, got.note) == (1e-3, (1e-3,), (), 0, "")


def test_of_equal_rates_the_lowest_wins():
    class Still(torch.optim.SGD):
        def step(self, closure=None):
            return None

    got = tuned(Parabola(), Baseline(name="still", make=Still, rates=(0.1, 1.0)))
    assert got.rate == min(got.rates) and got.edge == "lowest"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "name must not be empty"),
        ({"rates": ()}, "rates must hold at least one learning rate; got none"),
        ({"rates": (0.1, 0.1)}, r"rates must be ascending; got \(0.1, 0.1\)"),
        ({"rates": (0.0, 1.0)}, "rates must be positive and finite; got 0.0"),
    ],
)
def test_bad_baselines(change, message):
    with pytest.raises(ValueError, match=message):
        Baseline(**{"name": "x", "make": torch.optim.SGD, **change})
