"""The horizon curriculum as a state machine, and stages that hold part of theta fixed."""

import math

import pytest
import torch
from estimator_reference import NoisyBowl, theta_of, workload

from learned_opt import estimators, rules
from learned_opt.curriculum import Action, Curriculum, CurriculumState, Stage, frozen_names


def drive(curriculum, scores):
    state, actions = CurriculumState(), []
    for score in scores:
        state, action = curriculum.observe(state, score)
        actions.append(action)
    return state, actions


def test_advances_when_validation_at_the_next_horizon_stops_improving():
    curriculum = Curriculum(horizons=(100, 200, 500), patience=2)
    assert (curriculum.num_stages, curriculum.horizon(CurriculumState())) == (3, 100)
    assert curriculum.validation_horizon(CurriculumState()) == 200
    state, actions = drive(curriculum, [1.0, 0.9, 0.95, 0.8, 0.8, 0.81])
    keep, go_on = Action.KEEP, Action.CONTINUE
    assert actions == [keep, keep, go_on, keep, go_on, Action.ADVANCE]
    assert state == CurriculumState(stage=1) and curriculum.horizon(state) == 200
    assert curriculum.validation_horizon(state) == 500
    # A new stage has a new best: scores at another horizon cannot be compared.
    state, action = curriculum.observe(state, 5.0)
    assert action is Action.KEEP and state.best == 5.0


def test_finishes_after_the_last_horizon():
    curriculum = Curriculum(horizons=(10, 20), patience=1)
    state, actions = drive(curriculum, [1.0, 2.0, 1.0, 2.0])
    assert actions == [Action.KEEP, Action.ADVANCE, Action.KEEP, Action.FINISH]
    assert state.finished and curriculum.validation_horizon(state) == 520
    with pytest.raises(ValueError, match="the curriculum has finished; there is nothing to observe"):
        curriculum.observe(state, 1.0)


def test_horizons_continue_in_steps_of_500():
    curriculum = Curriculum(longest=3400, patience=1)
    state, seen = CurriculumState(), []
    while not state.finished:
        seen.append(curriculum.horizon(state))
        state, action = curriculum.observe(state, math.nan)
    assert seen == [100, 200, 500, 1000, 1500, 2000, 2500, 3000]
    assert action is Action.FINISH


def test_scores_that_are_not_finite_never_improve():
    state, actions = drive(Curriculum(patience=3), [math.nan, math.inf, 1.0, math.nan, math.inf, -math.inf])
    assert [a.value for a in actions] == ["continue", "continue", "keep", "continue", "continue", "advance"]
    assert state.stage == 1


def test_min_improvement():
    _, actions = drive(Curriculum(patience=9, min_improvement=0.1), [1.0, 0.95, 0.89])
    assert actions == [Action.KEEP, Action.CONTINUE, Action.KEEP]


def test_state_is_plain_values():
    state, _ = drive(Curriculum(patience=2), [1.0, 2.0])
    assert state.state_dict() == {"stage": 0, "best": 1.0, "num_bad": 1, "finished": False}
    assert CurriculumState(**state.state_dict()) == state


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizons": ()}, r"horizons must be increasing and at least 1; got \(\)"),
        ({"horizons": (200, 100)}, r"horizons must be increasing and at least 1; got \(200, 100\)"),
        ({"horizons": (0, 100)}, "horizons must be increasing and at least 1"),
        ({"longest": 50}, r"longest must be 0 or at least the first horizon \(100\); got 50"),
        ({"patience": 0}, "patience must be at least 1; got 0"),
        ({"min_improvement": -0.1}, "min_improvement must be non-negative; got -0.1"),
    ],
)
def test_bad_curricula(settings, message):
    with pytest.raises(ValueError, match=message):
        Curriculum(**settings)


def test_frozen_names_stage_by_stage():
    names = ["lstm.0.weight", "lstm.0.bias", "output.weight"]
    stages = [Stage(num_outer_steps=2, trainable=("output.*",)), Stage(num_outer_steps=1, trainable=["lstm.*"])]
    expected = [names[:2], names[:2], names[2:], [], []]
    assert [list(frozen_names(stages, step, names)) for step in range(5)] == expected
    with pytest.raises(
        ValueError, match=r"trainable pattern 'outptu\.\*' matches nothing in theta; it has lstm\.0\.weight, "
    ):
        frozen_names([Stage(num_outer_steps=1), Stage(num_outer_steps=1, trainable=("outptu.*",))], 0, names)
    with pytest.raises(ValueError, match="num_outer_steps must be at least 1; got 0"):
        Stage(num_outer_steps=0)
    with pytest.raises(ValueError, match="trainable is empty"):
        Stage(num_outer_steps=1, trainable=())


@pytest.mark.parametrize("kind", list(estimators.ESTIMATORS))
def test_the_rest_of_theta_is_learned_and_the_frozen_part_stays(kind):
    rule = rules.get("adam", lr=0.05)
    theta = theta_of(rule)
    start = {n: v.clone() for n, v in theta.items()}
    stages = [Stage(num_outer_steps=2, trainable=("log_lr",))]
    optimizer = torch.optim.Adam(theta.values(), lr=0.01)
    estimator = estimators.get(kind)
    state = None
    for step in range(2):
        work = workload(rule, NoisyBowl(), truncation=3, horizon=6, frozen=frozen_names(stages, step, theta))
        state = state or estimator.init(work, theta, range(8))
        grads = estimator.estimate(work, theta, state).grads
        for name, value in theta.items():
            value.grad = None if name in work.frozen else grads[name]
        optimizer.step()
    assert {n for n in theta if not torch.equal(theta[n], start[n])} == {"log_lr"}
