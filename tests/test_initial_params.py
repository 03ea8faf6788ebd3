"""Learned initial parameters: their meta-gradients against plain autograd, finite differences and MAML by hand."""

import dataclasses
from typing import ClassVar

import pytest
import torch

import tasks
from learned_opt import estimators, rules
from learned_opt.batched import BatchedFamily
from learned_opt.curriculum import Stage
from learned_opt.estimators import Workload
from learned_opt.estimators.antithetic import flatten, perturbations, unflatten
from learned_opt.evaluation.runs import run_rule
from learned_opt.initial_params import InitialParamsConfig, flat_params, name_of, with_initial
from learned_opt.meta_config import MetaTrainerConfig
from learned_opt.meta_loss import MetaLoss
from learned_opt.meta_trainer import MetaTrainer
from learned_opt.particles import EpisodePlan, start_particles
from learned_opt.task import TaskFamily, draw_batches, draw_task, task_seed
from learned_opt.truncation import HorizonSchedule
from learned_opt.unroll import unroll

NAME = name_of("task")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curved(TaskFamily):
    """A non-quadratic loss with noise in its batches; with `apart`, another one judges."""

    name: ClassVar[str] = "curved"
    dim: int = 3
    apart: bool = True

    def sample_task(self, split, generator):
        return {"h": 0.5 + torch.rand(self.dim, generator=generator), "q": torch.rand(self.dim, generator=generator)}

    def init_params(self, task, generator):
        return {"x": torch.randn(self.dim, generator=generator)}

    def sample_batches(self, task, num_steps, generator):
        return {"shift": 0.3 * torch.randn(num_steps, self.dim, generator=generator)}

    def loss(self, params, task, batch):
        x = params["x"] + batch["shift"]
        return 0.1 + (0.5 * task["h"] * x.square() + 0.3 * x.cos()).sum()

    def query_loss(self, params, task, batch):
        if not self.apart:
            return None
        return 0.2 + ((params["x"] - task["q"] + 0.5 * batch["shift"]).square() * task["h"]).sum().sqrt()


def theta_of(rule, dim=3):
    theta = {n: v.double() for n, v in rule.init_theta(torch.Generator().manual_seed(0)).items()}
    theta = {n: v * 10 if n == "output.weight" else v for n, v in theta.items()}
    return {**theta, NAME: torch.linspace(-0.7, 0.9, dim, dtype=torch.float64)}


def work_of(rule, family, *, truncation, horizon, normalization="log", average="mean", **horizons):
    return Workload(
        rule=rule,
        batched=BatchedFamily(family, dtype=torch.float64),
        plan=EpisodePlan(
            split="meta_train",
            run_seed=3,
            horizons=HorizonSchedule(longest=horizon, random_offsets=False, **horizons),
        ),
        meta_loss=MetaLoss(normalization=normalization, average=average),
        truncation=truncation,
        initial=NAME,
    )


def episode(work, particle, number):
    """(seed, horizon, constants, the parameters that the family draws), in float64."""
    seed, horizon = work.plan.draw(particle, number)
    task, params = draw_task(work.batched.family, "meta_train", seed)
    return seed, horizon, {n: v.double() for n, v in task.items()}, params["x"].double()


def judged(family, x, task, batch):
    value = family.query_loss({"x": x}, task, batch)
    return family.loss({"x": x}, task, batch) if value is None else value


def by_hand(work, thetas, particle, order):
    """Losses of one particle in truncation after truncation, each under its theta, and those at the families' starts.

    Whatever a truncation starts from is a constant to it, as in truncated backpropagation.
    """
    family, out, number, step = work.batched.family, [], 0, 0
    x = state = None
    for theta in thetas:
        losses, initial = [], []
        if x is not None:
            x, state = x.detach(), {n: v.detach() for n, v in state.items()}
        for _ in range(work.truncation):
            seed, horizon, task, own = episode(work, particle, number)
            at = lambda k, seed=seed, task=task: {  # noqa: E731
                n: v[0].double() for n, v in draw_batches(family, task, seed, k, 1).items()
            }
            if step == 0:
                x, state = theta[NAME], work.rule.init_state(family.dim, dtype=torch.float64)
            leaf = x if x.requires_grad and order == 2 else x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(
                family.loss({"x": leaf}, task, at(step)), leaf, create_graph=order == 2, retain_graph=True
            )
            update, state = work.rule.update(theta, grad, x, state)
            x, step = x + update, step + 1
            losses.append(judged(family, x, task, at(step)))
            initial.append(judged(family, own, task, at(0)))
            if step == horizon:
                number, step = number + 1, 0
        out.append((torch.stack(losses), torch.stack(initial)))
    return out


