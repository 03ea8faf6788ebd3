"""The time of a step, against optimizers and losses that take a known time."""

import dataclasses
import time
from typing import ClassVar

import pytest
import torch
from evaluation_families import Parabola, Regression

from learned_opt import rules
from learned_opt.artifact import Artifact
from learned_opt.evaluation import BASELINES, Baseline, Cost, EvaluationConfig, Learned, compare, cost

REST = 0.004


class Slow(torch.optim.SGD):
    """Takes a known time for a step."""

    def step(self, closure=None):
        time.sleep(REST)
        return super().step(closure)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlowParabola(Parabola):
    """Takes a known time for a loss."""

    name: ClassVar[str] = "slow_parabola"

    def loss(self, params, task, batch):
        time.sleep(REST)
        return super().loss(params, task, batch)


def test_a_step_takes_the_time_it_takes():
    setting = cost.prepare(Regression(), seconds=0.01)
    slow = cost.measure(Baseline(name="slow", make=Slow), setting, seconds=0.02)
    fast = cost.measure(BASELINES["sgd"], setting, seconds=0.02)
    assert fast.step < REST <= slow.step
    assert slow.gradient == fast.gradient == setting.gradient > 0
    assert slow.total == slow.gradient + slow.step


def test_a_gradient_takes_the_time_it_takes():
    assert cost.prepare(SlowParabola(), seconds=0.02).gradient >= REST > cost.prepare(Parabola(), seconds=0.02).gradient


def test_what_is_timed_is_what_a_user_builds(monkeypatch):
    built = []
    original = cost.LearnedOptimizer

    def build(params, *, weights):
        built.append([tuple(p.shape) for p in params])
        return original(params, weights=weights)

    monkeypatch.setattr(cost, "LearnedOptimizer", build)
    rule = rules.get("compact")
    artifact = Artifact.of(rule, rule.init_theta(torch.Generator().manual_seed(0)), name="x")
    setting = cost.prepare(Regression(), seconds=0.01)
    before = [leaf.detach().clone() for leaf in setting.params]
    assert cost.measure(artifact, setting, seconds=0.01).step > 0
    assert built == [[(3,), (1,)]]
    assert all(torch.equal(a, b) for a, b in zip(before, setting.params)), "the setting is shared by all optimizers"


def test_every_baseline_can_be_timed():
    setting = cost.prepare(Regression(), seconds=0.01)
    for baseline in BASELINES.values():
        assert cost.measure(baseline, setting, seconds=0.005).step > 0


def test_a_parameter_without_gradient_is_no_obstacle():
    class Unused(Parabola):
        def init_params(self, task, generator):
            return {**super().init_params(task, generator), "unused": torch.zeros(3)}

    assert cost.measure(BASELINES["adam"], cost.prepare(Unused(), seconds=0.01), seconds=0.01).step > 0


def test_a_comparison_measures_when_it_is_asked_to():
    rule = rules.get("sgd", lr=0.1)
    learned = Learned(name="any label, even this one", rule=rule, theta=rule.init_theta(torch.Generator()))
    config = EvaluationConfig(
        horizon=5, num_tasks=2, seeds=(0,), num_validation_tasks=2, num_resamples=20, cost_seconds=0.01
    )
    timed = compare([learned, BASELINES["adam"]], {"p": Parabola()}, config)
    costs = [result.cost for result in timed.results]
    assert all(isinstance(c, Cost) and c.step > 0 for c in costs) and costs[0].gradient == costs[1].gradient
    assert set(timed.to_json()["results"][0]["cost"]) == {"gradient", "step"}
    untimed = compare([learned], {"p": Parabola()}, dataclasses.replace(config, cost_seconds=0.0))
    assert untimed.results[0].cost is None


def test_what_cannot_be_timed_keeps_its_scores(monkeypatch):
    def fail(*_, **__):
        raise OverflowError("too much\nof it")

    monkeypatch.setattr(cost, "measure", fail)
    config = EvaluationConfig(horizon=3, num_tasks=2, seeds=(0,), num_resamples=10, cost_seconds=0.01)
    result = compare([BASELINES["adam_default"]], {"p": Parabola()}, config).results[0]
    assert result.scores is not None and result.cost is None
    assert result.note == "its step could not be timed: OverflowError: too much"


def test_prodigy_is_not_driven_to_overflow_by_one_gradient_over_and_over():
    pytest.importorskip("prodigyopt")
    setting = cost.prepare(Regression(), seconds=0.01)
    assert cost.measure(BASELINES["prodigy"], setting, seconds=0.3).step > 0


def test_bad_times():
    with pytest.raises(ValueError, match="seconds must be positive and finite; got 0"):
        cost.prepare(Parabola(), seconds=0)
    with pytest.raises(ValueError, match=r"cost_seconds must lie in \[0, 60\]; got -1"):
        EvaluationConfig(cost_seconds=-1)
