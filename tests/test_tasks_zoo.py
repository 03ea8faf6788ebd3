"""What single families promise beyond the contract: optima, shapes, and equality with PyTorch's own layers."""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from torch import nn
from torch.nn import functional as F

import tasks
from learned_opt.batched import BatchedFamily
from learned_opt.task import SPLITS, draw_batches, draw_task, task_seed
from tasks.data.tabular import TABLES, load_table
from tasks.data.text import encode, load_text

SEEDS = [task_seed("meta_train", 0, i) for i in range(8)]


def double(tensors):
    return {n: v.double() if v.is_floating_point() else v for n, v in tensors.items()}


def drawn(family, seed=SEEDS[0], split="meta_train"):
    task, params = draw_task(family, split, seed)
    return double(params), double({**task, **family.shared_data()})


def gradient(family, params, task, batch):
    return torch.func.grad(lambda p: family.loss(p, task, batch))(params)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("rosenbrock", 1e-14),
        ("ackley", 1e-10),
        ("rastrigin", 1e-14),
        ("griewank", 1e-14),
        ("levy", 1e-14),
        ("powell", 1e-14),
        ("saddle", 1e-14),
        ("plateau", 1e-14),
        ("spectrum_quadratic", 1e-14),
        ("matrix_factorization", 1e-14),
        ("linear_network", 1e-13),
    ],
)
def test_the_reference_optimum_is_zero_and_stationary(name, tolerance):
    family = tasks.get(name)
    for seed in SEEDS:
        params, task = drawn(family, seed)
        best = double(family.optimum(task))
        assert abs(float(family.loss(best, task, {}))) <= tolerance
        assert max(float(g.abs().max()) for g in gradient(family, best, task, {}).values()) < 1e-6
        start = float(family.loss(params, task, {}))
        assert 1e-3 < start < 1e3
        generator = torch.Generator().manual_seed(seed)
        for _ in range(50):  # no point is below the optimum
            other = {n: v + torch.randn(v.shape, generator=generator) for n, v in best.items()}
            assert float(family.loss(other, task, {})) >= 0


@pytest.mark.parametrize(
    ("name", "fields", "count"),
    [
        ("image_mlp", {}, 10),
        ("image_mlp", {"norm": "layer"}, 10),
        ("image_mlp_sampled", {}, 10),
        *(("image_conv", {"norm": norm}, 10) for norm in ("none", "layer", "batch")),
        ("image_autoencoder", {}, 2),
        ("image_autoencoder", {"variational": True}, 2),
        ("tabular", {"dataset": "breast_cancer"}, 2),
        ("tabular", {"dataset": "wine"}, 3),
        ("tabular", {"dataset": "digits"}, 10),
        ("char_mlp", {}, 96),
        ("char_rnn", {}, 96),
        ("char_rnn", {"cell": "gru"}, 96),
        ("char_transformer", {}, 96),
    ],
)
def test_the_reference_loss_is_that_of_a_uniform_guess(name, fields, count):
    """A network of zeros says the same of everything: its loss is the log of the number of classes, held out too."""
    family = tasks.get(name, **fields)
    params, task = drawn(family)
    zero = {n: torch.zeros_like(v) for n, v in params.items()}
    batch = {n: v[0] for n, v in double(draw_batches(family, task, SEEDS[0], 0, 1)).items()}
    assert float(family.loss(zero, task, batch)) == pytest.approx(math.log(count), rel=1e-6)
    assert float(family.eval_metrics(zero, task)["test_loss"]) == pytest.approx(math.log(count), rel=1e-6)


def test_rosenbrock_is_the_textbook_function_divided_by_a_hundred():
    family = tasks.get("rosenbrock", dim=2)
    x, y = -1.2, 1.0
    value = family.loss({"x": torch.tensor([x, y], dtype=torch.float64)}, {}, {})
    assert float(value) == pytest.approx((100 * (y - x**2) ** 2 + (1 - x) ** 2) / 100, rel=1e-12)


def test_ackley_and_rastrigin_at_known_points():
    task = {"center": torch.zeros(2, dtype=torch.float64)}
    ones = {"x": torch.ones(2, dtype=torch.float64)}
    # At whole numbers the cosines are 1: what is left of Ackley is 20(1 − e^−0.2), of Rastrigin the bowl.
    assert float(tasks.get("ackley", dim=2).loss(ones, task, {})) == pytest.approx(20 * (1 - math.exp(-0.2)), rel=1e-12)
    assert float(tasks.get("rastrigin", dim=2).loss(ones, task, {})) == pytest.approx(1.0, rel=1e-12)
    assert torch.isfinite(gradient(tasks.get("ackley", dim=2), {"x": task["center"]}, task, {})["x"]).all()


@pytest.mark.parametrize("dim", [1, 2, 7, 10])
def test_griewank_is_the_textbook_function_of_ten_times_the_distance(dim):
    family = tasks.get("griewank", dim=dim)
    for seed in SEEDS:
        params, task = drawn(family, seed)
        z = (params["x"] - task["center"]).numpy()
        ripples = np.prod([math.cos(10 * z[i] / math.sqrt(i + 1)) for i in range(dim)])
        # The textbook's bowl is the sum of squares over 4000: that of 10 z, for ten coordinates.
        want = 1 + 10 / dim * np.sum((10 * z) ** 2) / 4000 - ripples
        assert float(family.loss(params, task, {})) == pytest.approx(want, rel=1e-12)


def test_griewanks_ripples_matter_where_tasks_start():
    """A bowl's gradient has the sign of the distance in every coordinate; here many have the other one."""
    family = tasks.get("griewank")
    away = []
    for seed in range(0, 300, 3):
        params, task = drawn(family, seed)
        z = params["x"] - task["center"]
        assert 1e-3 < float(family.loss(params, task, {})) < 10
        away.append((gradient(family, params, task, {})["x"] * z < 0).double().mean())
    assert 0.1 < float(torch.stack(away).mean()) < 0.5


@pytest.mark.parametrize("dim", [1, 2, 10])
def test_levy_is_the_mean_of_the_textbook_function_of_four_times_the_distance(dim):
    family = tasks.get("levy", dim=dim)
    for seed in SEEDS:
        params, task = drawn(family, seed)
        x = 1 + 4 * (params["x"] - task["center"]).numpy()  # the textbook's optimum is at 1
        w = 1 + (x - 1) / 4
        want = math.sin(math.pi * w[0]) ** 2 + (w[-1] - 1) ** 2 * (1 + math.sin(2 * math.pi * w[-1]) ** 2)
        for i in range(dim - 1):
            want += (w[i] - 1) ** 2 * (1 + 10 * math.sin(math.pi * w[i] + 1) ** 2)
        assert float(family.loss(params, task, {})) == pytest.approx(want / dim, rel=1e-11)


