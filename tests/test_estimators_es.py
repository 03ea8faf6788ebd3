"""ES, PES and NRES: against their definitions written out step by step, and against each other where they agree."""

import dataclasses
import math

import pytest
import torch
from estimator_reference import (
    Arm,
    MatrixAndVector,
    NoisyBowl,
    Parabola,
    TwoTensors,
    reference_estimates,
    theta_of,
    workload,
)

from learned_opt import estimators, rules
from learned_opt.batched import BatchedFamily
from learned_opt.estimators.antithetic import flatten, perturbations, unflatten
from learned_opt.rules.inplace import stepper
from learned_opt.rules.kernels import build
from learned_opt.task import TaskFamily

EVOLUTION = ["es", "pes", "nres"]
compiler = build._compiler() is not None


def run(kind, work, theta, ids, num_truncations, **settings):
    estimator = estimators.get(kind, **settings)
    state = estimator.init(work, theta, ids)
    return [estimator.estimate(work, theta, state) for _ in range(num_truncations)], state


@pytest.mark.parametrize(
    ("rule_name", "average"),
    [*((name, "mean") for name in ("compact", "adam", "sgd", "paced", "turned")), ("compact", "final")],
)
@pytest.mark.parametrize("kind", EVOLUTION)
def test_equals_its_definition_with_resets_inside_truncations(kind, rule_name, average):
    rule = rules.get(rule_name)
    theta = theta_of(rule)
    # Horizon 7 with truncation 5 and random offsets: episodes end in the middle of a truncation, at its end, and at
    # different steps.
    family = MatrixAndVector() if rule.basis else TwoTensors()
    work = workload(rule, family, truncation=5, horizon=7, run_seed=3, average=average)
    got, _ = run(kind, work, theta, [0, 1, 2, 3, 4, 5], 4, sigma=0.05)
    want = reference_estimates(kind, work, theta, [0, 2, 4], 0.05, 4)
    for estimate, flat in zip(got, want):
        torch.testing.assert_close(flatten(estimate.grads), flat, rtol=1e-8, atol=1e-9 * float(flat.abs().max()))
    assert all(flat.abs().max() > 0 for flat in want)


@pytest.mark.parametrize("kind", EVOLUTION)
def test_compiled_kernels_give_the_numbers_of_plain_torch(kind, monkeypatch):
    """A rule that is told of whole tensors steps in a kernel of its own with one theta per arm."""
    rule = rules.get("paced")
    theta = {n: v.float() for n, v in theta_of(rule).items()}
    work = workload(rule, TwoTensors(), truncation=5, horizon=7)
    work = dataclasses.replace(work, batched=BatchedFamily(TwoTensors()))
    results = []
    for native in ("0", "1"):
        monkeypatch.setenv("LEARNED_OPT_NATIVE", native)
        assert (stepper(rule, {n: v[None] for n, v in theta.items()}) is not None) == (native == "1") or not compiler
        results.append(run(kind, work, theta, range(6), 4, sigma=0.1)[0])
    for plain, compiled in zip(*results):
        assert compiled.meta_loss == pytest.approx(plain.meta_loss, rel=1e-4)
        want = flatten(plain.grads)
        torch.testing.assert_close(flatten(compiled.grads), want, rtol=1e-3, atol=2e-3 * float(want.abs().max()))


@pytest.mark.parametrize("kind", EVOLUTION)
def test_several_episodes_inside_one_truncation(kind):
    rule = rules.get("adam", lr=0.05)
    theta = theta_of(rule)
    work = workload(rule, NoisyBowl(), truncation=11, horizon=11, run_seed=1)
    work = dataclasses.replace(
        work,
        plan=dataclasses.replace(
            work.plan, horizons=dataclasses.replace(work.plan.horizons, kind="log_uniform", shortest=2)
        ),
    )
    got, _ = run(kind, work, theta, range(4), 4, sigma=0.05)
    for estimate, flat in zip(got, reference_estimates(kind, work, theta, [0, 2], 0.05, 4)):
        torch.testing.assert_close(flatten(estimate.grads), flat, rtol=1e-8, atol=1e-9 * float(flat.abs().max()))


