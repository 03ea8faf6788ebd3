"""The command, from its arguments to its report: what it writes, what it says, and what it survives."""

import json
import re
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import trim_mean

import evaluate_optimizer
import tasks
from benchmarks import suite_summary
from learned_opt import rules, save_artifact
from learned_opt.evaluation import BASELINES, find
from learned_opt.task import TaskFamily

FAMILIES = """
square: {name: quadratic, dim: 2}
bowl: {name: rosenbrock, horizon: 6}
"""
SMALL = "--horizon 8 --num-tasks 2 --seeds 0 --num-validation-tasks 2 --num-resamples 20 --wandb disabled"
BAD = """
import torch

class Bad(torch.optim.SGD):
    def step(self, closure=None):
        raise ArithmeticError("oh no")
"""


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "mine.safetensors"
    rule = rules.get("compact")
    save_artifact(path, rule, rule.init_theta(torch.Generator().manual_seed(0)))
    return path


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, weights):
    """Run the command in an empty folder, by default without its report; (exit status, standard output, error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "families.yaml").write_text(FAMILIES)

    report = evaluate_optimizer.report

    def run(*arguments, small=True, out="out", reported=False):
        monkeypatch.setattr(evaluate_optimizer, "report", report if reported else lambda *_: None)
        base = [*SMALL.split(), "--cost-seconds", "0", "--cache", "cache", "--out", out] if small else []
        monkeypatch.setattr(sys, "argv", ["evaluate_optimizer.py", *map(str, arguments), *base])
        status = evaluate_optimizer.main()
        return status, *capsys.readouterr()

    return run


def results(folder="out"):
    with open(f"{folder}/results.json", encoding="utf-8") as file:
        return json.load(file)


def test_everything_is_written_and_a_second_time_nothing_is_computed(command, weights, tmp_path):
    arguments = (weights, "--families", "families.yaml", "--baselines", "adam", "sgd", "--explain-families", "1")
    status, out, err = command(*arguments, reported=True)
    assert status == 0, err
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {
        *("results.json", "report.html", "explanations.json", "curves.png", "speedups.png", "profiles.png")
    }
    first = results()
    assert first["complete"] and len(first["comparison"]["results"]) == 6
    assert [r["horizon"] for r in first["comparison"]["results"]] == [8, 8, 8, 6, 6, 6]
    assert "6/6  bowl, sgd: final loss" in out and "over all families" in out
    # What it comes to over all families is in the file, too.
    mine = next(total for total in first["totals"] if total["optimizer"] == "mine")
    tasks = [r["scores"]["task_speedups"] for r in first["comparison"]["results"] if r["optimizer"] == "mine"]
    assert mine["speedup"]["value"] == pytest.approx(trim_mean(np.concatenate(tasks), 0.25))
    assert [total["optimizer"] for total in first["totals"]] == ["mine", "adam", "sgd"] and mine["missing"] == []
    assert set(json.loads((tmp_path / "out" / "explanations.json").read_text())) == {"mine"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "What mine has learned" in page and f"mine@{first['settings']['optimizers']['mine'].split('@')[1]}" in page
    computed = int(re.search(r"runs from the cache: 0; computed: (\d+)", out)[1])
    status, out, _ = command(*arguments)
    assert status == 0 and f"runs from the cache: {computed}; computed: 0" in out
    assert results() == first
    # One more optimizer: that alone is computed.
    status, out, err = command("other=adam", *arguments, "--explain-families", "-1", out="elsewhere")
    assert status == 0, err
    assert f"runs from the cache: {computed}; computed: 2" in out


def test_what_a_comparison_comes_to_is_summarized(command, weights, tmp_path, capsys):
    Path("one.yaml").write_text("square: {name: quadratic, dim: 2}")
    status, _, err = command(weights, "--families", "one.yaml", "--baselines", "adam", "--explain-families", "-1")
    assert status == 0, err
    whole, file = results(), tmp_path / "out" / "results.json"
    suite_summary.main([str(file), "--command", "made it", "--out", str(tmp_path / "small.json")])
    small = json.loads((tmp_path / "small.json").read_text())
    (mine,) = [row for row in whole["comparison"]["results"] if row["optimizer"] == "mine"]
    (adam,) = [row for row in whole["comparison"]["results"] if row["optimizer"] == "adam"]
    assert small["command"] == "made it" and small["optimizers"] == whole["settings"]["optimizers"]
    found = small["8 steps"]
    assert found["adam rates"]["square"] == pytest.approx(adam["tuning"]["rate"], rel=1e-3)
    assert found["mine"]["families"]["square"]["speedup"][0] == pytest.approx(
        mine["scores"]["speedup"]["value"], rel=1e-3
    )
    assert found["mine"]["speedup"][0] == pytest.approx(whole["totals"][0]["speedup"]["value"], rel=1e-3)
    assert (found["mine"]["num_tasks"], found["mine"]["num_diverged"]) == (2, 0) and "mine [" in capsys.readouterr().out
    assert "wall_speedup" not in found["mine"] and "wall_speedup" not in found["mine"]["families"]["square"]
    # With costs: 10 + 2 milliseconds of the reference for 10 + 14 halve every speed-up.
    timed = json.loads(json.dumps(whole))
    for row in timed["comparison"]["results"]:
        row["cost"] = {"gradient": 0.010, "step": 0.014 if row["optimizer"] == "mine" else 0.002}
    timed["totals"][0]["wall_speedup"] = {"value": 1.5, "low": 1.25, "high": 2.0}
    file.write_text(json.dumps(timed))
    suite_summary.main([str(file), "--out", str(tmp_path / "timed.json")])
    found = json.loads((tmp_path / "timed.json").read_text())["8 steps"]["mine"]
    assert found["wall_speedup"] == [1.5, 1.25, 2.0]
    square = found["families"]["square"]
    assert square["wall_speedup"][0] == pytest.approx(square["speedup"][0] / 2, rel=1e-3)
    assert square["milliseconds"] == {"gradient": 10, "step": 14, "adam's step": 2}
    # An optimizer whose step could not be timed has none in the file.
    for row in timed["comparison"]["results"]:
        row["cost"]["step"] = None
    file.write_text(json.dumps(timed))
    suite_summary.main([str(file), "--out", str(tmp_path / "timed.json")])
    assert (
        "wall_speedup" not in json.loads((tmp_path / "timed.json").read_text())["8 steps"]["mine"]["families"]["square"]
    )
    file.write_text(json.dumps(whole))
    # What is not finished, or cannot be read as one horizon, is refused.
    for change, message in (
        (lambda d: d | {"complete": False}, "is of a comparison that is not finished"),
        (lambda d: d["comparison"]["results"][0].update(horizon=9) or d, "must have one horizon"),
    ):
        file.write_text(json.dumps(change(results())))
        with pytest.raises(SystemExit):
            suite_summary.main([str(file)])
        assert message in capsys.readouterr().err
        file.write_text(json.dumps(whole))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(whole | {"settings": whole["settings"] | {"optimizers": {"mine": "else@1"}}}))
    with pytest.raises(SystemExit):
        suite_summary.main([str(file), str(other)])
    assert "compares other optimizers" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_loses_nothing(command, weights, monkeypatch, number):
    arguments = (weights, "--families", "families.yaml", "--baselines", "adam", "sgd", "--explain-families", "-1")
    original = evaluate_optimizer.ComparisonProgress.started
    calls = []

    def started(self, family, optimizer):
        calls.append((family, optimizer))
        if len(calls) == 4:
            signal.raise_signal(number)
        original(self, family, optimizer)

    monkeypatch.setattr(evaluate_optimizer.ComparisonProgress, "started", started)
    reported = number == signal.SIGTERM
    status, out, _ = command(*arguments, reported=reported)
    assert status == 128 + number and "interrupted; the same command goes on from here" in out
    found = results()
    assert not found["complete"] and len(found["comparison"]["results"]) == 3 and len(found["totals"]) == 3
    if reported:
        with open("out/report.html", encoding="utf-8") as file:
            assert "This comparison is not complete: 3 of 6 results are here." in file.read()
    # The order of results is that of a run in one go, and what was there is not computed again.
    status, out, _ = command(*arguments)
    assert status == 0 and results()["complete"]
    assert int(re.search(r"runs from the cache: (\d+)", out)[1]) >= 4


def test_a_crash_within_an_optimizer_is_an_entry(command, weights, tmp_path):
    (tmp_path / "bad_optimizer.py").write_text(BAD)
    status, out, err = command(
        weights, "--families", "families.yaml", "--baselines", "adam", "bad_optimizer:Bad", "--explain-families", "-1"
    )
    assert status == 0, err
    assert "square, Bad: could not run: ArithmeticError: oh no" in out
    rows = results()["comparison"]["results"]
    assert [row["scores"] is None for row in rows] == [False, False, True] * 2


def test_several_horizons_are_families_of_their_own(command, weights):
    status, _, err = command(
        weights, "--families", "rosenbrock", "--baselines", "adam", "--horizons", "3", "5", "--explain-families", "-1"
    )
    assert status == 0, err
    found = results()["comparison"]
    assert list(found["families"]) == ["rosenbrock, 3 steps", "rosenbrock, 5 steps"]
    assert [row["horizon"] for row in found["results"]] == [3, 3, 5, 5]


def test_damaged_runs_are_computed_again(command, weights, tmp_path):
    arguments = (weights, "--families", "rosenbrock", "--baselines", "adam_default", "--explain-families", "-1")
    command(*arguments)
    entries = list((tmp_path / "cache").glob("*.safetensors"))
    assert len(entries) == 2
    entries[0].write_bytes(entries[0].read_bytes()[:-5])
    status, out, _ = command(*arguments)
    assert status == 0 and "runs from the cache: 1; computed: 1, 1 damaged ones among them" in out


def test_no_cache(command, weights, tmp_path):
    status, out, _ = command(
        *(weights, "--families", "rosenbrock", "--baselines", "adam_default", "--explain-families", "-1"),
        *(*SMALL.split(), "--cost-seconds", "0.005", "--cache", "off", "--out", "runs/here"),
        small=False,
    )
    assert status == 0 and "cache" not in out and not (tmp_path / "cache").exists()
    assert results("runs/here")["comparison"]["results"][0]["cost"]["step"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine.safetensors", "--suite", "tests"], "suite must be one of train, validation"),
        (["mine.safetensors", "--families", "quadratc"], "unknown task family 'quadratc'; did you mean quadratic"),
        (["mine.safetensors", "--families"], "--families was given no value; name at least one, or leave it out"),
        (["mine.safetensors", "--baselines", "--suite", "test"], "--baselines was given no value"),
        (["mine.safetensors", "--horizons"], "--horizons was given no value"),
        (["mine.safetensors", "--families", "bad.yaml"], "unknown task family 'nothing'"),
        (["mine.safetensors", "--families", "list.yaml"], "list.yaml must hold a mapping of labels to families"),
        (["mine.safetensors", "--families", "broken.yaml"], "broken.yaml is not valid YAML"),
        (
            ["mine.safetensors", "--families", "horizon.yaml"],
            "the horizon of 'a' must be a whole number of at least 1; got 0",
        ),
        (["mine.safetensors", "--families", "missing.yaml"], "missing.yaml"),
        (["mine.safetensors", "--families", "quadratic", "quadratic"], "two families are called 'quadratic'"),
        (["nobody"], "the weights 'nobody' are neither a file nor a shipped optimizer"),
        (["missing.safetensors"], "no exported optimizer at missing.safetensors"),
        (["foreign.safetensors"], "foreign.safetensors is a safetensors file, but no exported optimizer"),
        (["text.safetensors"], "text.safetensors is not a readable safetensors file"),
        (["damaged.safetensors"], "damaged.safetensors is damaged"),
        (["mine.safetensors", "mine.safetensors"], "two optimizers are called 'mine'; give one another label"),
        (["adam=mine.safetensors"], "two optimizers are called 'adam'; give the learned one another label"),
        (["mine.safetensors", "--baselines", "adamm"], "unknown baseline 'adamm'; did you mean adam"),
        (["mine.safetensors", "--horizons", "0"], "must be at least 1; got 0"),
        (["mine.safetensors", "--num-threads", "0"], "num_threads must be at least 1; got 0"),
        (["mine.safetensors", "--device", "abacus"], "device 'abacus' cannot be used here"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_bad_input_is_told_before_any_work(command, weights, tmp_path, arguments, message):
    from safetensors.torch import save

    (tmp_path / "bad.yaml").write_text("a: {name: nothing}")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    (tmp_path / "broken.yaml").write_text("a: {name: [\n")
    (tmp_path / "horizon.yaml").write_text("a: {name: quadratic, horizon: 0}")
    (tmp_path / "foreign.safetensors").write_bytes(save({"x": torch.zeros(2)}))
    (tmp_path / "text.safetensors").write_text("hello")
    data = bytearray(weights.read_bytes())
    data[-2] ^= 64
    (tmp_path / "damaged.safetensors").write_bytes(data)
    if "--families" not in arguments and "--suite" not in arguments:
        arguments = [*arguments, "--families", "quadratic"]
    status, out, err = command(*arguments)
    assert status == 2 and err.startswith("error: ") and message in err
    assert "1/" not in out and not (tmp_path / "out" / "results.json").exists()


def test_a_folder_of_another_comparison_is_refused(command, weights):
    arguments = (weights, "--families", "rosenbrock", "--explain-families", "-1")
    assert command(*arguments, "--baselines", "adam_default")[0] == 0
    before = results()
    status, _, err = command(*arguments, "--baselines", "sgd")
    assert status == 2 and "out holds the results of another comparison; name another folder with --out" in err
    assert results() == before


def test_by_default_the_folder_is_named_after_the_settings(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def folder(*arguments):
        parsed = evaluate_optimizer.parse([str(weights), "--families", "quadratic", *arguments])
        return evaluate_optimizer.folder_for(parsed, evaluate_optimizer.prepare(parsed))

    assert folder() == folder() != folder("--horizon", "9")
    assert re.fullmatch(r"runs/evaluation-families-[0-9a-f]{8}", folder().as_posix())


def test_what_is_not_installed_is_left_out_unless_it_is_named(command, weights, monkeypatch):
    import dataclasses

    for name in list(BASELINES):
        if name not in ("adam", "prodigy"):
            monkeypatch.delitem(BASELINES, name)
    monkeypatch.setitem(BASELINES, "prodigy", dataclasses.replace(BASELINES["prodigy"], needs="no_such_package"))
    arguments = (weights, "--families", "rosenbrock", "--explain-families", "-1")
    status, out, _ = command(*arguments)
    assert status == 0 and "prodigy is left out: pip install 'learned-opt[baselines]'" in out
    status, _, err = command(*arguments, "--baselines", "prodigy")
    assert status == 2 and "the baseline 'prodigy' needs no_such_package" in err


def test_all_of_it_goes_to_the_tracker(command, weights, monkeypatch):
    seen = []

    class Recorder:
        def __init__(self, config, folder, settings, *, resume):
            seen.append(("start", config.mode, settings["baselines"], resume))

        def __getattr__(self, name):
            return lambda *args, **kwargs: seen.append((name, *args[:1]))

    monkeypatch.setattr(evaluate_optimizer, "Tracker", Recorder)
    arguments = (weights, "--families", "rosenbrock", "--baselines", "adam", "--explain-families", "-1")
    assert command(*arguments, reported=True)[0] == 0
    assert seen[0] == ("start", "disabled", ["adam"], False)
    assert [entry[:2] for entry in seen[1:5]] == [
        ("log_table", "results"),
        ("log_image", "curves"),
        ("log_image", "speedups"),
        ("log_image", "profiles"),
    ]
    assert [entry[1].name for entry in seen if entry[0] == "log_artifact"] == ["results.json", "report.html"]
    assert seen[-1] == ("finish",)


def test_the_default_suite_is_one_that_nothing_is_downloaded_for():
    families, horizons = evaluate_optimizer.load_families(evaluate_optimizer.parse(["adam"]))
    assert all(isinstance(family, TaskFamily) for family in families.values()) and not horizons
    assert evaluate_optimizer.parse(["adam"]).suite == "test_small"


def test_no_reference_is_no_obstacle(command, weights, tmp_path):
    status, out, err = command(
        weights, "--families", "rosenbrock", "--baselines", "sgd", "--explain-families", "-1", reported=True
    )
    assert status == 0, err
    assert "over all families" not in out and not (tmp_path / "out" / "speedups.png").exists()
    assert results()["comparison"]["reference"] == ""


def test_what_the_docs_show_works(tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^python evaluate_optimizer.py.*", text, re.M)]
    assert len(commands) == 4
    parsed = [evaluate_optimizer.parse(words[2:]) for words in commands]
    assert parsed[1].optimizers == ("mine=a.safetensors", "old=b.safetensors") and parsed[1].horizons == (200, 1000)
    described = re.search(r"```yaml\n(.*?)```", text, re.S)[1]
    (tmp_path / "my_families.yaml").write_text(described)
    found, horizons = evaluate_optimizer.read_families(tmp_path / "my_families.yaml")
    assert tasks.build(found)["small digits"].hidden == (20,) and horizons == {"long quadratics": 2000}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_optimizers.py").write_text(re.search(r"```python\n(.*?)```", text, re.S)[1])
    names = parsed[3].baselines
    baselines = [find(name) for name in names]
    assert [baseline.name for baseline in baselines] == ["adam", "nadam", "RAdam"]
    assert baselines[1].make([torch.zeros(1, requires_grad=True)]).defaults["betas"] == (0.8, 0.99)
