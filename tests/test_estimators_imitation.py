"""Imitation: its auxiliary loss and gradient against a run written out for one particle at a time."""

import math

import pytest
import torch
from estimator_reference import Arm, NoisyBowl, TwoTensors, theta_of, workload
from rule_cases import update_by_hand

from learned_opt import estimators, rules
from learned_opt.estimators.antithetic import flatten, unflatten

STUDENTS = ["compact", "rnnprop", "l2l", "adam", "sgd", "paced"]
TEACHERS = {"adam": {"lr": 0.05}, "paced": {"output_scale": 0.05, "growth": 0.5}}


def reference_truncations(work, theta, teacher, policy, particles, num_truncations):
    """Per truncation: (auxiliary loss as a function of theta, with the trajectory as constants; its value)."""
    teacher_theta = {n: v.double() for n, v in teacher.init_theta(torch.Generator().manual_seed(0)).items()}
    arms = []
    for particle in particles:
        arm = Arm(work, particle)
        arm.other = None
        arms.append(arm)
    out = []
    for _ in range(num_truncations):
        pieces = []  # (student's state at the start, [(gradient, parameters)], [teacher's update])
        for arm in arms:
            sizes = [v.numel() for v in arm.params.values()]
            size = sum(sizes)
            piece = None
            for _ in range(work.truncation):
                flat = torch.cat([v.reshape(-1) for v in arm.params.values()])
                if arm.step == 0:
                    arm.student = work.rule.init_state(size, dtype=torch.float64)
                    arm.taught = teacher.init_state(size, dtype=torch.float64)
                    piece = None
                if piece is None:
                    piece = (arm.student, [], [])
                    pieces.append(piece)
                goal, arm.taught = update_by_hand(teacher, teacher_theta, arm.grad, flat, arm.taught, sizes)
                update, arm.student = update_by_hand(work.rule, theta, arm.grad, flat, arm.student, sizes)
                piece[1].append((arm.grad, flat))
                piece[2].append(goal)
                # Let the arm move by the chosen update: its own rule is not asked.
                move = goal if policy == "off" else update
                parts = zip(arm.params.items(), move.split(sizes))
                arm.params = {n: v + part for (n, v), part in parts}
                arm.step += 1
                _, arm.grad = arm.evaluate()
                if arm.step == arm.horizon:
                    arm.start(arm.episode + 1)

        def loss(at, pieces=pieces, sizes=sizes):
            error, norm = 0.0, 0.0
            for state, seen, goals in pieces:
                for (grad, flat), goal in zip(seen, goals):
                    update, state = update_by_hand(work.rule, at, grad, flat, state, sizes)
                    error = error + (update - goal).square().sum()
                    norm = norm + goal.square().sum()
            return error / norm

        out.append(loss)
    return out


