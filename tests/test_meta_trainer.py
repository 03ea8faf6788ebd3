"""The meta-trainer: resumed it gives the same bits, broken meta-gradients are survived and counted, and it learns."""

import copy
import dataclasses
import math
import re
from typing import ClassVar

import pytest
import torch

from learned_opt import estimators, meta_trainer, rules
from learned_opt.checkpoints import CheckpointFolder
from learned_opt.curriculum import Curriculum, Stage
from learned_opt.estimators import Estimate, Estimator
from learned_opt.meta_config import MetaTrainerConfig, optimizer_class
from learned_opt.meta_loss import MetaLoss
from learned_opt.meta_trainer import MetaTrainer
from learned_opt.truncation import HorizonSchedule
from tasks.augment import LossScaling
from tasks.image_mlp import ImageMLP
from tasks.quadratic import Quadratic

FAMILIES = {"quadratic": Quadratic(dim=3), "digits": ImageMLP(hidden=(3,), batch_size=4)}


def trainer_of(
    rule="compact", families=None, estimator="backprop", dtype=torch.float32, rule_settings=None, **settings
):
    config = dict(
        outer_steps=40,
        num_particles=2,
        truncation=4,
        horizons=HorizonSchedule(longest=9),
        validation_tasks=2,
        validation_every=5,
    )
    estimator = estimators.get(estimator) if isinstance(estimator, str) else estimator
    rule = rules.get(rule, **(rule_settings or {}))
    return MetaTrainer(rule, families or FAMILIES, MetaTrainerConfig(**config | settings), estimator, dtype=dtype)


def advance(trainer, num_steps):
    """The metrics of these outer steps, with validation where it is due."""
    out = []
    for _ in range(num_steps):
        out.append(trainer.step())
        if trainer.validation_due:
            out.append(trainer.validate())
    return out


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b or (a != a and b != b)


RESUMED = {
    "plain": {},
    "in_turn": {"families_per_step": 1},
    "accumulated": {"accumulation": 2, "optimizer": "AdamW"},
    "balanced": {"families_per_step": 1, "balance_families": True},
    "momentum": {"optimizer": "SGD", "horizons": HorizonSchedule(kind="log_uniform", shortest=4, longest=9)},
}


@pytest.mark.parametrize(
    ("rule", "settings", "through_file"),
    [
        ("compact", "plain", True),
        ("l2l", "plain", False),
        ("compact", "in_turn", False),
        ("adam", "in_turn", True),
        ("adam", "accumulated", False),
        ("compact", "accumulated", True),
        ("l2l", "momentum", True),
        ("adam", "momentum", False),
        ("compact", "balanced", True),
    ],
)
def test_resumed_it_continues_with_the_same_bits(tmp_path, rule, settings, through_file):
    settings = RESUMED[settings]
    whole = trainer_of(rule, **settings)
    advance(whole, 6)
    state = whole.state_dict()
    if through_file:
        checkpoints = CheckpointFolder(tmp_path)
        checkpoints.save(state, whole.outer_step)
    want = advance(whole, 4)  # a snapshot must not change while its trainer goes on
    if through_file:
        state = checkpoints.load_latest()
    kept = copy.deepcopy(state)
    for _ in range(2):  # nor while another trainer goes on from it
        resumed = trainer_of(rule, copy.deepcopy(FAMILIES), **settings)  # nothing is traced yet
        resumed.load_state_dict(state)
        assert resumed.outer_step == 6
        got = advance(resumed, 4)
        assert same(got, want)
        assert same(resumed.state_dict(), whole.state_dict())
    assert same(state, kept)


