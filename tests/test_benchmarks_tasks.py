"""The benchmarks of task families run at a small size, and save what they say."""

import json
import sys

import numpy as np
import pytest
import torch
from evaluation_families import Parabola
from torch.nn import functional as F

from benchmarks import amortization, families, few_shot, lasso, last_steps, long_horizons, mnist, rule_settings
from benchmarks.amortization_report import final, measured_steps, steps_to
from benchmarks.tuned_adam import tuned_adam
from examples.own_problem import network, source_files
from learned_opt.batched import BatchedFamily
from learned_opt.evaluation import BASELINES, tune
from learned_opt.task import SPLITS
from tasks import ModuleFamily
from tasks.image_mlp import ImageMLP


def test_few_shot_is_resumed_and_saved_method_by_method(tmp_path, monkeypatch, capsys):
    results = tmp_path / "few_shot.json"
    common = ["--folder", str(tmp_path), "--results", str(results), "--outer-steps", "2", "--num-tasks", "2"]
    for method in ("meta_sgd", "learned", "learned"):
        monkeypatch.setattr(sys, "argv", ["few_shot.py", *common, "--method", method, "--test-tasks", "3"])
        few_shot.main()
    assert "learned: continuing at outer step 2" in capsys.readouterr().out
    methods = json.loads(results.read_text())["sinusoid"]["methods"]
    assert list(methods) == ["meta_sgd", "learned"]
    for row in methods.values():
        assert [found["inner_steps"] for found in row["after"]] == [1, 2, 5, 10]
        assert all(found["low"] < found["mean"] < found["high"] for found in row["after"])


def test_mnist_networks_beside_tuned_adam(tmp_path, capsys):
    results = tmp_path / "mnist.json"
    small = ["--dataset", "digits", "--networks", "ReLU", "--horizons", "12", "--num-tasks", "3", "--out", str(results)]
    mnist.main(["adam", *small])
    saved = json.loads(results.read_text())
    assert saved["optimizer"].startswith("adam@")
    (row,) = saved["results"].values()
    assert list(saved["results"]) == ["ReLU, 12 steps"]
    # Adam at 1e-3 is hardly under way where its best rate has arrived.
    value, low, high = row["final loss over adam's"]
    assert 1 < low <= value <= high
    assert value == pytest.approx(row["final loss"]["learned"] / row["final loss"]["adam"])
    assert row["adam's rate"] > 1e-3 and "ReLU, 12 steps: final" in capsys.readouterr().out


def test_long_horizons_go_on_with_what_is_missing(tmp_path, monkeypatch, capsys):
    results = tmp_path / "long_horizons.json"
    small = ["adam", "--dataset", "digits", "--horizons", "10", "40", "--num-tasks", "3", "--tuning-tasks", "2"]
    long_horizons.main([*small, "--networks", "relu", "--out", str(results)])
    saved = json.loads(results.read_text())
    ((identity, rows),) = saved["results"]["relu"].items()
    assert saved["optimizers"] == [identity] and list(rows) == ["10", "40"]
    for row in rows.values():
        value, low, high = row["final loss over adam's"]
        assert 1 < low <= value <= high and row["diverged"] == 0  # Adam at 1e-3 beside Adam at its best rate
        assert value == pytest.approx(row["final loss"]["learned"] / row["final loss"]["adam"])
        assert row["final loss"]["learned"] < row["worst"]["learned"] < 2.5
    assert rows["40"]["final loss"]["adam"] < 0.5 * rows["10"]["final loss"]["adam"]
    # The same as the library's own tuning, for every horizon, on other draws of the reported rows.
    family = BatchedFamily(ImageMLP(dataset="digits", hidden=(20,), activation="relu", batch_size=128, init_scale=0.1))
    for horizon, row in rows.items():
        draws = {"seed": 1, "split": "meta_test", "num_tasks": 2, "horizon": int(horizon)}
        assert row["adam's rate"] == pytest.approx(tune(BASELINES["adam"], family, **draws).rate, rel=1e-12)
        assert row["final loss"]["learned"] == pytest.approx(np.mean(row["final losses"]))
    assert saved["adam"]["relu"]["40"]["rate"] == rows["40"]["adam's rate"]
    assert np.mean(saved["adam"]["relu"]["40"]["final losses"]) == rows["40"]["final loss"]["adam"]
    # A second call runs one network more, and nothing of what is there.
    monkeypatch.setattr(long_horizons, "measure", lambda artifact, batched, *_: measured.append(batched) or rows)
    measured: list[BatchedFamily] = []
    long_horizons.main([*small, "--networks", "relu", "sigmoid, 3 layers", "--out", str(results)])
    assert [batched.family.hidden for batched in measured] == [(20, 20, 20)]
    assert list(json.loads(results.read_text())["results"]) == ["relu", "sigmoid, 3 layers"]
    assert "relu, 40 steps" in capsys.readouterr().out


