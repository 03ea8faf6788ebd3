"""The benchmarks of the guard and of a step run at small size, and tell right from wrong."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

from learned_opt import Artifact, rules

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def guard_benchmark():
    return load("guard")


@pytest.fixture(scope="module")
def step_benchmark():
    return load("step")


def test_parameter_sets_have_the_sizes_of_the_models(step_benchmark):
    sizes = {name: sum(map(math.prod, shapes)) for name, shapes in step_benchmark.MODELS.items()}
    assert sizes == {"vit_b16": 86_567_656, "gpt2_small": 124_439_808, "tiny": 53_354}


def test_the_device_report_runs_on_the_cpu(step_benchmark, capsys):
    report = step_benchmark.device_report(["compact"], ["tiny"], torch.device("cpu"), 1)
    assert [(row["optimizer"], row["step"]) for row in report["rows"]] == [
        ("AdamW", "foreach"),
        ("AdamW", "fused"),
        ("compact", "plain"),
        ("compact", "plain, guarded"),
    ]
    assert [round(row["state_bytes"]) for row in report["rows"]] == [8, 8, 72, 84]
    assert all(row["ms"] > 0 and row["ms_per_million"] == pytest.approx(row["ms"] / 0.053354) for row in report["rows"])
    assert capsys.readouterr().out.count("| tiny |") == 4


def test_sets_of_the_guard_benchmark_share_nothing(guard_benchmark):
    cases = {name: {case.name for case in make()} for name, make in guard_benchmark.SETS.items()}
    families = {name: {case.family.describe() for case in make()} for name, make in guard_benchmark.SETS.items()}
    assert not cases["development"] & cases["held_out"]
    assert not families["development"] & families["held_out"]
    assert len(set(guard_benchmark.FIRST_SEED.values())) == 2


def test_the_guard_benchmark_sees_ruin_and_rescue(guard_benchmark):
    case = guard_benchmark.Case(
        name="steep", family=guard_benchmark.Function(kind="steep"), hostile=True, num_steps=120, scale=1e3
    )
    wild = guard_benchmark.wild()
    rows = [
        guard_benchmark.work(("development", case, 0, label, artifact, guard))
        for label, artifact, guard in (("Adam", None, False), ("wild", wild, False), ("wild", wild, True))
    ]
    (found,) = guard_benchmark.summary(rows)
    assert found["alone_to_adam"] == math.inf and found["cost"] is None
    assert found["to_adam"] <= 1.1 and found["to_start"] <= 1
    assert not guard_benchmark.show([found]).endswith("!")
    assert guard_benchmark.show([{**found, "to_adam": 1.2}]).endswith("!")
    assert guard_benchmark.show([{**found, "hostile": False, "cost": 1.05}]).endswith("!")


def test_ten_times_as_large(guard_benchmark):
    rule = rules.get("compact")
    artifact = Artifact.of(rule, rule.init_theta(torch.Generator().manual_seed(0)), name="compact")
    large = guard_benchmark.ten_times(artifact)
    grads, params = torch.randn(5, generator=torch.Generator().manual_seed(1)), torch.zeros(5)
    small_update, _ = rule.update(artifact.theta, grads, params, rule.init_state(5))
    large_update, _ = large.rule.update(large.theta, grads, params, rule.init_state(5))
    torch.testing.assert_close(large_update, 10 * small_update)
    assert guard_benchmark.ten_times(guard_benchmark.wild()) is None
