"""Numbers read off curves that were made by hand, and intervals that cover what they should."""

import math

import numpy as np
import pytest

from learned_opt.evaluation import metrics
from learned_opt.evaluation.metrics import bootstrap

INF = math.inf


def ramp(horizon, num_tasks=1):
    """Losses horizon, horizon − 1, …, 0, plus the task's number."""
    return np.arange(horizon, -1, -1.0)[:, None] + np.arange(num_tasks)


@pytest.mark.parametrize(("horizon", "window"), [(1, 1), (10, 1), (29, 1), (31, 2), (100, 5), (1000, 50)])
def test_final_loss_is_the_mean_over_the_last_twentieth(horizon, window):
    assert metrics.final_window(horizon) == window
    want = np.mean(np.arange(window)) + np.arange(3)
    np.testing.assert_allclose(metrics.final_losses(ramp(horizon, 3)), want)


def test_thrown_back_is_above_the_start_after_a_tenth_of_it():
    curves = {
        "falls": ([10.0, 2.0, 0.5, 0.4], False),
        "rises at once": ([10.0, 11.0, 0.5, 0.4], False),
        "leaps and returns": ([10.0, 0.9, 10.5, 0.4], True),
        "leaps to the start, not above": ([10.0, 0.9, 10.0, 0.4], False),
        "leaps from a tenth": ([10.0, 1.0, 20.0, 0.4], False),
        "diverges": ([10.0, 0.9, 0.8, math.nan], True),
        "begins below zero": ([-10.0, -12.0, -9.0, -30.0], False),
    }
    losses = np.array([values for values, _ in curves.values()]).T
    assert metrics.thrown_back(losses).tolist() == [wanted for _, wanted in curves.values()]


def test_mean_loss_leaves_the_initial_loss_out():
    losses = np.array([[1000.0, 2000.0], [1.0, 4.0], [2.0, 6.0]])
    np.testing.assert_array_equal(metrics.mean_losses(losses), [1.5, 5.0])


def test_one_loss_that_is_not_finite_is_a_divergence():
    losses = ramp(40, 4)
    losses[7, 1] = np.nan
    losses[-1, 2] = INF
    losses[:, 3] = 50 + np.arange(41)
    assert metrics.diverged(losses).tolist() == [False, True, True, False]
    assert metrics.ended_above_start(losses).tolist() == [False, False, True, True]
    assert metrics.mean_losses(losses)[1:3].tolist() == [INF, INF]
    # Task 1 recovered, so its final loss is a number; task 2 ended in infinity.
    np.testing.assert_allclose(metrics.final_losses(losses)[:3], [0.5, 1.5, INF])


def test_running_means_equal_a_plain_loop():
    losses = np.random.default_rng(0).normal(size=(101, 3))
    losses[30, 1] = np.nan
    losses[98, 2] = -INF
    got = metrics.running_means(losses)
    assert len(got) == 101
    for task in range(3):
        for step in range(101):
            seen = losses[max(0, step - 4) : step + 1, task]
            want = seen.mean() if np.isfinite(seen).all() else INF
            assert got[step, task] == pytest.approx(want, rel=1e-12, abs=1e-12)


def test_steps_to_reach():
    losses = ramp(100, 2)
    # The mean of five consecutive losses 100 − t … 104 − t is 102 − t.
    assert metrics.steps_to_reach(losses, 50.0).tolist() == [52, 53]
    assert metrics.steps_to_reach(losses, [101.0, 2.0]).tolist() == [0, INF]
    # The first steps average what there is: 100, then 99.5.
    assert metrics.steps_to_reach(losses, [99.5, 101.0]).tolist() == [1, 0]
    assert metrics.steps_to_reach(losses, [INF, np.nan]).tolist() == [INF, INF]


def test_every_curve_reaches_its_own_final_loss():
    losses = np.exp(np.random.default_rng(1).normal(size=(201, 500)) * 3 - np.linspace(0, 20, 201)[:, None])
    steps = metrics.steps_to_reach(losses, metrics.final_losses(losses))
    assert (steps <= 200).all()


def test_ratios():
    a, b = np.array([1.0, 2.0, 9.0]), np.array([2.0, 2.0, 2.0])
    assert metrics.ratio_of_means(a, b) == 2.0
    assert metrics.median_ratio(a, b) == 1.0
    assert metrics.ratio_of_means(np.array([INF, 1.0]), b[:2]) == INF
    assert math.isnan(metrics.ratio_of_means(a, np.array([INF, 1.0, 1.0])))
    assert math.isnan(metrics.ratio_of_means(a, -b))


