"""The growth benchmark: its exponents against known powers, its sizes, and a run of its smallest points."""

from __future__ import annotations

import pytest

from benchmarks.cost_growth import RANGES, Arguments, exponent, markdown, measure, trainer_at


def test_exponents_of_powers_are_exact_and_fixed_costs_lower_them():
    sizes = [1, 3, 10, 100]
    assert exponent(sizes, [2.0 * s**1.5 for s in sizes]) == pytest.approx(1.5)
    assert exponent(sizes, [7.0] * 4) == pytest.approx(0.0, abs=1e-12)
    assert 0.5 < exponent(sizes, [5.0 + s for s in sizes]) < 1
    with pytest.raises(ValueError, match="an exponent needs at least two sizes"):
        exponent([1], [1.0])
    with pytest.raises(ValueError, match="all positive"):
        exponent([1, 2], [1.0, 0.0])


def test_parameters_range_from_a_thousand_to_a_million():
    widths = RANGES["parameters"]
    count = [64 * w + w + w * w + w + w * 10 + 10 for w in widths]
    assert count[0] == 870 and 1e6 < count[-1] < 1.1e6
    assert trainer_at("parameters", widths[0]).work["digits"].batched.num_parameters == count[0]
    assert (RANGES["particles"][0], RANGES["particles"][-1]) == (1, 512)
    assert (RANGES["truncation"][0], RANGES["truncation"][-1]) == (5, 100)


def test_a_horizon_is_five_truncations_everywhere():
    for over, value in (("truncation", 5), ("truncation", 10), ("particles", 2)):
        work = trainer_at(over, value).work["digits"]
        assert work.plan.horizons.longest == 5 * work.truncation
    with pytest.raises(ValueError, match="over must be one of particles, parameters, truncation; got 'width'"):
        trainer_at("width", 3)


def test_a_short_run_has_a_time_for_every_size():
    found = measure("particles", (1, 2), rounds=1, seconds=0.0)
    assert found["sizes"] == [1, 2] and len(found["seconds"]) == 2 and min(found["seconds"]) > 0
    assert all(len(times) == 1 for times in found["rounds"])
    text = markdown([{**found, "seconds": [0.01, 0.02], "exponent": 1.0, "exponent_of_upper_half": 1.0}])
    assert "| 2 | 20.0 | 2.00 at 2.00 x the size |" in text and "Exponent 1.00" in text


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="over must be among particles, parameters, truncation; got 'depth'"):
        Arguments(over=("depth",))
    with pytest.raises(ValueError, match="at_most = 5 leaves fewer than two points of truncation"):
        Arguments(over=("truncation",), at_most=5)
    with pytest.raises(ValueError, match="rounds must be at least 1; got 0"):
        Arguments(rounds=0)