def test_balanced_families_count_alike_whatever_their_losses_scale():
    families = {"one": Quadratic(dim=3), "two": LossScaling(family=Quadratic(dim=4), log_range=5.0)}
    settings = {"meta_loss": MetaLoss(normalization="none"), "optimizer": "SGD", "clip_norm": 1e9, "learning_rate": 0.5}
    trainer, plain = (
        trainer_of("adam", families, dtype=torch.float64, balance_families=balanced, **settings)
        for balanced in (True, False)
    )
    norms, expected = [], {name: torch.zeros_like(value) for name, value in plain.theta.items()}
    for label, work in plain.work.items():
        grads = plain.estimator.estimate(work, plain.theta, plain.estimator_states[label]).grads
        norms.append(math.sqrt(sum(float(grad.square().sum()) for grad in grads.values())))
        for name, grad in grads.items():
            expected[name] -= 0.5 * grad / norms[-1] / 2
    assert max(norms) / min(norms) > 3
    before = {name: value.clone() for name, value in trainer.theta.items()}
    trainer.step()
    for name, change in expected.items():
        assert torch.allclose(trainer.theta[name] - before[name], change, rtol=1e-9, atol=1e-15)
    # The average remembers: a second step divides by the root of 0.9 of the old squares and 0.1 of the new.
    before = trainer.state_dict()["squared_norms"]
    twin = trainer_of("adam", families, dtype=torch.float64, balance_families=True, **settings)
    twin.load_state_dict(trainer.state_dict())
    squares = {
        label: sum(float(g.square().sum()) for g in grads.values())
        for label, work in twin.work.items()
        for grads in [twin.estimator.estimate(work, twin.theta, twin.estimator_states[label]).grads]
    }
    trainer.step()
    for label, after in trainer.state_dict()["squared_norms"].items():
        assert after == pytest.approx(0.9 * before[label] + 0.1 * squares[label], rel=1e-9)


def test_resumed_after_the_last_validation_it_keeps_the_best():
    whole = trainer_of()
    advance(whole, 6)
    resumed = trainer_of()
    resumed.load_state_dict(whole.state_dict())
    assert resumed.best_step == whole.best_step == 5
    assert resumed.best_score == whole.best_score < math.inf
    assert same(resumed.best_theta, whole.best_theta)