SETTINGS = [{"order": order, "recompute": recompute} for order in (1, 2) for recompute in (False, True)]


@pytest.mark.parametrize("apart", [True, False], ids=["query", "support"])
@pytest.mark.parametrize(
    ("rule_name", "settings"),
    [
        *(("compact", settings) for settings in SETTINGS),
        ("sgd", SETTINGS[0]),
        ("sgd", SETTINGS[2]),
        ("adam", SETTINGS[3]),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "horizons", [{"truncation": 3}, {"truncation": 4, "kind": "log_uniform", "shortest": 1}], ids=str
)
def test_backprop_equals_autograd_by_hand(horizons, settings, rule_name, apart):
    """Episodes start before a truncation, within it (several times) and at its end; five truncations in a row."""
    rule, ids = rules.get(rule_name), [0, 1, 4]
    work, theta = work_of(rule, Curved(apart=apart), horizon=4, **horizons), theta_of(rule)
    estimator = estimators.get("backprop", **settings)
    state = estimator.init(work, theta, ids)
    got = [estimator.estimate(work, theta, state) for _ in range(5)]
    leaves = {n: v.clone().requires_grad_() for n, v in theta.items()}
    rows = [by_hand(work, [leaves] * 5, i, settings["order"]) for i in ids]
    for k, estimate in enumerate(got):
        value = torch.stack([(row[k][0] / row[k][1].detach()).log().mean() for row in rows]).mean()
        assert estimate.meta_loss == pytest.approx(float(value.detach()), rel=1e-12)
        want = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True)
        for name, grad in zip(leaves, want):
            grad = torch.zeros_like(theta[name]) if grad is None else grad
            torch.testing.assert_close(estimate.grads[name], grad, rtol=1e-9, atol=1e-12)
    assert sum(float(estimate.grads[NAME].abs().min()) > 0 for estimate in got) >= 3


@pytest.mark.parametrize("normalization", ["log", "none"])
def test_exact_gradient_equals_finite_differences(normalization):
    rule = rules.get("compact")
    work = work_of(rule, Curved(), truncation=4, horizon=4, normalization=normalization)
    theta = theta_of(rule)
    estimator = estimators.get("backprop", order=2)
    got = estimator.estimate(work, theta, estimator.init(work, theta, range(3))).grads[NAME]

    def meta_loss(start):
        at = {**theta, NAME: start}
        particles = start_particles(work.batched, rule, work.plan, range(3))
        segment = unroll(rule, at, work.batched, work.plan, particles, 4, initial_params=start)
        return float(work.meta_loss(segment.losses, segment.initial))

    for i in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[i] = 1e-5
        assert float(got[i]) == pytest.approx(
            (meta_loss(theta[NAME] + step) - meta_loss(theta[NAME] - step)) / 2e-5, rel=1e-6
        )


