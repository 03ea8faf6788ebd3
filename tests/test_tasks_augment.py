"""Augmentations against the family they wrap."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import grad
from torch.nn import functional as F

import tasks
from learned_opt import estimators, rules
from learned_opt.batched import BatchedFamily
from learned_opt.meta_loss import MetaLoss
from learned_opt.particles import EpisodePlan, Particles, start_particles
from learned_opt.task import draw_batches, draw_task, task_seed
from learned_opt.truncation import HorizonSchedule
from learned_opt.unroll import unroll
from tasks.augment import Augmentation
from tests.task_cases import CASES

DIGITS = {"name": "image_mlp", "hidden": [4], "batch_size": 12}
# smaller_batches changes the mini-batches, which is its purpose.
WRAPPED = [label for label, case in CASES.items() if "family" in case and case["name"] != "smaller_batches"]
PLAIN = [label for label, case in CASES.items() if "family" not in case]
SEEDS = [task_seed("meta_train", 3, i) for i in range(200)]


def double(tensors):
    return {n: v.double() if v.is_floating_point() else v for n, v in tensors.items()}


def drawn(family, seed, step=0):
    task, params = draw_task(family, "meta_train", seed)
    batch = {n: v[0] for n, v in draw_batches(family, task, seed, step, 1).items()}
    return double(params), double({**task, **family.shared_data()}), double(batch)


@pytest.mark.parametrize("label", WRAPPED)
def test_the_wrapped_family_draws_what_it_draws_alone(label):
    family = tasks.get(**CASES[label])
    inner = family
    while isinstance(inner, Augmentation):
        inner = inner.family
    _, task, batch = drawn(family, SEEDS[0])
    _, inner_task, inner_batch = drawn(inner, SEEDS[0])
    for name, value in inner_task.items():
        assert torch.equal(task[name], value)
    for name, value in inner_batch.items():
        assert torch.equal(batch[name], value)


@pytest.mark.parametrize("scope", ["global", "tensor", "coordinate"])
def test_reparametrization_keeps_the_problem(scope):
    inner = tasks.get(**DIGITS)
    family = tasks.get("reparametrized", family=DIGITS, scope=scope)
    params, task, batch = drawn(family, SEEDS[0])
    original, inner_task, inner_batch = drawn(inner, SEEDS[0])
    scales = {n: task[f"reparametrized0.{n}"] for n in params}
    for name in params:
        torch.testing.assert_close(params[name] * scales[name], original[name], rtol=1e-6, atol=1e-9)
        assert scales[name].shape == (original[name].shape if scope == "coordinate" else ())
    torch.testing.assert_close(
        family.loss(params, task, batch), inner.loss(original, inner_task, inner_batch), rtol=1e-6, atol=0
    )
    # Gradients with respect to p are c times those with respect to c · p: the chain rule written out.
    got = grad(family.loss)(params, task, batch)
    want = grad(inner.loss)({n: params[n] * scales[n] for n in params}, inner_task, inner_batch)
    for name in params:
        torch.testing.assert_close(got[name], want[name] * scales[name], rtol=1e-9, atol=1e-12)
    metrics, inner_metrics = family.eval_metrics(params, task), inner.eval_metrics(original, inner_task)
    torch.testing.assert_close(metrics, inner_metrics, rtol=1e-6, atol=0)
    values = torch.stack([v.flatten()[0] for v in scales.values()])
    assert (values.unique().numel() == 1) == (scope == "global")


def test_reparametrization_is_log_uniform_and_happens_with_its_probability():
    family = tasks.get("reparametrized", family={"name": "quadratic", "dim": 50}, probability=0.3, log_range=2.0)
    logs = torch.stack([draw_task(family, "meta_train", s)[0]["reparametrized0.theta"].log() for s in SEEDS])
    changed = (logs != 0).any(1)
    assert float(changed.double().mean()) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / len(SEEDS)))
    logs = logs[changed].flatten()
    assert logs.abs().max() <= 2.0
    assert float(logs.mean()) == pytest.approx(0.0, abs=0.1)
    assert float(logs.var()) == pytest.approx(4 / 3, rel=0.05)  # of U(−2, 2)
    never = tasks.get("reparametrized", family={"name": "quadratic"}, probability=0.0)
    assert all((draw_task(never, "meta_train", s)[0]["reparametrized0.theta"] == 1).all() for s in SEEDS[:20])


def test_loss_scaling():
    inner, family = tasks.get("quadratic"), tasks.get("loss_scaling", family={"name": "quadratic"}, log_range=2.0)
    for seed in SEEDS[:5]:
        params, task, _ = drawn(family, seed)
        scale = task["loss_scaling0.scale"]
        assert math.exp(-2) <= scale <= math.exp(2)
        torch.testing.assert_close(family.loss(params, task, {}), scale * inner.loss(params, task, {}))


def test_loss_offset_leaves_gradients_and_metrics_what_they_are():
    inner, family = tasks.get(**DIGITS), tasks.get("loss_offset", family=DIGITS, offset=0.75)
    for seed in SEEDS[:5]:
        params, task, batch = drawn(family, seed)
        torch.testing.assert_close(family.loss(params, task, batch), inner.loss(params, task, batch) - 0.75)
        got, want = grad(family.loss)(params, task, batch), grad(inner.loss)(params, task, batch)
        assert all(torch.equal(got[n], v) for n, v in want.items())
        got, want = family.eval_metrics(params, task), inner.eval_metrics(params, task)
        assert want and all(torch.equal(got[n], v) for n, v in want.items())
    assert family.query_loss(params, task, batch) is None
    # So a rule does the same with it, batched, to the bit.
    runs = []
    for each in (family, inner):
        batched, rule = BatchedFamily(each), rules.get("adam", lr=0.01)
        plan = EpisodePlan(split="meta_train", run_seed=0)
        particles = start_particles(batched, rule, plan, range(2))
        losses = unroll(rule, rule.init_theta(torch.Generator()), batched, plan, particles, 12).losses
        runs.append((losses, particles.params))
    assert torch.equal(runs[0][1], runs[1][1])
    torch.testing.assert_close(runs[0][0], runs[1][0] - 0.75)


def test_loss_offset_of_what_judges():
    case = CASES["sinusoid-query"]
    inner, family = tasks.get(**case), tasks.get("loss_offset", family=case, offset=-0.5)
    params, task, batch = drawn(family, SEEDS[0])
    torch.testing.assert_close(family.query_loss(params, task, batch), inner.query_loss(params, task, batch) + 0.5)
    torch.testing.assert_close(family.loss(params, task, batch), inner.loss(params, task, batch) + 0.5)


WITH_OPTIMUM = [
    label for label in PLAIN if hasattr(tasks.get(**CASES[label]), "optimum") and label != "spectrum_quadratic-noise"
]


@pytest.mark.parametrize("label", WITH_OPTIMUM)
def test_loss_offset_above_the_optimum_makes_the_loss_there_zero(label):
    inner = tasks.get(**CASES[label])
    family = tasks.get("loss_offset", family=inner, offset=0.25, above_optimum=True)
    for seed in SEEDS[:3]:
        params, task, _ = drawn(family, seed)
        best = double(inner.optimum(draw_task(inner, "meta_train", seed)[0]))
        least = inner.loss(best, task, {})
        close = dict(rtol=0, atol=1e-6 * max(1.0, float(least)))  # what is taken off is a float32
        torch.testing.assert_close(family.loss(best, task, {}), torch.full_like(least, -0.25), **close)
        above = family.loss(params, task, {}) + 0.25
        torch.testing.assert_close(above, inner.loss(params, task, {}) - least, **close)
        assert above > -1e-6
    assert {"lasso", "logistic_regression", "robust_regression", "softmax_regression", "rosenbrock"} <= {*WITH_OPTIMUM}


def test_loss_offset_asks_for_an_optimum_that_is_there():
    for given in ({"name": "quadratic"}, {"name": "reparametrized", "family": {"name": "lasso"}}):
        text = (
            rf"above_optimum needs a family whose tasks have a known optimum, which {given['name']}\(.*\) has not; give"
        )
        with pytest.raises(ValueError, match=text + " offset a number instead"):
            tasks.get("loss_offset", family=given, above_optimum=True)
    noisy = {"name": "spectrum_quadratic", "noise": 0.1}
    with pytest.raises(
        ValueError, match=r"needs a loss that no mini-batch changes; spectrum_quadratic\(.*\) draws mini-batches"
    ):
        tasks.get("loss_offset", family=noisy, above_optimum=True)
    assert tasks.get("loss_offset", family=noisy, offset=1.0).offset == 1.0


def test_gradient_noise_is_in_the_gradient_alone():
    inner, family = (
        tasks.get("quadratic", dim=30),
        tasks.get("gradient_noise", family={"name": "quadratic", "dim": 30}, std=0.5),
    )
    params, task, _ = drawn(family, SEEDS[0])
    noise = []
    for step in range(40):
        batch = drawn(family, SEEDS[0], step)[2]
        assert torch.equal(family.loss(params, task, batch), inner.loss(params, task, {}))
        noise.append(grad(family.loss)(params, task, batch)["theta"] - grad(inner.loss)(params, task, {})["theta"])
        torch.testing.assert_close(noise[-1], batch["gradient_noise0.theta"], rtol=0, atol=1e-9)
    all_noise = torch.stack(noise)
    assert float(all_noise.std()) == pytest.approx(0.5, rel=0.1)
    assert float((all_noise[:-1] * all_noise[1:]).mean()) == pytest.approx(0.0, abs=0.03)  # fresh at every step


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_delayed_gradients_are_those_of_earlier_steps(nested):
    """Gradient descent written out: step t sees the gradient of step t − 2, or the first; resets, cuts and resumes."""
    inner = tasks.get("spectrum_quadratic", dim=3)
    family = tasks.get("delayed_gradients", family={"name": "spectrum_quadratic", "dim": 3}, delay=2)
    if nested:
        family = tasks.get("delayed_gradients", family=tasks.get("delayed_gradients", family=inner))
    assert family.gradient_delay == 2
    batched, rule = BatchedFamily(family, dtype=torch.float64), rules.get("sgd", lr=0.05)
    theta = {"log_lr": torch.tensor(0.05, dtype=torch.float64).log()}
    plan = EpisodePlan(split="meta_train", run_seed=0, horizons=HorizonSchedule(longest=6, random_offsets=False))
    whole, cut = (start_particles(batched, rule, plan, [0, 3]) for _ in range(2))
    segment = unroll(rule, theta, batched, plan, whole, 14, record="gradients")
    parts = []
    for num_steps in (1, 3, 4, 6):
        parts.append(unroll(rule, theta, batched, plan, cut, num_steps).losses)
        cut = Particles.from_state_dict(cut.state_dict(), batched, "meta_train")
    assert torch.equal(torch.cat(parts), segment.losses)
    assert torch.equal(cut.pending, whole.pending) and torch.equal(cut.grads, whole.grads)
    for column, particle in enumerate([0, 3]):
        for episode in range(3):
            seed, _ = plan.draw(particle, episode)
            task, params = draw_task(inner, "meta_train", seed)
            task, params, seen = double(task), double(params), []
            for t in range(min(6, 14 - 6 * episode)):
                seen.append(grad(inner.loss)(params, task, {}))
                old = seen[max(t - 2, 0)]
                params = {n: v - 0.05 * old[n] for n, v in params.items()}
                step = 6 * episode + t
                torch.testing.assert_close(segment.losses[step, column], inner.loss(params, task, {}))
                torch.testing.assert_close(segment.inputs[step, column], torch.cat([g.flatten() for g in old.values()]))
                now = grad(inner.loss)(params, task, {})
                torch.testing.assert_close(
                    segment.outputs[step, column], torch.cat([g.flatten() for g in now.values()])
                )


def test_delayed_gradients_take_no_exact_backpropagation():
    family = tasks.get("delayed_gradients", family={"name": "quadratic"})
    plan = EpisodePlan(split="meta_train", run_seed=0, horizons=HorizonSchedule(longest=4))
    work = estimators.Workload(
        rule=rules.get("sgd"), batched=BatchedFamily(family), plan=plan, meta_loss=MetaLoss(), truncation=2
    )
    with pytest.raises(ValueError, match="order=2 cannot differentiate through the delayed gradients of delayed_gradi"):
        estimators.get("backprop", order=2).init(work, {}, [0])
    with pytest.raises(ValueError, match="delay must be at least 1; got 0"):
        tasks.get("delayed_gradients", family={"name": "quadratic"}, delay=0)


def test_smaller_batches_are_batches_of_fewer_rows():
    inner, family = tasks.get(**DIGITS), tasks.get("smaller_batches", family=DIGITS)
    sizes = set()
    for seed in SEEDS[:60]:
        params, task, batch = drawn(family, seed)
        whole = drawn(inner, seed)[2]["rows"]
        num_kept = next(k for k in (1, 2, 3, 4, 6, 12) if torch.equal(batch["rows"], whole[:k].repeat(12 // k)))
        sizes.add(num_kept)
        small = inner.loss(params, task, {"rows": whole[:num_kept]})
        torch.testing.assert_close(family.loss(params, task, batch), small)
    assert sizes == {1, 2, 3, 4, 6, 12}
    full = tasks.get("smaller_batches", family={"name": "quadratic"})
    with pytest.raises(
        ValueError, match=r"smaller_batches needs a family that draws mini-batches; quadratic\(.*\) draws none"
    ):
        drawn(full, SEEDS[0])


@pytest.mark.parametrize("label", [x for x in PLAIN if x not in ("image_mlp_sampled", "spectrum_quadratic-noise")])
def test_smaller_batches_of_every_family_that_draws_them(label):
    """Loss and gradient are the family's own on the first k entries of its batch, whatever the batch holds."""
    inner = tasks.get(**CASES[label])
    whole = drawn(inner, SEEDS[0])[2]
    if not any("." not in name for name in whole):
        with pytest.raises(ValueError, match="smaller_batches needs a family that draws mini-batches; "):
            drawn(tasks.get("smaller_batches", family=inner), SEEDS[0])
        return
    family, sizes = tasks.get("smaller_batches", family=inner), set()
    for seed in SEEDS[:12]:
        params, task, batch = drawn(family, seed)
        whole = drawn(inner, seed)[2]
        size = len(next(iter(whole.values())))
        divisors = [k for k in range(1, size + 1) if size % k == 0]
        k = divisors[int(float(task["smaller_batches0.uniform"]) * len(divisors))]
        small = {name: value[:k] for name, value in whole.items()}
        torch.testing.assert_close(family.loss(params, task, batch), inner.loss(params, task, small))
        got, want = grad(family.loss)(params, task, batch), grad(inner.loss)(params, task, small)
        for name in params:
            torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-9)
        sizes.add(k)
    assert len(sizes) > 1


