"""What a rule has learned: closed forms on rules that are known, and every rule there is."""

import json

import numpy as np
import pytest
import torch
from evaluation_families import Parabola, Regression

from learned_opt import rules
from learned_opt.evaluation import explain as explaining
from learned_opt.evaluation.explain import (
    explain,
    responses,
    scale_response,
    signals,
    synthetic_gradients,
    trace,
    update_map,
)
from learned_opt.evaluation.memory import FEATURES, memory, rank_correlations
from learned_opt.evaluation.replay import Replay, effective_rate, reference_updates, replay
from tasks.augment import DelayedGradients
from tasks.quadratic import Quadratic


def optimizer(name, **settings):
    rule = rules.get(name, **settings)
    return rule, rule.init_theta(torch.Generator().manual_seed(0))


ADAM = optimizer("adam", lr=0.01)
SGD = optimizer("sgd", lr=0.5)


def test_references_are_the_closed_forms():
    grads = np.array([[2.0, -3.0], [1.0, 0.5]])
    first, second = reference_updates("adam", grads)
    np.testing.assert_allclose(first, [-1, 1], rtol=1e-7)  # m̂/√v̂ of one gradient is its sign
    m = (0.1 * 0.9 * grads[0] + 0.1 * grads[1]) / (1 - 0.9**2)
    v = (0.001 * 0.999 * grads[0] ** 2 + 0.001 * grads[1] ** 2) / (1 - 0.999**2)
    np.testing.assert_allclose(second, -m / np.sqrt(v), rtol=1e-6)
    np.testing.assert_allclose(reference_updates("rmsprop", grads)[0], [-10, 10], rtol=1e-6)


def test_the_map_of_the_adam_rule_is_adam_s_own():
    found = update_map(*ADAM, num_momenta=5, num_gradients=7)
    np.testing.assert_allclose(found.updates["rule"], 0.01 * found.updates["adam"], rtol=1e-5, atol=1e-9)
    assert found.updates["rule"].shape == (5, 7) and found.momenta[0] == -1 and found.gradients[-1] == 4


def test_the_map_of_gradient_descent_knows_no_momentum():
    found = update_map(*SGD, num_momenta=3, num_gradients=5, scale=2.0)
    np.testing.assert_allclose(found.updates["rule"], np.tile(-0.5 * 2.0 * found.gradients, (3, 1)), rtol=1e-6)


def test_the_map_at_full_consistency_is_a_constant_gradient_and_then_another():
    found = update_map(*ADAM, num_momenta=3, num_gradients=3, widest=2.0)
    # At μ = 1 the history has no randomness left: sixty ones, then the newest gradient.
    constant = np.concatenate([np.ones((60, 3)), [[-2.0, 0.0, 2.0]]])
    np.testing.assert_allclose(found.updates["adam"][2], reference_updates("adam", constant)[-1], rtol=1e-6)
    # Histories come with their opposites, so at μ = 0 the map is odd.
    for updates in found.updates.values():
        np.testing.assert_allclose(updates[1], -updates[1][::-1], atol=1e-9)


@pytest.mark.parametrize("name", list(rules.RULES))
def test_copying_the_state_equals_running_every_history(name):
    rule, theta = optimizer(name)
    options = dict(num_momenta=3, num_gradients=3, num_histories=4, widest=2.0)
    found = update_map(rule, theta, **options)
    half = np.random.default_rng(0).choice([-1.0, 1.0], size=(60, 2))
    signs = np.concatenate([half, -half], axis=1)
    for i, mean in enumerate(found.momenta):
        for k, newest in enumerate(found.gradients):
            history = mean + np.sqrt(1 - mean**2) * signs
            updates = replay(rule, theta, np.concatenate([history, np.full((1, 4), newest)])).updates
            assert found.updates["rule"][i, k] == pytest.approx(updates[-1].mean(), rel=1e-6, abs=1e-12)