class Near(Parabola):
    """Parabolas that begin a millionth from their minimum."""

    def init_params(self, task, generator):
        return {"theta": task["c"] - 1e-6 * torch.rand((), generator=generator, dtype=torch.float64)}


@pytest.mark.parametrize(("family", "inside"), [(Near(), (1e-9, 1e-4)), (Parabola(), (0.2, 10.0))])
def test_adam_is_tuned_on_other_draws_of_the_reported_rows(family, inside):
    batched = BatchedFamily(family, dtype=torch.float64)
    for horizon in (3, 9):
        rate, losses = tuned_adam(batched, horizon, tuning_tasks=4, num_tasks=2)
        want = tune(BASELINES["adam"], batched, seed=1, split="meta_test", num_tasks=4, horizon=horizon).rate
        assert rate == pytest.approx(want, rel=1e-12) and inside[0] < rate < inside[1]
        draws = {"split": "meta_test", "seeds": (0,), "num_tasks": 2, "horizon": horizon}
        np.testing.assert_array_equal(losses, BASELINES["adam"].run(batched, (rate,), **draws).losses[:, 0].numpy())


def test_several_optimizers_share_adam_on_long_horizons(tmp_path, monkeypatch):
    small = ["--dataset", "digits", "--horizons", "10", "--num-tasks", "3", "--tuning-tasks", "2", "--networks", "relu"]
    for names in (["rnnprop"], ["rnnprop", "adam"]):
        long_horizons.main([*names, *small, "--out", str(tmp_path / f"{len(names)}.json")])
    one, both = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    (rnnprop, adam) = both["results"]["relu"]
    assert rnnprop.startswith("rnnprop@") and both["results"]["relu"][rnnprop] == one["results"]["relu"][rnnprop]
    assert both["results"]["relu"][adam] != both["results"]["relu"][rnnprop]
    # Added later, an optimizer finds Adam's losses in the file, and its own numbers are the same.
    monkeypatch.delattr(long_horizons, "tuned_adam")
    long_horizons.main(["adam", *small, "--out", str(tmp_path / "1.json")])
    later = json.loads((tmp_path / "1.json").read_text())
    assert later["results"] == both["results"] and later["optimizers"] == both["optimizers"]
    assert [command.split()[3] for command in later["commands"]] == ["rnnprop", "adam"]


def test_lasso_beside_the_optimum(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lasso, "STEPS", (20, 60))
    results = tmp_path / "lasso.json"
    lasso.main(["adam", "--num-tasks", "3", "--out", str(results)])
    rows = json.loads(results.read_text())["results"]
    assert list(rows) == ["20 steps", "60 steps"]
    for row in rows.values():
        # Nothing is below the optimum; FISTA is nearest, and Adam at 1e-3 has hardly begun.
        assert 0 < row["fista"]["together"][0] < row["adam"]["together"][0] < row["learned"]["together"][0]
    assert rows["60 steps"]["fista"]["together"][0] < 0.5 * rows["20 steps"]["fista"]["together"][0]
    assert "60 steps: learned" in capsys.readouterr().out


def test_where_the_last_steps_end(tmp_path, capsys):
    losses = [[1.0] * 59 + [0.1, 0.5, 0.39, 0.2], [2.0] * 63]
    assert last_steps.summary(losses) == pytest.approx({"leaps": 1 / 6, "lost": 0.0, "median": 0.6, "worst": 1.0})
    # Lost: above a tenth of the first loss, after having been below a hundredth of it.
    losses = [[2.0] * 60 + [0.019, 0.19, 0.21, 0.0], [2.0] * 60 + [0.021, 0.5, 0.5, 0.5]]
    assert last_steps.summary(losses)["lost"] == pytest.approx(1 / 8)
    results = tmp_path / "last_steps.json"
    last_steps.main(["adam", "--num-runs", "2", "--num-steps", "70", "--out", str(results)])
    found = json.loads(results.read_text())["results"]
    assert list(found) == list(last_steps.PROBLEMS) == ["regression", "digits"]
    for rows in found.values():
        assert list(rows) == [*last_steps.SCHEDULES, "guard", "adam"] and all(r["worst"] < 1 for r in rows.values())
        # Adam at 1e-3 is on its way still: half the rate gets it less far. The guard has nothing to do.
        assert rows["constant"]["median"] < rows["to zero over the last fifth"]["median"] < rows["half"]["median"]
        assert rows["guard"] == pytest.approx(rows["constant"])
        # The best rate is at least as good as one of the grid, 1e-3, by the rule that is Adam.
        assert rows["adam"]["rate"] > 1e-3 and rows["adam"]["median"] < rows["constant"]["median"]
    assert "regression, half: leaps 0.000" in capsys.readouterr().out