def test_convex_mixing_adds_a_problem_with_optimum_zero():
    inner, family = tasks.get(**DIGITS), tasks.get("convex_mixing", family=DIGITS, dim=7)
    params, task, batch = drawn(family, SEEDS[0])
    start, target = params["convex_mixing0.x"], task["convex_mixing0.target"]
    assert start.shape == (7,) and start.abs().max() <= 1 and target.abs().max() <= 1
    alone = inner.loss({n: v for n, v in params.items() if n != "convex_mixing0.x"}, task, batch)
    torch.testing.assert_close(family.loss(params, task, batch), alone + ((start - target) ** 2).sum() / 7)
    solved = {**params, "convex_mixing0.x": target}
    torch.testing.assert_close(family.loss(solved, task, batch), alone)
    assert torch.equal(family.eval_metrics(solved, task)["test_loss"], family.eval_metrics(params, task)["test_loss"])


def test_label_noise_changes_its_share_of_the_classes_and_no_held_out_row():
    family, clean = tasks.get(**DIGITS, label_noise=0.4), tasks.get(**DIGITS)
    wrong = []
    for seed in SEEDS[:40]:
        task, params = draw_task(family, "meta_train", seed)
        batches = draw_batches(family, task, seed, 0, 32)
        wrong.append((batches["targets"] != family.shared_data()["targets"][batches["rows"]]).double().mean())
        everything = {**task, **family.shared_data()}
        assert torch.equal(
            family.eval_metrics(params, everything)["test_loss"], clean.eval_metrics(params, everything)["test_loss"]
        )
    # A uniformly drawn class is the right one in a tenth of the cases.
    assert float(torch.stack(wrong).mean()) == pytest.approx(0.36, abs=0.02)