def test_responses_of_gradient_descent_are_the_signals():
    found = responses(*SGD, scale=3.0)
    assert list(found) == ["constant gradient", "sign flip", "spike, 30 times", "noise alone"]
    for name, response in found.items():
        np.testing.assert_array_equal(response.gradients, signals(3.0)[name])
        np.testing.assert_allclose(response.updates["rule"], -0.5 * response.gradients, rtol=1e-6)
    flip, spike, noise = (signals()[name] for name in list(found)[1:])
    assert (flip[:50] == 1).all() and (flip[50:] == -1).all()
    assert spike[50] == 30 and spike.sum() == 129
    assert np.sqrt((noise**2).mean()) == pytest.approx(1)


def test_responses_of_the_adam_rule_are_adam_s():
    for response in responses(*ADAM).values():
        np.testing.assert_allclose(response.updates["rule"], 0.01 * response.updates["adam"], rtol=1e-5, atol=1e-8)


def test_the_scale_response_is_flat_for_adam_and_straight_for_gradient_descent():
    scales, sizes = scale_response(*ADAM)
    np.testing.assert_allclose(sizes[scales > 1e-4], 0.01, rtol=2e-4)  # ε = 1e-8 matters below
    assert sizes[0] == pytest.approx(0.01 / 2, rel=1e-4)
    scales, sizes = scale_response(*SGD)
    np.testing.assert_allclose(sizes, 0.5 * scales, rtol=1e-6)


def test_the_effective_rate_of_adam_is_its_rate():
    grads = synthetic_gradients(40, 30)
    np.testing.assert_allclose(effective_rate(replay(*ADAM, grads).updates, grads), 0.01, rtol=1e-5)
    np.testing.assert_allclose(effective_rate(3 * reference_updates("adam", grads), grads), 3.0)
    assert np.isnan(effective_rate(np.zeros((1, 2)), np.zeros((1, 2)))).all()


@pytest.mark.parametrize("name", list(rules.RULES))
def test_a_recorded_run_replays_to_the_updates_that_were_made(name):
    rule, theta = optimizer(name)
    found = trace(rule, theta, Regression(), 12, num_tasks=3, num_coordinates=7)
    assert found.gradients.shape == (12, 7) and found.losses.shape == (13,)
    again = replay(rule, theta, found.gradients, found.context)
    np.testing.assert_allclose(again.updates, found.updates, rtol=1e-6, atol=1e-12)
    assert (found.context is None) == (rule.num_context == 0)


def test_a_recorded_run_has_the_gradients_of_the_closed_form():
    # One parameter, gradient a(θ − c): consecutive ones shrink by 1 − rate·a under gradient descent.
    found = trace(*SGD, Parabola(), 10, num_tasks=1)
    ratio = found.gradients[1:] / found.gradients[:-1]
    np.testing.assert_allclose(ratio, np.full_like(ratio, ratio[0, 0]), rtol=1e-9)
    assert 1 - 0.5 * 1.5 <= ratio[0, 0] <= 1 - 0.5 * 0.5
    np.testing.assert_allclose(found.updates, -0.5 * found.gradients, rtol=1e-6)


def test_a_recorded_run_has_the_gradients_that_the_rule_saw():
    delayed = trace(*SGD, DelayedGradients(family=Parabola(curvature=0.2), delay=3), 8, num_tasks=1)
    np.testing.assert_allclose(delayed.updates, -0.5 * delayed.gradients, rtol=1e-6)
    assert (delayed.gradients[:4] == delayed.gradients[0]).all() and (np.diff(delayed.gradients[3:, 0]) != 0).all()


def test_rank_correlations_are_spearman_s():
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    rows = np.stack([random.normal(size=50), random.integers(4, size=50).astype(float), np.ones(50)])
    columns = np.stack([rows[0] ** 3, -rows[1], random.normal(size=50)])
    got = rank_correlations(rows, columns)
    for i in range(2):
        for k in range(3):
            assert got[i, k] == pytest.approx(stats.spearmanr(rows[i], columns[k]).statistic)
    assert got[0, 0] == pytest.approx(1) and got[1, 1] == pytest.approx(-1) and np.isnan(got[2]).all()


