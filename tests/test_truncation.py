"""Horizons: their distribution, where the first ones are cut, and what they depend on."""

import math

import pytest

from learned_opt.truncation import HorizonSchedule


def largest_gap(values, cdf, points):
    """Kolmogorov–Smirnov: the largest distance between the empirical and the given distribution function."""
    return max(abs(sum(v <= x for v in values) / len(values) - cdf(x)) for x in points)


# With probability 1 − 2·exp(−2·n·d²) the gap of n independent draws stays below d (Dvoretzky–Kiefer–Wolfowitz): 6e-7 to
# exceed it here.
NUM_DRAWS, BOUND = 3000, 0.05


def test_log_uniform():
    schedule = HorizonSchedule(kind="log_uniform", shortest=10, longest=1000, random_offsets=False)
    drawn = [schedule.draw(0, particle, episode) for particle in range(60) for episode in range(NUM_DRAWS // 60)]
    assert min(drawn) >= 10 and max(drawn) <= 1000 and all(type(h) is int for h in drawn)

    # Rounded to the nearest integer: P(h ≤ x) = P(e^u ≤ x + 1/2).
    def cdf(x):
        return min(1.0, math.log((x + 0.5) / 10) / math.log(100))

    assert largest_gap(drawn, cdf, range(10, 1001)) < BOUND
    # The bound is sharp enough to tell a uniform distribution from it.
    assert largest_gap(drawn, lambda x: (x - 10) / 990, range(10, 1001)) > 5 * BOUND


def test_first_horizons_are_cut_uniformly():
    schedule = HorizonSchedule(longest=50)
    drawn = [schedule.draw(4, particle, 0) for particle in range(NUM_DRAWS)]
    assert largest_gap(drawn, lambda x: x / 50, range(1, 51)) < BOUND
    assert set(drawn) == set(range(1, 51))
    assert {schedule.draw(4, particle, episode) for particle in range(20) for episode in (1, 2, 3)} == {50}


def test_offsets_of_log_uniform_horizons_stay_within_the_episodes_own():
    cut = HorizonSchedule(kind="log_uniform", shortest=5, longest=40)
    whole = HorizonSchedule(kind="log_uniform", shortest=5, longest=40, random_offsets=False)
    for particle in range(300):
        assert 1 <= cut.draw(1, particle, 0) <= whole.draw(1, particle, 0)
        assert cut.draw(1, particle, 1) == whole.draw(1, particle, 1)


def test_without_offsets_all_start_together():
    schedule = HorizonSchedule(longest=50, random_offsets=False)
    assert {schedule.draw(4, particle, 0) for particle in range(50)} == {50}


def test_a_function_of_its_arguments_alone():
    schedule = HorizonSchedule(kind="log_uniform", shortest=2, longest=10**6)
    keys = [(seed, particle, episode) for seed in range(3) for particle in range(5) for episode in range(5)]
    drawn = [schedule.draw(*key) for key in keys]
    assert drawn[::-1] == [schedule.draw(*key) for key in reversed(keys)]
    assert len(set(drawn)) > len(keys) * 0.8


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"kind": "uniform"}, "horizon kind must be one of fixed, log_uniform; got 'uniform'"),
        ({"longest": 0}, "longest horizon must be at least 1; got 0"),
        (
            {"kind": "log_uniform", "longest": 10, "shortest": 11},
            r"shortest horizon must lie in \[1, longest=10\]; got 11",
        ),
        ({"kind": "log_uniform", "shortest": 0}, r"shortest horizon must lie in \[1, longest=100\]; got 0"),
    ],
)
def test_bad_settings(settings, text):
    with pytest.raises(ValueError, match=text):
        HorizonSchedule(**settings)


def test_shortest_is_only_read_by_log_uniform():
    assert HorizonSchedule(longest=10).draw(0, 0, 1) == 10


def test_horizon_of_one():
    assert HorizonSchedule(longest=1).draw(0, 3, 0) == 1
    assert HorizonSchedule(kind="log_uniform", shortest=1, longest=1).draw(0, 3, 5) == 1
