"""The comparison of estimators: its statistics on samples of known distribution, and problems with known answers."""

import dataclasses
import json
import math

import pytest
import torch
from estimator_reference import Linear, NoisyBowl, theta_of
from scipy import stats

from benchmarks.influence_balancing import InfluenceBalancing, LinearSystem
from learned_opt import estimators, rules
from learned_opt.estimators.statistics import UNDEFINED, Interval, jackknife, quality, student_quantile
from learned_opt.meta_loss import MetaLoss


@pytest.mark.parametrize("degrees", [3, 5, 15, 100])
def test_student_quantile(degrees):
    assert student_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=0.01)


def test_jackknife_of_a_mean_is_students_interval():
    values = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = jackknife(lambda rows: float(values[rows].mean()), 12)
    half = stats.t.ppf(0.975, 11) * stats.sem(values.numpy())
    assert got.value == pytest.approx(float(values.mean()))
    assert (got.high - got.value, got.value - got.low) == pytest.approx((half, half), rel=1e-3)
    clamped = jackknife(lambda rows: float(values[rows].mean()), 12, low=got.value, high=got.value)
    assert clamped == Interval(value=got.value, low=got.value, high=got.value)
    assert jackknife(lambda rows: math.nan if 3 in rows else 1.0, 12) is UNDEFINED


def test_logarithmic_intervals_are_symmetric_in_ratio():
    values = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = jackknife(lambda rows: float(values[rows].mean()), 12, logarithmic=True)
    assert got.low > 0 and got.high / got.value == pytest.approx(got.value / got.low)


def test_quality_covers_the_truth():
    """Gaussian samples that share noise with the reference: intervals hold the truth about 95 times in 100."""
    dim, count, trials = 6, 16, 200
    generator = torch.Generator().manual_seed(0)
    mean_f = torch.zeros(dim, dtype=torch.float64)
    mean_f[0] = 1.0
    mean_g = torch.zeros(dim, dtype=torch.float64)
    mean_g[:2] = torch.tensor([0.6, 0.8]) * 1.5
    noise, shared = 0.5, 0.2
    variance = dim * (noise**2 + shared**2)
    truth = {
        "cosine": 0.6,
        "norm_ratio": 1.5,
        "projection": 0.9,
        "variance": variance,
        "signal_to_noise": 1.5**2 / variance,
    }
    hits = dict.fromkeys(truth, 0)
    values = {name: [] for name in truth}
    for _ in range(trials):
        common = shared * torch.randn(count, dim, generator=generator, dtype=torch.float64)
        g = mean_g + common + noise * torch.randn(count, dim, generator=generator, dtype=torch.float64)
        got = quality(g, mean_f + common)
        for name, want in truth.items():
            interval = getattr(got, name)
            hits[name] += interval.low <= want <= interval.high
            values[name].append(interval.value)
    for name, want in truth.items():
        assert 0.88 <= hits[name] / trials <= 0.995, (name, hits[name])
        assert sum(values[name]) / trials == pytest.approx(want, rel=0.05), name


def test_pure_noise_is_undefined_and_not_signal():
    generator = torch.Generator().manual_seed(3)
    reference = torch.ones(8, 5)
    got = quality(100 * torch.randn(8, 5, generator=generator), reference)
    assert got.cosine == UNDEFINED and str(got.cosine) == "undefined"
    assert got.norm_ratio.value == 0 or got.norm_ratio.low == 0
    assert got.signal_to_noise.low == 0 and got.signal_to_noise.high < 1
    assert got.projection.low < 0 < got.projection.high


def test_quality_needs_samples():
    with pytest.raises(ValueError, match=r"with at least 4 rows; got \(3, 2\), \(3, 2\)"):
        quality(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"samples and reference must be alike, .*; got \(4, 2\), \(4, 3\)"):
        quality(torch.ones(4, 2), torch.ones(4, 3))


@pytest.fixture(scope="module")
def comparison():
    rule = rules.get("adam", lr=0.05)
    return estimators.compare(
        rule,
        NoisyBowl(noise=0.1),
        theta_of(rule),
        {
            "first": estimators.get("backprop"),
            "second": estimators.get("backprop", order=2),
            "PES": estimators.get("pes", sigma=0.02),
        },
        horizon=12,
        truncations=[3, 12],
        num_particles=16,
        num_samples=8,
    )


def rows_of(comparison):
    return {(r.estimator, r.truncation): r for r in comparison.rows}


def test_exact_backpropagation_of_the_horizon_has_no_bias(comparison):
    found = rows_of(comparison)
    exact = found["second", 12].quality
    for measure in (exact.cosine, exact.norm_ratio, exact.projection):
        assert (measure.value, measure.low, measure.high) == pytest.approx((1, 1, 1), abs=1e-9)
    assert found["second", 3].quality.projection.high < 0.9
    assert found["first", 12].quality.projection.value != pytest.approx(1, abs=1e-3)