@pytest.mark.parametrize(
    ("label", "num_classes"), [("image_conv", 10), ("image_mlp_sampled", 10), ("char_rnn", 96), ("omniglot", 3)]
)
def test_label_noise_of_every_family_with_classes(label, num_classes):
    """The noisy loss is the cross-entropy of the drawn classes, the rows and held-out metrics are those without."""
    family, clean = tasks.get(**{**CASES[label], "label_noise": 0.5}), tasks.get(**CASES[label])
    changed = []
    for seed in SEEDS[:40]:
        params, task, batch = drawn(family, seed)
        clean_params, clean_task, clean_batch = drawn(clean, seed)
        assert all(torch.equal(batch[n], v) for n, v in clean_batch.items())
        assert all(torch.equal(params[n], v) for n, v in clean_params.items())
        (drawn_classes,) = (batch[n].flatten() for n in batch.keys() - clean_batch.keys())
        assert int(drawn_classes.min()) >= 0 and int(drawn_classes.max()) < num_classes
        if label == "omniglot":
            images, right = family.rows(task, slice(0, family.num_shots))
            scores = family.outputs(params, images)
        elif label == "char_rnn":
            windows = task["text"][batch["rows"][:, None] + torch.arange(family.length + 1)].long()
            scores = family.logits(params, F.one_hot(windows[:, :-1], 96).double()).flatten(0, 1)
            right = windows[:, 1:].flatten()
        else:
            count = int(task.get("batch_rows", family.batch_size))
            scores = family.outputs(params, task, task["inputs"][batch["rows"][:count]])
            right, drawn_classes = task["targets"][batch["rows"][:count]], drawn_classes[:count]
        torch.testing.assert_close(family.loss(params, task, batch), F.cross_entropy(scores, drawn_classes))
        torch.testing.assert_close(clean.loss(params, clean_task, clean_batch), F.cross_entropy(scores, right))
        torch.testing.assert_close(family.eval_metrics(params, task), clean.eval_metrics(params, task), rtol=0, atol=0)
        changed.append((drawn_classes != right).double())
    share, wanted = torch.cat(changed), 0.5 * (1 - 1 / num_classes)
    assert float(share.mean()) == pytest.approx(wanted, abs=4 * math.sqrt(wanted * (1 - wanted) / len(share)))