def test_the_seed_decides():
    thetas = []
    for seed in (1, 1, 2):
        trainer = trainer_of(seed=seed)
        advance(trainer, 4)
        thetas.append(trainer.theta)
    assert same(thetas[0], thetas[1])
    assert not same(thetas[0], thetas[2])


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = trainer_of()
    advance(a, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    b = trainer_of()
    advance(b, 5)
    assert same(a.theta, b.theta)


def test_state_of_another_rule_or_other_families_is_refused():
    state = trainer_of("compact").state_dict()
    text = r"the checkpoint's theta has shapes .*\(32, 10\).* but the update rule needs .*; resume with the same rule"
    with pytest.raises(ValueError, match=text):
        trainer_of("rnnprop").load_state_dict(state)
    text = "the checkpoint was made with families quadratic, digits, not quadratic; resume with the same families"
    with pytest.raises(ValueError, match=text):
        trainer_of(families={"quadratic": Quadratic(dim=3)}).load_state_dict(state)


def test_it_learns():
    """Gradient descent on quadratics: the learning rate that it starts with is a hundred times too small."""
    trainer = trainer_of(
        "adam",
        {"quadratic": Quadratic(dim=3)},
        rule_settings={"lr": 1e-3},
        outer_steps=100,
        num_particles=4,
        learning_rate=0.1,
        truncation=10,
        horizons=HorizonSchedule(longest=20),
    )
    first = trainer.validate()["validation"]
    losses = [trainer.step()["meta_loss"] for _ in range(100)]
    last = trainer.validate()["validation"]
    assert last < first - 0.5  # the mean log of the loss's ratio
    assert sum(losses[-20:]) / 20 < sum(losses[:20]) / 20 - 0.5
    assert trainer.theta["log_lr"].exp() > 1e-2
    assert trainer.totals == {"inner_steps": 100 * 10 * 4, "skipped": 0, "invalid": 0, "clipped": 0}


def test_an_lstm_learns():
    trainer = trainer_of(
        "compact", {"quadratic": Quadratic(dim=3)}, outer_steps=100, num_particles=4, learning_rate=0.01
    )
    first = trainer.validate()["validation"]
    for _ in range(100):
        trainer.step()
    assert trainer.validate()["validation"] < first - 0.2


class Scripted(Estimator):
    """Returns the meta-gradients it is given, one after another."""

    kind = "scripted"

    def __init__(self, values):
        self.values = list(values)
        self.calls = []

    def init(self, work, theta, ids):
        return {"ids": list(ids)}

    def estimate(self, work, theta, state):
        self.calls.append(tuple(state["ids"]))
        value = self.values[(len(self.calls) - 1) % len(self.values)]
        grads = {n: torch.full_like(v, value) for n, v in theta.items()}
        return Estimate(grads=grads, meta_loss=float(value), num_inner_steps=8, num_invalid=1, num_clipped=2)

    def horizons(self, state):
        return [10, 20]

    def state_dict(self, state):
        return dict(state)

    def load_state_dict(self, work, saved):
        return dict(saved)


ONE = {"quadratic": Quadratic(dim=3)}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_meta_gradient_is_skipped_and_counted(bad):
    trainer = trainer_of("adam", ONE, Scripted([0.1, bad, 0.1]))
    trainer.step()
    theta, optimizer = copy.deepcopy(trainer.theta), copy.deepcopy(trainer.optimizer.state_dict()["state"])
    metrics = trainer.step()
    assert same(trainer.theta, theta) and same(trainer.optimizer.state_dict()["state"], optimizer)
    assert not math.isfinite(metrics["grad_norm"]) and math.isnan(metrics["grad_norm_clipped"])
    assert metrics["skipped"] == 1 and trainer.outer_step == 2
    metrics = trainer.step()
    assert metrics["skipped"] == 1 and not same(trainer.theta, theta)
    assert metrics["invalid"] == 3 and metrics["clipped"] == 6 and metrics["inner_steps"] == 24
    assert metrics["horizon"] == 15


def test_many_broken_meta_gradients_in_a_row_are_an_error():
    text = (
        r"the meta-gradient was not finite in 50 outer steps in a row; lower learning_rate \(0.003\) or the rule's "
        "output_scale, or check that the tasks' losses are finite"
    )
    trainer = trainer_of("adam", ONE, Scripted([math.nan]))
    for _ in range(30):
        trainer.step()
    resumed = trainer_of("adam", ONE, Scripted([math.nan]))
    resumed.load_state_dict(trainer.state_dict())  # what was counted before counts on
    for _ in range(19):
        resumed.step()
    with pytest.raises(RuntimeError, match=text):
        resumed.step()
    assert resumed.totals["skipped"] == 50
    now_and_then = trainer_of("adam", ONE, Scripted([math.nan] * 49 + [1.0]))
    for _ in range(120):
        now_and_then.step()
    assert now_and_then.totals["skipped"] == 118


def test_families_in_turn_and_accumulation():
    families = {f"q{dim}": Quadratic(dim=dim) for dim in (2, 3, 4)}
    scripted = Scripted([1.0])
    trainer = trainer_of("adam", families, scripted, families_per_step=2, accumulation=2)
    used = []
    for _ in range(3):
        metrics = trainer.step()
        used.append([n for n in families if f"meta_loss/{n}" in metrics])
    assert used == [["q2", "q3"], ["q2", "q4"], ["q3", "q4"]]
    # Particles are numbered through, so that no two families share tasks by number.
    ids = [(0, 1), (2, 3), (4, 5)]
    assert scripted.calls == [ids[i] for i in (0, 1, 0, 1, 2, 0, 2, 0, 1, 2, 1, 2)]
    assert trainer.totals["inner_steps"] == 12 * 8


def test_meta_gradients_are_averaged_and_clipped():
    settings = dict(optimizer="SGD", learning_rate=0.5, final_learning_rate=1.0)
    trainer = trainer_of("adam", ONE, Scripted([1.0, 3.0]), accumulation=2, clip_norm=100.0, **settings)
    before = copy.deepcopy(trainer.theta)
    metrics = trainer.step()
    assert metrics["meta_loss"] == metrics["meta_loss/quadratic"] == 2.0
    assert metrics["grad_norm"] == metrics["grad_norm_clipped"] == pytest.approx(2 * math.sqrt(3))
    for name, value in trainer.theta.items():  # three numbers, each with gradient (1 + 3)/2
        assert float(before[name] - value) == pytest.approx(0.5 * 2.0, rel=1e-5)
    trainer = trainer_of("adam", ONE, Scripted([7.0]), clip_norm=0.3, **settings)
    before = copy.deepcopy(trainer.theta)
    metrics = trainer.step()
    assert metrics["grad_norm_clipped"] == 0.3 and metrics["grad_norm"] == pytest.approx(7 * math.sqrt(3))
    for name, value in trainer.theta.items():
        assert float(before[name] - value) == pytest.approx(0.5 * 0.3 / math.sqrt(3), rel=1e-4)
    assert all(value.grad is None for value in trainer.theta.values())


def test_learning_rate_follows_half_a_cosine():
    trainer = trainer_of("adam", ONE, Scripted([1.0]), outer_steps=5, learning_rate=0.1, final_learning_rate=0.2)
    rates = [trainer.step()["learning_rate"] for _ in range(5)]
    assert rates == pytest.approx([0.1, 0.02 + 0.08 * (2 + 2**0.5) / 4, 0.06, 0.02 + 0.08 * (2 - 2**0.5) / 4, 0.02])
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.02)
    assert trainer.config.learning_rate_at(1000) == pytest.approx(0.02)
    constant = MetaTrainerConfig(final_learning_rate=1.0)
    assert {constant.learning_rate_at(step) for step in range(0, 500, 50)} == {constant.learning_rate}
    assert MetaTrainerConfig(outer_steps=1).learning_rate_at(0) == pytest.approx(3e-3)


