"""Truncated backpropagation against plain autograd through a loop written by hand that shares no code with it."""

import pytest
import torch
from rule_cases import bases_by_hand, loud, step_by_hand

from learned_opt import estimators, rules
from learned_opt.batched import BatchedFamily
from learned_opt.meta_loss import MetaLoss
from learned_opt.particles import EpisodePlan
from learned_opt.task import draw_batches, draw_task
from learned_opt.truncation import HorizonSchedule
from tasks.image_mlp import ImageMLP
from tasks.quadratic import Quadratic

FAMILIES = {
    "quadratic": Quadratic(dim=4),
    "digits_two_layers": ImageMLP(hidden=(3, 4), activation="tanh", batch_size=8),
}


def theta_of(rule, seed=0):
    generator = torch.Generator().manual_seed(seed)
    theta = {n: v.double() for n, v in rule.init_theta(generator).items()}
    return loud({n: v * 10 if n == "output.weight" else v for n, v in theta.items()}, generator)


def reference(work, theta, ids, num_truncations, second_order):
    """One task at a time, nothing batched, whole graphs: returns the last truncation's value and gradient."""
    family = work.batched.family
    shared = {n: v.double() if v.is_floating_point() else v for n, v in family.shared_data().items()}
    carried = {}

    def evaluate(task, params, seed, step, create):
        batch = {n: v[0] for n, v in draw_batches(family, task, seed, step, 1).items()}
        loss = family.loss(params, {**task, **shared}, batch)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=create, retain_graph=True)
        return loss, torch.cat([g.reshape(-1) for g in grads])

    def fresh(particle, episode):
        seed, horizon = work.plan.draw(particle, episode)
        task, params = draw_task(family, work.plan.split, seed)
        task = {n: v.double() if v.is_floating_point() else v for n, v in task.items()}
        params = {n: v.double().requires_grad_() for n, v in params.items()}
        loss, grad = evaluate(task, params, seed, 0, False)
        size = sum(v.numel() for v in params.values())
        state = work.rule.init_state(size, dtype=torch.float64)
        return dict(
            seed=seed,
            horizon=horizon,
            task=task,
            params=params,
            grad=grad.detach(),
            f0=loss.detach(),
            state=state,
            bases=bases_by_hand(work.rule, [tuple(v.shape) for v in params.values()]),
            step=0,
            episode=episode,
        )

    for _ in range(num_truncations):
        leaves = {n: v.clone().requires_grad_() for n, v in theta.items()}
        values = []
        for i in ids:
            p = carried.get(i) or fresh(i, 0)
            p = {
                **p,
                "params": {n: v.detach().requires_grad_() for n, v in p["params"].items()},
                "grad": p["grad"].detach(),
            }
            p["state"] = {n: v.detach() for n, v in p["state"].items()}
            losses, initial = [], []
            for _ in range(work.truncation):
                flat = torch.cat([v.reshape(-1) for v in p["params"].values()])
                shapes = [tuple(v.shape) for v in p["params"].values()]
                update, p["state"] = step_by_hand(work.rule, leaves, p["grad"], flat, p["state"], shapes, p["bases"])
                params, at = {}, 0
                for n, v in p["params"].items():
                    params[n] = v + update[at : at + v.numel()].view_as(v)
                    at += v.numel()
                p["params"], p["step"] = params, p["step"] + 1
                loss, grad = evaluate(p["task"], params, p["seed"], p["step"], second_order)
                p["grad"] = grad if second_order else grad.detach()
                losses.append(loss)
                initial.append(p["f0"])
                if p["step"] == p["horizon"]:
                    p = fresh(i, p["episode"] + 1)
            carried[i] = p
            values.append((torch.stack(losses) / torch.stack(initial)).log().mean())
        value = torch.stack(values).mean()
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return value.detach(), {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(leaves.items(), grads)}


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("rule_name", list(rules.RULES))
@pytest.mark.parametrize("family_name", list(FAMILIES))
def test_equals_plain_autograd(family_name, rule_name, order):
    rule = rules.get(rule_name)
    if order == 2 and rule.basis:
        pytest.skip("there is no second order through a basis")
    theta = theta_of(rule)
    # Horizon 7 with truncation 5: particles restart in the middle of a truncation, and at different steps.
    plan = EpisodePlan(split="meta_train", run_seed=3, horizons=HorizonSchedule(longest=7))
    work = estimators.Workload(
        rule=rule,
        batched=BatchedFamily(FAMILIES[family_name], dtype=torch.float64),
        plan=plan,
        meta_loss=MetaLoss(),
        truncation=5,
    )
    estimator = estimators.get("backprop", order=order, **({"chunk_size": 7} if order == 1 else {}))
    state = estimator.init(work, theta, [0, 1, 2])
    for _ in range(2):
        got = estimator.estimate(work, theta, state)
    value, grads = reference(work, theta, [0, 1, 2], 2, order == 2)
    assert got.meta_loss == pytest.approx(value.item(), rel=1e-10)
    for name, want in grads.items():
        torch.testing.assert_close(got.grads[name], want, rtol=1e-8, atol=1e-8 * float(want.abs().max()))
    assert any(want.abs().max() > 0 for want in grads.values())


@pytest.mark.parametrize("order", [1, 2])
def test_however_it_is_cut_a_rule_that_is_told_of_whole_tensors_has_one_meta_gradient(order):
    rule = rules.get("paced")
    theta = theta_of(rule)
    plan = EpisodePlan(split="meta_train", run_seed=3, horizons=HorizonSchedule(longest=7))
    work = estimators.Workload(
        rule=rule,
        batched=BatchedFamily(FAMILIES["digits_two_layers"], dtype=torch.float64),
        plan=plan,
        meta_loss=MetaLoss(),
        truncation=5,
    )
    assert len(work.batched.sizes) == 6

    def gradients(settings, ids):
        estimator = estimators.get("backprop", order=order, **settings)
        state = estimator.init(work, theta, ids)
        return [estimator.estimate(work, theta, state).grads for _ in range(3)]

    want = gradients({}, [0, 1, 2])
    cuts = [{"recompute": True}, *({"chunk_size": size} for size in (7, 100, 10**6) if order == 1)]
    found = [gradients(settings, [0, 1, 2]) for settings in cuts]
    alone = [gradients({}, [i]) for i in range(3)]  # the mean over particles
    found.append([{n: sum(part[t][n] for part in alone) / 3 for n in theta} for t in range(3)])
    for got in found:
        for mine, exact in zip(got, want):
            for name, value in exact.items():
                torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-10 * float(value.abs().max()))
    assert all(value.abs().max() > 0 for value in want[-1].values())
