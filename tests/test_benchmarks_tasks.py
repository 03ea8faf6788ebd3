"""The benchmarks of task families run at a small size, and save what they say."""

import json
import sys

import pytest

from benchmarks import families, few_shot


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
