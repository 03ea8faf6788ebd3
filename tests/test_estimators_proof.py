"""Estimators against what they estimate: finite differences, a closed form, the exact gradient of a whole unroll."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from estimator_reference import Linear, NoisyBowl, Parabola, theta_of, workload

from learned_opt import estimators, rules
from learned_opt.estimators.antithetic import flatten, unflatten
from learned_opt.particles import start_particles
from learned_opt.unroll import unroll
from tasks.image_mlp import ImageMLP
from tasks.quadratic import Quadratic

FAMILIES = {
    "noisy_bowl": NoisyBowl(),
    "quadratic": Quadratic(dim=3),
    "digits": ImageMLP(hidden=(2,), activation="tanh", batch_size=4),
}


def finite_differences(work, theta, saved, directions, h=1e-5):
    """Central differences of this truncation's meta-loss along each direction; the meta-loss needs no gradient code."""
    estimator = estimators.get("backprop")

    def value(at):
        return estimator.estimate(work, at, estimator.load_state_dict(work, copy.deepcopy(saved))).meta_loss

    flat = flatten(theta)
    return [
        (value(unflatten(flat + h * d, theta)) - value(unflatten(flat - h * d, theta))) / (2 * h) for d in directions
    ]


def check_against_finite_differences(work, settings, num_truncations=2):
    theta = theta_of(work.rule)
    estimator = estimators.get("backprop", **settings)
    state = estimator.init(work, theta, range(3))
    generator = torch.Generator().manual_seed(1)
    largest = 0.0
    for _ in range(num_truncations):
        saved = copy.deepcopy(estimator.state_dict(state))
        grads = flatten(estimator.estimate(work, theta, state).grads)
        directions = torch.randn(2, len(grads), generator=generator, dtype=torch.float64) / math.sqrt(len(grads))
        got = directions @ grads
        want = finite_differences(work, theta, saved, directions)
        assert got.tolist() == pytest.approx(want, rel=1e-5, abs=1e-8 * float(grads.norm()) + 1e-9)
        largest = max(largest, *map(abs, want))
    assert largest > 1e-5


@pytest.mark.parametrize("rule_name", list(rules.RULES))
@pytest.mark.parametrize(("family_name", "recompute"), [*((name, False) for name in FAMILIES), ("quadratic", True)])
def test_second_order_equals_finite_differences(family_name, rule_name, recompute):
    # Horizon 7, truncation 5: the meta-loss includes episodes that end inside the truncation.
    work = workload(rules.get(rule_name), FAMILIES[family_name], truncation=5, horizon=7, run_seed=2)
    if work.rule.turns(work.batched.shapes):
        pytest.skip("there is no second order through a basis")
    check_against_finite_differences(work, {"order": 2, "recompute": recompute})


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rule_name", list(rules.RULES))
def test_first_order_equals_finite_differences_where_it_is_exact(rule_name, recompute):
    work = workload(rules.get(rule_name), Linear(), truncation=5, horizon=7, normalization="none")
    check_against_finite_differences(work, {"order": 1, "recompute": recompute})


@pytest.mark.parametrize("average", ["mean", "final"])
@pytest.mark.parametrize("normalization", ["log", "ratio", "none"])
def test_every_meta_loss_equals_finite_differences(normalization, average):
    work = workload(
        rules.get("adam", lr=0.05), NoisyBowl(), truncation=4, horizon=9, normalization=normalization, average=average
    )
    check_against_finite_differences(work, {"order": 2})


H, X0, ETA = Parabola().h, Parabola().x0, 0.2