def test_best_is_the_lowest_validation_score(monkeypatch):
    trainer = trainer_of("sgd", ONE, Scripted([1.0]), validation_every=1)
    scores = iter([3.0, 2.0, 2.5, 2.0, 1.0])

    def fake_normalize(self, losses, initial):
        return torch.full_like(losses, next(scores))

    monkeypatch.setattr(MetaLoss, "normalize", fake_normalize)
    history, thetas = [], []
    for _ in range(5):
        trainer.step()
        thetas.append(copy.deepcopy(trainer.theta))
        assert trainer.validate()["validation"] == pytest.approx([3.0, 2.0, 2.5, 2.0, 1.0][len(history)])
        history.append((trainer.best_step, trainer.best_score))
    # An equal score is no improvement.
    assert history == [(1, 3.0), (2, 2.0), (2, 2.0), (2, 2.0), (5, 1.0)]
    assert same(trainer.best_theta, thetas[4])
    trainer.step()
    assert same(trainer.best_theta, thetas[4]) and not same(trainer.theta, thetas[4])


def test_validation_score_in_closed_form():
    """Gradient descent on one-dimensional quadratics: f_t/f_0 = (1 − 2·lr·w²)^(2t)."""
    trainer = trainer_of(
        "sgd",
        {"line": Quadratic(dim=1)},
        dtype=torch.float64,
        rule_settings={"lr": 0.05},
        validation_horizon=40,
        validation_tasks=3,
    )
    got = trainer.validate()
    lr = float(trainer.theta["log_lr"].exp())
    plan = meta_trainer.EpisodePlan(split="meta_validation", run_seed=0)
    values = []
    for particle in range(3):
        generator = torch.Generator().manual_seed(plan.draw(particle, 0)[0])
        rate = 1 - 2 * lr * float(torch.randn(1, 1, generator=generator).double()) ** 2
        values.append([max(math.log(rate ** (2 * t)), math.log(1e-12)) for t in range(1, 41)])
    everything = [v for row in values for v in row]
    last = [v for row in values for v in row[-2:]]  # a twentieth of forty
    want = (sum(everything) / len(everything) + sum(last) / len(last)) / 2
    assert got["validation"] == got["validation/line"] == pytest.approx(want, rel=1e-6)


def test_validation_is_repeatable_and_moves_nothing():
    trainer = trainer_of()
    advance(trainer, 2)
    before = copy.deepcopy(trainer.state_dict())
    a, b = trainer.validate(), trainer.validate()
    assert a == b and set(a) == {"validation", "validation/quadratic", "validation/digits"}
    assert a["validation"] == pytest.approx((a["validation/quadratic"] + a["validation/digits"]) / 2)
    after = trainer.state_dict()
    for name in ("theta", "optimizer", "estimators", "outer_step", "totals"):
        assert same(before[name], after[name])


def test_diverging_validation_counts_as_the_clip():
    trainer = trainer_of("sgd", ONE, rule_settings={"lr": 1e6}, validation_horizon=200)
    got = trainer.validate()["validation"]
    assert 0.9 * math.log(1e3) < got <= math.log(1e3) * (1 + 1e-6)


def test_other_validation_families_and_horizons():
    rule = rules.get("adam")
    config = MetaTrainerConfig(
        outer_steps=3, truncation=2, num_particles=1, horizons=HorizonSchedule(longest=6), validation_tasks=1
    )
    trainer = MetaTrainer(
        rule, ONE, config, estimators.get("backprop"), validation_families={"other": Quadratic(dim=2)}
    )
    assert set(trainer.validate()) == {"validation", "validation/other"}
    assert list(trainer.work) == ["quadratic"]


