"""Comparisons from end to end: the same draws for all, honest entries, strict JSON, a table and a picture."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from evaluation_families import Parabola, Regression, gradient_descent

from learned_opt import rules
from learned_opt.batched import BatchedFamily
from learned_opt.evaluation import BASELINES, Baseline, Comparison, EvaluationConfig, Learned, compare, run_rule, tune
from learned_opt.evaluation.compare import score
from learned_opt.task import draw_task, task_seed
from tasks.quadratic import Quadratic

CONFIG = EvaluationConfig(horizon=20, num_tasks=3, seeds=(0, 5), num_validation_tasks=4, num_resamples=200)
DOUBLE = torch.float64


def learned(name="learned", rate=0.1):
    rule = rules.get("adam", lr=rate)
    return Learned(name=name, rule=rule, theta=rule.init_theta(torch.Generator()))


@pytest.fixture(scope="module")
def found():
    """Two families, a learned optimizer and three baselines, with every result as the callback saw it."""
    seen = []
    comparison = compare(
        [learned(), BASELINES["sgd"], BASELINES["adam"], BASELINES["adam_default"]],
        {"one": Parabola(), "two": Quadratic(dim=2)},
        CONFIG,
        horizons={"two": 30},
        dtype=DOUBLE,
        on_result=lambda result, so_far: seen.append((result, so_far)),
    )
    return comparison, seen


def test_scores_of_a_baseline_are_those_of_the_closed_form(found):
    comparison, _ = found
    result = comparison.result("one", "sgd")
    curves = [gradient_descent(Parabola(), "meta_test", seed, 3, result.rate, 20).numpy() for seed in CONFIG.seeds]
    losses = np.concatenate(curves, axis=1)
    np.testing.assert_allclose(result.scores.task_final_losses, losses[-1], rtol=1e-6, atol=1e-15)
    np.testing.assert_allclose(result.scores.task_mean_losses, losses[1:].mean(0), rtol=1e-9)
    assert result.scores.mean_loss.value == pytest.approx(losses[1:].mean())
    np.testing.assert_allclose(result.scores.curve.median, np.median(losses, axis=1), rtol=1e-6, atol=1e-15)
    assert result.scores.curve.steps == tuple(range(21))
    distances = []
    for seed in CONFIG.seeds:
        for index in range(3):
            task, params = draw_task(Parabola(), "meta_test", task_seed("meta_test", seed, index, 0))
            distances.append(abs(float((1 - result.rate * task["a"]) ** 20 * (params["theta"] - task["c"]))))
    assert result.scores.metrics["distance"].value == pytest.approx(np.mean(distances), rel=1e-6)


def test_the_learned_optimizer_ran_on_the_same_draws(found):
    comparison, _ = found
    batched = BatchedFamily(Quadratic(dim=2), dtype=DOUBLE)
    candidate = learned()
    runs = run_rule(candidate.rule, candidate.theta, batched, split="meta_test", seeds=(0, 5), num_tasks=3, horizon=30)
    scores = comparison.result("two", "learned").scores
    np.testing.assert_allclose(scores.task_mean_losses, runs.losses[1:].mean(0))
    starts = {comparison.result("two", name).scores.curve.median[0] for name in comparison.optimizers}
    assert len(starts) == 1


def test_tuned_on_meta_validation_with_the_family_s_horizon(found):
    comparison, _ = found
    batched = BatchedFamily(Quadratic(dim=2), dtype=DOUBLE)
    assert comparison.result("two", "adam").tuning == tune(BASELINES["adam"], batched, seed=0, num_tasks=4, horizon=30)
    assert comparison.result("two", "adam").horizon == 30 and comparison.result("one", "adam").horizon == 20
    assert comparison.result("one", "adam_default").rate == 1e-3


def test_tuned_on_other_draws_of_the_reported_data_when_told_to():
    config = dataclasses.replace(CONFIG, tuning_split="meta_test", validation_seed=9)
    comparison = compare([BASELINES["adam"]], {"two": Quadratic(dim=2)}, config, dtype=DOUBLE)
    draws = {"split": "meta_test", "seed": 9, "num_tasks": 4, "horizon": 20}
    want = tune(BASELINES["adam"], BatchedFamily(Quadratic(dim=2), dtype=DOUBLE), **draws)
    assert comparison.result("two", "adam").tuning == want


def test_ratios_are_to_the_reference(found):
    comparison, _ = found
    adam, sgd = (comparison.result("one", name).scores for name in ("adam", "sgd"))
    assert (adam.final_ratio.value, adam.final_ratio.low, adam.final_ratio.high) == (1, 1, 1)
    assert adam.share_reached == 1.0
    assert sgd.final_ratio.value == pytest.approx(sgd.final_loss.value / adam.final_loss.value)
    assert sgd.mean_ratio.value == pytest.approx(sgd.mean_loss.value / adam.mean_loss.value)
    per_task = np.divide(sgd.task_final_losses, adam.task_final_losses)
    assert sgd.task_final_ratio.value == pytest.approx(np.median(per_task))
    assert sgd.final_ratio.low <= sgd.final_ratio.value <= sgd.final_ratio.high


def test_a_rule_equal_to_the_tuned_reference_has_ratio_one():
    family = Regression()
    rate = tune(BASELINES["adam"], BatchedFamily(family, dtype=DOUBLE), seed=0, num_tasks=4, horizon=20).rate
    comparison = compare([learned(rate=rate), BASELINES["adam"]], {"r": family}, CONFIG, dtype=DOUBLE)
    scores = comparison.result("r", "learned").scores
    for ratio in (scores.final_ratio, scores.mean_ratio, scores.task_final_ratio):
        # theta is stored in float32.
        assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1, 1, 1), abs=1e-5)


def test_results_come_one_by_one_with_the_reference_first(found):
    comparison, seen = found
    assert comparison.num_expected == len(seen) == 8
    assert [len(so_far.results) for _, so_far in seen] == list(range(1, 9))
    assert [result.optimizer for result, _ in seen[:4]] == ["adam", "learned", "sgd", "adam_default"]
    assert seen[0][1].result("one", "learned") is None
    assert "adam" in seen[0][1].table()
    assert [r.optimizer for r in comparison.ordered()[:4]] == ["learned", "sgd", "adam", "adam_default"]


def test_json_is_strict_and_complete(found):
    comparison, _ = found
    plain = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert plain["families"]["one"].startswith("parabola(")
    row = plain["results"][0]
    assert (row["family"], row["optimizer"], row["learned"]) == ("one", "learned", True)
    assert len(row["scores"]["curve"]["median"]) == 21
    assert len(row["scores"]["task_final_losses"]) == 6
    assert set(row["scores"]["final_loss"]) == {"value", "low", "high"}
    assert plain["results"][2]["tuning"]["rate"] == comparison.result("one", "adam").rate


def test_the_table_is_aligned_and_says_what_it_holds(found):
    comparison, _ = found
    lines = comparison.table().splitlines()
    assert re.split("  +", lines[0].strip()) == comparison.header()[1:]
    assert comparison.header()[5:9] == ["final / adam", "mean / adam", "steps to adam", "speed-up"]
    assert lines[2] == "one" and lines[8] == "two"
    rows = [line for line in lines[3:13] if line.startswith("  ")]
    assert len(rows) == 8
    column = lines[0].index("diverged") + len("diverged")
    assert {row[column - 3 : column] for row in rows} == {"0/6"}
    assert "Means over 6 meta-test tasks (2 seeds); 95% bootstrap intervals." in lines
    assert len(comparison.rows()[0]) == len(comparison.header())
    assert comparison.rows(wide=True)[0][3].count("[") == 1 and comparison.rows()[0][3].count("[") == 0


def test_no_reference_no_ratios():
    comparison = compare([learned(), BASELINES["adam_default"]], {"q": Quadratic(dim=2)}, CONFIG)
    assert comparison.reference == ""
    scores = comparison.result("q", "learned").scores
    assert scores.final_ratio is scores.mean_ratio is scores.task_final_ratio is scores.steps_to_reference is None
    assert comparison.header() == ["family", "optimizer", "rate", "final loss", "mean loss", "diverged"]
    assert "Ratios" not in comparison.table() and "[" in comparison.rows()[0][3]


def test_a_baseline_that_diverges_everywhere_is_an_honest_entry(tmp_path):
    from learned_opt.evaluation.plots import save_curves

    family = Parabola(curvature=1e40)
    comparison = compare([learned(), BASELINES["sgd"], BASELINES["adam"]], {"steep": family}, CONFIG, dtype=DOUBLE)
    result = comparison.result("steep", "sgd")
    assert result.scores is None and result.rate is None
    row = comparison.rows()[1]
    assert row == ["steep", "sgd", "-", "-", "-", "-", "-", "-", "-", "all", "-"]
    assert "steep, sgd: every meta-validation task diverged at every rate from 1e-07 to 10" in comparison.table()
    json.dumps(comparison.to_json(), allow_nan=False)
    assert comparison.result("steep", "learned").scores.final_ratio is not None
    save_curves(comparison, tmp_path / "c.png")
    # The reference itself may be the one that has no numbers.
    alone = compare([learned(), Baseline(name="adam", make=torch.optim.SGD)], {"steep": family}, CONFIG, dtype=DOUBLE)
    assert alone.result("steep", "learned").scores.final_ratio is None
    assert alone.rows()[0][5:9] == ["-", "-", "-", "-"]


def test_diverged_tasks_are_counted_and_make_means_infinite():
    losses = np.tile(np.linspace(2, 1, 21)[:, None], (1, 6))
    reference = losses * 2
    losses[9:, 4] = np.nan
    losses[:, 5] = np.linspace(1, 3, 21)
    losses[4:6, 2] = 0.1, 2.5
    scores = score(losses, {}, reference, CONFIG)
    assert (scores.num_tasks, scores.num_diverged, scores.num_above_start, scores.num_thrown_back) == (6, 1, 2, 1)
    assert scores.final_loss.value == scores.mean_loss.value == scores.final_ratio.value == math.inf
    assert scores.task_final_ratio.value == 0.5
    # 2 → 1 passes the reference's final loss of 2 at once; the diverged task too, the rising one as well.
    assert scores.share_reached == 1.0
    never = score(reference, {}, losses[:, :4].repeat(2, axis=1)[:, :6] / 3, CONFIG)
    assert never.share_reached == 0 and never.steps_to_reference.value == math.inf
    assert score(losses, {}, np.full_like(losses, np.nan), CONFIG).share_reached == 0


def test_infinities_in_table_and_json():
    def explode(groups):
        return torch.optim.SGD([{**group, "lr": 1e200} for group in groups])

    comparison = compare(
        [Baseline(name="boom", make=explode, rates=(0.1,)), BASELINES["adam"]], {"p": Parabola()}, CONFIG, dtype=DOUBLE
    )
    assert comparison.rows()[0][1:9] == ["boom", "0.1", "inf", "inf", "inf", "inf", "> 20 (0%)", "0.050"]
    plain = comparison.to_json()["results"][0]["scores"]
    assert plain["final_loss"] == {"value": None, "low": None, "high": None} and plain["num_diverged"] == 6


@pytest.mark.parametrize(
    ("candidates", "families", "horizons", "message"),
    [
        ([], {"p": Parabola()}, None, "candidates must hold at least one optimizer; got none"),
        (
            [learned(), learned()],
            {"p": Parabola()},
            None,
            "candidates must have distinct names; got 'learned' more than once",
        ),
        ([learned()], {}, None, "families must hold at least one task family; got none"),
        ([learned()], {"p": Parabola()}, {"q": 3}, "horizons names 'q', which is not among the families p"),
        ([learned()], {"p": Parabola()}, {"p": 0}, "the horizon of 'p' must be at least 1; got 0"),
    ],
)
def test_bad_comparisons_fail_before_any_work(candidates, families, horizons, message):
    with pytest.raises(ValueError, match=message):
        compare(candidates, families, CONFIG, horizons=horizons, on_result=lambda *_: pytest.fail("work was done"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizon": 0}, "horizon must be at least 1; got 0"),
        ({"num_tasks": 0}, "num_tasks must be at least 1; got 0"),
        ({"num_validation_tasks": 0}, "num_validation_tasks must be at least 1; got 0"),
        ({"num_resamples": 0}, "num_resamples must be at least 1; got 0"),
        ({"particles_at_once": 0}, "particles_at_once must be at least 1; got 0"),
        ({"seeds": ()}, r"seeds must be non-negative and distinct, and at least one; got \(\)"),
        ({"seeds": (1, 1)}, r"seeds must be non-negative and distinct, and at least one; got \(1, 1\)"),
        ({"validation_seed": -1}, "validation_seed must be non-negative; got -1"),
        ({"tuning_split": "test"}, "tuning_split must be one of meta_validation, meta_test; got 'test'"),
        (
            {"tuning_split": "meta_test", "seeds": (0, 5), "validation_seed": 5},
            r"validation_seed 5 is among seeds \(0, 5\): with tuning_split meta_test .* give another, such as 6",
        ),
        ({"confidence": 1.0}, "confidence must lie strictly between 0 and 1; got 1.0"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**change)


def test_unknown_labels_are_told(found):
    comparison, _ = found
    with pytest.raises(ValueError, match="family must be one of one, two; got 'three'"):
        comparison.result("three", "adam")
    with pytest.raises(ValueError, match="optimizer must be one of learned, sgd, adam, adam_default; got 'lion'"):
        comparison.result("one", "lion")
    with pytest.raises(ValueError, match="name must not be empty"):
        learned(name="")


def test_the_picture_shows_every_curve(found, tmp_path):
    from learned_opt.evaluation.plots import draw_curves, save_curves

    comparison, _ = found
    files = save_curves(comparison, tmp_path / "curves.png", svg=True)
    assert [file.name for file in files] == ["curves.png", "curves.svg"]
    assert files[0].read_bytes().startswith(b"\x89PNG") and b"<svg" in files[1].read_bytes()
    figure = draw_curves(comparison)
    panels = figure.axes
    assert [panel.get_title(loc="left") for panel in panels] == ["one", "two"]
    for panel in panels:
        lines = {line.get_label(): line for line in panel.lines}
        assert set(lines) == set(comparison.optimizers)
        assert len({line.get_color() for line in lines.values()}) == 4
        assert len(panel.collections) == 4 and panel.get_yscale() == "log"
        want = comparison.result(panel.get_title(loc="left"), "sgd").scores.curve
        np.testing.assert_array_equal(lines["sgd"].get_ydata(), want.median)
        np.testing.assert_array_equal(lines["sgd"].get_xdata(), want.steps)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(comparison.optimizers)
    assert figure.legends[0].get_title().get_text() == "median over 6 meta-test tasks, 95% band"


def test_a_run_that_blows_up_does_not_flatten_the_picture():
    from learned_opt.evaluation.plots import draw_curves

    wild = Baseline(name="wild", make=torch.optim.SGD, rates=(30.0,))
    comparison = compare([wild, BASELINES["sgd"]], {"p": Parabola()}, CONFIG, dtype=DOUBLE)
    curve = comparison.result("p", "wild").scores.curve
    (panel,) = draw_curves(comparison).axes
    assert max(curve.high) > 1e6 and panel.get_ylim()[1] < 5 * curve.high[0]


def test_a_picture_without_results_or_without_survivors():
    from learned_opt.evaluation.plots import draw_curves

    dead = compare(
        [Baseline(name="adam", make=torch.optim.SGD)], {"steep": Parabola(curvature=1e40)}, CONFIG, dtype=DOUBLE
    )
    (panel,) = draw_curves(dead).axes
    assert [text.get_text() for text in panel.texts] == ["every optimizer diverged"]
    empty = Comparison(
        families={"p": ""}, optimizers=("adam",), reference="adam", num_tasks=1, seeds=(0,), confidence=0.95, results=()
    )
    with pytest.raises(ValueError, match="the comparison has no results to draw"):
        draw_curves(empty)
    assert "optimizer" in empty.table()


def test_evaluation_imports_without_matplotlib_and_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import learned_opt.evaluation\n"
        "from learned_opt.evaluation import explain_plots, plots, report, style, suite_plots\n"
        "try:\n"
        "    style.new_figure(1, 1)\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'pictures need matplotlib: pip install "learned-opt[eval]"'