def test_levy_has_local_minima_beside_the_optimum():
    line = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    family = tasks.get("levy", dim=2)
    values = torch.stack([family.value(torch.stack([z, torch.zeros_like(z)])) for z in line])
    minima = line[1:-1][(values[1:-1] < values[:-2]) & (values[1:-1] < values[2:])]
    assert len(minima) >= 5 and float(minima.abs().min()) < 1e-3


def test_powell_is_the_textbook_function_divided_by_a_hundred():
    task = {"center": torch.zeros(4, dtype=torch.float64)}
    start = {"x": torch.tensor([3.0, -1.0, 0.0, 1.0], dtype=torch.float64)}  # Powell's own start, where it is 215
    assert float(tasks.get("powell", dim=4).loss(start, task, {})) == pytest.approx(2.15, rel=1e-12)
    family = tasks.get("powell")
    params, task = drawn(family)
    four = tasks.get("powell", dim=4)
    parts = [four.value(z) for z in (params["x"] - task["center"]).split(4)]
    assert float(family.loss(params, task, {})) == pytest.approx(float(sum(parts)) / 3, rel=1e-12)


def test_powells_hessian_is_singular_at_the_optimum():
    family = tasks.get("powell")
    curvature = torch.func.jacrev(torch.func.grad(family.value))(torch.zeros(12, dtype=torch.float64))
    eigenvalues = torch.linalg.eigvalsh(curvature)
    assert float(eigenvalues[:6].abs().max()) < 1e-14 and float(eigenvalues[6:].min()) > 1e-2
    flat = torch.tensor([10.0, -1.0, 1.0, 1.0] * 3, dtype=torch.float64)
    assert float(family.value(2e-2 * flat)) == pytest.approx(16 * float(family.value(1e-2 * flat)), rel=1e-9)
    assert float(family.value(1e-2 * flat)) > 0


def test_the_saddle_is_one():
    family = tasks.get("saddle", dim=4)
    params, task = drawn(family)
    at = {"x": task["center"]}
    assert float(family.loss(at, task, {})) == pytest.approx(0.25, abs=1e-12)
    assert float(gradient(family, at, task, {})["x"].abs().max()) == 0
    curvature = torch.func.jacrev(torch.func.grad(lambda x: family.loss({"x": x}, task, {})))(task["center"]).diagonal()
    assert (curvature[:2] < 0).all() and (curvature[2:] > 0).all()
    assert float((params["x"] - task["center"]).abs().max()) <= 0.01


@pytest.mark.parametrize("rotated", [True, False])
def test_the_spectrum_is_the_chosen_one(rotated):
    family = tasks.get("spectrum_quadratic", dim=6, condition=50.0, rotated=rotated)
    _, task = drawn(family)
    eigenvalues = torch.linalg.eigvalsh(task["hessian"])
    assert float(eigenvalues[-1]) == pytest.approx(1.0, rel=1e-5)
    assert float(eigenvalues[0]) == pytest.approx(1 / 50, rel=1e-4)
    off = task["hessian"] - torch.diag(task["hessian"].diagonal())
    assert (float(off.abs().max()) > 0.01) == rotated


def test_the_noisy_quadratic_has_the_stated_gradient_noise_and_least_loss():
    family = tasks.get("spectrum_quadratic", dim=3, noise=0.5)
    _, task = drawn(family)
    best = family.optimum(task)
    jitter = torch.cat([draw_batches(family, task, s, 0, 500)["jitter.x"] for s in SEEDS]).double()
    losses = torch.stack([family.loss(best, task, {"jitter.x": j}) for j in jitter])
    assert float(losses.mean()) == pytest.approx(0.5 * 0.25 * float(task["hessian"].trace()), rel=0.06)
    grads = torch.stack([gradient(family, best, task, {"jitter.x": j})["x"] for j in jitter[:1000]])
    want = 0.25 * task["hessian"] @ task["hessian"]
    torch.testing.assert_close(torch.cov(grads.T), want, rtol=0.2, atol=0.03)


def test_lasso_optimum_satisfies_the_optimality_conditions():
    family = tasks.get("lasso")
    params, task = drawn(family)
    assert task["a"].shape == (25, 50)
    torch.testing.assert_close(task["a"].norm(dim=0), torch.ones(50, dtype=torch.float64), rtol=1e-6, atol=0)
    x = family.optimum(task)["x"]
    slope = task["a"].T @ (task["a"] @ x - task["b"])
    assert float(slope.abs().max()) <= 0.005 * (1 + 1e-6)
    used = x != 0
    torch.testing.assert_close(slope[used], -0.005 * x[used].sign(), rtol=1e-5, atol=0)
    assert float(family.loss({"x": x}, task, {})) < float(family.loss(params, task, {}))


@pytest.mark.parametrize("delta", [1e-3, 0.01, 1.0, 1e4])
def test_robust_regression_is_the_pseudo_huber_loss_and_its_optimum_stationary(delta):
    family = tasks.get("robust_regression", delta=delta)
    for seed in SEEDS[:4]:
        params, task = drawn(family, seed)
        a, b, x = (v.numpy() for v in (task["a"], task["b"], params["x"]))
        want = np.mean(delta * (np.sqrt(1 + ((a @ x - b) / delta) ** 2) - 1))
        assert float(family.loss(params, task, {})) == pytest.approx(want, rel=1e-5 if delta > 1 else 1e-11)
        best = family.optimum(task)
        assert float(gradient(family, best, task, {})["x"].abs().max()) < 1e-10
        least = float(family.loss(best, task, {}))
        generator = torch.Generator().manual_seed(seed)
        for scale in (1.0, 1e-3):
            other = best["x"] + scale * torch.randn(20, generator=generator, dtype=torch.float64)
            assert float(family.loss({"x": other}, task, {})) > least


def test_robust_regression_keeps_small_residuals_in_float32():
    family = tasks.get("robust_regression", num_rows=2, dim=1, delta=1e4)
    task = {"a": torch.ones(2, 1), "b": torch.zeros(2)}
    loss = family.loss({"x": torch.tensor([0.5])}, task, {})
    assert float(loss) == pytest.approx(0.25 / 2e4, rel=1e-6)


def test_robust_regression_has_about_a_tenth_of_outliers_that_its_optimum_resists():
    family = tasks.get("robust_regression")
    far, errors = [], []
    for i in range(20):
        _, task = drawn(family, task_seed("meta_train", 2, i))
        far.append(((task["a"] @ family.optimum(task)["x"] - task["b"]).abs() > 0.2).double().mean())
        # Least squares spreads the outliers over all rows.
        squares = torch.linalg.lstsq(task["a"], task["b"][:, None]).solution[:, 0]
        errors.append(((task["a"] @ squares - task["b"]).abs() > 0.2).double().mean())
    # Outliers N(0, 5²) are above 0.2 in 97 of 100 cases.
    assert float(torch.stack(far).mean()) == pytest.approx(0.097, abs=4 * math.sqrt(0.09 / 1200))
    assert float(torch.stack(errors).mean()) > 0.5