def test_maml_by_hand():
    """A fixed rule of gradient descent, one step on the support, judged on the queries: MAML's meta-gradient."""
    rule, family = rules.get("sgd", lr=0.05), tasks.get("sinusoid", hidden=(6,), judge="query", num_queries=7)
    batched = BatchedFamily(family, dtype=torch.float64)
    work = dataclasses.replace(
        work_of(rule, Curved(), truncation=1, horizon=1, normalization="none", average="final"), batched=batched
    )
    start = batched.start("meta_train", [0])[1][0]
    theta = {"log_lr": torch.tensor(0.05, dtype=torch.float64).log(), NAME: start}
    estimator = estimators.get("backprop", order=2)
    got = estimator.estimate(work, theta, estimator.init(work, theta, range(4)))

    def network(w, x):
        return torch.relu(x @ w[0] + w[1]) @ w[2] + w[3]

    weights = [v.clone().requires_grad_() for v in batched.unflatten(start).values()]
    losses = []
    for i in range(4):
        task, _ = draw_task(family, "meta_train", work.plan.draw(i, 0)[0])
        task = {n: v.double() for n, v in task.items()}
        support = (network(weights, task["x"]) - task["y"]).square().mean()
        grads = torch.autograd.grad(support, weights, create_graph=True)
        adapted = [w - 0.05 * g for w, g in zip(weights, grads)]
        losses.append((network(adapted, task["query_x"]) - task["query_y"]).square().mean())
    meta_loss = torch.stack(losses).mean()
    want = torch.cat([g.flatten() for g in torch.autograd.grad(meta_loss, weights)])
    assert got.meta_loss == pytest.approx(float(meta_loss.detach()), rel=1e-12)
    torch.testing.assert_close(got.grads[NAME], want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["es", "pes", "nres"])