def test_label_noise_out_of_range():
    for label in ("image_mlp", "tabular", "char_transformer", "omniglot"):
        with pytest.raises(ValueError, match=r"label_noise must lie in \[0, 1\]; got -0.1"):
            tasks.get(**{**CASES[label], "label_noise": -0.1})


def _initial(wrapper, fields, inner, seed):
    """(loss of the wrapped family at its initial parameters, the inner family's at its own, the wrapped task)."""
    family = tasks.get(wrapper, family=inner, **fields)
    params, task, batch = drawn(family, seed, 3)
    inner_params, inner_task, inner_batch = drawn(tasks.get(**inner), seed, 3)
    pairs = []
    for method in ("loss", "query_loss"):
        got = getattr(family, method)(params, task, batch)
        want = getattr(tasks.get(**inner), method)(inner_params, inner_task, inner_batch)
        assert (got is None) == (want is None)
        if got is not None:
            pairs.append((got, want))
    return pairs, params, task


@pytest.mark.parametrize("label", PLAIN)
@pytest.mark.parametrize(
    ("wrapper", "fields"),
    [
        ("reparametrized", {"scope": "coordinate", "log_range": 1.0}),
        ("reparametrized", {"scope": "tensor"}),
        ("reparametrized", {"scope": "global"}),
        ("gradient_noise", {"std": 0.7}),
        ("delayed_gradients", {"delay": 3}),
        ("loss_scaling", {}),
        ("loss_offset", {"offset": 1.5}),
        ("convex_mixing", {"dim": 4}),
    ],
)
def test_the_loss_at_the_initial_parameters_around_every_family(wrapper, fields, label):
    """What docs/tasks.md says of it: unchanged, times or less a constant, or plus the convex term."""
    for seed in SEEDS[:2]:
        pairs, params, task = _initial(wrapper, fields, CASES[label], seed)
        for got, want in pairs:
            if wrapper == "loss_scaling":
                want = want * task["loss_scaling0.scale"]
            if wrapper == "loss_offset":
                want = want - 1.5
            if wrapper == "convex_mixing":
                want = want + (params["convex_mixing0.x"] - task["convex_mixing0.target"]).square().sum() / 4
            # Initial parameters are float32, so that p₀/c times c is p₀ to a rounding of each.
            torch.testing.assert_close(got, want, rtol=1e-5 if wrapper == "reparametrized" else 0, atol=1e-12)