@pytest.mark.parametrize("num_steps", [1, 2, 10, 60])
@pytest.mark.parametrize("recompute", [False, True])
def test_closed_form_of_gradient_descent_on_a_parabola(num_steps, recompute):
    rule = rules.get("sgd")
    work = workload(
        rule,
        Parabola(),
        truncation=num_steps,
        horizon=num_steps,
        random_offsets=False,
        normalization="none",
        average="final",
    )
    theta = {"log_lr": torch.tensor(ETA, dtype=torch.float64).log()}
    exact = estimators.get("backprop", order=2, recompute=recompute)
    got = exact.estimate(work, theta, exact.init(work, theta, range(2)))
    derivative = -num_steps * H**2 * X0**2 * (1 - ETA * H) ** (2 * num_steps - 1)
    assert got.meta_loss == pytest.approx(0.5 * H * X0**2 * (1 - ETA * H) ** (2 * num_steps), rel=1e-12)
    assert float(got.grads["log_lr"]) == pytest.approx(ETA * derivative, rel=1e-12)
    # With gradients as constants, x_K = x_0 − η Σ h·x_s, whose derivative is a geometric sum.
    first = estimators.get("backprop", recompute=recompute)
    got = first.estimate(work, theta, first.init(work, theta, range(2)))
    path = [X0 * (1 - ETA * H) ** k for k in range(num_steps + 1)]
    assert float(got.grads["log_lr"]) == pytest.approx(-ETA * H * path[-1] * H * sum(path[:-1]), rel=1e-12)


@pytest.mark.parametrize("kind", ["es", "pes", "nres"])
def test_evolution_is_unbiased_for_the_closed_form(kind):
    """The derivative of E[L(log η + ε)] by Gauss-Hermite quadrature is what evolution strategies estimate."""
    num_steps, sigma = 6, 0.3
    rule = rules.get("sgd")
    work = workload(
        rule,
        Parabola(),
        truncation=num_steps,
        horizon=num_steps,
        random_offsets=False,
        normalization="none",
        average="final",
    )
    theta = {"log_lr": torch.tensor(ETA, dtype=torch.float64).log()}
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    eta = ETA * np.exp(sigma * nodes)
    slopes = eta * -num_steps * H**2 * X0**2 * (1 - eta * H) ** (2 * num_steps - 1)
    want = float((slopes * weights).sum() / weights.sum())
    estimator = estimators.get(kind, sigma=sigma)
    state = estimator.init(work, theta, range(200))
    samples = torch.stack([estimator.estimate(work, theta, state).grads["log_lr"] for _ in range(30)])
    error = float(samples.std() / math.sqrt(len(samples)))
    assert error < 0.05 * abs(want)
    assert abs(float(samples.mean()) - want) < 4 * error


NUM_PARTS, PART = 3, 4


def episode_means(kind, theta, num_particles, num_episodes, **settings):
    """Meta-gradients averaged over each episode's truncations, [episodes, num_theta]."""
    work = workload(
        rules.get("adam", lr=0.1),
        NoisyBowl(noise=0.0, spread=0.0),
        truncation=PART,
        horizon=NUM_PARTS * PART,
        random_offsets=False,
    )
    estimator = estimators.get(kind, **settings)
    state = estimator.init(work, theta, range(num_particles))
    return torch.stack(
        [
            torch.stack([flatten(estimator.estimate(work, theta, state).grads) for _ in range(NUM_PARTS)]).mean(0)
            for _ in range(num_episodes)
        ]
    )


@pytest.fixture(scope="module")
def exact_gradients():
    """Of the whole unroll, and of its truncations one at a time: by exact backpropagation, which is confirmed above."""
    rule = rules.get("adam", lr=0.1, beta1=0.7, beta2=0.9)
    theta = theta_of(rule)
    work = workload(
        rule,
        NoisyBowl(noise=0.0, spread=0.0),
        truncation=NUM_PARTS * PART,
        horizon=NUM_PARTS * PART,
        random_offsets=False,
    )
    estimator = estimators.get("backprop", order=2)
    whole = flatten(estimator.estimate(work, theta, estimator.init(work, theta, range(1))).grads)
    (parts,) = episode_means("backprop", theta, 1, 1, order=2)
    return theta, whole, parts


@pytest.mark.parametrize("kind", ["es", "pes", "nres"])
def test_unbiased_to_within_the_confidence_interval(kind, exact_gradients):
    """PES and NRES estimate the whole unroll's gradient from truncations; ES estimates the truncations' own."""
    theta, whole, parts = exact_gradients
    samples = episode_means(kind, theta, 300, 30, sigma=0.003)
    mean, error = samples.mean(0), samples.std(0) / math.sqrt(len(samples))
    target, other = (parts, whole) if kind == "es" else (whole, parts)
    distance = float((whole - parts).norm())
    assert ((mean - target).abs() < 4 * error).all()
    # The interval is narrow enough to tell the two targets apart, and the other one lies outside it.
    assert float(error.norm()) < distance / 4
    assert ((mean - other).abs() > 4 * error).any()


