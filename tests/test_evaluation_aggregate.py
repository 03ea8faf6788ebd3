"""Numbers over a whole suite: against SciPy, against the definition, and on a comparison with gaps."""

import dataclasses

import numpy as np
import pytest
import torch
from evaluation_families import Parabola

from learned_opt import rules
from learned_opt.evaluation import BASELINES, Baseline, EvaluationConfig, Learned, compare, totals
from learned_opt.evaluation.aggregate import (
    interquartile_mean,
    performance_profile,
    speedup_strata,
    stratified_bootstrap,
    totals_table,
    wall_factor,
)
from learned_opt.evaluation.results import Cost

CONFIG = EvaluationConfig(horizon=20, num_tasks=4, seeds=(0, 1), num_validation_tasks=3, num_resamples=200)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 17, 100])
def test_interquartile_mean_is_scipy_s_trimmed_mean(size):
    stats = pytest.importorskip("scipy.stats")
    sample = np.random.default_rng(size).lognormal(size=(3, size))
    np.testing.assert_allclose(interquartile_mean(sample), stats.trim_mean(sample, 0.25, axis=-1))


def test_infinities_in_the_outer_quarters_do_not_matter():
    assert interquartile_mean([np.inf, 1.0, 2.0, 3.0, 4.0, 0.0, -np.inf, 2.0]) == 2.0
    assert interquartile_mean([np.inf, np.inf, 1.0, 2.0]) == np.inf


def test_strata_are_resampled_within_themselves():
    # Resampling families would move this; resampling tasks within them cannot.
    got = stratified_bootstrap([np.full(10, 1.0), np.full(10, 3.0)])
    assert (got.value, got.low, got.high) == (2.0, 2.0, 2.0)


def test_the_interval_is_that_of_a_plain_loop():
    random = np.random.default_rng(0)
    strata = [random.lognormal(mean, size=12) for mean in (0.0, 1.0, 3.0)]
    got = stratified_bootstrap(strata, num_resamples=4000, confidence=0.9)
    stats = pytest.importorskip("scipy.stats")
    draws = []
    for _ in range(4000):
        draws.append(stats.trim_mean(np.concatenate([random.choice(s, len(s)) for s in strata]), 0.25))
    assert (got.low, got.high) == pytest.approx(np.quantile(draws, [0.05, 0.95]), rel=0.04)
    assert got.value == pytest.approx(stats.trim_mean(np.concatenate(strata), 0.25))
    assert stratified_bootstrap(strata, seed=1) == stratified_bootstrap(strata, seed=1)


def test_the_numbers_of_rliable():
    # What rliable 1.2.0 gives for this table of 12 runs × 7 tasks: aggregate_iqm with its stratified bootstrap of
    # 20,000 resamples, and the profile with one of 5,000.
    scores = np.exp(np.random.default_rng(0).normal(size=(12, 7)) + np.arange(7) * 0.3)
    got = stratified_bootstrap(list(scores.T), num_resamples=20_000)
    assert got.value == pytest.approx(2.55740715, rel=1e-8)
    assert (got.low, got.high) == pytest.approx((2.08697911, 3.25017296), rel=0.01)
    found = performance_profile(list(scores.T), [0.5, 1, 2, 4], num_resamples=5000)
    assert found.share == pytest.approx([0.97619048, 0.8452381, 0.55952381, 0.28571429])
    assert found.low == pytest.approx([0.94047619, 0.77380952, 0.46428571, 0.20238095], abs=1.5 / 84)
    assert found.high == pytest.approx([1.0, 0.91666667, 0.6547619, 0.36904762], abs=1.5 / 84)