def test_nested_augmentations_keep_their_tensors_apart():
    family = tasks.get("reparametrized", family={"name": "reparametrized", "family": {"name": "quadratic"}})
    task, _ = draw_task(family, "meta_train", SEEDS[0])
    assert not torch.equal(task["reparametrized0.theta"], task["reparametrized1.theta"])


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("reparametrized", {"scope": "row"}, "scope must be one of global, tensor, coordinate; got 'row'"),
        ("reparametrized", {"log_range": 0.0}, "log_range must be positive and finite; got 0.0"),
        ("reparametrized", {"probability": 2.0}, r"probability must lie in \[0, 1\]; got 2.0"),
        ("loss_scaling", {"log_range": -1.0}, "log_range must be positive and finite; got -1.0"),
        ("loss_offset", {"offset": math.inf}, "offset must be finite; got inf"),
        ("loss_offset", {"offset": math.nan}, "offset must be finite; got nan"),
        ("gradient_noise", {"std": 0.0}, "std must be positive and finite; got 0.0"),
        ("convex_mixing", {"dim": 0}, "dim must be at least 1; got 0"),
        ("convex_mixing", {"family": "quadratic"}, "family must be a TaskFamily or a mapping .*; got 'quadratic'"),
        ("convex_mixing", {"family": {"dim": 3}}, "family must have a 'name' beside its fields; got {'dim': 3}"),
        (
            "convex_mixing",
            {"family": {"name": "quadratik"}},
            r"unknown task family 'quadratik'; did you mean quadratic\?",
        ),
    ],
)
def test_values_out_of_range(name, fields, message):
    with pytest.raises(ValueError, match=message):
        tasks.get(name, **{"family": {"name": "quadratic"}, **fields})