def test_paired_resampling_knows_a_constant_ratio_exactly():
    sample = np.random.default_rng(0).lognormal(size=30)
    got = bootstrap(metrics.ratio_of_means, sample / 2, sample)
    assert (got.value, got.low, got.high) == pytest.approx((0.5, 0.5, 0.5), rel=1e-12)


def test_bootstrap_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(3)
    a, b = random.lognormal(size=40), random.lognormal(size=40)
    for statistic, samples in ((metrics.mean, (a,)), (metrics.ratio_of_means, (a, b)), (metrics.median_ratio, (a, b))):
        got = bootstrap(statistic, *samples, num_resamples=20_000, confidence=0.9)
        want = stats.bootstrap(
            samples,
            lambda *s, axis, f=statistic: f(*s),
            paired=True,
            vectorized=True,
            axis=-1,
            n_resamples=20_000,
            confidence_level=0.9,
            method="percentile",
            rng=np.random.default_rng(11),
        ).confidence_interval
        assert (got.low, got.high) == pytest.approx((want.low, want.high), rel=0.02)


def test_bootstrap_covers_a_known_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    samples = random.normal(2.0, 1.0, size=(400, 60))
    covered = 0
    for i, sample in enumerate(samples):
        got = bootstrap(metrics.mean, sample, num_resamples=500, confidence=0.9, seed=i)
        covered += got.low <= 2.0 <= got.high
    # A binomial (400, 0.9) has standard deviation 6; the percentile interval is known to be a little short at n = 60.
    assert 360 - 24 <= covered <= 360 + 18


def test_bootstrap_allows_infinities():
    sample = np.array([1.0] * 30 + [INF])
    got = bootstrap(metrics.mean, sample)
    assert got.value == INF and got.high == INF
    assert got.low == 1.0
    never = bootstrap(metrics.median, np.full(9, INF))
    assert (never.value, never.low, never.high) == (INF, INF, INF)


def test_bootstrap_is_seeded_and_memory_is_cut_in_rounds(monkeypatch):
    sample = np.random.default_rng(0).normal(size=50)
    first = bootstrap(metrics.mean, sample, seed=1)
    assert bootstrap(metrics.mean, sample, seed=1) == first != bootstrap(metrics.mean, sample, seed=2)
    monkeypatch.setattr(metrics, "_NUMBERS_PER_RESAMPLING", 170)
    assert bootstrap(metrics.mean, sample, seed=1) == first


@pytest.mark.parametrize("num_tasks", [1, 5, 6, 16, 64, 1500])
def test_median_band_has_the_binomial_ranks(num_tasks):
    binom = pytest.importorskip("scipy.stats").binom
    losses = np.random.default_rng(0).permuted(np.tile(np.arange(1.0, num_tasks + 1), (2, 1)), axis=1)
    middle, low, high = metrics.median_band(losses)
    # The largest r with P(B < r) ≤ 2.5 %; the smallest and the largest of all where there is none.
    rank = max([r for r in range(1, num_tasks + 1) if binom.cdf(r - 1, num_tasks, 0.5) <= 0.025], default=1)
    assert middle.tolist() == [(num_tasks + 1) / 2] * 2
    assert low.tolist() == [rank] * 2 and high.tolist() == [num_tasks + 1 - rank] * 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.final_losses([1.0, 2.0]), r"losses must be \[horizon \+ 1, num_tasks\].*got shape \(2,\)"),
        (lambda: metrics.mean_losses(np.ones((1, 3))), r"at least one step and task; got shape \(1, 3\)"),
        (
            lambda: bootstrap(metrics.mean, []),
            r"samples must be non-empty vectors of one length; got shapes \[\(0,\)\]",
        ),
        (lambda: bootstrap(metrics.ratio_of_means, [1.0], [1.0, 2.0]), r"of one length; got shapes \[\(1,\), \(2,\)\]"),
        (lambda: bootstrap(metrics.mean, [1.0], num_resamples=0), "num_resamples must be at least 1; got 0"),
        (
            lambda: bootstrap(metrics.mean, [1.0], confidence=1.0),
            "confidence must lie strictly between 0 and 1; got 1.0",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
