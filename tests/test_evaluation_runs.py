"""Runs of many draws at once, against closed forms and against one torch.optim run after another."""

import math

import pytest
import torch
from evaluation_families import Parabola, Regression, gradient_descent

from learned_opt import rules
from learned_opt.batched import BatchedFamily
from learned_opt.evaluation import BASELINES, run_rule, run_torch_optimizer
from learned_opt.task import draw_batches, draw_task, task_seed
from tasks.augment import DelayedGradients
from tasks.quadratic import Quadratic

DOUBLE = torch.float64


def one_by_one(make, make_schedule, family, split, seed, num_tasks, rate, horizon):
    """Plain loops: a fresh torch.optim optimizer per task, over parameters of true shapes, gradients by autograd."""
    shared = {n: v.to(DOUBLE) for n, v in family.shared_data().items()}
    curves = []
    for index in range(num_tasks):
        number = task_seed(split, seed, index, 0)
        task, params = draw_task(family, split, number)
        task = {n: v.to(DOUBLE) for n, v in task.items()}
        leaves = {n: v.to(DOUBLE).requires_grad_() for n, v in params.items()}
        optimizer = make([{"params": list(leaves.values()), "lr": rate}])
        schedule = make_schedule(optimizer, horizon) if make_schedule else None
        losses = []
        for step in range(horizon + 1):
            batch = {n: v[0] for n, v in draw_batches(family, task, number, step, 1).items()}
            optimizer.zero_grad()
            loss = family.loss(leaves, {**task, **shared}, batch)
            losses.append(loss.detach())
            loss.backward()
            optimizer.step()
            if schedule:
                schedule.step()
        curves.append(torch.stack(losses))
    return torch.stack(curves, dim=1)


