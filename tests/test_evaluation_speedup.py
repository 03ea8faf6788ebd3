"""Speed-ups against curves whose crossing steps are known."""

import numpy as np
import pytest

from learned_opt.evaluation.speedup import speedups

HORIZON = 20  # one loss in the final window, so that running means are the losses themselves


def line(slope, horizon=HORIZON):
    """A loss that falls from 1 by `slope` a step, to zero at the lowest."""
    return np.maximum(1 - slope * np.arange(horizon + 1.0), 0)[:, None]


def test_twice_as_steep_is_twice_as_fast():
    slow, fast = line(0.01), line(0.02)
    assert speedups(fast, slow) == pytest.approx([2.0])
    assert speedups(fast, slow, of_horizon=True) == pytest.approx([2.0])
    # The slow one never reaches 0.6; the fast one passed the slow one's 0.8 at step 10 of 20.
    assert speedups(slow, fast) == pytest.approx([0.5])


def test_a_plateau_reached_early_earns_nothing():
    # Down to 0.5 in one step and no further; the reference is there at step 10 and ends at 0.
    early, reference = np.where(np.arange(HORIZON + 1) > 0, 0.5, 1.0)[:, None], line(0.05)
    assert speedups(early, reference) == pytest.approx([10 / HORIZON])


def test_the_reference_has_exactly_one_and_the_published_definition_more():
    random = np.random.default_rng(0)
    noisy = np.exp(-np.arange(201.0)[:, None] / 20) + 0.1 * random.random((201, 40)) + 1
    assert (speedups(noisy, noisy) == 1).all()
    published = speedups(noisy, noisy, of_horizon=True)
    assert (published > 1).all()
    other = np.exp(-np.arange(201.0)[:, None] / 10) + 0.1 * random.random((201, 40)) + 1
    assert (speedups(other, noisy) <= speedups(other, noisy, of_horizon=True)).all()


def test_what_diverged_counts_as_the_worst():
    curve = np.tile(line(0.01), (1, 4))
    lost = curve.copy()
    lost[5:, 1] = lost[5:, 3] = np.nan
    reference = curve.copy()
    reference[5:, 2] = reference[5:, 3] = np.inf
    assert speedups(lost, reference) == pytest.approx([1, 1 / HORIZON, HORIZON, 1])


def test_at_once_is_one_step():
    assert speedups(np.zeros((HORIZON + 1, 1)), line(0.01)) == pytest.approx([HORIZON])
    # The reference's initial loss is already below what the other ends with.
    assert speedups(np.full((HORIZON + 1, 1), 2.0), line(0.01)) == pytest.approx([1 / HORIZON])


def test_curves_of_different_tasks_are_refused():
    with pytest.raises(ValueError, match=r"losses and reference must be of one shape, .*; got \(21, 1\) and \(21, 2\)"):
        speedups(line(0.1), np.tile(line(0.1), (1, 2)))