@pytest.mark.parametrize("per_particle", [False, True])
@pytest.mark.parametrize("horizon", [7, None])
@pytest.mark.parametrize("rule_name", list(rules.RULES))
def test_k_steps_twice_are_bitwise_2k_steps(rule_name, horizon, per_particle):
    rule = rules.get(rule_name)
    theta = theta_of(rule)
    if per_particle:
        theta = {n: torch.stack([v, v * 1.1, v * 0.9]) for n, v in theta.items()}
    work = workload(rule, NoisyBowl(), truncation=1, horizon=horizon)
    once, twice = (start_particles(work.batched, rule, work.plan, range(3)) for _ in range(2))
    whole = unroll(rule, theta, work.batched, work.plan, once, 20, per_particle=per_particle)
    halves = [unroll(rule, theta, work.batched, work.plan, twice, 10, per_particle=per_particle) for _ in range(2)]
    assert torch.equal(whole.losses, torch.cat([h.losses for h in halves]))
    assert torch.equal(whole.initial, torch.cat([h.initial for h in halves]))
    a, b = once.state_dict(), twice.state_dict()
    for name in a:
        if isinstance(a[name], dict):
            assert all(torch.equal(a[name][n], b[name][n]) for n in a[name])
        else:
            assert torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]


@pytest.mark.parametrize("family_name", list(FAMILIES))
@pytest.mark.parametrize("rule_name", list(rules.RULES))
@pytest.mark.parametrize("kind", list(estimators.ESTIMATORS))
def test_every_estimator_runs_every_rule_on_every_family(kind, rule_name, family_name, tmp_path):
    """Gradients like theta, resets taken, and the state survives a file that holds plain values only, to the bit."""
    rule = rules.get(rule_name)
    theta = theta_of(rule)
    work = workload(rule, FAMILIES[family_name], truncation=3, horizon=5)
    if kind == "imitation" and rule.turns(work.batched.shapes):
        pytest.skip("there is no imitation in a basis")
    ids = range(8)
    estimator = estimators.get(kind)
    state = estimator.init(work, theta, ids)
    first = estimator.estimate(work, theta, state)
    assert {n: v.shape for n, v in first.grads.items()} == {n: v.shape for n, v in theta.items()}
    assert list(first.grads) == list(theta)
    assert all(torch.isfinite(v).all() and v.dtype == torch.float64 for v in first.grads.values())
    assert max(float(v.abs().max()) for v in first.grads.values()) > 0
    assert first.num_inner_steps >= 3 * len(ids) and first.num_invalid == 0 and math.isfinite(first.meta_loss)
    assert set(estimator.horizons(state)) <= set(range(1, 6))
    torch.save(estimator.state_dict(state), tmp_path / "state.pt")
    want = estimator.estimate(work, theta, state)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh = estimators.get(kind)
    got = fresh.estimate(work, theta, fresh.load_state_dict(work, saved))
    assert got.meta_loss == want.meta_loss
    assert all(torch.equal(got.grads[n], want.grads[n]) for n in theta)


@pytest.mark.parametrize("kind", list(estimators.ESTIMATORS))
def test_frozen_names_get_no_gradient(kind):
    rule = rules.get("adam", lr=0.05)
    theta = theta_of(rule)
    work = workload(rule, NoisyBowl(), truncation=3, horizon=6, frozen=("log_lr",))
    estimator = estimators.get(kind)
    state = estimator.init(work, theta, range(8))
    for _ in range(2):
        estimate = estimator.estimate(work, theta, state)
        assert float(estimate.grads["log_lr"]) == 0
        assert float(estimate.grads["log_one_minus_beta1"]) != 0