@pytest.mark.parametrize("policy", ["off", "on"])
@pytest.mark.parametrize("teacher_name", list(TEACHERS))
@pytest.mark.parametrize("rule_name", STUDENTS)
def test_equals_autograd_of_the_auxiliary_loss(rule_name, teacher_name, policy):
    rule = rules.get(rule_name)
    theta, settings = theta_of(rule), TEACHERS[teacher_name]
    teacher = rules.get(teacher_name, **settings)
    work = workload(rule, TwoTensors(), truncation=5, horizon=7, run_seed=4)
    taught = {"teacher": teacher_name, "teacher_settings": settings}
    if teacher_name == "paced":
        taught["teacher_theta"] = teacher.init_theta(torch.Generator().manual_seed(0))
    estimator = estimators.get("imitation", policy=policy, share=1.0, weight=2.5, **taught)
    state = estimator.init(work, theta, range(3))
    for loss in reference_truncations(work, theta, teacher, policy, range(3), 3):
        got = estimator.estimate(work, theta, state)
        leaf = flatten(theta).requires_grad_()
        value = loss(unflatten(leaf, theta))
        (want,) = torch.autograd.grad(value, leaf)
        assert got.metrics["imitation_loss"] == pytest.approx(value.item(), rel=1e-9)
        torch.testing.assert_close(flatten(got.grads), 2.5 * want, rtol=1e-7, atol=1e-9 * float(want.abs().max()))
        h, direction = 1e-5, torch.randn(len(want), dtype=torch.float64)
        difference = (
            loss(unflatten(leaf.detach() + h * direction, theta))
            - loss(unflatten(leaf.detach() - h * direction, theta))
        ) / (2 * h)
        assert float(want @ direction) == pytest.approx(float(difference), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("rule_name", ["compact", "paced"])
def test_chunks_do_not_change_the_gradient(rule_name, monkeypatch):
    from learned_opt.estimators import imitation

    rule = rules.get(rule_name)
    theta = theta_of(rule)
    work = workload(rule, TwoTensors(), truncation=5, horizon=7)
    results = []
    for chunk in (2048, 4):
        monkeypatch.setattr(imitation, "fitting_chunk", lambda rule, chunk=chunk: 2 * chunk)
        estimator = estimators.get("imitation", share=1.0)
        state = estimator.init(work, theta, range(4))
        results.append([flatten(estimator.estimate(work, theta, state).grads) for _ in range(3)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_rule_that_is_the_teacher_has_nothing_to_learn():
    rule = rules.get("adam", lr=0.05)
    work = workload(rule, NoisyBowl(), truncation=5, horizon=7)
    theta = theta_of(rule)
    for policy in ("off", "on"):
        estimator = estimators.get("imitation", teacher_settings={"lr": 0.05}, share=1.0, policy=policy)
        state = estimator.init(work, theta, range(2))
        for _ in range(4):
            estimate = estimator.estimate(work, theta, state)
            assert estimate.metrics["imitation_loss"] == 0 and flatten(estimate.grads).abs().max() == 0


def test_adds_to_the_other_estimator_on_the_rest():
    rule = rules.get("compact")
    theta = theta_of(rule)
    work = workload(rule, NoisyBowl(), truncation=5, horizon=7)
    ids = list(range(20))
    both = estimators.get("imitation", share=0.3, weight=0.5)
    chosen = [i for i in ids if both.imitates(i)]
    assert len(chosen) == 6 and all(i ^ 1 in chosen for i in chosen)
    alone = estimators.get("imitation", share=1.0, weight=0.5)
    plain = estimators.get("backprop")
    states = [
        both.init(work, theta, ids),
        alone.init(work, theta, chosen),
        plain.init(work, theta, [i for i in ids if i not in chosen]),
    ]
    for _ in range(3):
        total, a, b = (e.estimate(work, theta, s) for e, s in zip((both, alone, plain), states))
        torch.testing.assert_close(flatten(total.grads), flatten(a.grads) + flatten(b.grads), rtol=1e-9, atol=1e-14)
        assert total.meta_loss == b.meta_loss
        assert total.num_inner_steps == 5 * 20
    assert estimators.get("imitation", share=0.3).init(work, theta, [0, 1]).particles is None


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.77, 1.0])
def test_the_share_is_kept_over_many_particles(share):
    estimator = estimators.get("imitation", share=share)
    assert sum(map(estimator.imitates, range(2000))) / 2000 == pytest.approx(share, abs=0.002)


def test_a_teacher_theta_can_be_given():
    rule = rules.get("sgd", lr=0.1)
    work = workload(rule, NoisyBowl(), truncation=3, horizon=6)
    theta = theta_of(rule)
    estimator = estimators.get(
        "imitation", teacher="sgd", teacher_theta={"log_lr": torch.tensor(math.log(0.2))}, share=1.0
    )
    estimate = estimator.estimate(work, theta, estimator.init(work, theta, range(2)))
    # u = 0.1 g and ū = 0.2 g: the loss is (1 − ½)², whatever the gradients, and its slope in log lr is −2·(1 − ½)·½.
    assert estimate.metrics["imitation_loss"] == pytest.approx(0.25, rel=1e-6)
    assert float(estimate.grads["log_lr"]) == pytest.approx(-0.5, rel=1e-6)


def test_errors_name_the_argument_and_what_is_allowed():
    with pytest.raises(ValueError, match="policy must be one of off, on; got 'both'"):
        estimators.get("imitation", policy="both")
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\]; got 0"):
        estimators.get("imitation", share=0)
    with pytest.raises(ValueError, match="weight must be positive; got -1"):
        estimators.get("imitation", weight=-1)
    with pytest.raises(ValueError, match="unknown update rule 'adm'; did you mean adam"):
        estimators.get("imitation", teacher="adm")
    with pytest.raises(ValueError, match="unknown estimator 'bprop'; did you mean backprop"):
        estimators.get("imitation", estimator="bprop")