@pytest.mark.parametrize("kind", ["pes", "nres"])
def test_equals_es_where_one_truncation_covers_the_horizon(kind):
    rule = rules.get("compact")
    theta = theta_of(rule)
    work = workload(rule, NoisyBowl(), truncation=6, horizon=6, random_offsets=False)
    es, _ = run("es", work, theta, range(4), 3, sigma=0.1)
    other, _ = run(kind, work, theta, range(4), 3, sigma=0.1)
    assert [e.meta_loss for e in es[:1]] == [e.meta_loss for e in other[:1]]
    if kind == "pes":  # NRES names its perturbations by episode, which coincides with the truncation here.
        assert [e.meta_loss for e in es] == [e.meta_loss for e in other]
    for a, b in zip(es, other):
        for name in theta:
            assert torch.equal(a.grads[name], b.grads[name])
        assert a.num_inner_steps == b.num_inner_steps == 4 * 6


def test_an_ended_episode_leaks_nothing_into_the_next():
    """Whatever a pair has accumulated, the losses after its reset, inside a truncation or at its end, do not see it."""
    rule = rules.get("adam", lr=0.1)
    theta = theta_of(rule)
    work = workload(rule, NoisyBowl(), truncation=5, horizon=7, random_offsets=False, average="final")
    clean, poisoned = (estimators.get("pes") for _ in range(2))
    states = [e.init(work, theta, range(4)) for e in (clean, poisoned)]
    states[1].accumulated += 1e6
    first = [e.estimate(work, theta, s) for e, s in zip((clean, poisoned), states)]
    assert flatten(first[1].grads).abs().max() > 1e3 * flatten(first[0].grads).abs().max()
    # Steps 5 to 9: the episode ends after step 7, and the final loss is the next episode's.
    for _ in range(3):
        a, b = (e.estimate(work, theta, s) for e, s in zip((clean, poisoned), states))
        assert all(torch.equal(a.grads[n], b.grads[n]) for n in theta)
        assert torch.equal(states[0].accumulated, states[1].accumulated)


@pytest.mark.parametrize("kind", EVOLUTION)
def test_resumed_from_its_state_it_gives_the_same_bits(kind):
    rule = rules.get("compact")
    theta = theta_of(rule)
    work = workload(rule, NoisyBowl(), truncation=5, horizon=7)
    estimator = estimators.get(kind, num_pairs=2)
    state = estimator.init(work, theta, range(8))
    estimator.estimate(work, theta, state)
    saved = estimator.state_dict(state)
    saved = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in saved.items()}
    wanted = [estimator.estimate(work, theta, state) for _ in range(3)]
    resumed = estimators.get(kind, num_pairs=2)
    state = resumed.load_state_dict(work, saved)
    for want in wanted:
        got = resumed.estimate(work, theta, state)
        assert got.meta_loss == want.meta_loss
        assert all(torch.equal(got.grads[n], want.grads[n]) for n in theta)