def test_when_validation_is_due():
    trainer = trainer_of("adam", ONE, Scripted([1.0]), outer_steps=7, validation_every=3)
    due = []
    for _ in range(7):
        trainer.step()
        due.append(trainer.validation_due)
    assert due == [False, False, True, False, False, True, True]
    trainer = trainer_of("adam", ONE, Scripted([1.0]), outer_steps=3, validation_every=0)
    due = [(trainer.step(), trainer.validation_due)[1] for _ in range(3)]
    assert due == [False, False, True]


def test_a_given_theta_is_copied():
    rule = rules.get("adam")
    theta = {n: v + 1 for n, v in rule.init_theta(torch.Generator()).items()}
    trainer = MetaTrainer(rule, ONE, MetaTrainerConfig(learning_rate=1.0), Scripted([1.0]), theta=theta)
    assert same(trainer.theta, theta)
    trainer.step()
    assert not same(trainer.theta, theta)
    assert float(theta["log_lr"]) == pytest.approx(math.log(1e-3) + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listed(Quadratic):
    """A field without a hash."""

    scales: list[float] = dataclasses.field(default_factory=lambda: [1.0, 2.0])


def test_equal_families_share_their_data():
    trainer = trainer_of("adam", {"a": Quadratic(dim=3), "b": Quadratic(dim=3), "c": Quadratic(dim=2)})
    assert trainer.work["a"].batched is trainer.work["b"].batched is trainer.validation["a"]
    assert trainer.work["a"].batched is not trainer.work["c"].batched
    family = Listed(dim=3)
    trainer = trainer_of("adam", {"a": family, "b": Listed(dim=3)})
    assert trainer.validation["a"] is trainer.work["a"].batched is not trainer.work["b"].batched
    trainer.step()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"outer_steps": 0}, "outer_steps must be at least 1; got 0"),
        ({"num_particles": 0}, "num_particles must be at least 1; got 0"),
        ({"truncation": 0}, "truncation must be at least 1; got 0"),
        ({"accumulation": 0}, "accumulation must be at least 1; got 0"),
        ({"validation_tasks": 0}, "validation_tasks must be at least 1; got 0"),
        ({"families_per_step": -1}, "families_per_step must be non-negative; got -1"),
        ({"validation_every": -1}, "validation_every must be non-negative; got -1"),
        ({"validation_horizon": -1}, "validation_horizon must be non-negative; got -1"),
        ({"seed": -1}, "seed must be non-negative; got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite; got 0.0"),
        ({"learning_rate": math.inf}, "learning_rate must be positive and finite; got inf"),
        ({"clip_norm": math.nan}, "clip_norm must be positive and finite; got nan"),
        ({"final_learning_rate": 0.0}, "final_learning_rate must lie in (0, 1]; got 0.0"),
        ({"final_learning_rate": 1.5}, "final_learning_rate must lie in (0, 1]; got 1.5"),
        ({"optimizer": "Adm"}, "got 'Adm'; did you mean Adam"),
        (
            {"optimizer": "lr_scheduler"},
            "optimizer must name a torch.optim class for dense gradients; got 'lr_scheduler'",
        ),
        ({"optimizer": "Optimizer"}, "optimizer must name a torch.optim class for dense gradients; got 'Optimizer'"),
        ({"optimizer": "LBFGS"}, "optimizer must name a torch.optim class for dense gradients; got 'LBFGS'"),
        ({"optimizer": "SparseAdam"}, "got 'SparseAdam'"),
    ],
)
def test_bad_settings(settings, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        MetaTrainerConfig(**settings)


def test_settings_that_do_not_fit_together():
    with pytest.raises(ValueError, match="families is empty; name at least one family to meta-train on"):
        MetaTrainer(rules.get("adam"), {}, MetaTrainerConfig(), Scripted([1.0]))
    with pytest.raises(ValueError, match=r"families_per_step \(2\) exceeds the number of families \(1\)"):
        trainer_of("adam", ONE, families_per_step=2)
    text = (
        r"truncation \(10\) must not exceed the longest horizon \(9\); shorten the truncation or lengthen the horizon"
    )
    with pytest.raises(ValueError, match=text):
        trainer_of("adam", ONE, truncation=10)


def test_every_dense_optimizer_takes_a_step():
    for name in ("Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax", "Rprop", "ASGD", "Adadelta"):
        assert optimizer_class(name).__name__ == name
        trainer = trainer_of("adam", ONE, Scripted([1.0]), optimizer=name)
        before = copy.deepcopy(trainer.theta)
        trainer.step()
        assert not same(trainer.theta, before) or name == "ASGD", name


def test_dtype_of_everything():
    trainer = trainer_of("adam", ONE, dtype=torch.float64)
    trainer.step()
    particles = trainer.estimator_states["quadratic"]
    assert particles.params.dtype == torch.float64
    assert {v.dtype for v in trainer.theta.values()} == {torch.float64}


class ScriptedValidation(MetaTrainer):
    """A meta-trainer whose validation scores are given."""

    scores: ClassVar[list[float]] = []

    def _score(self):
        return {"validation/x": self.scores.pop(0)}


def test_curriculum_grows_the_horizon_and_goes_back_to_the_best():
    config = MetaTrainerConfig(
        outer_steps=100,
        num_particles=2,
        truncation=2,
        curriculum=Curriculum(horizons=(4, 6, 10), patience=1),
        validation_every=1,
        validation_tasks=1,
    )
    trainer = ScriptedValidation(rules.get("adam"), {"q": Quadratic(dim=2)}, config, estimators.get("backprop"))
    trainer.scores[:] = [3.0, 2.0, 2.5, 9.0, 8.0, 8.5, 5.0, 6.0]
    assert trainer.work["q"].plan.horizons.longest == 4
    thetas = []
    for _ in range(3):
        trainer.step()
        thetas.append({n: v.clone() for n, v in trainer.theta.items()})
        trainer.validate()
    # The third score is no better: back to the second theta, and on at the next horizon.
    assert all(torch.equal(trainer.theta[n], thetas[1][n]) for n in trainer.theta)
    assert not all(torch.equal(trainer.theta[n], thetas[2][n]) for n in trainer.theta)
    trainer.step()
    assert trainer.work["q"].plan.horizons.longest == 6
    trainer.validate()  # 9.0 is the best there is at this horizon
    assert trainer.best_score == 9.0 and trainer.best_step == 4
    resumed = ScriptedValidation(rules.get("adam"), {"q": Quadratic(dim=2)}, config, estimators.get("backprop"))
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.work["q"].plan.horizons.longest == 6
    for _ in range(4):
        assert not trainer.finished
        trainer.step()
        trainer.validate()
    assert trainer.finished and trainer.outer_step == 8
    assert trainer.best_step == 7 and trainer.best_score == 5.0
    assert all(torch.equal(trainer.theta[n], trainer.best_theta[n]) for n in trainer.theta)


def test_stages_hold_a_part_of_theta_fixed_at_first():
    config = MetaTrainerConfig(
        outer_steps=6, num_particles=2, stages=(Stage(num_outer_steps=3, trainable=("log_lr",)),), learning_rate=0.1
    )
    trainer = MetaTrainer(rules.get("adam"), {"q": Quadratic(dim=2)}, config, estimators.get("backprop"))
    start = {n: v.clone() for n, v in trainer.theta.items()}
    for _ in range(3):
        trainer.step()
    unmoved = [n for n in start if torch.equal(start[n], trainer.theta[n])]
    assert unmoved == ["log_one_minus_beta1", "log_one_minus_beta2"]
    trainer.step()
    assert not any(torch.equal(start[n], trainer.theta[n]) for n in start)


def test_a_stage_that_names_nothing_is_refused():
    config = MetaTrainerConfig(stages=(Stage(num_outer_steps=3, trainable=("output.*",)),))
    with pytest.raises(ValueError, match=r"trainable pattern 'output.\*' matches nothing in theta; it has log_lr"):
        MetaTrainer(rules.get("adam"), {"q": Quadratic(dim=2)}, config, estimators.get("backprop"))


def test_a_curriculum_needs_validation():
    with pytest.raises(ValueError, match="a curriculum advances on validation; set validation_every to at least 1"):
        MetaTrainerConfig(curriculum=Curriculum(), validation_every=0)