def test_settings_of_a_rule_changed_by_hand(tmp_path, capsys):
    curve = np.array([1.0] * 10 + [0.001] * 20 + [0.021, 0.06, 0.04, 0.0])[:, None]
    # Above a twentieth of the first loss, and above twenty times the least mean of ten: one step of two curves.
    assert rule_settings.lost_steps(np.concatenate([curve, np.ones_like(curve)], 1)) == 1
    assert rule_settings.last_loss(np.array([[1.0, 3.0]] * 99 + [[0.5, 2.0]])) == 1.625  # of means over two steps
    results = tmp_path / "settings.json"
    common = ["--families", "quadratic", "--num-steps", "40", "--num-tasks", "2", "--out", str(results)]
    rule_settings.main(["compact", "--changes", "square_ratio=64", "growth=0.01,relative_eps=0.1", *common])
    document = json.loads(results.read_text())
    changes = "--changes square_ratio=64 growth=0.01,relative_eps=0.1"
    asked = f"compact {changes} --families quadratic --num-steps 40 --num-tasks 2"
    assert document["command"] == f"python -m benchmarks.rule_settings {asked}"
    rows = document["results"]
    as_it_is, same, slower = rows.values()
    assert as_it_is == same and slower["speedup"] < as_it_is["speedup"]  # 64 is the setting that it has
    assert "growth=0.01,relative_eps=0.1: speed-up" in capsys.readouterr().out
    with pytest.raises(ValueError, match="changes must be name=number, separated by commas; got 'growth' in 'growth'"):
        rule_settings.main(["compact", "--changes", "growth", *common])
    with pytest.raises(ValueError, match="square_ratio must be finite and at least 1; got 0.5"):
        rule_settings.main(["compact", "--changes", "square_ratio=0.5", *common])


def test_rows_of_families_that_are_not_measured_are_kept(tmp_path, monkeypatch, capsys):
    results = tmp_path / "families.json"
    for name in ("quadratic", "module"):
        arguments = ["--family", name, "--particles", "2", "--seconds", "0.001", "--results", str(results)]
        monkeypatch.setattr(sys, "argv", ["families.py", *arguments])
        families.main()
    rows = json.loads(results.read_text())["rows"]
    assert list(rows) == ["quadratic", "module"]
    for row in rows.values():
        assert row["ratio"]["2"] == pytest.approx(row["batched"]["2"] / row["one_by_one"], rel=0.05, abs=0.01)
    assert "| `module` | 321 |" in capsys.readouterr().out


def test_amortization_at_a_small_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(amortization, "RATES", {name: rates[:3] for name, rates in amortization.RATES.items()})
    monkeypatch.setattr(amortization, "RECIPE", amortization.RECIPE | {"num_particles": 2, "longest": 40})
    paths = [
        "--folder",
        str(tmp_path / "runs"),
        "--results",
        str(tmp_path / "a.json"),
        "--picture",
        str(tmp_path / "a.png"),
    ]
    sizes = ["--outer-steps", "2", "--horizon", "30", "--most-groups", "3", "--pooled-steps", "2", "--seeds", "0", "1"]
    monkeypatch.setattr(sys, "argv", ["amortization.py", *paths, *sizes])
    amortization.main()
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["num_networks"] == 6 and found["measured_steps"] == [*range(11), 15, 20, 25, 30]
    counts = found["num_groups"]
    assert counts["meta_train"] == pytest.approx(sum(counts.values()) / 3, abs=1)
    adam = found["optimizers"]["adam"]
    assert adam["steps_to_adams_final"]["reached"] == 1 and adam["final_loss_minus_adams"] == [0, 0, 0]
    assert adam["steps_to_adams_final"]["share_of_its_own_steps_iqm"] == [1, 1, 1]
    assert all(len(row["curve"]) == 15 and row["rise_after_least"][0] >= 0 for row in found["optimizers"].values())
    assert found["optimizers"]["adam_per_group"]["final_loss"][0] <= adam["final_loss"][0]
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert "| learned_start |" in capsys.readouterr().out


def test_every_group_is_trained_on_once_and_only_within_its_split():
    data = source_files(amortization.SHARES)
    family = BatchedFamily(ModuleFamily(network, F.cross_entropy, data, batch_size=64))
    firsts = {}
    for split in SPLITS:
        groups = amortization.Groups(family, data, split)
        firsts[split] = groups.particles.tasks["first_row"].tolist()
        assert firsts[split] == sorted(group.first for group in data.ranges[split])
    assert len({first for found in firsts.values() for first in found}) == sum(map(len, data.ranges.values()))


def test_steps_to_a_target_of_curves_that_are_known():
    steps = measured_steps(30)
    curves = np.stack([3 - 0.1 * np.array(steps), np.full(len(steps), 3.0)], axis=1)
    np.testing.assert_allclose(final(curves, 30), [0.0, 3.0], atol=1e-12)
    np.testing.assert_array_equal(steps_to(curves, np.array([1.05, 2.0]), 30), [20, np.inf])
    np.testing.assert_array_equal(steps_to(curves, np.array([0.6, 3.0]), 30), [25, 0])