def test_pes_is_unbiased_at_any_truncation_and_noisier(comparison):
    found = rows_of(comparison)
    for truncation in (3, 12):
        pes = found["PES", truncation].quality
        assert pes.projection.low < 1 < pes.projection.high
        assert pes.variance.low > found["second", 12].quality.variance.high
        assert pes.signal_to_noise.high < found["second", 12].quality.signal_to_noise.low


def test_truncation_one_of_influence_balancing_has_the_wrong_sign():
    rule = LinearSystem()
    got = estimators.compare(
        rule,
        InfluenceBalancing(),
        {"theta": torch.tensor(0.5, dtype=torch.float64)},
        {"backprop": estimators.get("backprop", order=2), "PES": estimators.get("pes", sigma=0.1)},
        horizon=100,
        truncations=[1, 100],
        num_particles=40,
        num_samples=6,
        meta_loss=MetaLoss(normalization="none"),
    )
    found = rows_of(got)
    assert found["backprop", 1].quality.cosine.value == pytest.approx(-1) and found["PES", 1].quality.projection.low > 0


def test_reports(comparison, tmp_path):
    table = comparison.table().splitlines()
    assert table[0].startswith(
        "| estimator | truncation | cosine | norm ratio | projection | variance | signal to noise |"
    )
    assert len(table) == 2 + 6 and len({line.count("|") for line in table}) == 1
    assert table[5].startswith("| second | 12 | 1 [1, 1] | 1 [1, 1] |")
    read = json.loads(comparison.to_json())
    assert read["settings"]["horizon"] == 12 and read["settings"]["rule"] == "adam"
    assert [(r["estimator"], r["truncation"]) for r in read["rows"]] == list(rows_of(comparison))
    assert read["rows"][3]["quality"]["cosine"]["value"] == pytest.approx(1)
    metrics = comparison.metrics("compare")
    assert metrics["compare/second/12/cosine"] == pytest.approx(1)
    assert metrics["compare/PES/3/inner_steps_per_second"] > 0 and all(map(math.isfinite, metrics.values()))
    comparison.plot(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    undefined = dataclasses.replace(
        comparison.rows[0], quality=dataclasses.replace(comparison.rows[0].quality, cosine=UNDEFINED)
    )
    partly = dataclasses.replace(comparison, rows=[undefined])
    assert json.loads(partly.to_json())["rows"][0]["quality"]["cosine"] == {"value": None, "low": None, "high": None}
    assert "compare/first/3/cosine" not in partly.metrics("compare") and "| undefined |" in partly.table()
    partly.plot(tmp_path / "partly.png")


def test_the_reference_can_be_replaced():
    rule = rules.get("sgd", lr=0.05)
    pair = {"first": estimators.get("backprop")}
    arguments = dict(
        horizon=4, truncations=[4], num_particles=4, num_samples=4, meta_loss=MetaLoss(normalization="none")
    )
    got = estimators.compare(rule, Linear(), theta_of(rule), pair, reference=estimators.get("backprop"), **arguments)
    assert got.rows[0].quality.cosine.value == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truncations": [5]}, r"truncations must divide the horizon \(12\); got 5"),
        ({"truncations": [0]}, r"truncations must divide the horizon \(12\); got 0"),
        ({"truncations": [24]}, r"truncations must divide the horizon \(12\); got 24"),
        ({"num_samples": 3}, "num_samples must be at least 4, for confidence intervals; got 3"),
        ({"estimators": {}}, "estimators is empty; name at least one"),
        ({"meta_loss": MetaLoss(average="final")}, "meta_loss must have average='mean', .*; got 'final'"),
        ({"num_particles": 3}, "num_particles must be a multiple of 2: pes runs"),
    ],
)
def test_bad_arguments(change, message):
    rule = rules.get("sgd")
    arguments = dict(
        estimators={"PES": estimators.get("pes")}, horizon=12, truncations=[3], num_samples=4, num_particles=2
    )
    with pytest.raises(ValueError, match=message):
        estimators.compare(rule, NoisyBowl(), theta_of(rule), **{**arguments, **change})


def test_compare_command(tmp_path, capsys):
    from benchmarks.estimators import main

    arguments = "compare --family quadratic --family-field dim=2 --rule adam --rule-setting lr=0.01 --float64"
    arguments += " --horizon 4 --truncations 2 4 --particles 2 --samples 4 --estimators PES NRES --sigma 0.1"
    arguments += f" --out {tmp_path / 'deep' / 'result'}"
    main(arguments.split())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [[f"| {e}", k] for e in ("PES", "NRES") for k in ("2", "4")]
    settings = json.loads((tmp_path / "deep" / "result.json").read_text())["settings"]
    assert (settings["rule_settings"]["lr"], settings["dtype"]) == (0.01, "float64")
    assert (tmp_path / "deep" / "result.png").stat().st_size > 10_000


def test_cost_of_the_floor_and_of_an_estimator():
    from benchmarks.estimators import PLAIN, measure_cost
    from tasks.quadratic import Quadratic

    for label in (PLAIN, "PES"):
        found = measure_cost(Quadratic(dim=1), label, 5, 2, 0.01)
        assert found["inner_steps_per_cpu_second"] > 0 and found["megabytes"] >= 0
