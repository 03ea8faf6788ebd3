"""Tuning, against brute force by closed forms."""

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from evaluation_families import Parabola, gradient_descent

from learned_opt.batched import BatchedFamily
from learned_opt.evaluation import BASELINES, DEFAULT_BASELINES, Baseline, find, half_decades, tune
from learned_opt.evaluation.metrics import final_losses
from learned_opt.task import draw_task, task_seed

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


def test_other_draws_of_the_reported_data_are_tuned_on_where_a_split_is_named():
    family = Parabola(curvature=3.0)
    batched = BatchedFamily(family, dtype=torch.float64)
    got = tune(SGD, batched, seed=1, num_tasks=6, horizon=20, split="meta_test")
    curves = [gradient_descent(family, "meta_test", 1, 6, rate, 20).numpy() for rate in got.rates]
    np.testing.assert_allclose(got.scores, [final_losses(curve).mean() for curve in curves], rtol=1e-8)
    assert got.scores != tuned(family).scores


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


def test_schedule_free_is_evaluated_at_its_average():
    schedulefree = pytest.importorskip("schedulefree")
    family, rate = Parabola(), 0.05
    options = dict(split="meta_test", seeds=(0,), num_tasks=2, horizon=9)
    batched = BatchedFamily(family, dtype=torch.float64)
    got = BASELINES["schedule_free_adamw"].run(batched, (rate,), **options)
    for index in range(2):
        task, params = draw_task(family, "meta_test", task_seed("meta_test", 0, index, 0))
        leaf = params["theta"].clone().requires_grad_()
        optimizer = schedulefree.AdamWScheduleFree([leaf], lr=rate)
        optimizer.train()
        for _ in range(9):
            optimizer.zero_grad()
            family.loss({"theta": leaf}, task, {}).backward()
            optimizer.step()
        trained_at = float(family.loss({"theta": leaf.detach()}, task, {}))
        optimizer.eval()
        distance = abs(float(leaf.detach() - task["c"]))
        assert float(got.losses[-1, 0, index]) == pytest.approx(trained_at, rel=1e-9)
        assert float(got.metrics["distance"][0, index]) == pytest.approx(distance, rel=1e-9)
        assert distance != pytest.approx((2 * trained_at / float(task["a"])) ** 0.5, rel=1e-3)


def test_the_untuned_take_their_own_defaults():
    prodigyopt, schedulefree = pytest.importorskip("prodigyopt"), pytest.importorskip("schedulefree")
    param = torch.zeros(2, requires_grad=True)
    for name, plain in (
        ("adam_default", torch.optim.Adam([param])),
        ("prodigy", prodigyopt.Prodigy([param])),
        ("schedule_free_adamw", schedulefree.AdamWScheduleFree([param])),
    ):
        baseline = BASELINES[name]
        ours = baseline.make([{"params": [param], "lr": baseline.rates[0]}])
        ignored = {"params", "train_mode"}
        assert not baseline.tuned
        assert {k: v for k, v in ours.param_groups[0].items() if k not in ignored} == {
            k: v for k, v in plain.param_groups[0].items() if k not in ignored
        }


OWN = """
import torch
from learned_opt.evaluation import Baseline

class Own(torch.optim.SGD):
    pass

OWN = Baseline(name="own", make=Own, rates=(0.1, 1.0))
number = 3
"""


def test_an_optimizer_of_one_s_own_is_found(tmp_path, monkeypatch):
    (tmp_path / "own_baseline_module.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = find("own_baseline_module:OWN")
    assert (found.name, found.rates) == ("own", (0.1, 1.0))
    tuned_too = find("own_baseline_module:Own")
    assert (tuned_too.name, tuned_too.rates, tuned_too.elementwise) == ("Own", half_decades(-4, 1), False)
    assert find("torch.optim:NAdam").make is torch.optim.NAdam
    assert find("adam") is BASELINES["adam"]
    for name, message in (
        (
            "own_baseline_module:number",
            "must be a learned_opt.evaluation.Baseline or the class of an optimizer; got int",
        ),
        ("own_baseline_module:nothing", "the baseline 'own_baseline_module:nothing' cannot be imported: .*nothing"),
        ("no_such_module:x", "the baseline 'no_such_module:x' cannot be imported: No module named 'no_such_module'"),
        ("adm", "unknown baseline 'adm'; did you mean adam"),
        ("zzz", "unknown baseline 'zzz'; choose from .*nesterov"),
    ):
        with pytest.raises(ValueError, match=message):
            find(name)


def test_a_baseline_whose_package_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(BASELINES, "adam", dataclasses.replace(BASELINES["adam"], needs="no_such_package"))
    assert not BASELINES["adam"].installed
    with pytest.raises(ModuleNotFoundError, match=r"needs no_such_package: pip install 'learned-opt\[baselines\]'"):
        find("adam")