def test_linear_network_gradients_are_the_products_of_the_other_factors():
    family = tasks.get("linear_network")
    for seed in SEEDS[:3]:
        params, task = drawn(family, seed)
        first, second, third = (params[f"weight{i}"].numpy() for i in range(3))
        x, target = task["points"].numpy(), (task["map"] @ task["points"]).numpy()
        error = third @ second @ first @ x - target
        assert float(family.loss(params, task, {})) == pytest.approx(float(np.mean(error**2)), rel=1e-6)
        outer = 2 * error @ x.T / error.size  # of the product of the matrices
        want = [
            second.T @ third.T @ outer,
            third.T @ outer @ first.T,
            outer @ first.T @ second.T,
        ]
        grads = gradient(family, params, task, {})
        for i, value in enumerate(want):
            torch.testing.assert_close(grads[f"weight{i}"], torch.from_numpy(value), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_linear_networks_of_any_depth_reach_zero_and_are_flat_at_the_origin(depth):
    family = tasks.get("linear_network", depth=depth, dim=4, num_points=6)
    params, task = drawn(family)
    assert list(params) == [f"weight{i}" for i in range(depth)]
    best = double(family.optimum(task))
    assert float(family.loss(best, task, {})) < 1e-13
    zero = {n: torch.zeros_like(v) for n, v in params.items()}
    slope = max(float(g.abs().max()) for g in gradient(family, zero, task, {}).values())
    assert (slope == 0) == (depth > 1)
    variance = float(torch.cat([drawn(family, s)[1]["images"].flatten() for s in range(0, 600, 3)]).var())
    assert variance == pytest.approx(1, rel=0.1)


def test_linear_networks_rest_on_plateaus():
    """Plain descent from small weights: hardly any progress for long, then much of it at once."""
    family = tasks.get("linear_network", init_scale=0.2)
    params, task = drawn(family)
    losses = []
    for _ in range(1000):
        grads, value = torch.func.grad_and_value(lambda p: family.loss(p, task, {}))(params)
        params = {n: p - 0.1 * grads[n] for n, p in params.items()}
        losses.append(float(value))
    assert losses[50] > 0.95 * losses[0]
    assert losses[-1] < 0.2 * losses[0]


def test_logistic_regression_optimum_is_stationary():
    family = tasks.get("logistic_regression", weight_decay=1e-4)
    for seed in SEEDS[:4]:
        params, task = drawn(family, seed)
        assert float(family.loss(params, task, {})) == pytest.approx(math.log(2), rel=1e-12)
        best = family.optimum(task)
        assert max(float(g.abs().max()) for g in gradient(family, best, task, {}).values()) < 1e-9


def test_softmax_regression_is_the_formula_and_its_optimum_stationary():
    family = tasks.get("softmax_regression", weight_decay=0.02)
    for seed in SEEDS[:4]:
        params, task = drawn(family, seed)
        x, weight, bias = (v.numpy() for v in (task["points"], params["weight"], params["bias"]))
        shares = np.exp(x @ weight + bias)
        shares /= shares.sum(1, keepdims=True)
        right = np.eye(4)[task["classes"].numpy()]
        want = -np.mean(np.log((shares * right).sum(1))) + 0.01 * (np.sum(weight**2) + np.sum(bias**2))
        assert float(family.loss(params, task, {})) == pytest.approx(want, rel=1e-12)
        grads = gradient(family, params, task, {})
        error = (shares - right) / len(x)
        torch.testing.assert_close(grads["weight"], torch.from_numpy(x.T @ error + 0.02 * weight))
        torch.testing.assert_close(grads["bias"], torch.from_numpy(error.sum(0) + 0.02 * bias))
        best = family.optimum(task)
        assert best["weight"].shape == (10, 4) and best["bias"].shape == (4,)
        assert max(float(g.abs().max()) for g in gradient(family, best, task, {}).values()) < 1e-12
        assert float(family.loss(best, task, {})) < want


def test_softmax_regression_of_two_classes_is_logistic_regression():
    """The difference of two scores is a logit, and halving it on both sides halves the penalty's weight."""
    family = tasks.get("softmax_regression", num_classes=2, weight_decay=4e-3)
    logistic = tasks.get("logistic_regression", num_rows=80, weight_decay=2e-3)
    for seed in SEEDS[:3]:
        _, task = drawn(family, seed)
        best = family.optimum(task)
        torch.testing.assert_close(best["weight"][:, 0], -best["weight"][:, 1], rtol=1e-7, atol=1e-9)
        theirs = logistic.optimum({"points": task["points"], "signs": 2.0 * task["classes"] - 1})
        got = best["weight"][:, 1] - best["weight"][:, 0]
        torch.testing.assert_close(got, theirs["weight"], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(best["bias"].diff(), theirs["bias"], rtol=1e-6, atol=1e-9)


def test_softmax_classes_are_noisy_and_few_starts_know_them():
    family = tasks.get("softmax_regression")
    losses, wrong = [], []
    for i in range(100):
        seed = task_seed("meta_train", 3, i)
        params, task = drawn(family, seed)
        losses.append(float(family.loss(params, task, {})))
        generator = torch.Generator().manual_seed(seed)
        points = torch.randn(80, 10, generator=generator)
        assert torch.equal(points.double(), task["points"])
        best = (points @ torch.randn(10, 4, generator=generator)).argmax(1)
        wrong.append((best != task["classes"]).double())
    # A uniformly drawn class is the right one in a quarter of the cases.
    assert float(torch.cat(wrong).mean()) == pytest.approx(0.075, abs=4 * math.sqrt(0.07 / 8000))
    assert sum(losses) / len(losses) == pytest.approx(math.log(4), abs=0.1)


def test_the_optimum_of_robust_regression_is_that_of_the_linear_program():
    """A row's loss lies between |r| − delta and |r|, so that the least mean of |r|, a linear program, bounds it."""
    from scipy import optimize

    family = tasks.get("robust_regression")
    for seed in SEEDS[:3]:
        _, task = drawn(family, seed)
        a, b = task["a"].numpy(), task["b"].numpy()
        eye = np.eye(60)
        # min Σ t with −t ≤ Ax − b ≤ t
        solved = optimize.linprog(
            np.concatenate([np.zeros(20), np.ones(60)]),
            A_ub=np.block([[a, -eye], [-a, -eye]]),
            b_ub=np.concatenate([b, -b]),
            bounds=[(None, None)] * 20 + [(0, None)] * 60,
        )
        assert solved.success
        least = float(family.loss(family.optimum(task), task, {}))
        assert solved.fun / 60 - 0.01 < least < solved.fun / 60
        rounder = tasks.get("robust_regression", delta=0.5)
        fitted = optimize.minimize(
            lambda x: float(rounder.loss({"x": torch.from_numpy(x)}, task, {})),
            np.zeros(20),
            jac=lambda x: gradient(rounder, {"x": torch.from_numpy(x)}, task, {})["x"].numpy(),
            method="BFGS",
            options={"gtol": 1e-9},
        )
        torch.testing.assert_close(rounder.optimum(task)["x"], torch.from_numpy(fitted.x), rtol=1e-4, atol=1e-5)


def test_the_optima_are_scikit_learns():
    from sklearn import linear_model

    family = tasks.get("lasso")
    for seed in SEEDS[:3]:
        _, task = drawn(family, seed)
        fitted = linear_model.Lasso(alpha=0.005 / 25, fit_intercept=False, tol=1e-12, max_iter=1_000_000)
        fitted.fit(task["a"].numpy(), task["b"].numpy())
        theirs = float(family.loss({"x": torch.from_numpy(fitted.coef_)}, task, {}))
        assert float(family.loss(family.optimum(task), task, {})) == pytest.approx(theirs, rel=1e-6)
    family = tasks.get("logistic_regression")
    for seed in SEEDS[:3]:
        _, task = drawn(family, seed)
        points = torch.cat([task["points"], torch.ones(100, 1)], dim=1)  # ours penalizes the bias as well
        fitted = linear_model.LogisticRegression(C=1 / (100 * 1e-3), fit_intercept=False, tol=1e-12, max_iter=10_000)
        fitted.fit(points.numpy(), task["signs"].numpy())
        best = family.optimum(task)
        theirs = torch.from_numpy(fitted.coef_[0])
        torch.testing.assert_close(torch.cat([best["weight"], best["bias"]]), theirs, rtol=1e-4, atol=1e-5)
    family = tasks.get("softmax_regression")
    for seed in SEEDS[:3]:
        _, task = drawn(family, seed)
        points = torch.cat([task["points"], torch.ones(80, 1)], dim=1)
        fitted = linear_model.LogisticRegression(C=1 / (80 * 1e-3), fit_intercept=False, tol=1e-12, max_iter=10_000)
        fitted.fit(points.numpy(), task["classes"].numpy())
        best = family.optimum(task)
        theirs = torch.from_numpy(fitted.coef_.T)
        torch.testing.assert_close(torch.cat([best["weight"], best["bias"][None]]), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dataset", TABLES)
def test_tables_are_scikit_learns_standardized_on_what_meta_train_sees(dataset):
    inputs, targets, split = load_table(dataset)
    source = getattr(sklearn.datasets, f"load_{dataset}")()
    seen = split.ranges["meta_train"].train
    raw = torch.tensor(source.data)[split.order]
    varies = raw[seen].std(0) > 0
    got = inputs[seen].double()
    torch.testing.assert_close(got.mean(0), torch.zeros(raw.shape[1], dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        got.std(0)[varies], torch.ones(int(varies.sum()), dtype=torch.float64), rtol=1e-5, atol=0
    )
    for column in (0, raw.shape[1] - 1):
        if varies[column]:
            correlation = np.corrcoef(inputs[:, column].numpy(), raw[:, column].numpy())[0, 1]
            assert correlation == pytest.approx(1, abs=1e-6)
    if dataset != "diabetes":
        assert torch.equal(targets, torch.tensor(source.target)[split.order])


def test_a_tabular_task_has_its_own_features_and_rows():
    family = tasks.get("tabular", num_features=5, num_rows=40)
    first, second = (draw_task(family, "meta_train", seed)[0] for seed in SEEDS[:2])
    for task in (first, second):
        assert len(task["columns"].unique()) == 5 and len(task["own_rows"].unique()) == 40
        rows = draw_batches(family, task, SEEDS[0], 0, 32)["rows"]
        assert set(rows.flatten().tolist()) <= set(task["own_rows"].tolist())
    assert not torch.equal(first["columns"], second["columns"])
    params, task = drawn(family)
    other = torch.ones(30, dtype=torch.bool)
    other[task["columns"]] = False
    poisoned = {**task, "inputs": torch.where(other, torch.nan, task["inputs"])}
    assert torch.isfinite(family.loss(params, poisoned, {"rows": task["own_rows"]}))


def test_tabular_sizes_that_the_table_has_not():
    with pytest.raises(ValueError, match="num_features must be at most 13 for wine; got 14"):
        draw_task(tasks.get("tabular", dataset="wine", num_features=14), "meta_train", 0)
    with pytest.raises(ValueError, match=r"num_rows must be at most \d+ for wine; got 150"):
        draw_task(tasks.get("tabular", dataset="wine", num_rows=150), "meta_train", 0)
    with pytest.raises(ValueError, match="label_noise needs integer targets"):
        draw_task(tasks.get("tabular", dataset="diabetes", label_noise=0.1), "meta_train", 0)


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_the_convolutional_net_is_the_one_of_pytorchs_layers(norm):
    family = tasks.get("image_conv", channels=(3, 4, 5, 6), norm=norm)
    params, task = drawn(family)
    generator = torch.Generator().manual_seed(0)
    params = {n: v + 0.1 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for n, v in params.items()}
    layers: list[nn.Module] = []
    for i, (fan_in, width) in enumerate(zip((1, 3, 4, 5), (3, 4, 5, 6))):
        conv = nn.Conv2d(fan_in, width, 3, padding=1, bias=norm == "none").double()
        conv.weight.data = params[f"conv{i}"]
        layers.append(conv)
        if norm == "none":
            conv.bias.data = params[f"shift{i}"]
        else:
            layer = nn.BatchNorm2d(width).double() if norm == "batch" else nn.GroupNorm(1, width).double()
            layer.weight.data, layer.bias.data = params[f"scale{i}"], params[f"shift{i}"]
            layers.append(layer)
        layers += [nn.ReLU(), *([nn.AvgPool2d(2)] if i < 3 else [])]
    images = task["inputs"][:9]
    want = nn.Sequential(*layers)(images.view(9, 1, 8, 8)).mean((2, 3)) @ params["weight"] + params["bias"]
    torch.testing.assert_close(family.outputs(params, task, images), want.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("hidden", [(5,), (6, 4, 7)])
def test_the_normalized_mlp_is_the_one_of_pytorchs_layers(hidden):
    """Outputs, loss and gradients of nn.Linear, nn.LayerNorm and the activation, in float64."""
    family = tasks.get("image_mlp", hidden=hidden, activation="elu", norm="layer", init="fan_in", init_scale=1.0)
    plain = tasks.get("image_mlp", hidden=hidden, activation="elu", init="fan_in", init_scale=1.0)
    params, task = drawn(family)
    unnormalized, _ = drawn(plain)
    assert [n for n in params if not n.startswith(("scale", "shift"))] == list(unnormalized)
    for name, value in params.items():
        gain_or_shift = torch.ones_like(value) if name.startswith("scale") else torch.zeros_like(value)
        assert torch.equal(value, unnormalized.get(name, gain_or_shift))
    generator = torch.Generator().manual_seed(0)
    params = {n: v + 0.1 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for n, v in params.items()}
    layers: list[nn.Module] = []
    widths = [64, *hidden, 10]
    for i, (fan_in, width) in enumerate(zip(widths, widths[1:])):
        linear = nn.Linear(fan_in, width).double()
        linear.weight.data, linear.bias.data = params[f"weight{i}"].T, params[f"bias{i}"]
        layers.append(linear)
        if i < len(hidden):
            norm = nn.LayerNorm(width).double()
            norm.weight.data, norm.bias.data = params[f"scale{i}"], params[f"shift{i}"]
            layers += [norm, nn.ELU()]
    rows = torch.arange(9)
    net = nn.Sequential(*layers)
    want = net(task["inputs"][rows])
    torch.testing.assert_close(family.outputs(params, task, task["inputs"][rows]), want, rtol=1e-10, atol=1e-12)
    F.cross_entropy(want, task["targets"][rows]).backward()
    grads = gradient(family, params, task, {"rows": rows})
    for i, layer in enumerate(m for m in net if not isinstance(m, nn.ELU)):
        number = i // 2
        pair = (f"weight{number}", f"bias{number}") if i % 2 == 0 else (f"scale{number}", f"shift{number}")
        for name, value in zip(pair, (layer.weight.grad, layer.bias.grad)):
            torch.testing.assert_close(grads[name], value.t(), rtol=1e-9, atol=1e-13)


def test_without_normalization_the_mlp_is_what_it_was():
    """Names, shapes and numbers of a network drawn and applied by hand."""
    family = tasks.get("image_mlp", hidden=(3,), activation="tanh")
    seed = SEEDS[0]
    _, params = draw_task(family, "meta_train", seed)
    generator = torch.Generator().manual_seed(seed)
    want = {}
    for i, shape in enumerate([(64, 3), (3, 10)]):
        want |= {f"weight{i}": torch.randn(*shape, generator=generator) * 0.1, f"bias{i}": torch.zeros(shape[1])}
    assert list(params) == list(want) and all(torch.equal(params[n], want[n]) for n in want)
    _, task = drawn(family)
    x = task["inputs"][:7]
    by_hand = torch.tanh(x @ want["weight0"].double()) @ want["weight1"].double()
    torch.testing.assert_close(family.outputs(double(params), task, x), by_hand, rtol=1e-12, atol=1e-14)
    assert family == tasks.get("image_mlp", hidden=(3,), activation="tanh", norm="none")


def test_the_convolutional_net_wants_square_images():
    family = tasks.get("image_conv")
    params, task = drawn(family)
    with pytest.raises(ValueError, match="image_conv needs square images; got 60 pixels"):
        family.outputs(params, task, task["inputs"][:3, :60])


def test_the_variational_bound_is_the_textbook_one():
    family = tasks.get("image_autoencoder", hidden=(), code=3, variational=True, batch_size=5)
    params, task = drawn(family)
    batch = {n: v[0] for n, v in double(draw_batches(family, task, SEEDS[0], 0, 1)).items()}
    images = task["inputs"][batch["rows"]]
    says = images @ params["encoder.weight0"] + params["encoder.bias0"]
    mean, std = says[:, :3], (0.5 * says[:, 3:]).exp()
    posterior, prior = torch.distributions.Normal(mean, std), torch.distributions.Normal(0.0, 1.0)
    logits = (mean + batch["noise"] * std) @ params["decoder.weight0"] + params["decoder.bias0"]
    cross_entropy = -(images * F.logsigmoid(logits) + (1 - images) * F.logsigmoid(-logits)).sum(1)
    want = (cross_entropy + torch.distributions.kl_divergence(posterior, prior).sum(1)).mean() / 64
    torch.testing.assert_close(family.loss(params, task, batch), want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("variational", [False, True])
def test_autoencoders_learn(variational):
    family = tasks.get("image_autoencoder", variational=variational)
    batched = BatchedFamily(family)
    stacked, params = batched.start("meta_train", SEEDS[:2])
    before = batched.eval_metrics(params, stacked)["test_loss"]
    weights = params.clone().requires_grad_()
    adam = torch.optim.Adam([weights], lr=3e-3)
    for step in range(150):
        batch = {n: v[0] for n, v in batched.batches(stacked, SEEDS[:2], [step] * 2, 1).items()}
        _, weights.grad = batched.losses_and_grads(weights.detach(), stacked, batch)
        adam.step()
    assert (batched.eval_metrics(weights.detach(), stacked)["test_loss"] < 0.75 * before).all()


def test_text_is_the_standard_librarys_and_files_belong_to_one_split():
    text, split = load_text()
    parts = {s: text[r.first : r.first + r.num_train + r.num_test].numpy().tobytes() for s, r in split.ranges.items()}
    assert sum(map(len, parts.values())) == len(text)
    owners = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]:
        beginning = encode(path.read_bytes()[:2000]).tobytes()
        if len(beginning) == 2000:
            owners.append([s for s in SPLITS if beginning in parts[s]])
    assert all(len(owner) == 1 for owner in owners)
    assert {owner[0] for owner in owners} == set(SPLITS)


def test_encoding():
    assert encode(b"\n ~a\t\xc3").tolist() == [0, 1, 95, ord("a") - 31, 1, 1]


def test_windows_of_a_text_file_stay_in_their_stretch(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(33 + i // 100) for i in range(6000)))  # character k at positions 100 k …
    family = tasks.get("char_rnn", text_file=str(path), length=30, hidden=3)
    text, split = load_text(str(path))
    assert [(r.first, r.num_train, r.num_test) for r in split.ranges.values()] == [
        (0, 3300, 300),
        (3600, 900, 300),
        (4800, 900, 300),
    ]
    for name, rows in split.ranges.items():
        seed = task_seed(name, 0)
        task, params = draw_task(family, name, seed)
        starts = torch.cat([draw_batches(family, task, seed, 32 * i, 32)["rows"].flatten() for i in range(6)])
        assert rows.first <= starts.min() and starts.max() + 31 <= rows.first + rows.num_train
        changed = text.clone()
        changed[rows.test] = 7
        everything = {**task, "text": text}
        metrics = family.eval_metrics(params, everything)
        assert float(family.eval_metrics(params, {**task, "text": changed})["test_loss"]) != float(metrics["test_loss"])
        changed = text.clone()
        changed[: rows.test.start] = 7
        changed[rows.test.stop :] = 7
        assert torch.equal(family.eval_metrics(params, {**task, "text": changed})["test_loss"], metrics["test_loss"])


def test_texts_that_cannot_be_used(tmp_path):
    for path in ("nowhere.txt", str(tmp_path)):
        with pytest.raises(
            FileNotFoundError, match=f"text_file '{path}' is not a file; give the path of a text file, or"
        ):
            load_text(path)
    path = tmp_path / "short.txt"
    for content in ("", "short"):
        path.write_text(content)
        message = f"text_file must hold at least 3000 characters; .*short.txt' has {len(content)}. Give a longer"
        with pytest.raises(ValueError, match=message):
            load_text(str(path))
    for name, content, share in (
        ("archive", bytes(range(256)) * 20, 39),
        ("wide", ("text\n" * 1000).encode("utf-16"), 50),
        ("greek", ("μῆνιν ἄειδε " * 500).encode(), 8),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            ValueError, match=f"must be plain text, at least 60% of it ASCII; of '.*{name}' {share}% is. U"
        ):
            load_text(str(tmp_path / name))
    path.write_text("x" * 3200)
    with pytest.raises(ValueError, match="length must be below 160 for a text this short; got 200"):
        draw_task(tasks.get("char_rnn", text_file=str(path), length=200), "meta_train", 0)


def test_a_text_that_is_not_utf8_is_read_byte_by_byte(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("un café à Orléans\r\n".encode("latin-1") * 300)
    text, _ = load_text(str(path))
    want = "un caf    Orl ans \n" * 300  # accents and the carriage return count as spaces
    assert text.tolist() == [0 if c == "\n" else ord(c) - 31 for c in want]


@pytest.mark.parametrize("context", [1, 3, 9])
@pytest.mark.parametrize("activation", ["tanh", "elu"])
def test_the_feed_forward_character_net_is_the_one_of_pytorchs_layers(context, activation):
    family = tasks.get("char_mlp", context=context, embedding=5, hidden=6, length=7, activation=activation)
    params, _ = drawn(family)
    generator = torch.Generator().manual_seed(0)
    params = {n: v + 0.1 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for n, v in params.items()}
    codes = torch.randint(96, (3, 7), generator=generator)
    got = family.logits(params, F.one_hot(codes, 96).double())
    assert got.shape == (3, 7, 96)
    layers = (nn.Linear(context * 5, 6).double(), nn.Linear(6, 96).double())
    for layer, weight, bias in zip(layers, ("input", "output"), ("bias", "output_bias")):
        layer.weight.data, layer.bias.data = params[weight].T, params[bias]
    activate = nn.Tanh() if activation == "tanh" else nn.ELU()
    for window in range(3):
        for t in range(7):  # the characters t − context + 1 … t, the earliest first
            seen = [codes[window, k] if k >= 0 else None for k in range(t - context + 1, t + 1)]
            embedded = [torch.zeros(5).double() if k is None else params["embedding"][k] for k in seen]
            want = layers[1](activate(layers[0](torch.cat(embedded))))
            torch.testing.assert_close(got[window, t], want.detach(), rtol=1e-10, atol=1e-12)


def test_the_feed_forward_character_net_sees_its_context_alone():
    family = tasks.get("char_mlp", context=3, length=8)
    params, _ = drawn(family)
    one_hot = F.one_hot(torch.arange(8).view(1, 8), 96).double()
    changed = one_hot.clone()
    changed[:, 2] = changed[:, 2].flip(-1)
    same = (family.logits(params, one_hot) == family.logits(params, changed)).all(-1)[0]
    assert same.tolist() == [True, True, False, False, False, True, True, True]


@pytest.mark.parametrize("cell", ["tanh", "gru"])
def test_the_recurrent_net_is_pytorchs(cell):
    family = tasks.get("char_rnn", cell=cell, hidden=5, length=7)
    params, _ = drawn(family)
    generator = torch.Generator().manual_seed(0)
    params = {n: v + 0.1 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for n, v in params.items()}
    layer = (nn.GRU if cell == "gru" else nn.RNN)(96, 5, batch_first=True).double()
    layer.weight_ih_l0.data, layer.weight_hh_l0.data = params["input"].T, params["state"].T
    layer.bias_ih_l0.data, layer.bias_hh_l0.data = params["bias"], torch.zeros_like(params["bias"])
    one_hot = F.one_hot(torch.randint(96, (3, 7), generator=generator), 96).double()
    want = layer(one_hot)[0] @ params["output"] + params["output_bias"]
    torch.testing.assert_close(family.logits(params, one_hot), want.detach(), rtol=1e-9, atol=1e-10)


def test_the_transformer_layer_is_pytorchs():
    family = tasks.get("char_transformer", num_layers=2, num_heads=2, width=8, length=6)
    params, _ = drawn(family)
    generator = torch.Generator().manual_seed(0)
    params = {n: v + 0.1 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for n, v in params.items()}
    one_hot = F.one_hot(torch.randint(96, (3, 6), generator=generator), 96).double()
    x = one_hot @ params["characters"] + params["positions"]
    for i in range(2):
        layer = nn.TransformerEncoderLayer(8, 2, 32, 0.0, F.gelu, batch_first=True, norm_first=True).double()
        attention = layer.self_attn
        attention.in_proj_weight.data, attention.out_proj.weight.data = (
            params[f"{i}.attention"].T,
            params[f"{i}.attention_out"].T,
        )
        attention.in_proj_bias.data.zero_()
        attention.out_proj.bias.data.zero_()
        layer.linear1.weight.data, layer.linear1.bias.data = params[f"{i}.wide"].T, params[f"{i}.wide_bias"]
        layer.linear2.weight.data, layer.linear2.bias.data = params[f"{i}.narrow"].T, params[f"{i}.narrow_bias"]
        for k, norm in ((1, layer.norm1), (2, layer.norm2)):
            norm.weight.data, norm.bias.data = params[f"{i}.norm{k}.scale"], params[f"{i}.norm{k}.shift"]
        x = layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64))
    want = F.layer_norm(x, (8,), params["norm.scale"], params["norm.shift"]) @ params["output"]
    torch.testing.assert_close(family.logits(params, one_hot), want.detach(), rtol=1e-9, atol=1e-10)


def test_characters_do_not_see_those_that_follow():
    for name in ("char_mlp", "char_rnn", "char_transformer"):
        family = tasks.get(name, length=6)
        params, _ = drawn(family)
        one_hot = F.one_hot(torch.arange(12).view(2, 6), 96).double()
        changed = one_hot.clone()
        changed[:, 4:] = changed[:, 4:].flip(-1)
        before, after = family.logits(params, one_hot), family.logits(params, changed)
        torch.testing.assert_close(before[:, :4], after[:, :4], rtol=1e-12, atol=0)
        assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_sinusoids_have_the_stated_ranges_and_reference_loss():
    family = tasks.get("sinusoid")
    drawn_tasks = [draw_task(family, "meta_train", task_seed("meta_train", 1, i))[0] for i in range(1500)]
    amplitude = torch.stack([t["amplitude"] for t in drawn_tasks])
    phase = torch.stack([t["phase"] for t in drawn_tasks])
    assert 0.1 <= amplitude.min() < 0.2 and 4.9 < amplitude.max() <= 5
    assert 0 <= phase.min() < 0.02 and math.pi - 0.02 < phase.max() <= math.pi
    zero = {n: torch.zeros_like(v) for n, v in draw_task(family, "meta_train", 0)[1].items()}
    losses = torch.stack([family.eval_metrics(zero, t)["test_loss"] for t in drawn_tasks])
    assert float(losses.mean()) == pytest.approx(4.25, abs=4 * float(losses.std()) / math.sqrt(1500))
    task = drawn_tasks[0]
    torch.testing.assert_close(task["query_y"], task["amplitude"] * torch.sin(task["query_x"] + task["phase"]))
    assert task["x"].shape == (10, 1) and task["query_x"].shape == (100, 1)


def test_the_pendulum_keeps_its_energy_without_torque():
    family = tasks.get("pendulum")
    machine = torch.tensor([1.3, 0.8], dtype=torch.float64)
    state = torch.tensor([[2.0, 0.5], [3.0, -1.0]], dtype=torch.float64)

    def energy(state):
        return 0.5 * (0.8 * state[:, 1]) ** 2 + 9.81 * 0.8 * state[:, 0].cos()

    before, idle = energy(state), torch.zeros(2, dtype=torch.float64)
    for _ in range(200):  # the method's steps of 0.05 s oscillate around the true energy and do not drift
        state, cost = family.step(state, idle, machine)
        assert ((energy(state) - before).abs() < 1.0).all()
        assert (cost >= 0).all()


def test_the_cart_pole_obeys_lagranges_equations():
    family = tasks.get("cart_pole")
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        state = torch.randn(1, 4, generator=generator, dtype=torch.float64)
        action = torch.randn(1, generator=generator, dtype=torch.float64)
        factors = torch.rand(3, generator=generator, dtype=torch.float64) + 0.5
        cart, pole, half = float(factors[0]), 0.1 * float(factors[1]), 0.5 * float(factors[2])
        _, velocity, angle, spin = (float(v) for v in state[0])
        # Mass matrix times accelerations = forces, for a uniform pole (moment of inertia 4/3 m l² about its end).
        coupling = pole * half * math.cos(angle)
        mass = torch.tensor([[cart + pole, coupling], [coupling, 4 / 3 * pole * half**2]], dtype=torch.float64)
        forces = torch.tensor(
            [10 * float(action) + pole * half * spin**2 * math.sin(angle), pole * 9.81 * half * math.sin(angle)],
            dtype=torch.float64,
        )
        want = torch.linalg.solve(mass, forces)
        after, _ = family.step(state, action, factors)
        assert float(after[0, 1] - velocity) / 0.02 == pytest.approx(float(want[0]), rel=1e-9)
        assert float(after[0, 3] - spin) / 0.02 == pytest.approx(float(want[1]), rel=1e-9)


@pytest.mark.parametrize("name", ["pendulum", "cart_pole"])
def test_a_policy_learns_to_beat_doing_nothing(name):
    family = tasks.get(name)
    task, params = draw_task(family, "meta_train", SEEDS[0])
    weights = [v.requires_grad_() for v in params.values()]
    adam = torch.optim.Adam(weights, lr=2e-2)
    batches = draw_batches(family, task, SEEDS[0], 0, 40)
    for starts in batches["starts"]:
        adam.zero_grad()
        family.loss(params, task, {"starts": starts}).backward()
        adam.step()
    metrics = family.eval_metrics({n: v.detach() for n, v in params.items()}, task)
    assert metrics["test_loss"] < 0.9 * metrics["idle_loss"]


def test_traffic_is_season_trend_and_noise_of_the_stated_variance():
    family = tasks.get("forecasting")
    ratios = []
    for seed in SEEDS:
        _, task = drawn(family, seed)
        hours = torch.arange(672, dtype=torch.float64)
        waves = [24, 12, 8, 168, 84]
        columns = [torch.ones_like(hours), hours / 672]
        columns += [f(2 * math.pi * hours / p) for p in waves for f in (torch.sin, torch.cos)]
        design = torch.stack(columns, dim=1)
        residual = task["series"] - design @ torch.linalg.lstsq(design, task["series"]).solution
        ratios.append(float(residual.square().sum() / (672 - design.shape[1]) / task["noise_variance"]))
        assert float(task["series"][:504].mean()) == pytest.approx(0, abs=1e-5)
        assert float(task["series"][:504].var()) == pytest.approx(1, rel=1e-5)
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=4 * math.sqrt(2 / 660 / len(SEEDS)))


def test_finance_has_regimes_that_last():
    family = tasks.get("forecasting", kind="finance", length=4000)
    tasks_drawn = [drawn(family, seed)[1] for seed in SEEDS]
    variances = [float(F.avg_pool1d(t["series"][None], 20, 20)[0].var()) for t in tasks_drawn]
    # Means of 20 values would have a twentieth of the variance if values were independent.
    assert min(variances) > 2 / 20
    assert sum(variances) / len(variances) > 4 / 20
    assert all(0.2 < float(t["noise_variance"]) < 1 for t in tasks_drawn)


def test_finance_has_the_stated_noise_within_a_regime():
    family = tasks.get("forecasting", kind="finance", length=4000)
    ratios = []
    for seed in SEEDS:
        _, task = drawn(family, seed)
        steps = task["series"].diff()
        ratios.append(float(steps.square().mean() / 2 / task["noise_variance"]))
    # Half the mean square of a step is the noise, and a change of regime in 3 of 100 adds some 4 % on average.
    assert sum(ratios) / len(ratios) == pytest.approx(1.04, abs=0.07)


def test_forecasts_are_tested_on_the_last_quarter_alone():
    family = tasks.get("forecasting", length=100, num_lags=5)
    params, task = drawn(family)
    windows = draw_batches(family, task, SEEDS[0], 0, 64)["windows"]
    assert windows.min() == 0 and windows.max() + 5 == 74  # the last training target; values 75 … 99 are held out
    changed = {**task, "series": task["series"].clone()}
    changed["series"][:70] = 9.0
    assert torch.equal(
        family.eval_metrics(params, changed)["test_loss"], family.eval_metrics(params, task)["test_loss"]
    )


def test_ratings_are_held_out_and_some_users_are_cold_starts():
    family = tasks.get("recommendation")
    _, task = drawn(family)
    pairs = list(zip(task["users"].tolist(), task["items"].tolist()))
    assert len(set(pairs)) == len(pairs) == 1600
    counts = torch.bincount(task["users"][:800], minlength=100)
    assert counts.max() >= 20 and counts.median() <= 7 and counts.min() <= 4
    halves = [torch.bincount(task["users"][part], minlength=100).double() for part in (slice(800), slice(800, 1600))]
    assert float(torch.corrcoef(torch.stack(halves))[0, 1]) > 0.7


def test_ratings_have_the_stated_variance_and_can_be_learned():
    family = tasks.get("recommendation")
    variances = [float(draw_task(family, "meta_train", s)[0]["ratings"].var()) for s in SEEDS]
    assert sum(variances) / len(variances) == pytest.approx(1.18 + 0.09, rel=0.2)
    batched = BatchedFamily(family)
    stacked, params = batched.start("meta_train", SEEDS[:2])
    before = batched.eval_metrics(params, stacked)["test_loss"]
    weights = params.clone().requires_grad_()
    adam = torch.optim.Adam([weights], lr=1e-2)
    for step in range(300):
        batch = {n: v[0] for n, v in batched.batches(stacked, SEEDS[:2], [step] * 2, 1).items()}
        _, weights.grad = batched.losses_and_grads(weights.detach(), stacked, batch)
        adam.step()
    assert (batched.eval_metrics(weights.detach(), stacked)["test_loss"] < 0.85 * before).all()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("rosenbrock", {"dim": 1}, "dim must be at least 2; got 1"),
        ("ackley", {"start": 0.0}, "start must be positive and finite; got 0.0"),
        ("griewank", {"dim": 0}, "dim must be at least 1; got 0"),
        ("griewank", {"start": -1.0}, "start must be positive and finite; got -1.0"),
        ("levy", {"dim": 0}, "dim must be at least 1; got 0"),
        ("powell", {"dim": 10}, "dim must be a multiple of 4; got 10"),
        ("powell", {"dim": 0}, "dim must be at least 4; got 0"),
        ("powell", {"start": math.inf}, "start must be positive and finite; got inf"),
        ("spectrum_quadratic", {"dim": 1}, "dim must be at least 2; got 1"),
        ("spectrum_quadratic", {"condition": 0.5}, "condition must be at least 1 and finite; got 0.5"),
        ("spectrum_quadratic", {"noise": -1.0}, "noise must be non-negative and finite; got -1.0"),
        ("lasso", {"num_rows": 0}, "num_rows must be at least 1; got 0"),
        ("lasso", {"weight": 0.0}, "weight must be positive; got 0.0"),
        ("lasso", {"init_scale": 0.0}, "init_scale must be positive; got 0.0"),
        ("robust_regression", {"dim": 0}, "dim must be at least 1; got 0"),
        ("robust_regression", {"num_rows": 19}, r"num_rows must be at least dim \(20\); got 19"),
        ("robust_regression", {"delta": 0.0}, "delta must be positive and finite; got 0.0"),
        ("robust_regression", {"delta": math.inf}, "delta must be positive and finite; got inf"),
        ("linear_network", {"depth": 0}, "depth must be at least 1; got 0"),
        ("linear_network", {"dim": 0}, "dim must be at least 1; got 0"),
        ("linear_network", {"num_points": 0}, "num_points must be at least 1; got 0"),
        ("linear_network", {"init_scale": 0.0}, "init_scale must be positive and finite; got 0.0"),
        ("softmax_regression", {"num_classes": 1}, "num_classes must be at least 2; got 1"),
        ("softmax_regression", {"num_rows": 1}, "num_rows must be at least 2; got 1"),
        ("softmax_regression", {"dim": 0}, "dim must be at least 1; got 0"),
        ("softmax_regression", {"weight_decay": 0.0}, "weight_decay must be positive; got 0.0"),
        ("softmax_regression", {"init_scale": -1.0}, "init_scale must be positive; got -1.0"),
        ("matrix_factorization", {"rank": 0}, "rank must be at least 1; got 0"),
        ("matrix_factorization", {"init_scale": 0.0}, "init_scale must be positive; got 0.0"),
        ("logistic_regression", {"num_rows": 1}, "num_rows must be at least 2; got 1"),
        ("logistic_regression", {"weight_decay": 0.0}, "weight_decay must be positive; got 0.0"),
        ("tabular", {"dataset": "iris"}, "dataset must be one of breast_cancer, wine, diabetes, digits; got 'iris'"),
        ("tabular", {"num_rows": -1}, "num_rows must be non-negative; got -1"),
        ("image_conv", {"channels": ()}, r"channels must name at least one layer, each of at least 1; got \(\)"),
        ("image_conv", {"norm": "group"}, "norm must be one of none, layer, batch; got 'group'"),
        ("image_conv", {"norm": "batch", "batch_size": 1}, "batch_size must be at least 2 with norm='batch'; got 1"),
        ("image_autoencoder", {"code": 0}, "code must be at least 1; got 0"),
        ("char_mlp", {"context": 0}, "context must be at least 1; got 0"),
        ("char_mlp", {"embedding": 0}, "embedding must be at least 1; got 0"),
        ("char_mlp", {"hidden": 0}, "hidden must be at least 1; got 0"),
        ("char_mlp", {"activation": "step"}, "activation must be one of .*tanh.*; got 'step'"),
        ("char_mlp", {"length": 0}, r"length must lie in \[1, 512\]; got 0"),
        ("char_mlp", {"label_noise": 2.0}, r"label_noise must lie in \[0, 1\]; got 2.0"),
        ("char_rnn", {"length": 0}, r"length must lie in \[1, 512\]; got 0"),
        ("char_rnn", {"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ("char_rnn", {"cell": "lstm"}, "cell must be one of tanh, gru; got 'lstm'"),
        ("char_rnn", {"hidden": 0}, "hidden must be at least 1; got 0"),
        ("char_transformer", {"num_heads": 3}, r"num_heads must divide width \(32\); got 3"),
        ("char_transformer", {"num_layers": 0}, "num_layers must be at least 1; got 0"),
        ("recommendation", {"rank": 0}, "rank must be at least 1; got 0"),
        ("recommendation", {"num_ratings": 2501}, "num_ratings must be at most half of num_users · num_items = 5000"),
        ("recommendation", {"noise": -1.0}, "noise must be non-negative; got -1.0"),
        ("recommendation", {"init_scale": 0.0}, "init_scale must be positive; got 0.0"),
        ("forecasting", {"kind": "weather"}, "kind must be one of traffic, finance; got 'weather'"),
        ("forecasting", {"num_lags": 0}, "num_lags must be at least 1; got 0"),
        ("forecasting", {"length": 50}, r"length must be at least 4 · \(num_lags \+ 1\) = 100; got 50"),
        ("pendulum", {"num_steps": 0}, "num_steps must be at least 1; got 0"),
        ("cart_pole", {"spread": -0.1}, "spread must be non-negative and finite; got -0.1"),
        ("sinusoid", {"num_shots": 0}, "num_shots must be at least 1; got 0"),
    ],
)
def test_values_out_of_range(name, fields, message):
    with pytest.raises(ValueError, match=message):
        tasks.get(name, **fields)
