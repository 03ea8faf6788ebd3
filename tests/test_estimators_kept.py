"""Backpropagation over steps that the unroll has kept, against the one that takes them again."""

import copy

import pytest
import torch
from estimator_reference import NoisyBowl, theta_of, workload

from learned_opt import estimators, rules
from learned_opt.estimators import backprop
from learned_opt.rules import lstm_tape
from tasks.quadratic import Quadratic


@pytest.fixture
def kept(monkeypatch):
    """What every unroll has kept, or None."""
    found, plain_unroll = [], backprop.unroll

    def unroll(*args, **options):
        segment = plain_unroll(*args, **options)
        found.append(segment.kept)
        return segment

    monkeypatch.setattr(backprop, "unroll", unroll)
    monkeypatch.setattr(lstm_tape._kept, "tapes", {})
    return found


def both_ways(work, num_truncations, **settings):
    """(Estimates with what was kept and without, the particles after each) over some truncations."""
    theta = theta_of(work.rule)
    ways = [estimators.get("backprop", **settings, chunk_size=size) for size in (None, 10**6)]
    states = [way.init(work, theta, range(3)) for way in ways]
    for _ in range(num_truncations):
        yield [way.estimate(work, theta, state) for way, state in zip(ways, states)], states


def check_alike(estimates, states):
    for name, value in estimates[1].grads.items():
        assert torch.isfinite(value).all()
        torch.testing.assert_close(estimates[0].grads[name], value, rtol=1e-9, atol=1e-12)
    assert estimates[0].meta_loss == pytest.approx(estimates[1].meta_loss, rel=1e-12)
    for name, value in states[1].rule_state.items():
        torch.testing.assert_close(states[0].rule_state[name], value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(states[0].params, states[1].params, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"order": 2}, {"recompute": True}], ids=str)
@pytest.mark.parametrize("rule_name", ["l2l", "rnnprop"])
@pytest.mark.parametrize(
    ("horizon", "want"),
    [(None, [True] * 3), (10, [True] * 3), (7, [True, False, False])],
    ids=["no restart", "restart at the end", "restart inside"],
)
def test_steps_are_kept_where_nothing_restarts_inside(kept, rule_name, horizon, want, settings):
    work = workload(rules.get(rule_name), NoisyBowl(), truncation=5, horizon=horizon, random_offsets=False)
    for estimates, states in both_ways(work, 3, **settings):
        check_alike(estimates, states)
        assert any(value.abs().max() > 0 for value in estimates[0].grads.values())
    if "recompute" not in settings:  # which unrolls several times
        assert [found is not None for found in kept[::2]] == want
        assert kept[1::2] == [None] * 3


@pytest.mark.parametrize("settings", [{}, {"order": 2}, {"recompute": True}], ids=str)
def test_failing_particles_are_left_out(kept, settings):
    work = workload(rules.get("lstm", output_tanh=False, output_scale=1e200), Quadratic(dim=2), truncation=3)
    for estimates, states in both_ways(work, 1, **settings):
        assert estimates[0].num_invalid == estimates[1].num_invalid == 3
        check_alike(estimates, states)
    assert kept[0] is not None or settings == {"recompute": True}
    assert set(lstm_tape._kept.tapes) == {torch.float64}  # its memory is not lost, nor is there twice as much


def test_resumed_it_gives_the_same_bits(kept):
    work = workload(rules.get("rnnprop"), NoisyBowl(), truncation=5, horizon=20, random_offsets=False)
    theta, estimator = theta_of(work.rule), estimators.get("backprop")
    state = estimator.init(work, theta, range(3))
    estimator.estimate(work, theta, state)
    saved = copy.deepcopy(estimator.state_dict(state))
    want = [estimator.estimate(work, theta, state).grads for _ in range(2)]
    lstm_tape._kept.tapes.clear()
    resumed = estimator.load_state_dict(work, saved)
    for grads in want:
        got = estimator.estimate(work, theta, resumed).grads
        assert all(torch.equal(got[name], value) for name, value in grads.items())
    assert None not in kept