def test_evolution_strategies_perturb_the_start_too(kind):
    """Horizon 4, truncation 2, each estimator by its definition on arms that are run by hand."""
    rule, sigma = rules.get("compact"), 0.05
    work, theta = work_of(rule, Curved(), truncation=2, horizon=4, normalization="ratio"), theta_of(rule)
    estimator = estimators.get(kind, sigma=sigma)
    state = estimator.init(work, theta, [0, 1, 2, 3])
    got = [estimator.estimate(work, theta, state) for _ in range(4)]
    pairs, totals = [(0, 0), (2, 0)], [torch.zeros_like(flatten(theta)) for _ in range(4)]
    for pair in pairs:
        # What names the perturbation: the truncation, or for NRES the episode.
        noises = [
            perturbations(theta, sigma, work.plan.run_seed, [pair], [k // 2 if kind == "nres" else k])[0]
            for k in range(4)
        ]
        for k in range(4):
            values = []
            for sign in (1, -1):
                # ES arms start from where theta itself has got to; the others keep their own state.
                seen = [0 * noise if kind == "es" and j < k else sign * noise for j, noise in enumerate(noises)]
                thetas = [unflatten(flatten(theta) + noise, theta) for noise in seen[: k + 1]]
                losses, initial = by_hand(work, thetas, pair[0], 1)[k]
                values.append((losses / initial).mean().detach())
            direction = noises[k]
            if kind == "pes" and k % 2:
                direction = noises[k - 1] + noises[k]
            totals[k] += direction * (values[0] - values[1]) / (2 * sigma**2 * len(pairs))
    for estimate, total in zip(got, totals):
        torch.testing.assert_close(flatten(estimate.grads), total, rtol=1e-8, atol=1e-9 * float(total.abs().max()))
        assert estimate.grads[NAME].abs().min() > 0


def test_losses_are_measured_against_those_at_the_familys_own_start():
    rule = rules.get("sgd")
    work, theta = work_of(rule, Curved(), truncation=2, horizon=2), theta_of(rule)
    particles = start_particles(work.batched, rule, work.plan, range(3))
    segment = unroll(rule, theta, work.batched, work.plan, particles, 2, initial_params=theta[NAME])
    for i in range(3):
        (losses, initial), *_ = by_hand(work, [theta], i, 1)
        torch.testing.assert_close(segment.losses[:, i], losses)
        torch.testing.assert_close(segment.initial[:, i], initial)


def test_an_invalid_particle_leaves_the_start_alone():
    """Query losses that overflow for some tasks: the others' derivative is what they have alone."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Trapped(Curved):
        def query_loss(self, params, task, batch):
            return super().query_loss(params, task, batch) * torch.where(task["h"][0] > 1.2, torch.inf, 1.0)

    rule = rules.get("compact")
    theta = theta_of(rule)
    ids = range(8)
    plain = work_of(rule, Curved(), truncation=3, horizon=3)
    sound = [i for i in ids if episode(plain, i, 0)[2]["h"][0] <= 1.2]
    assert 0 < len(sound) < 8
    trapped = dataclasses.replace(plain, batched=BatchedFamily(Trapped(), dtype=torch.float64))
    for settings in SETTINGS:
        estimator = estimators.get("backprop", **settings)
        want = estimator.estimate(plain, theta, estimator.init(plain, theta, sound))
        state = estimator.init(plain, theta, ids)  # the trap is shut at the start, or the tasks would be redrawn
        got = estimator.estimate(trapped, theta, state)
        assert got.num_invalid == 8 - len(sound)
        torch.testing.assert_close(got.grads[NAME], want.grads[NAME], rtol=1e-9, atol=1e-12)


# --- the meta-trainer ---

FAMILIES = {"a": Curved(), "b": Curved(dim=2, apart=False), "c": Curved(dim=4)}


def trainer_of(
    estimator="backprop", initial=("a", "b"), families=None, theta=None, estimator_settings=None, **settings
):
    config = dict(
        outer_steps=20,
        num_particles=2,
        truncation=3,
        horizons=HorizonSchedule(longest=5),
        validation_tasks=3,
        initial_params=InitialParamsConfig(families=tuple(initial), learning_rate=0.05),
    )
    return MetaTrainer(
        rules.get("compact"),
        families or FAMILIES,
        MetaTrainerConfig(**config | settings),
        estimators.get(estimator, **(estimator_settings or {})),
        theta=theta,
        dtype=torch.float64,
    )


def snapshot(trainer):
    return {n: v.clone() for n, v in trainer.theta.items()}


def test_none_are_learned_by_default():
    trainer = trainer_of(initial=())
    assert trainer.theta.keys() == rules.get("compact").init_theta(torch.Generator().manual_seed(0)).keys()
    assert len(trainer.optimizer.param_groups) == 1
    assert MetaTrainerConfig().initial_params.families == ()
    assert "grad_norm_initial" not in trainer.step()


def test_they_start_as_a_draw_of_the_family_and_keep_their_own_learning_rate():
    trainer = trainer_of(final_learning_rate=1.0, learning_rate=1e-3)
    seed = task_seed("meta_train", 0)
    _, params = draw_task(FAMILIES["b"], "meta_train", seed)
    assert torch.equal(trainer.theta[name_of("b")], params["x"].double())
    before = snapshot(trainer)
    metrics = trainer.step()
    assert metrics["grad_norm_initial"] > 0
    for label in ("a", "b"):  # the first step of Adam is as long as the learning rate
        moved = trainer.theta[name_of(label)] - before[name_of(label)]
        torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.05), rtol=1e-4, atol=0)
    assert (trainer.theta["output.bias"] - before["output.bias"]).abs().max() <= 1e-3 * (1 + 1e-6)


@pytest.mark.parametrize("estimator", ["backprop", "es", "pes", "nres", "mix", "imitation"])
def test_every_estimator_moves_those_of_the_families_it_ran_and_no_others(estimator):
    particles = {"mix": 8, "imitation": 4}.get(estimator, 2)
    settings = {"share": 0.5} if estimator == "imitation" else {}
    trainer = trainer_of(estimator, families_per_step=1, num_particles=particles, estimator_settings=settings)
    for label in ("a", "b"):
        before = snapshot(trainer)
        trainer.step()
        moved = {n for n, v in trainer.theta.items() if not torch.equal(v, before[n])}
        assert {n for n in moved if n.startswith("initial_params.")} == {name_of(label)}
        assert "output.weight" in moved


def test_the_rule_can_be_held_fixed():
    trainer = trainer_of(stages=(Stage(num_outer_steps=20, trainable=("initial_params.*",)),))
    before = snapshot(trainer)
    trainer.step()
    assert all(torch.equal(v, before[n]) != n.startswith("initial_params.") for n, v in trainer.theta.items())


@pytest.mark.parametrize("estimator", ["backprop", "pes"])
def test_resumed_it_gives_the_same_bits(estimator):
    whole, first, second = (trainer_of(estimator) for _ in range(3))
    for _ in range(7):
        whole.step()
    whole.validate()
    for _ in range(3):
        first.step()
    second.load_state_dict(first.state_dict())
    for _ in range(4):
        second.step()
    second.validate()
    assert all(torch.equal(v, second.theta[n]) for n, v in whole.theta.items())
    assert whole.best_score == second.best_score
    assert all(torch.equal(v, second.best_theta[n]) for n, v in whole.best_theta.items())


def test_learning_the_start_lowers_the_query_loss():
    family = tasks.get("sinusoid", judge="query", hidden=(20,), num_queries=10)
    trainer = trainer_of(
        initial=("*",),
        families={"sines": family},
        outer_steps=150,
        num_particles=10,
        truncation=1,
        horizons=HorizonSchedule(longest=1, random_offsets=False),
        meta_loss=MetaLoss(normalization="none"),
        initial_params=InitialParamsConfig(families=("*",), learning_rate=0.02),
        validation_tasks=50,
    )
    before = trainer.validate()["validation"]
    for _ in range(150):
        trainer.step()
    assert trainer.validate()["validation"] < 0.8 * before


def test_settings_out_of_range():
    for settings, message in (
        ({"learning_rate": 0.0}, "initial_params.learning_rate must be positive and finite; got 0.0"),
        ({"clip_norm": -1.0}, "initial_params.clip_norm must be positive and finite; got -1.0"),
        ({"seed": -1}, "initial_params.seed must be non-negative; got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            InitialParamsConfig(**settings)
    with pytest.raises(ValueError, match="names 'd', which matches no family; there are a, b, c"):
        trainer_of(initial=("d",))


def test_what_does_not_fit():
    with pytest.raises(ValueError, match=r"'imitation' as it is set never learns initial parameters; lower its share"):
        trainer_of("imitation", estimator_settings={"share": 1.0})
    theta = {**rules.get("compact").init_theta(torch.Generator().manual_seed(0)), name_of("a"): torch.zeros(7)}
    with pytest.raises(ValueError, match=r"of family 'a' have shape \(7,\), but its tasks have 3 parameters"):
        trainer_of(theta=theta)
    with pytest.raises(ValueError, match="theta holds 'initial_params.a', but initial_params.families does not name"):
        trainer_of(theta=theta, initial=("b",))
    with pytest.raises(ValueError, match=r"of family 'a' have shape \(3,\), but its tasks have 5 parameters"):
        MetaTrainer(
            rules.get("compact"),
            FAMILIES,
            trainer_of().config,
            estimators.get("backprop"),
            validation_families={"a": Curved(dim=5)},
        )
    batched = BatchedFamily(FAMILIES["a"])
    with pytest.raises(
        ValueError, match=r"of family 'a' have shapes \{'y': \(3,\)\}, but its tasks have \{'x': \(3,\)\}"
    ):
        flat_params("a", {"y": torch.zeros(3)}, batched)
    given = with_initial({name_of("a"): torch.ones(3)}, {"a": batched}, InitialParamsConfig(families=("*",)))
    assert torch.equal(given[name_of("a")], torch.ones(3))


def test_evaluation_starts_there():
    rule, batched = rules.get("sgd"), BatchedFamily(Curved(), dtype=torch.float64)
    start = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    runs = run_rule(
        rule,
        rule.init_theta(torch.Generator().manual_seed(0)),
        batched,
        split="meta_test",
        seeds=(0,),
        num_tasks=2,
        horizon=1,
        initial_params=start,
    )
    for i in range(2):
        seed = task_seed("meta_test", 0, i, 0)
        task, _ = draw_task(Curved(), "meta_test", seed)
        batch = {n: v[0].double() for n, v in draw_batches(Curved(), task, seed, 0, 1).items()}
        want = Curved().loss({"x": start}, {n: v.double() for n, v in task.items()}, batch)
        torch.testing.assert_close(runs.losses[0, i], want)