@pytest.mark.parametrize("kind", EVOLUTION)
def test_pairs_do_not_depend_on_how_particles_are_distributed(kind):
    rule = rules.get("adam", lr=0.1)
    theta = theta_of(rule)
    work = workload(rule, NoisyBowl(), truncation=5, horizon=7)
    together, _ = run(kind, work, theta, range(8), 3)
    first, _ = run(kind, work, theta, range(4), 3)
    second, _ = run(kind, work, theta, range(4, 8), 3)
    for all_, a, b in zip(together, first, second):
        mean = (flatten(a.grads) + flatten(b.grads)) / 2
        torch.testing.assert_close(flatten(all_.grads), mean, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", EVOLUTION)
def test_several_pairs_share_a_task_and_average(kind):
    rule = rules.get("sgd", lr=0.1)
    theta = theta_of(rule)
    work = workload(rule, NoisyBowl(), truncation=5, horizon=5, random_offsets=False)
    estimator = estimators.get(kind, num_pairs=3)
    state = estimator.init(work, theta, range(12))
    assert state.pairs == [(0, 0), (0, 1), (0, 2), (6, 0), (6, 1), (6, 2)]
    assert set(state.particles.seeds) == {work.plan.draw(0, 0)[0], work.plan.draw(6, 0)[0]}
    estimate = estimator.estimate(work, theta, state)
    slope = 0.0
    noise = perturbations(theta, 0.01, 0, [(i, j) for i in (0, 6) for j in range(3)], [0] * 6)[:, 0]
    for particle, epsilons in ((0, noise[:3]), (6, noise[3:])):
        for epsilon in epsilons:
            single = reference_difference(work, theta, particle, epsilon)
            slope += float(epsilon * single / (2 * 0.01**2)) / 6
    assert float(estimate.grads["log_lr"]) == pytest.approx(slope, rel=1e-9)


def reference_difference(work, theta, particle, epsilon):
    values = []
    for sign in (1, -1):
        arm = Arm(work, particle)
        values.append(sum(arm.advance({"log_lr": theta["log_lr"] + sign * epsilon}) for _ in range(work.truncation)))
    return (values[0] - values[1]) / work.truncation


@pytest.mark.parametrize("kind", EVOLUTION)
def test_sign_and_clip_of_the_difference(kind):
    rule = rules.get("sgd", lr=0.1)
    theta = theta_of(rule)
    work = workload(rule, Parabola(), truncation=4, horizon=4, random_offsets=False)
    (plain,), _ = run(kind, work, theta, [0, 1], 1)
    noise = float(perturbations(theta, 0.01, 0, [(0, 0)], [0])[0, 0])
    difference = float(plain.grads["log_lr"]) * 2 * 0.01**2 / noise
    (sign,), _ = run(kind, work, theta, [0, 1], 1, difference="sign", difference_scale=0.5)
    assert float(sign.grads["log_lr"]) == pytest.approx(math.copysign(0.5, difference) * noise / (2 * 0.01**2))
    bound = abs(difference) / 3
    (clip,), _ = run(kind, work, theta, [0, 1], 1, difference="clip", difference_scale=bound)
    assert float(clip.grads["log_lr"]) == pytest.approx(float(plain.grads["log_lr"]) / 3)
    (loose,), _ = run(kind, work, theta, [0, 1], 1, difference="clip", difference_scale=abs(difference) * 2)
    assert float(loose.grads["log_lr"]) == float(plain.grads["log_lr"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cliff(TaskFamily):
    """½x² until x falls below −1, and infinite beyond: too long a step of one arm fails."""

    name = "cliff"

    def sample_task(self, split, generator):
        return {"x0": 1 + torch.rand((), generator=generator)}

    def init_params(self, task, generator):
        return {"x": task["x0"].reshape(1)}

    def loss(self, params, task, batch):
        x = params["x"].sum()
        return torch.where(x > -1, 0.5 * x.square(), math.inf)


@pytest.mark.parametrize("kind", ["pes", "nres"])
def test_one_failing_arm_takes_its_partner_along(kind):
    rule = rules.get("sgd", lr=1.4)
    theta = theta_of(rule)
    work = workload(rule, Cliff(), truncation=2, horizon=6, random_offsets=False, run_seed=5)
    estimator = estimators.get(kind, sigma=0.5)
    state = estimator.init(work, theta, range(16))
    num_failed = 0
    for _ in range(6):
        estimate = estimator.estimate(work, theta, state)
        num_failed += estimate.num_invalid
        p, num = state.particles, len(state.pairs)
        for name in ("ids", "seeds", "episodes", "steps", "horizons"):
            assert getattr(p, name)[:num] == getattr(p, name)[num:], name
        assert math.isfinite(estimate.meta_loss) and torch.isfinite(estimate.grads["log_lr"])
        assert torch.isfinite(p.params).all() and torch.isfinite(p.losses).all()
        if state.accumulated is not None:
            at_start = torch.tensor([s == 0 for s in p.steps[:num]])
            assert (state.accumulated[at_start] == 0).all() and (state.accumulated[~at_start] != 0).all()
    assert 0 < num_failed < 6 * 16


@pytest.mark.parametrize("kind", EVOLUTION)
def test_failed_pairs_are_left_out(kind):
    """The meta-gradient is the mean over the pairs that stayed finite."""
    rule = rules.get("sgd", lr=1.4)
    theta = theta_of(rule)
    work = workload(rule, Cliff(), truncation=2, horizon=2, random_offsets=False, run_seed=5, normalization="none")
    singles = [run(kind, work, theta, [i, i + 1], 1, sigma=0.5)[0][0] for i in range(0, 16, 2)]
    kept = [s for s in singles if s.num_invalid == 0]
    assert 0 < len(kept) < len(singles)
    (together,), _ = run(kind, work, theta, range(16), 1, sigma=0.5)
    mean = sum(float(s.grads["log_lr"]) for s in kept) / len(kept)
    assert float(together.grads["log_lr"]) == pytest.approx(mean, rel=1e-9)
    assert together.num_invalid == 2 * (len(singles) - len(kept))
    assert together.meta_loss == pytest.approx(sum(s.meta_loss for s in kept) / len(kept))


@pytest.mark.parametrize("kind", EVOLUTION)
def test_frozen_theta_is_not_perturbed(kind):
    rule = rules.get("adam", lr=0.1)
    theta = theta_of(rule)
    frozen = ("log_lr", "log_one_minus_beta2")
    work = workload(rule, NoisyBowl(), truncation=5, horizon=7, frozen=frozen)
    (estimate, *_), state = run(kind, work, theta, range(4), 2)
    assert all(float(estimate.grads[n]) == 0 for n in frozen) and float(estimate.grads["log_one_minus_beta1"]) != 0
    noise = perturbations(theta, 0.5, 0, [(0, 0)], [0], frozen)
    free = perturbations(theta, 0.5, 0, [(0, 0)], [0])
    moved = unflatten(noise[0], theta)
    assert all(float(moved[n]) == 0 for n in frozen)
    assert moved["log_one_minus_beta1"] == unflatten(free[0], theta)["log_one_minus_beta1"]


def test_perturbations_are_normal_and_named():
    theta = {"b": torch.zeros(40, 50), "a": torch.zeros(7)}
    noise = perturbations(theta, 0.5, 3, [(0, 0), (0, 1), (1, 0), (0, 0)], [0, 0, 0, 1])
    assert noise.dtype == torch.float32 and noise.shape == (4, 2007)
    assert torch.allclose(noise.std(1), torch.tensor(0.5), atol=0.03) and noise.mean(1).abs().max() < 0.05
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.1
    assert torch.equal(noise[2:3], perturbations(theta, 0.5, 3, [(1, 0)], [0]))
    assert not torch.equal(noise[:1], perturbations(theta, 0.5, 4, [(0, 0)], [0]))
    swapped = perturbations({"a": theta["a"], "b": theta["b"]}, 0.5, 3, [(0, 0)], [0])
    assert torch.equal(noise[:1], swapped)
    back = flatten(unflatten(noise[0], theta))
    assert torch.equal(back, noise[0])


@pytest.mark.parametrize("kind", EVOLUTION)
def test_errors_name_the_argument_and_the_remedy(kind):
    with pytest.raises(ValueError, match=r"^sigma must be positive; got 0; 0\.01 is a usual value$"):
        estimators.get(kind, sigma=0)
    with pytest.raises(ValueError, match="sigma must be positive; got -1.0"):
        estimators.get(kind, sigma=-1.0)
    with pytest.raises(ValueError, match="sigma must be positive; got nan"):
        estimators.get(kind, sigma=math.nan)
    with pytest.raises(ValueError, match="num_pairs must be at least 1; got 0"):
        estimators.get(kind, num_pairs=0)
    with pytest.raises(ValueError, match="difference must be one of plain, sign, clip; got 'rank'"):
        estimators.get(kind, difference="rank")
    with pytest.raises(ValueError, match="difference_scale must be positive; got 0"):
        estimators.get(kind, difference_scale=0)
    with pytest.raises(ValueError, match=f"estimator '{kind}': .*unexpected keyword argument 'sgima'"):
        estimators.get(kind, sgima=1)
    work = workload(rules.get("sgd"), Parabola(), truncation=2, horizon=4)
    theta = theta_of(work.rule)
    with pytest.raises(ValueError, match=rf"num_particles must be a multiple of 2: {kind} runs .*; got 5; use 4 or 6$"):
        estimators.get(kind).init(work, theta, range(5))
    with pytest.raises(ValueError, match=r"num_particles must be a multiple of 6: .*num_pairs=3 .*; got 4; use 6$"):
        estimators.get(kind, num_pairs=3).init(work, theta, range(4))
    grouped = workload(work.rule, Parabola(), truncation=2, horizon=4, normalization="log_mean")
    with pytest.raises(ValueError, match=f"normalization 'log_mean' is of all particles together, and {kind} needs"):
        estimators.get(kind).init(grouped, theta, range(4))
    with pytest.raises(
        ValueError, match=r"truncation \(5\) must not exceed the longest horizon \(4\); shorten the truncation"
    ):
        workload(rules.get("sgd"), Parabola(), truncation=5, horizon=4)