class _Once(torch.autograd.Function):
    """Σx³ with a backward that autograd may not follow."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.pow(3).sum()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 3 * x.square()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnceDifferentiable(NoisyBowl):
    name = "once_differentiable"

    def loss(self, params, task, batch):
        return _Once.apply(params["x"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoDoubleBackward(NoisyBowl):
    """Aligning a sequence: PyTorch has the gradient of the CTC loss, and not the gradient's."""

    name = "no_double_backward"
    dim: int = 4

    def loss(self, params, task, batch):
        scores = params["x"].view(2, 1, 2).log_softmax(-1)
        one = torch.ones(1, 1, dtype=torch.long)
        return torch.nn.functional.ctc_loss(scores, one, torch.tensor([2]), torch.tensor([1]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (OnceDifferentiable(), "its gradient carries no graph, yet is not constant"),
        (NoDoubleBackward(), "derivative for aten::_ctc_loss_backward is not implemented"),
    ],
)
def test_order_two_needs_a_second_derivative(family, reason):
    work = workload(rules.get("sgd"), family, truncation=2, horizon=4)
    theta = theta_of(work.rule)
    with pytest.raises(ValueError) as error:
        estimators.get("backprop", order=2).init(work, theta, range(2))
    assert str(error.value) == (
        f"order=2 needs the second derivative of the loss of {family.name}, which cannot be formed: {reason}. "
        "Use order=1, an evolution strategy (es, pes, nres), or write the loss with operations that can be "
        "differentiated twice"
    )
    for kind in ("backprop", "pes"):
        estimator = estimators.get(kind)
        assert math.isfinite(estimator.estimate(work, theta, estimator.init(work, theta, range(2))).meta_loss)


def test_a_linear_loss_has_the_second_derivative_zero():
    work = workload(rules.get("sgd"), Linear(), truncation=2, horizon=4)
    assert len(estimators.get("backprop", order=2).init(work, theta_of(work.rule), range(2))) == 2


@pytest.mark.parametrize("order", [1, 2])
def test_recomputation_keeps_about_the_root_of_the_steps(order, monkeypatch):
    """At most √K states are kept at once, and at most √K steps are recorded at once."""
    from learned_opt.estimators import backprop

    kept, recorded = [], []
    plain_snapshot, plain_unroll = backprop.snapshot, backprop.unroll

    def counting_snapshot(particles):
        kept.append(1)
        return plain_snapshot(particles)

    def counting_unroll(*args, **options):
        segment = plain_unroll(*args, **options)
        assert segment.inputs is None
        recorded.append(len(segment.stages))
        return segment

    monkeypatch.setattr(backprop, "snapshot", counting_snapshot)
    monkeypatch.setattr(backprop, "unroll", counting_unroll)
    work = workload(rules.get("adam", lr=0.01), NoisyBowl(), truncation=200, horizon=200, random_offsets=False)
    theta = theta_of(work.rule)
    estimator = estimators.get("backprop", order=order, recompute=True)
    got = estimator.estimate(work, theta, estimator.init(work, theta, range(2)))
    assert sum(kept) <= 15 and max(recorded) <= 15 and sum(recorded) == 200
    monkeypatch.undo()
    plain = estimators.get("backprop", order=order)
    want = plain.estimate(work, theta, plain.init(work, theta, range(2)))
    assert got.meta_loss == want.meta_loss
    for name in theta:
        torch.testing.assert_close(got.grads[name], want.grads[name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_recomputation_with_a_failing_particle(order):
    """A particle whose loss overflows is left out, and the others' meta-gradient is what it is without it."""
    rule = rules.get("sgd", lr=0.9)

    work = workload(rule, Quadratic(dim=1), truncation=300, horizon=300, random_offsets=False, clip=1e300)
    theta = theta_of(rule)
    grads = []
    for recompute in (False, True):
        estimator = estimators.get("backprop", order=order, recompute=recompute)
        grads.append(estimator.estimate(work, theta, estimator.init(work, theta, range(6))))
    assert grads[0].num_invalid == grads[1].num_invalid and 0 < grads[0].num_invalid < 6
    assert grads[0].meta_loss == grads[1].meta_loss
    assert float(grads[0].grads["log_lr"]) == pytest.approx(float(grads[1].grads["log_lr"]), rel=1e-8)
    assert math.isfinite(grads[0].grads["log_lr"])


def test_unknown_estimator_suggests():
    with pytest.raises(ValueError, match=r"unknown estimator 'nress'; did you mean nres"):
        estimators.get("nress")
    with pytest.raises(ValueError, match="unknown estimator 'zzz'; choose from backprop, es, "):
        estimators.get("zzz")


def test_table_names_are_the_kinds():
    assert all(estimators.get(name).kind == name for name in estimators.ESTIMATORS)
    assert len(set(itertools.chain(estimators.ESTIMATORS))) >= 4