def test_performance_profile_counts():
    found = performance_profile([[0.5, 1.0], [2.0, 4.0]], [0.1, 1.0, 1.5, 4.0, 9.0])
    assert found.share == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert all(low <= share <= high for low, share, high in zip(found.low, found.share, found.high))
    # Between 1.5 and 2 lies nothing and each family is wholly on one side: no doubt about the half.
    assert (found.low[2], found.high[2]) == (0.5, 0.5)
    assert performance_profile([[1.0, 3.0]], [1.0, 2.0, 3.0], at_least=False).share == (0.5, 0.5, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stratified_bootstrap([]), r"strata must be non-empty vectors, at least one; got shapes \[\]"),
        (lambda: stratified_bootstrap([[1.0], []]), r"got shapes \[\(1,\), \(0,\)\]"),
        (lambda: stratified_bootstrap([[1.0]], num_resamples=0), "num_resamples must be at least 1; got 0"),
        (
            lambda: stratified_bootstrap([[1.0]], confidence=0.0),
            "confidence must lie strictly between 0 and 1; got 0.0",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Broken(torch.optim.SGD):
    """Raises at its third step on the steep family."""

    def step(self, closure=None):
        if self.param_groups[0]["params"][0].grad.abs().max() > 30:
            raise RuntimeError("this optimizer is broken\nand says so at length")
        return super().step(closure)


@pytest.fixture(scope="module")
def comparison():
    rule = rules.get("adam", lr=0.1)
    candidates = [
        Learned(name="learned", rule=rule, theta=rule.init_theta(torch.Generator())),
        BASELINES["adam"],
        BASELINES["sgd"],
        Baseline(name="broken", make=Broken, rates=(0.01,)),
    ]
    families = {"easy": Parabola(), "steep": Parabola(curvature=40.0), "impossible": Parabola(curvature=1e40)}
    return compare(candidates, families, CONFIG, dtype=torch.float64)


def test_an_optimizer_that_raises_has_an_entry_and_the_comparison_goes_on(comparison):
    assert len(comparison.results) == comparison.num_expected
    broken = comparison.result("steep", "broken")
    assert broken.scores is None and broken.note == "could not run: RuntimeError: this optimizer is broken"
    assert comparison.result("easy", "broken").scores is not None
    assert "steep, broken: could not run: RuntimeError: this optimizer is broken" in comparison.table()
    row = next(row for row in comparison.rows() if row[:2] == ["steep", "broken"])
    assert set(row[2:]) == {"-"}, "a row of an optimizer that could not run claims nothing"


def test_totals_are_over_all_families_and_missing_ones_are_the_worst(comparison):
    found = {total.optimizer: total for total in totals(comparison, num_resamples=200)}
    learned = comparison.result("easy", "learned").scores
    everything = np.concatenate(list(speedup_strata(comparison, "learned").values()))
    assert len(everything) == found["learned"].num_tasks == 24
    np.testing.assert_array_equal(everything[:8], learned.task_speedups)
    assert found["learned"].speedup.value == pytest.approx(interquartile_mean(everything))
    assert (found["adam"].speedup.value, found["adam"].worst_speedup) == (1, 1)
    assert found["adam"].final_ratio.value == pytest.approx(1)
    assert found["broken"].missing == ("steep", "impossible")
    np.testing.assert_array_equal(speedup_strata(comparison, "broken")["steep"], np.full(8, 1 / 20))
    assert found["broken"].final_ratio.value == np.inf and found["broken"].num_diverged == 16
    assert found["sgd"].missing == ("impossible",) and found["sgd"].worst_family == "impossible"
    assert found["sgd"].worst_speedup == pytest.approx(1 / 20)
    reached = [comparison.result(f, "sgd").scores.share_reached for f in ("easy", "steep")]
    assert found["sgd"].share_reached == pytest.approx(sum(reached) / 3)
    lines = totals_table(list(found.values()), "adam").splitlines()
    assert lines[0].split()[:3] == ["over", "all", "families"] and len(lines) == 6
    assert {line.split()[0] for line in lines[1:5]} == set(found)


def test_time_multiplies_the_speed_up_by_the_ratio_of_costs(comparison):
    costs = {"adam": Cost(gradient=3.0, step=1.0), "learned": Cost(gradient=3.0, step=5.0)}
    results = [dataclasses.replace(r, cost=costs.get(r.optimizer)) for r in comparison.results]
    timed = dataclasses.replace(comparison, results=tuple(results))
    mine, reference = timed.result("easy", "learned"), timed.result("easy", "adam")
    assert wall_factor(mine.cost, reference.cost) == 0.5
    assert wall_factor(timed.result("easy", "sgd").cost, reference.cost) is None
    found = {total.optimizer: total for total in totals(timed)}
    assert found["learned"].wall_speedup.value == pytest.approx(found["learned"].speedup.value / 2)
    assert found["sgd"].wall_speedup is None
    assert "in time" in totals_table(list(found.values()), "adam")


def test_no_reference_no_totals():
    rule = rules.get("sgd")
    learned = Learned(name="learned", rule=rule, theta=rule.init_theta(torch.Generator()))
    comparison = compare([learned], {"easy": Parabola()}, CONFIG)
    assert totals(comparison) == [] and totals_table([], "") == ""


def test_losses_that_are_not_positive_are_left_out_of_the_ratios(comparison):
    def below(result):
        moved = tuple(v - 10 for v in result.scores.task_final_losses)
        return dataclasses.replace(result, scores=dataclasses.replace(result.scores, task_final_losses=moved))

    results = [below(r) if r.family == "easy" else r for r in comparison.results if r.optimizer in ("adam", "learned")]
    moved = dataclasses.replace(comparison, results=tuple(results))
    ratios = {t.optimizer: t.final_ratio.value for t in totals(moved)}
    kept = [
        comparison.result(f, n).scores.task_final_losses for n in ("learned", "adam") for f in ("steep", "impossible")
    ]
    want = interquartile_mean(np.divide(np.concatenate(kept[:2]), np.concatenate(kept[2:])))
    assert ratios["learned"] == pytest.approx(float(want))
