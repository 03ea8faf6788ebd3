"""The inverse-variance mix: its weights by hand, and its meta-gradient against its two halves run alone."""

import math

import pytest
import torch
from estimator_reference import NoisyBowl, theta_of, workload

from learned_opt import estimators, rules
from learned_opt.estimators.antithetic import flatten


def halves(work, theta, num_groups, size, num_outer_steps, sigma):
    """Meta-gradients of every group of both estimators run alone: [outer steps, 2, groups, num_theta]."""
    out = []
    for half, (name, settings) in enumerate([("backprop", {"order": 2}), ("es", {"sigma": sigma})]):
        rows = []
        for group in range(num_groups):
            estimator = estimators.get(name, **settings)
            first = (half * num_groups + group) * size
            state = estimator.init(work, theta, range(first, first + size))
            rows.append([flatten(estimator.estimate(work, theta, state).grads) for _ in range(num_outer_steps)])
        out.append(torch.stack([torch.stack(r) for r in rows]))
    return torch.stack(out).permute(2, 0, 1, 3)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_weights_each_coordinate_by_inverse_variance(decay):
    rule = rules.get("adam", lr=0.1)
    theta = theta_of(rule)
    work = workload(rule, NoisyBowl(), truncation=4, horizon=6)
    mix = estimators.get(
        "mix", num_groups=3, decay=decay, backprop_settings={"order": 2}, evolution_settings={"sigma": 0.1}
    )
    state = mix.init(work, theta, range(24))
    groups = halves(work, theta, 3, 4, 4, 0.1)
    average = torch.zeros(2, 3, dtype=torch.float64)
    weights = []
    for step in range(4):
        got = mix.estimate(work, theta, state)
        mean = groups[step].mean(1)
        variance = (groups[step] - mean[:, None]).square().sum(1) / (3 - 1) / 3
        average = decay * average + (1 - decay) * variance
        inverse = 1 / average
        want = (mean * inverse).sum(0) / inverse.sum(0)
        torch.testing.assert_close(flatten(got.grads), want, rtol=1e-8, atol=1e-12)
        assert got.metrics["es_weight"] == pytest.approx(float((inverse[1] / inverse.sum(0)).mean()))
        weights.append(got.metrics["es_weight"])
    assert all(0 < w < 0.5 for w in weights)  # smooth and short: backpropagation varies less


def test_an_overflowing_half_has_no_weight():
    rule = rules.get("sgd", lr=0.1)
    theta = theta_of(rule)
    work = workload(rule, NoisyBowl(), truncation=4, horizon=6)
    mix = estimators.get("mix", backprop_settings={"order": 2}, evolution_settings={"sigma": 0.1})
    state = mix.init(work, theta, range(8))
    mix.estimate(work, theta, state)
    kept = state.variances.clone()
    backprop, es = (estimator.inner for estimator in mix.estimators)

    class Exploding(type(backprop)):
        def estimate(self, work, theta, state):
            out = super().estimate(work, theta, state)
            out.grads["log_lr"].fill_(math.inf)
            return out

    mix.estimators = (Exploding(order=2), es)
    got = mix.estimate(work, theta, state)
    assert got.metrics["es_weight"] == 1.0 and math.isfinite(got.grads["log_lr"])
    assert torch.equal(state.variances[0], kept[0]) and not torch.equal(state.variances[1], kept[1])


def test_errors_name_the_argument_and_the_remedy():
    with pytest.raises(ValueError, match="num_groups must be at least 2, since their spread gives the variance; got 1"):
        estimators.get("mix", num_groups=1)
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\); got 1"):
        estimators.get("mix", decay=1)
    with pytest.raises(ValueError, match="evolution must be an evolution strategy, es, pes or nres; got 'backprop'"):
        estimators.get("mix", evolution="backprop")
    with pytest.raises(ValueError, match="unknown estimator 'ess'; did you mean"):
        estimators.get("mix", evolution="ess")
    with pytest.raises(ValueError, match="sigma must be positive; got 0"):
        estimators.get("mix", evolution_settings={"sigma": 0})
    work = workload(rules.get("sgd"), NoisyBowl(), truncation=2, horizon=4)
    with pytest.raises(
        ValueError, match=r"num_particles must be a multiple of 8: mix runs .*num_groups=2.*; got 6; use 8"
    ):
        estimators.get("mix").init(work, theta_of(work.rule), range(6))