def test_memory_that_is_known_is_recognized():
    grads = synthetic_gradients(60, 40)
    made_up = Replay(
        reference_updates("adam", grads),
        {
            "size": np.abs(grads) ** 0.3,
            "clock": np.broadcast_to(np.arange(60.0)[:, None] ** 2, grads.shape),
            "direction": -np.exp(reference_updates("adam", grads)),
        },
    )
    found = memory([grads], [made_up])
    best = dict(zip(found.cells, (FEATURES[k] for k in np.abs(found.correlations).argmax(1))))
    table = dict(zip(found.cells, found.correlations))
    assert table["size"][FEATURES.index("log |gradient|")] == pytest.approx(1)
    assert table["clock"][FEATURES.index("time")] == pytest.approx(1)
    # Adam's update is minus its momentum over the root: both features know this row entirely.
    assert table["direction"][FEATURES.index("momentum")] == pytest.approx(1)
    assert table["direction"][FEATURES.index("update")] == pytest.approx(-1)
    assert best["size"] == "log |gradient|" and best["clock"] == "time"


@pytest.mark.parametrize("name", list(rules.RULES))
def test_what_every_rule_remembers(name):
    rule, theta = optimizer(name)
    state = rule.init_state(1)
    found = replay(rule, theta, synthetic_gradients(5, 4)).memory
    assert all(rows.shape == (5, 4) for rows in found.values())
    if "cell" in state:
        assert len(found) == state["cell"].numel() and next(iter(found)) == "cell 0.0"
    else:
        assert len(found) == sum(value.numel() for key, value in state.items() if key != "step")
    assert name != "adam" or list(found) == ["m", "v"]


@pytest.mark.parametrize("name", list(rules.RULES))
def test_every_rule_is_explained_and_drawn(name):
    from learned_opt.evaluation.explain_plots import draw_all

    found = explain(*optimizer(name), {"quadratic": Quadratic(dim=3)}, horizon=12)
    assert list(found.effective_rates) == ["synthetic", "quadratic"]
    assert all(rates.shape == (12,) and (rates > 0).all() for rates in found.effective_rates.values())
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert len(plain["update_map"]["updates"]["rule"]) == 25
    figures = draw_all(found, "mine")
    assert len(figures) == 3 + 4 + 2 + bool(found.memory.cells)
    assert "Update of mine" in figures and "Response: sign flip" in figures
    panel = figures["Response: sign flip"].axes[0]
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["mine", "adam", "rmsprop"]
    # Each is drawn in units of its own step after many equal gradients, downhill.
    line = panel.get_lines()[0].get_ydata()
    steady = abs(found.responses["constant gradient"].updates["rule"][-1])
    np.testing.assert_allclose(line, -found.responses["sign flip"].updates["rule"] / steady)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: explain(*SGD, horizon=1), "horizon must be at least 2; got 1"),
        (lambda: update_map(*SGD, scale=0.0), "scale must be positive and finite; got 0.0"),
        (lambda: responses(*SGD, scale=float("inf")), "scale must be positive and finite; got inf"),
        (lambda: replay(*SGD, np.zeros(3)), r"gradients must be \[steps, n\] .*; got shape \(3,\)"),
        (
            lambda: effective_rate(np.zeros((2, 3)), np.zeros((2, 4))),
            r"updates and gradients must be of one shape; got \(2, 3\) and \(2, 4\)",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_synthetic_gradients_are_seeded():
    assert np.array_equal(synthetic_gradients(9, 5), synthetic_gradients(9, 5))
    assert not np.array_equal(synthetic_gradients(9, 5), synthetic_gradients(9, 5, seed=1))
    assert explaining.EVENT == 50