class NormalizedDescent(torch.optim.Optimizer):
    """Divides a tensor's gradient by its norm: coordinates of one tensor are not apart from each other."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad / p.grad.norm(), alpha=group["lr"])


def test_gradient_descent_on_parabolas_is_the_closed_form():
    family = Parabola()
    rates = (0.01, 0.3, 1.0)
    # 140 steps are more than are drawn at a time; 5 particles at once cut both tasks and rates into pieces.
    options = dict(split="meta_test", seeds=(4,), num_tasks=7, horizon=140)
    for at_once in (256, 5):
        got = run_torch_optimizer(
            torch.optim.SGD, BatchedFamily(family, dtype=DOUBLE), rates, particles_at_once=at_once, **options
        )
        assert got.losses.shape == (141, 3, 7)
        for column, rate in enumerate(rates):
            want = gradient_descent(family, "meta_test", 4, 7, rate, 140)
            torch.testing.assert_close(got.losses[:, column], want, rtol=1e-9, atol=1e-15)
            # f = a/2 · distance², and the metric is the last distance.
            task, _ = draw_task(family, "meta_test", task_seed("meta_test", 4, 6, 0))
            distance = (2 * want[-1, 6] / task["a"]).sqrt()
            torch.testing.assert_close(got.metrics["distance"][column, 6], distance, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", [Regression(), Quadratic(dim=3)], ids=lambda f: f.name)
@pytest.mark.parametrize("name", list(BASELINES))
def test_one_batch_of_tasks_and_rates_equals_one_run_after_another(name, family):
    baseline = BASELINES[name]
    rates = (1e-3, 3e-2)
    got = baseline.run(
        BatchedFamily(family, dtype=DOUBLE), rates, split="meta_validation", seeds=(2,), num_tasks=3, horizon=35
    )
    for column, rate in enumerate(rates):
        want = one_by_one(baseline.make, baseline.schedule, family, "meta_validation", 2, 3, rate, 35)
        torch.testing.assert_close(got.losses[:, column], want, rtol=1e-9, atol=1e-14)


def test_an_optimizer_that_couples_coordinates_gets_true_shapes():
    family = Regression()
    batched = BatchedFamily(family, dtype=DOUBLE)
    options = dict(split="meta_test", seeds=(0,), num_tasks=3, horizon=12)
    apart = run_torch_optimizer(NormalizedDescent, batched, (0.05, 0.2), elementwise=False, **options).losses
    for column, rate in enumerate((0.05, 0.2)):
        want = one_by_one(NormalizedDescent, None, family, "meta_test", 0, 3, rate, 12)
        torch.testing.assert_close(apart[:, column], want, rtol=1e-10, atol=0)
    stacked = run_torch_optimizer(NormalizedDescent, batched, (0.05, 0.2), **options).losses
    assert not torch.allclose(stacked, apart), "the stacked run should differ, or the option would be pointless"


@pytest.mark.parametrize("elementwise", [True, False])
def test_gradients_that_lag_behind_do_so_for_every_task_and_rate(elementwise):
    family = DelayedGradients(family=Parabola(), delay=2)
    options = dict(split="meta_test", seeds=(0, 1), num_tasks=2, horizon=9, elementwise=elementwise)
    got = run_torch_optimizer(torch.optim.SGD, BatchedFamily(family, dtype=DOUBLE), (0.1, 0.3), **options).losses
    for column, rate in enumerate((0.1, 0.3)):
        for row, (seed, index) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            task, params = draw_task(family, "meta_test", task_seed("meta_test", seed, index, 0))
            places = [float(params["theta"])]
            for step in range(9):
                old = places[max(step - 2, 0)]
                places.append(places[-1] - rate * float(task["a"]) * (old - float(task["c"])))
            want = float(task["a"]) / 2 * (torch.tensor(places, dtype=DOUBLE) - task["c"]).square()
            torch.testing.assert_close(got[:, column, row], want, rtol=1e-9, atol=1e-15)


def test_adam_rule_and_torch_adam_are_one_optimizer():
    batched = BatchedFamily(Regression(), dtype=DOUBLE)
    rule = rules.get("adam", lr=0.03)
    theta = {n: v.double() for n, v in rule.init_theta(torch.Generator()).items()}
    theta["log_lr"] = torch.tensor(math.log(0.03), dtype=DOUBLE)
    theta["log_one_minus_beta1"] = torch.tensor(math.log(0.1), dtype=DOUBLE)
    theta["log_one_minus_beta2"] = torch.tensor(math.log(0.001), dtype=DOUBLE)
    options = dict(split="meta_test", seeds=(7, 1), num_tasks=4, horizon=40)
    learned = run_rule(rule, theta, batched, **options)
    torch_adam = run_torch_optimizer(torch.optim.Adam, batched, (0.03,), **options)
    assert learned.losses.shape == (41, 8)
    torch.testing.assert_close(learned.losses, torch_adam.losses[:, 0], rtol=1e-9, atol=0)
    assert learned.metrics == {}


def test_draws_depend_on_split_seed_and_index_alone():
    batched = BatchedFamily(Parabola(), dtype=DOUBLE)
    rule = rules.get("compact")
    theta = rule.init_theta(torch.Generator().manual_seed(1))

    def run(seeds, num_tasks, split="meta_test", **more):
        return run_rule(rule, theta, batched, split=split, seeds=seeds, num_tasks=num_tasks, horizon=6, **more)

    both, few = run((3, 5), 4), run((5,), 2)
    torch.testing.assert_close(both.losses[:, 4:6], few.losses, rtol=1e-12, atol=0)
    pieces = run((3, 5), 4, particles_at_once=3)
    torch.testing.assert_close(both.losses, pieces.losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(both.metrics["distance"], pieces.metrics["distance"], rtol=1e-12, atol=0)
    assert len(both.losses[0].unique()) == 8
    assert not set(both.losses[0].tolist()) & set(run((3, 5), 4, split="meta_validation").losses[0].tolist())


def test_a_diverging_rate_keeps_its_infinities_and_leaves_the_others_alone():
    batched = BatchedFamily(Parabola(), dtype=DOUBLE)
    options = dict(split="meta_test", seeds=(0,), num_tasks=3, horizon=8)
    got = run_torch_optimizer(torch.optim.SGD, batched, (0.5, 1e120), **options).losses
    alone = run_torch_optimizer(torch.optim.SGD, batched, (0.5,), **options).losses
    assert torch.equal(got[:, 0], alone[:, 0])
    assert torch.isfinite(got[0, 1]).all() and not torch.isfinite(got[-1, 1]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rates": ()}, "rates must hold at least one learning rate; got none"),
        ({"rates": (0.1, -1.0)}, "rates must be positive and finite; got -1.0"),
        ({"rates": (math.inf,)}, "rates must be positive and finite; got inf"),
        ({"seeds": ()}, r"seeds must be non-negative, and at least one; got \(\)"),
        ({"seeds": (1, -2)}, r"seeds must be non-negative, and at least one; got \(1, -2\)"),
        ({"num_tasks": 0}, "num_tasks must be at least 1; got 0"),
        ({"horizon": 0}, "horizon must be at least 1; got 0"),
        ({"particles_at_once": 0}, "particles_at_once must be at least 1; got 0"),
        ({"split": "test"}, "split must be one of meta_train, meta_validation, meta_test; got 'test'"),
    ],
)
def test_bad_arguments(change, message):
    options = dict(rates=(0.1,), split="meta_test", seeds=(0,), num_tasks=1, horizon=1, particles_at_once=8)
    with pytest.raises(ValueError, match=message):
        run_torch_optimizer(torch.optim.SGD, BatchedFamily(Parabola()), **{**options, **change})
